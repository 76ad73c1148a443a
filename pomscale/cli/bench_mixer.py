"""`pomscale bench ops` and `pomscale bench gpu-acceptance`: measure the mixer."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomscale.cli.arguments import add_device, finite, positive

if TYPE_CHECKING:
    from pomscale.benchmarks.report import BenchReport

_FORMS = ("product", "coefficients", "heads", "rope")
_MASKS = ("none", "causal", "block-causal", "padding", "segments")
_DTYPES = ("fp64", "fp32", "bf16")


def add_ops(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb `ops`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "ops",
        help="Measure the mixer beside bare matrix products, the authors' layers, attention and a compiled plain form",
        description="Measure the mixer over tokens, sizes, forms and masks, beside bare matrix products, the authors' "
        "layers, attention and a compiled plain form. The first value of a list is the base, and each further value "
        "replaces it alone. Every contender is compared with the oracle first, outputs and gradients; one that is "
        "wrong is reported, not measured, and the exit code is 1. Ctrl-C keeps what is measured.",
    )
    _add_list(parser, "--num-tokens", positive, [4**power for power in range(3, 9)] + [131072], "Numbers of tokens N")
    _add_list(parser, "--dim", positive, None, "Widths of the tokens (default: 256 512, or 1152 on a GPU)")
    _add_list(parser, "--form", str, list(_FORMS), "Forms", _FORMS)
    _add_list(parser, "--degree", positive, [2], "Degrees k")
    _add_list(parser, "--expand", positive, [2], "Widths of one monomial over that of the tokens")
    _add_list(parser, "--mask", str, list(_MASKS), "Masks", _MASKS)
    _add_list(parser, "--batch", positive, [1], "Samples")
    _add_list(parser, "--dtype", str, None, "Dtypes: fp64, fp32 or bf16 (default: fp32, or bf16 on a GPU)", _DTYPES)
    _add_number(parser, "--heads", 16, "Number of selection heads of the forms heads and rope")
    parser.add_argument("--figures", action="store_true", help="Measure the figures with targets, in place of a sweep")
    parser.add_argument("--no-compile", action="store_true", help="Leave out what torch.compile makes")
    _add_number(parser, "--num-turns", 9, "Number of turns of each contender, the least time of which counts")
    parser.add_argument(
        "--seconds", type=finite, default=300.0, help="Budget of a sweep in seconds (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="PNG that receives the curves of a sweep")
    add_device(parser)
    _add_official(parser)
    parser.set_defaults(measure=_ops)
    return parser


def add_gpu_acceptance(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb `gpu-acceptance`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "gpu-acceptance",
        help="Hold the mixer on this GPU to its targets, a line per target",
        description="Hold the mixer on this GPU, meant to be an H200, to its targets: a line per target, passed or "
        "failed. The exit code is 1 if a line fails, and 2 without a GPU.",
    )
    parser.add_argument(
        "--seconds", type=finite, default=480.0, help="Seconds after which no line begins (default: %(default)s)"
    )
    _add_official(parser)
    parser.set_defaults(measure=_gpu_acceptance)
    return parser


def _add_official(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--official",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="Checkouts of davidpicard/pom and davidpicard/HoMM, whose layers are measured, too (default: none)",
    )


def _add_list(
    parser: argparse.ArgumentParser,
    option: str,
    kind: Callable[[str], Any],
    default: list[Any] | None,
    what: str,
    choices: Sequence[str] | None = None,
) -> None:
    shown = "" if default is None else f" (default: {' '.join(map(str, default))})"
    metavar = "N" if choices is None else None
    parser.add_argument(
        option, type=kind, nargs="+", default=default, choices=choices, metavar=metavar, help=f"{what}{shown}"
    )


def _add_number(parser: argparse.ArgumentParser, option: str, default: int, what: str) -> None:
    parser.add_argument(option, type=positive, default=default, metavar="N", help=f"{what} (default: %(default)s)")


def _ops(arguments: argparse.Namespace) -> BenchReport:
    # The library of torch's profiler, which counts memory, writes two lines at every use unless it is told before.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from pomscale.benchmarks.operators.figures import bench_figures
    from pomscale.benchmarks.operators.official import load_official
    from pomscale.benchmarks.operators.sweep import Sweep, bench_operators
    from pomscale.distributed.world import resolve_device

    device = resolve_device(arguments.device)
    official = load_official(arguments.official)
    if arguments.figures:
        return bench_figures(official, device, num_turns=arguments.num_turns, out=arguments.out)
    lists = ("num_tokens", "dim", "form", "degree", "expand", "mask", "batch", "dtype")
    defaults: dict[str, Any] = (
        {"dim": [1152], "dtype": ["bf16"]} if device.type == "cuda" else {"dim": [256, 512], "dtype": ["fp32"]}
    )
    return bench_operators(
        Sweep(**{name: tuple(getattr(arguments, name) or defaults[name]) for name in lists}, heads=arguments.heads),
        official,
        device,
        with_compiled=not arguments.no_compile,
        num_turns=arguments.num_turns,
        seconds=arguments.seconds,
        out=arguments.out,
        plot=arguments.plot,
    )


def _gpu_acceptance(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.gpu_acceptance import bench_gpu_acceptance
    from pomscale.benchmarks.operators.official import load_official
    from pomscale.distributed.world import resolve_device

    return bench_gpu_acceptance(resolve_device("cuda"), load_official(arguments.official), seconds=arguments.seconds)
