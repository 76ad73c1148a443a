"""`pomscale evaluate images`: FID and its kin, of pictures that a model generates now or that lie in files."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pomscale.base.console import say
from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_device, positive, seed
from pomscale.cli.evaluate import many
from pomscale.cli.sample import parse_classes
from pomscale.cli.sample.options import add_sampling_options, sampling_changes
from pomscale.config.hardware import Precision

if TYPE_CHECKING:
    from pomscale.evaluation.generated.evaluation import Evaluation
    from pomscale.evaluation.generated.opening import Opening
    from pomscale.evaluation.generated.request import Request

_DESCRIPTION = """Measure pictures against a reference: fid, sfid, inception_score, precision, recall, density,
coverage, kid, fdd, cmmd, clip_score.

SOURCE is a run, a checkpoint or an exported folder, from which pictures are drawn, an .npz file (arr_0 as ADM writes
it, or images), a folder of pictures, tars, or a dataset of shards. REFERENCE is the same, or a file of statistics:
ADM's or JiT's .npz, torch-fidelity's .pt, or one of --write-statistics.

Any number of processes may run the same command: ranks of torchrun, tasks of an array, or further shells. They share
the parts; the figures are the same to the last digit, and a killed command continues where it stopped."""


def add(evaluate_verbs: Any) -> None:
    """Add the verb to those of `evaluate`."""
    images = evaluate_verbs.add_parser(
        "images", help="Measure FID and its kin of generated pictures", description=_DESCRIPTION
    )
    images.add_argument("source", metavar="SOURCE", help="Pictures to measure, or a model that draws them")
    images.add_argument("--reference", metavar="REFERENCE", help="Pictures or statistics to compare with")
    images.add_argument(
        "--extractor",
        action="append",
        default=[],
        metavar="SPEC",
        help="Network whose features are compared; may be given several times: inception:FILE, torchscript:FILE, "
        "dinov2:FOLDER, clip:FOLDER, digits or pixels",
    )
    images.add_argument(
        "--metrics", metavar="NAME,..", help="Names of metrics (default: all that extractors and pictures can serve)"
    )
    _add_pictures(images)
    _add_model(images)
    _add_outputs(images)
    _add_work(images)
    add_sampling_options(images)
    many.add(images)
    images.set_defaults(run=_evaluate, leaves_threads=True)  # a wandb server that hangs must not hold the exit


def _add_pictures(images: argparse.ArgumentParser) -> None:
    group = images.add_argument_group("pictures")
    group.add_argument(
        "--num-samples",
        "--num",  # which torchrun refuses
        dest="num",
        type=positive,
        metavar="N",
        help="Number of pictures of SOURCE: N at equal distances in files (default: all), or drawn from a model "
        "(default: 50,000)",
    )
    group.add_argument(
        "--num-reference",
        type=positive,
        metavar="N",
        help="Number of pictures of REFERENCE, at equal distances (default: all)",
    )
    group.add_argument(
        "--fit",
        type=positive,
        metavar="SIDE",
        help="Cut pictures in files to their central square and resize it to this side, as `data encode` does",
    )
    group.add_argument(
        "--filter", choices=["lanczos", "area"], default="lanczos", help="Filter of --fit (default: %(default)s)"
    )
    group.add_argument(
        "--grey", choices=["repeat"], help="Give grey pictures to colour extractors with three equal channels"
    )
    group.add_argument(
        "--any-crop",
        action="store_true",
        help="Allow a reference that was cropped otherwise than the training pictures",
    )
    group.add_argument(
        "--max-skipped",
        type=int,
        default=0,
        metavar="N",
        help="Most pictures that are left out since they cannot be read (default: %(default)s)",
    )
    group.add_argument(
        "--splits", type=positive, default=10, metavar="N", help="Splits of the inception score (default: %(default)s)"
    )
    group.add_argument(
        "--splits-in-order",
        action="store_true",
        help="Split pictures in their order, as ADM does, and not shuffled, as torch-fidelity does",
    )
    group.add_argument(
        "--kid-subsets",
        type=_subsets,
        metavar="NUMBERxSIZE",
        help="Random subsets for KID, such as 100x1000 of torch-fidelity (default: all pictures at once)",
    )


def _add_model(images: argparse.ArgumentParser) -> None:
    group = images.add_argument_group("model", "Options for a SOURCE that is a model.")
    group.add_argument(
        "--weights",
        metavar="NAME",
        help="Set of weights: ema (an average), model (as last trained) or the name of an average (default: the "
        "average that stands for the model, or model where there is none)",
    )
    group.add_argument(
        "--seed", type=seed, default=0, help="Seed of the first picture; number i has it plus i (default: %(default)s)"
    )
    group.add_argument(
        "--labels",
        choices=["balanced", "random", "none"],
        default="balanced",
        help="Class of picture i: number i modulo the number of classes, drawn with its seed, or no class (default: "
        "%(default)s)",
    )
    group.add_argument("--classes", help="Class ids such as 0,5,7-9 (default: all)")
    group.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="Precision of the network (default: %(default)s)",
    )
    group.add_argument("--compile", action="store_true", help="Compile the network, which takes a minute")
    group.add_argument("--codec-path", metavar="DIR", help="Directory with the codec's weights, if they have moved")


def _add_outputs(images: argparse.ArgumentParser) -> None:
    group = images.add_argument_group("results")
    group.add_argument("--json", type=Path, metavar="FILE", help="File that receives figures and settings")
    group.add_argument(
        "--write-npz", type=Path, metavar="FILE", help="File that receives the pictures as arr_0, as ADM's"
    )
    group.add_argument("--write-tars", type=Path, metavar="DIR", help="Directory that receives them as PNGs in tars")
    group.add_argument(
        "--write-statistics",
        type=Path,
        metavar="FILE",
        help="File that receives mean and covariance of the first extractor's features, to be a REFERENCE",
    )
    group.add_argument(
        "--name", default="images", help="Name in the run's record: evaluation/NAME/fid (default: %(default)s)"
    )
    group.add_argument("--no-record", action="store_true", help="Leave the run's record as it is")


def _add_work(images: argparse.ArgumentParser) -> None:
    group = images.add_argument_group("work")
    group.add_argument(
        "--batch",
        type=positive,
        default=64,
        metavar="N",
        help="Pictures at once; it may change last digits (default: %(default)s)",
    )
    group.add_argument(
        "--part",
        type=positive,
        metavar="N",
        help="Pictures of a part, which one process measures at once (default: 1,000, or a hundredth of a larger set)",
    )
    group.add_argument(
        "--work", type=Path, metavar="DIR", help="Directory that processes share (default: evaluations/NAME-HASH)"
    )
    group.add_argument(
        "--num-workers", type=positive, default=2, metavar="N", help="Threads that decode files (default: %(default)s)"
    )
    group.add_argument(
        "--task",
        metavar="INDEX/COUNT",
        help="Number of this process among those that share the work (default: from SLURM or torchrun)",
    )
    group.add_argument("--dry-run", action="store_true", help="Say what would be measured, and what is missing")
    add_device(images)


def _subsets(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not int(match[1]) or int(match[2]) < 2:
        raise argparse.ArgumentTypeError(f"must be NUMBERxSIZE such as 100x1000, got {text}")
    return int(match[1]), int(match[2])


def _evaluate(arguments: argparse.Namespace) -> int:
    from pomscale.base.files import check_can_be_written, write_text
    from pomscale.base.task_index import this_task

    if many.is_asked(arguments):
        return many.run(arguments)

    with large_imports():
        from pomscale.evaluation.generated.evaluate import evaluate
        from pomscale.evaluation.generated.evaluation import Evaluation

    task = this_task(arguments.task)
    if arguments.json is not None:
        check_can_be_written(arguments.json)
    evaluation = Evaluation(_request(arguments))
    if arguments.dry_run:
        print(evaluation.describe())
        return 0
    outcome = evaluate(evaluation, task, lambda result: _record(arguments, evaluation, result))
    if outcome.result is None:
        print(
            f"{outcome.num_made:,} of {outcome.num_parts:,} parts measured; {outcome.num_elsewhere:,} are not done: "
            f"other processes are at work on them, and the last one will give the figures; if none is, run the same "
            f"command again"
        )
        return 0
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(outcome.result, indent=1))
    print(_table(outcome.result))
    return 0


def _request(arguments: argparse.Namespace) -> Request:
    from pomscale.evaluation.generated.figures import Conventions
    from pomscale.evaluation.generated.request import Outputs, Request

    return Request(
        arguments.source,
        arguments.reference,
        tuple(arguments.extractor),
        metrics=None if arguments.metrics is None else tuple(dict.fromkeys(arguments.metrics.split(","))),
        opening=_opening(arguments),
        num_reference=arguments.num_reference,
        batch=arguments.batch,
        part=arguments.part,
        repeats_grey=arguments.grey == "repeat",
        any_crop=arguments.any_crop,
        max_skipped=arguments.max_skipped,
        conventions=Conventions(arguments.splits, not arguments.splits_in_order, arguments.kid_subsets),
        outputs=Outputs(arguments.write_npz, arguments.write_tars, arguments.write_statistics),
        work=arguments.work,
    )


def _opening(arguments: argparse.Namespace) -> Opening:
    from pomscale.config.encode import ImageTransformConfig
    from pomscale.evaluation.generated.generated_pictures import Drawing, ModelSource
    from pomscale.evaluation.generated.opening import Opening
    from pomscale.evaluation.generated.picture_files import Fit
    from pomscale.sources.item_fields import MAX_CLASSES

    fit = None if arguments.fit is None else Fit(ImageTransformConfig(size=arguments.fit, filter=arguments.filter))
    every = arguments.classes in (None, "all")
    return Opening(
        num=arguments.num,
        fit=fit,
        num_threads=arguments.num_workers,
        model=ModelSource(
            Path(),
            weights=arguments.weights,
            device=arguments.device,
            codec_path=arguments.codec_path,
            precision=arguments.precision,
            compile=arguments.compile,
            guide=arguments.guide,
        ),
        drawing=Drawing(
            seed=arguments.seed,
            labels=arguments.labels,
            classes=() if every else tuple(parse_classes(arguments.classes, MAX_CLASSES)),
            changes=sampling_changes(arguments),
        ),
    )


def _record(arguments: argparse.Namespace, evaluation: Evaluation, result: dict[str, Any]) -> None:
    """Add the figures to the record of the run whose checkpoint was measured, and to its wandb run."""
    from pomscale.evaluation.generated.generated_pictures import GeneratedPictures
    from pomscale.monitoring.wandb.sink import deliver_without_training
    from pomscale.runs.evaluation_log import record
    from pomscale.runs.metric_names import evaluation_name

    if arguments.no_record or not isinstance(evaluation.source, GeneratedPictures) or evaluation.source.run is None:
        return
    run, samples = evaluation.source.run
    figures = {evaluation_name(arguments.name, name): value for name, value in result["metrics"].items()}
    if figures:
        record(run, samples, figures, settings=result["settings"])
        deliver_without_training(run)
        say(f"recorded at {samples:,} samples of {run}")


def _table(result: dict[str, Any]) -> str:
    """Return the figures for people, a line each, and what belongs to them."""
    lines = [f"{name:18}{value:14.6g}" for name, value in result["metrics"].items()]
    if result["left_out"]:
        lines.append(f"(left out: {', '.join(result['left_out'])}; --dry-run says why)")
    lines += [f"({text})" for text in result["warnings"]]
    for side, facts in result["pictures"].items():
        failed = f", {facts['failures']:,} could not be read" if facts["failures"] else ""
        lines.append(f"{side}: {facts['count']:,} pictures{failed}")
    return "\n".join(lines)
