"""Options of `pomscale evaluate images`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_args

from pomscale.cli.arguments import add_device, finite, positive, seed
from pomscale.cli.sample.clips import add_frames, add_prompts
from pomscale.config.hardware import Precision


def add_pictures(images: argparse.ArgumentParser) -> None:
    """Add the options of the pictures and of conventions."""
    group = images.add_argument_group("pictures")
    group.add_argument(
        "--num-samples",
        "--num",  # which torchrun refuses
        dest="num",
        type=positive,
        metavar="N",
        help="Number of pictures or clips of SOURCE: N at equal distances in files (default: all), or drawn from a "
        "model (default: 50,000 pictures, 2,048 clips)",
    )
    group.add_argument(
        "--num-reference",
        type=positive,
        metavar="N",
        help="Number of pictures or clips of REFERENCE, at equal distances (default: all)",
    )
    group.add_argument(
        "--fit",
        metavar="SIDE|HxW",
        help="Resize pictures and clips in files so that they just cover a square of this side, or this height and "
        "width, and cut out their centre, as `data encode` does",
    )
    group.add_argument(
        "--filter", choices=["lanczos", "area", "adm"], help="Filter of --fit (default: lanczos, for clips area)"
    )
    group.add_argument(
        "--grey", choices=["repeat"], help="Give grey pictures and clips to colour extractors with three equal channels"
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
        help="Most pictures or clips that are left out since they cannot be read (default: %(default)s)",
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


def add_clips(images: argparse.ArgumentParser) -> None:
    """Add the options of clips."""
    group = images.add_argument_group("clips", "Options for clips, in files or drawn from a model of clips.")
    group.add_argument(
        "--measured-frames",
        type=positive,
        default=16,
        metavar="N",
        help="Frames of each clip that are measured, from the first one on; shorter clips are refused (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--frame-stride",
        type=positive,
        default=1,
        metavar="S",
        help="Distance of these frames: every S-th is measured (default: %(default)s)",
    )
    group.add_argument(
        "--fps",
        type=_rate,
        metavar="F",
        help="Frames per second to which clips in files are resampled first, as `data encode` does (default: their "
        "own, which must be one)",
    )
    add_frames(group)


def add_texts(images: argparse.ArgumentParser) -> None:
    """Add the options of a SOURCE that is a model of texts."""
    add_prompts(images.add_argument_group("texts", "Options for a SOURCE that is a model conditioned on texts."))


def add_model(images: argparse.ArgumentParser) -> None:
    """Add the options of a SOURCE that is a model."""
    group = images.add_argument_group("model", "Options for a SOURCE that is a model.")
    group.add_argument(
        "--weights",
        metavar="NAME",
        help="Set of weights: ema (an average), model (as last trained) or the name of an average (default: the "
        "average that stands for the model, or model where there is none)",
    )
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="Seed of the first picture or clip; number i has it plus i (default: %(default)s)",
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


def add_outputs(images: argparse.ArgumentParser) -> None:
    """Add the options of results."""
    group = images.add_argument_group("results")
    group.add_argument("--json", type=Path, metavar="FILE", help="File that receives figures and settings")
    group.add_argument("--write-npz", type=Path, metavar="FILE", help="File that receives pictures as arr_0, as ADM's")
    group.add_argument(
        "--write-tars",
        type=Path,
        metavar="DIR",
        help="Directory that receives them as PNGs in tars, or the measured frames of clips as mp4 with their captions",
    )
    group.add_argument(
        "--write-statistics",
        type=Path,
        metavar="FILE",
        help="File that receives mean and covariance of the first extractor's features, to be a REFERENCE",
    )
    group.add_argument(
        "--name",
        type=_name,
        default="images",
        help="Name in the run's record: evaluation/NAME/fid (default: %(default)s)",
    )
    group.add_argument("--no-record", action="store_true", help="Leave the run's record as it is")


def add_work(images: argparse.ArgumentParser) -> None:
    """Add the options of the work and of its processes."""
    group = images.add_argument_group("work")
    group.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="Pictures or clips at once; it may change last digits (default: 64 pictures, 8 clips)",
    )
    group.add_argument(
        "--part",
        type=positive,
        metavar="N",
        help="Pictures or clips of a part, which one process measures at once (default: 1,000 pictures or 64 clips, or "
        "a hundredth of a larger set)",
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


def _name(text: str) -> str:
    from pomscale.runs.metric_names import OTHER_SETTINGS

    if not re.fullmatch(rf"[^/\s{OTHER_SETTINGS}]+", text):
        raise argparse.ArgumentTypeError(f"must have no /, {OTHER_SETTINGS} or space, got {text!r}")
    return text


def _rate(text: str) -> float:
    rate = finite(text)
    if rate <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return rate


def _subsets(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not int(match[1]) or int(match[2]) < 2:
        raise argparse.ArgumentTypeError(f"must be NUMBERxSIZE such as 100x1000, got {text}")
    return int(match[1]), int(match[2])
