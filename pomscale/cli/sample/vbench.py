"""`pomscale sample --vbench`: the videos that VBench measures."""

from __future__ import annotations

import argparse
from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.base.imports import large_imports
from pomscale.cli.sample.clips import given
from pomscale.cli.sample.options import sampling_changes

# Options of `sample` that VBench fixes.
_FIXED_BY_VBENCH = ("classes", "prompt", "prompts", "size", "sheet", "start", "save_state", "state", "out", "npz")


def add_to_sample(sample: argparse.ArgumentParser) -> None:
    """Add the options of `sample` for VBench."""
    group = sample.add_argument_group("VBench", "Options to make the videos that VBench measures.")
    group.add_argument(
        "--vbench",
        type=Path,
        metavar="PROMPTS",
        help="Text file with a prompt per line, or VBench_full_info.json, whose videos are made unless they exist; "
        "--num-samples is the number of videos per prompt (default: 5; 25 for temporal flickering in "
        "VBench_full_info.json)",
    )
    group.add_argument("--out-dir", type=Path, metavar="DIR", help="Directory that receives the videos, in DIR/videos")
    group.add_argument(
        "--task",
        metavar="INDEX/COUNT",
        help="Number of this process among those that share one DIR (default: from SLURM or torchrun)",
    )


def refuse(arguments: argparse.Namespace) -> None:
    """Raise InputError for options of VBench without --vbench."""
    if arguments.out_dir is not None or arguments.task is not None:
        raise InputError("--out-dir, --task: only with --vbench")


def sample(arguments: argparse.Namespace) -> int:
    """Run `sample --vbench`."""
    from pomscale.base.task_index import this_task

    with large_imports():
        from pomscale.sampling.vbench import ModelSource, SuiteRequest, write_suite

    if arguments.out_dir is None:
        raise InputError("--vbench: name the folder for the videos with --out-dir")
    if options := given(arguments, _FIXED_BY_VBENCH):
        raise InputError(f"{options}: not with --vbench, which fixes prompts, form and names of its videos")
    task = this_task(arguments.task)
    source = ModelSource(
        arguments.model,
        arguments.weights,
        arguments.device,
        arguments.codec_path,
        arguments.text_path,
        guide=arguments.guide,
    )
    suite = SuiteRequest(
        arguments.vbench,
        num=arguments.num,
        seed=arguments.seed,
        num_frames=arguments.frames,
        changes=sampling_changes(arguments),
    )
    print(write_suite(source, suite, arguments.out_dir, task=(task.index, task.count)))
    return 0
