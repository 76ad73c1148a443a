"""`pomscale sample`: pictures and clips from a trained model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_device, add_model, positive, seed
from pomscale.cli.sample import clips, vbench
from pomscale.cli.sample.options import add_sampling_options, load_guide, sampling_changes


def add(verbs: Any) -> None:
    """Add the verb."""
    sample = verbs.add_parser("sample", help="Sample pictures or clips from a trained model")
    add_model(sample)
    sample.add_argument(
        "--classes", help="Class ids such as 0,5,7-9, or all (default: those of the grid in the model's recipe)"
    )
    sample.add_argument(
        "--num-samples",
        "--num",  # which torchrun refuses
        dest="num",
        type=positive,
        metavar="N",
        help="Number of pictures per class or prompt (default: 8), or of clips per prompt (default: as the model's "
        "recipe says)",
    )
    _add_options(sample)
    sample.add_argument(
        "--batch",
        type=positive,
        default=64,
        help="Most pictures or clips made at once, which does not change them; clips that are made frame by frame are "
        "all made together (default: %(default)s)",
    )
    add_device(sample)
    sample.add_argument(
        "--codec-path", metavar="DIR", help="Directory with the codec's weights on this machine, if they have moved"
    )
    sample.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="PNG that receives a grid of pictures, one row per class or prompt (default: grid.png); for clips, an mp4 "
        "that receives all of them, one row per prompt (default: clips.mp4), or a directory that receives one file per "
        "clip",
    )
    sample.add_argument(
        "--npz",
        type=Path,
        metavar="FILE",
        help="File that also receives the pictures (uint8 n h w c) or clips (uint8 n f h w c), classes or prompts, and "
        "seeds",
    )
    clips.add_to_sample(sample)
    vbench.add_to_sample(sample)
    sample.set_defaults(run=_sample)


def _add_options(sample: argparse.ArgumentParser) -> None:
    add_sampling_options(sample)
    sample.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="Seed of the first picture or clip; number i has this seed plus i (default: %(default)s)",
    )


def _sample(arguments: argparse.Namespace) -> int:
    if arguments.vbench is not None:
        return vbench.sample(arguments)
    vbench.refuse(arguments)

    with large_imports():
        from pomscale.diffusion.options import SamplingOptions
        from pomscale.pretrained.load import PretrainedVDiPoM, load_pretrained
        from pomscale.sampling.pictures import PictureRequest, write_pictures

    model = load_pretrained(
        arguments.model,
        weights=arguments.weights,
        device=arguments.device,
        codec_path=arguments.codec_path,
        text_path=arguments.text_path,
    )
    options = SamplingOptions.from_recipe(model.card.sampling, **sampling_changes(arguments))
    guide = load_guide(arguments)
    if isinstance(model, PretrainedVDiPoM):
        if guide is not None and not isinstance(guide, PretrainedVDiPoM):
            raise InputError(f"--guide {arguments.guide}: this model makes pictures, and {arguments.model} makes clips")
        return clips.sample(arguments, model, options, guide)
    request = PictureRequest(options, arguments.num or 8, arguments.seed, arguments.batch, guide)
    rows: list[int] | list[str] | None
    if model.config.num_classes is None:
        clips.refuse(arguments, clips.OF_CLIPS, f"{arguments.model}, which makes pictures")
        if arguments.classes is not None:
            raise InputError(
                f"--classes: not for {arguments.model}, which makes pictures of a text: describe them with --prompt"
            )
        size = None if arguments.size is None else clips.parse_size(arguments.size)
        rows, request = clips.given_prompts(arguments) or None, replace(request, size=size)
    else:
        clips.refuse(arguments, clips.OF_TEXTS, f"{arguments.model}, which makes pictures of classes")
        rows = parse_classes(arguments.classes, model.config.num_classes) if arguments.classes else None
    write_pictures(
        model,
        rows,
        request,
        out=arguments.out or Path("grid.png"),
        npz=arguments.npz,
    )
    return 0


def parse_classes(text: str, num_classes: int) -> list[int]:
    """Parse "all" or a list such as "0,5,7-9". Raise InputError for other text and for classes that do not exist."""
    if text == "all":
        return list(range(num_classes))
    classes: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise InputError(f"--classes {text!r}: {part!r} is neither a class id nor a range such as 0-9")
        classes += range(int(first), int(last if dash else first) + 1)
    if not classes or max(classes) >= num_classes:
        raise InputError(f"--classes {text!r}: the model has classes 0..{num_classes - 1}")
    return classes
