"""`pomscale sample --vbench` and `pomscale evaluate vbench`: videos for VBench, and what it has found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.imports import large_imports
from pomscale.cli.arguments import positive
from pomscale.cli.clips import given

_NAME = "vbench"

# Options of `sample` that VBench has answers of its own for.
_ANSWERED = ("classes", "prompt", "prompts", "size", "sheet", "start", "save_state", "state", "out", "npz")


def add_to_sample(sample: argparse.ArgumentParser) -> None:
    """The options of `sample` that are of VBench."""
    sample.add_argument(
        "--vbench",
        type=Path,
        metavar="PROMPTS",
        help="videos for VBench, of a text file with a prompt per line or VBench_full_info.json; goes on where it "
        "stopped. --num: videos per prompt (default: 5, of VBench_full_info.json 25 for temporal flickering)",
    )
    sample.add_argument("--out-dir", type=Path, metavar="DIR", help="of the videos for VBench: DIR/videos")
    sample.add_argument("--task", help="INDEX/COUNT, one of several on one DIR (default: from SLURM or torchrun)")


def refuse(arguments: argparse.Namespace) -> None:
    """InputError for options of VBench without it."""
    if arguments.out_dir is not None or arguments.task is not None:
        raise InputError("--out-dir, --task: only with --vbench")


def sample(arguments: argparse.Namespace) -> int:
    """`sample --vbench`."""
    from data_pipelines.encode.tasks import this_task

    with large_imports():
        from pomscale.sampling.vbench import film_suite

    if arguments.out_dir is None:
        raise InputError("--vbench: name the folder for the videos with --out-dir")
    if options := given(arguments, _ANSWERED):
        raise InputError(f"{options}: not with --vbench, whose videos have prompts, form and names of their own")
    task = this_task(arguments.task)
    report = film_suite(
        arguments.model,
        arguments.vbench,
        arguments.out_dir,
        num=arguments.num,
        seed=arguments.seed,
        num_frames=arguments.frames,
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=arguments.guidance,
        weights=arguments.weights,
        device=arguments.device,
        codec_path=arguments.codec_path,
        text_path=arguments.text_path,
        task=(task.index, task.count),
    )
    print(report)
    return 0


def add(evaluate_verbs: Any) -> None:
    """The verb, to those of `evaluate`."""
    vbench = evaluate_verbs.add_parser("vbench", help="VBench's results into a run's record and wandb, with its scores")
    vbench.add_argument("run_folder", type=Path, metavar="RUN")
    vbench.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json", help="VBench's *_eval_results.json")
    of = vbench.add_mutually_exclusive_group(required=True)
    of.add_argument("--videos", type=Path, metavar="DIR", help="--out-dir of `sample --vbench`: tells the samples")
    of.add_argument("--samples", type=positive, help="that the checkpoint had seen")
    vbench.set_defaults(run=_evaluate, leaves_threads=True)  # a wandb server that hangs must not hold the exit


def _evaluate(arguments: argparse.Namespace) -> int:
    from pomscale.evaluation.vbench import read_results
    from pomscale.monitoring.wandb.sink import deliver_without_training
    from pomscale.runs.evaluation_log import record
    from pomscale.runs.metric_names import evaluation_name

    run_folder = arguments.run_folder
    found = read_results(arguments.results)
    samples = arguments.samples or _samples_of(arguments.videos, run_folder)
    print(found.table())
    record(run_folder, samples, {evaluation_name(_NAME, figure): value for figure, value in found.figures.items()})
    deliver_without_training(run_folder)
    print(f"recorded at {samples:,} samples of {run_folder}")
    return 0


def _samples_of(videos: Path, run_folder: Path) -> int:
    """That the model of the videos had seen. InputError if they are not of this run."""
    from pomscale.config.load import load_train_recipe
    from pomscale.runs.layout import RECIPE_FILE
    from pomscale.sampling.vbench_suite import MANIFEST, read_manifest

    model = read_manifest(videos)["model"]
    if "samples" not in model:
        raise InputError(f"{videos / MANIFEST}: does not tell how many samples the model had seen; give --samples")
    name = load_train_recipe(run_folder / RECIPE_FILE).name
    if model.get("run", name) != name:
        raise InputError(f"{videos / MANIFEST}: videos of run {model['run']!r}, and {run_folder} is run {name!r}")
    return int(model["samples"])
