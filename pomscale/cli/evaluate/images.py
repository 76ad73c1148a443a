"""`pomscale evaluate images`: FID and its kin, FVD of clips; a model generates them now, or they lie in files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomscale.base.console import say
from pomscale.base.errors import InputError
from pomscale.base.imports import large_imports
from pomscale.cli.evaluate import image_options, many
from pomscale.cli.sample import parse_classes
from pomscale.cli.sample.clips import given_prompts, parse_size
from pomscale.cli.sample.options import OPTIONS, add_sampling_options, sampling_changes

if TYPE_CHECKING:
    from pomscale.evaluation.generated.evaluation import Evaluation
    from pomscale.evaluation.generated.opening import Opening
    from pomscale.evaluation.generated.request import Request

_OF_MODELS = ("weights", "seed", "precision", "compile", "guide", *OPTIONS)
"""Options that only a model obeys."""

_DESCRIPTION = """Measure pictures against a reference: fid, sfid, inception_score, precision, recall, density,
coverage, kid, fdd, cmmd, clip_score; or clips: fvd, clip_score.

SOURCE is a run, a checkpoint or an exported folder, from which pictures or clips are drawn, an .npz file (arr_0 as ADM
writes it, or images), a folder of pictures or of video files, tars, or a dataset of shards. REFERENCE is the same, or
a file of statistics: ADM's or JiT's .npz, torch-fidelity's .pt, or one of --write-statistics.

Any number of processes may run the same command: ranks of torchrun, tasks of an array, or further shells. They share
the parts; the figures are the same to the last digit, and a killed command continues where it stopped."""


def add(evaluate_verbs: Any) -> None:
    """Add the verb to those of `evaluate`."""
    images = evaluate_verbs.add_parser(
        "images", help="Measure FID and its kin of generated pictures, FVD of clips", description=_DESCRIPTION
    )
    images.add_argument("source", metavar="SOURCE", help="Pictures or clips to measure, or a model that draws them")
    images.add_argument("--reference", metavar="REFERENCE", help="Pictures, clips or statistics to compare with")
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
    image_options.add_pictures(images)
    image_options.add_clips(images)
    image_options.add_model(images)
    image_options.add_texts(images)
    image_options.add_outputs(images)
    image_options.add_work(images)
    add_sampling_options(images)
    many.add(images)
    images.set_defaults(check=_check, check_drawing=_check_drawing)
    images.set_defaults(run=_evaluate, leaves_threads=True)  # a wandb server that hangs must not hold the exit


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
    _check_used(arguments, evaluation)
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
    if outcome.shows:
        print(_table(outcome.result, evaluation.kind))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise InputError if this evaluation could not begin. No picture is drawn, and no GPU is needed.

    Of a run that has no checkpoint yet all but the model is checked.
    """
    from pomscale.runs.checkpoint_folder import complete_checkpoints
    from pomscale.runs.layout import CHECKPOINTS_FOLDER, RECIPE_FILE

    with large_imports():
        from pomscale.evaluation.generated.evaluation import Evaluation, check_without_source

    here = argparse.Namespace(**{**vars(arguments), "device": "cpu", "compile": False})
    run = Path(arguments.source)
    if (run / RECIPE_FILE).is_file() and not complete_checkpoints(run / CHECKPOINTS_FOLDER):
        check_without_source(_request(here))
    else:
        _check_used(here, Evaluation(_request(here)))


def _check_drawing(arguments: argparse.Namespace) -> None:
    """Raise InputError if the model of SOURCE has no such weights or options of sampling. No weights are read."""
    with large_imports():
        from pomscale.diffusion.options import SamplingOptions
        from pomscale.pretrained.weights import open_weights
        from pomscale.sampling.guides import check_guidance

    weights = open_weights(Path(arguments.source))
    if arguments.weights is not None:
        weights.resolve(arguments.weights)
    options = SamplingOptions.from_recipe(weights.card.sampling, **sampling_changes(arguments))
    options = options.resolved(weights.card.diffusion.objective)
    if arguments.guide is not None:
        check_guidance(options)


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
    from pomscale.evaluation.generated.opening import Opening
    from pomscale.evaluation.generated.picture_files import Fit
    from pomscale.evaluation.generated.picture_sets import Frames
    from pomscale.evaluation.generated.trained_model import Drawing, ModelSource
    from pomscale.sources.item_fields import MAX_CLASSES

    every = arguments.classes in (None, "all")
    return Opening(
        num=arguments.num,
        fit=None if arguments.fit is None else Fit(_fit_size(arguments.fit), arguments.filter),
        num_threads=arguments.num_workers,
        model=ModelSource(
            Path(),
            weights=arguments.weights,
            device=arguments.device,
            codec_path=arguments.codec_path,
            text_path=arguments.text_path,
            precision=arguments.precision,
            compile=arguments.compile,
            guide=arguments.guide,
        ),
        drawing=Drawing(
            seed=arguments.seed,
            labels=arguments.labels,
            classes=() if every else tuple(parse_classes(arguments.classes, MAX_CLASSES)),
            changes=sampling_changes(arguments),
            prompts=tuple(given_prompts(arguments)),
            num_frames=arguments.frames,
            size=None if arguments.size is None else parse_size(arguments.size),
        ),
        frames=Frames(arguments.measured_frames, arguments.frame_stride),
        fps=arguments.fps,
    )


def _fit_size(text: str) -> tuple[int, int]:
    """Return (height, width) of --fit. InputError for a text that is neither a side nor HEIGHTxWIDTH."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise InputError(f"--fit {text!r}: give a side in pixels, such as 256, or height and width, such as 240x384")
    return int(sides[0]), int(sides[-1])


def _check_used(arguments: argparse.Namespace, evaluation: Evaluation) -> None:
    """Raise InputError if an option is given for nothing: the figures would not be those that were asked for."""
    from pomscale.evaluation.generated.clip_files import ClipFiles
    from pomscale.evaluation.generated.generated_clips import Generated, GeneratedClips
    from pomscale.evaluation.generated.generated_pictures import PicturesOfClasses, PicturesOfTexts
    from pomscale.evaluation.generated.picture_files import PictureFiles

    if evaluation.kind == "pictures":
        _refuse(arguments, ("measured_frames", "frame_stride"), "clips are measured")
    sides = (evaluation.source, evaluation.reference.pictures)
    uses: list[tuple[tuple[str, ...], Any, str]] = [
        (_OF_MODELS, Generated, "a model draws pictures or clips"),
        (("labels", "classes"), PicturesOfClasses, "a model draws pictures of classes"),
        (("prompt", "prompts", "size", "text_path"), PicturesOfTexts | GeneratedClips, "a model draws by prompts"),
        (("frames",), GeneratedClips, "a model draws clips"),
        (("fit", "filter"), PictureFiles | ClipFiles, "pictures or clips lie in files or tars"),
        (("fps",), ClipFiles, "clips lie in files or tars"),
    ]
    for options, kind, what in uses:
        if not any(isinstance(side, kind) for side in sides):
            _refuse(arguments, options, what)


def _refuse(arguments: argparse.Namespace, options: Sequence[str], what: str) -> None:
    """Raise InputError if one of the options was given, that only count where `what` is so."""
    defaults = arguments.parse([arguments.source])
    given = [name for name in options if getattr(arguments, name) != getattr(defaults, name)]
    if given:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{shown}: only where {what}, and neither SOURCE nor REFERENCE is such; leave it out")


def _record(arguments: argparse.Namespace, evaluation: Evaluation, result: dict[str, Any]) -> None:
    """Add the figures to the record of the run whose checkpoint was measured, and to its wandb run, unless it is there.

    A result may be found that an earlier command measured with --no-record, or recorded under another --name.
    """
    from pomscale.evaluation.generated.generated_clips import Generated
    from pomscale.monitoring.wandb.sink import deliver_without_training
    from pomscale.runs.evaluation_log import read_evaluations, record
    from pomscale.runs.metric_names import evaluation_name, plain_figure

    if arguments.no_record or not isinstance(evaluation.source, Generated):
        return
    if evaluation.source.model.run is None:
        return
    run, samples = evaluation.source.model.run
    figures = {evaluation_name(arguments.name, name): value for name, value in result["metrics"].items()}
    is_there = any(
        one.samples == samples
        and one.settings == result["settings"]
        and {*map(plain_figure, one.metrics)} == {*figures}
        for one in read_evaluations(run)
    )
    if figures and not is_there:
        record(run, samples, figures, settings=result["settings"])
        deliver_without_training(run)
        say(f"recorded at {samples:,} samples of {run}")


def _table(result: dict[str, Any], kind: str) -> str:
    """Return the figures for people, a line each, and what belongs to them."""
    from pomscale.evaluation.generated.metric_choice import reasons

    lines = [f"{name:18}{value:14.6g}" for name, value in result["metrics"].items()]
    lines += [f"(left out: {reason})" for reason in reasons(result["left_out"])]
    lines += [f"({text})" for text in result["warnings"]]
    for side, facts in result["pictures"].items():
        failed = f", {facts['failures']:,} could not be read" if facts["failures"] else ""
        lines.append(f"{side}: {facts['count']:,} {kind}{failed}")
    return "\n".join(lines)
