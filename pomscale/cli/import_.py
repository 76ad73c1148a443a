"""`pomscale import`: weights of other code as a folder that `load_pretrained` reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_exported, finite, positive

# Options that only one of the codes has.
_HOMM = ("degree", "heads", "latent_size", "objective", "codec_path")
_JIT = ("in_context_start", "noise_scale")


def add(verbs: Any) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "import", help="Convert a checkpoint of davidpicard/HoMM, davidpicard/JiTpp or LTH14/JiT for load_pretrained"
    )
    verb.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="Checkpoint of a ClassConditionalDiH, a ClassConditionalDiT or a JiT, by Lightning or the original JiT",
    )
    add_exported(verb, with_dtype=False)
    homm, jit = verb.add_argument_group("HoMM"), verb.add_argument_group("JiT")
    homm.add_argument("--degree", type=positive, help="Degree of DiH's polynomial (default: 2)")
    homm.add_argument(
        "--heads",
        type=positive,
        help="Number of DiT's attention heads (default: as in the published model of its size)",
    )
    homm.add_argument("--latent-size", type=positive, help="Side of the latents (default: 32)")
    homm.add_argument(
        "--objective",
        choices=["eps", "flow"],
        help="Objective of the training: eps, or flow for their mode fm (default: eps)",
    )
    homm.add_argument(
        "--codec-path",
        metavar="DIR",
        help="Directory with the weights of the VAE, whose identity is then recorded (default: not recorded)",
    )
    jit.add_argument(
        "--in-context-start",
        type=int,
        metavar="BLOCK",
        help="Block, from 0, that first reads the tokens of the class (default: that of the preset of these sizes)",
    )
    jit.add_argument(
        "--noise-scale",
        type=finite,
        metavar="STD",
        help="Standard deviation of the noise of the training (default: 1 for 256 pixels, 2 for 512)",
    )
    verb.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> int:
    with large_imports():
        from pomscale.pretrained.homm import import_homm
        from pomscale.pretrained.jit import import_jit, is_jit

    found, own, others = (import_jit, _JIT, _HOMM) if is_jit(arguments.file) else (import_homm, _HOMM, _JIT)
    for name in others:
        if getattr(arguments, name) is not None:
            code = "HoMM" if own is _JIT else "JiT"
            option = name.replace("_", "-")
            raise InputError(f"--{option}: is for checkpoints of {code}, and {arguments.file} is none")
    options = {name: value for name in own if (value := getattr(arguments, name)) is not None}
    print(found(arguments.file, arguments.out, **options))
    return 0
