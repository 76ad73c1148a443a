"""Options of sampling on the command line, for every verb that samples."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from pomscale.cli.arguments import finite, positive
from pomscale.config.names import GridName, GuidanceSchedule, SamplerName

if TYPE_CHECKING:
    from pomscale.diffusion.options import SamplingChanges
    from pomscale.pretrained.load import PretrainedModel

OPTIONS = (
    "sampler",
    "num_steps",
    "eta",
    "grid",
    "shift",
    "rho",
    "times",
    "guidance",
    "guidance_interval",
    "guidance_schedule",
    "guidance_base_size",
)
"""Names of the options, which are fields of SamplingOptions."""


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling, each by default as the model's recipe says, and --guide."""
    group = parser.add_argument_group(
        "sampling", "Options of sampling (default: as the model's recipe says). Time t is 0 at the data and 1 at noise."
    )
    group.add_argument("--sampler", choices=get_args(SamplerName), help="Name of the sampler")
    group.add_argument(
        "--steps", "--num-steps", dest="num_steps", type=positive, metavar="N", help="Number of steps of the sampler"
    )
    group.add_argument(
        "--eta", type=finite, help="Amount of noise that is added in each step: ddim, 0 to 1 (then it is ddpm); sde"
    )
    group.add_argument("--grid", choices=get_args(GridName), help="Grid of times; the next three options imply theirs")
    group.add_argument(
        "--shift",
        type=finite,
        metavar="S",
        help="Factor on noise over data on the uniform grid: s / s0, for sides s and s0 of pictures",
    )
    group.add_argument("--rho", type=finite, metavar="R", help="Exponent of EDM's grid, 7 if only --grid rho is given")
    group.add_argument(
        "--times", type=_numbers(None), metavar="T,..,0", help="Times themselves, decreasing from noise (1) to 0"
    )
    group.add_argument(
        "--guidance", type=finite, metavar="W", help="Weight w in pred_c + w (pred_c - pred_u); 0 is off"
    )
    group.add_argument(
        "--guidance-interval",
        type=_numbers(2),
        metavar="LO,HI",
        help="Times between which guidance is on; outside, a step costs half",
    )
    group.add_argument(
        "--guidance-schedule",
        choices=get_args(GuidanceSchedule),
        help="Weight over time: constant, linear (2 w (1 - t)) or cosine (w (1 + cos(pi t)))",
    )
    group.add_argument(
        "--guidance-base-size",
        type=finite,
        metavar="S0",
        help="Side of the latents that w was chosen at: latents of side s are guided by w s / S0",
    )
    group.add_argument(
        "--guide",
        type=Path,
        metavar="MODEL",
        help="Weaker model of the same data, as MODEL, whose prediction guidance leads away from instead of the "
        "unconditional one (default: none)",
    )


def sampling_changes(arguments: argparse.Namespace) -> SamplingChanges:
    """Return the options as they were given; None = as the recipe says."""
    return cast("SamplingChanges", {name: getattr(arguments, name) for name in OPTIONS})


def load_guide(arguments: argparse.Namespace) -> PretrainedModel | None:
    """Return the model of --guide, if there is one, on the device of --device.

    Raises:
        InputError: There are no such weights.
    """
    from pomscale.pretrained.load import load_pretrained

    return None if arguments.guide is None else load_pretrained(arguments.guide, device=arguments.device)


def _numbers(count: int | None) -> Callable[[str], tuple[float, ...]]:
    def parse(text: str) -> tuple[float, ...]:
        numbers = tuple(finite(part) for part in text.split(","))
        if count is not None and len(numbers) != count:
            raise argparse.ArgumentTypeError(f"must be {count} numbers with a comma, got {text}")
        return numbers

    parse.__name__ = "list of numbers"  # argparse says "invalid list of numbers value"
    return parse
