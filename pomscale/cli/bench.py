"""`pomscale bench ...`: measure this machine, beside named rivals."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomscale.cli import bench_mixer
from pomscale.cli.arguments import add_device, add_recipe, positive

if TYPE_CHECKING:
    import torch

    from pomscale.benchmarks.report import BenchReport
    from pomscale.config.train import TrainRecipe


def add(verbs: Any) -> None:
    """Add the verb and its own verbs."""
    bench = verbs.add_parser("bench", help="Measure this machine, beside named rivals")
    bench_verbs = bench.add_subparsers(metavar="WHAT", required=True)
    for add_one in (
        _add_loader,
        _add_encode,
        _add_codecs,
        _add_checkpoint,
        _add_engine,
        _add_plan,
        _add_logging,
        _add_runs,
        _add_video,
        _add_images,
        _add_network,
        _add_step,
        _add_packed,
        bench_mixer.add_ops,
        bench_mixer.add_gpu_acceptance,
    ):
        parser = add_one(bench_verbs)
        parser.add_argument(
            "--out",
            type=Path,
            metavar="FILE",
            help="File that also receives the figures, as JSON with machine, versions and commit",
        )
        parser.set_defaults(run=_run)


def _add_loader(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "loader", help="Measure samples per second, resume and memory of the training loader"
    )
    _add_number(parser, "--num-samples", 20_000, "Number of samples in the dataset that is read")
    _add_number(parser, "--num-resume", 1_000_000, "Number of samples in the dataset that is resumed")
    _add_number(parser, "--num-pictures", 1024, "Number of pictures in the datasets of pixels")
    parser.add_argument("--only", choices=["latents", "pixels", "resume"], help="Part to measure (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="Seconds of each reader and setting (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="Directory that keeps the datasets (default: a temporary one)"
    )
    parser.set_defaults(measure=_loader)
    return parser


def _add_encode(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "encode", help="Measure overhead, scaling, memory and decoding of `data encode`"
    )
    _add_number(parser, "--num-pictures", 512, "Number of JPEG files")
    _add_number(parser, "--num-items", 1_000_000, "Number of items for the measurement of memory")
    _add_number(parser, "--num-clips", 12, "Number of clips that are decoded")
    parser.add_argument("--only", choices=["pictures", "memory", "decode"], help="Part to measure (default: all)")
    parser.set_defaults(measure=_encode)
    return parser


def _add_codecs(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "codecs", help="Measure the codecs that people use: samples per second, memory and bytes, beside a bare loop"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="Codec to measure, such as wan-2.1 (default: all)")
    _add_number(parser, "--size", 256, "Side of pictures in pixels")
    parser.add_argument(
        "--clip",
        type=_clip_size,
        default=(17, 128, 128),
        metavar="FxHxW",
        help="Frames, height and width of clips in pixels (default: 17x128x128)",
    )
    _add_number(parser, "--batch", 4, "Pictures or captions of an encoder call")
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help="Least seconds of each loop, of at least two calls (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="Arithmetic of the encoders (default: %(default)s)",
    )
    add_device(parser)
    parser.set_defaults(measure=_codecs)
    return parser


def _clip_size(text: str) -> tuple[int, int, int]:
    try:
        frames, height, width = (positive(number) for number in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give FRAMESxHEIGHTxWIDTH, such as 17x128x128") from None
    return frames, height, width


def _add_checkpoint(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "checkpoint", help="Measure stall and time of saves beside torch's own, and the time of loads"
    )
    _add_number(parser, "--depth", 15, "Depth of the network; 15 has 200 M parameters")
    _add_number(parser, "--num-saves", 5, "Number of saves of each kind")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="Directory on the disk to measure (default: a temporary one)"
    )
    parser.set_defaults(measure=_checkpoint)
    return parser


def _add_engine(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "engine", help="Measure the cost of the trainer, of averages and of a cold start"
    )
    _add_number(parser, "--batch", 16, "Samples per step")
    _add_number(parser, "--num-steps", 4, "Number of steps measured in a turn")
    _add_number(parser, "--num-turns", 3, "Number of turns of the trainer and of its rival")
    parser.add_argument("--no-compile", action="store_true", help="Leave out the starts with torch.compile")
    parser.set_defaults(measure=_engine)
    return parser


def _add_plan(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "plan", help="Compare the memory that `pomscale plan` computes with what is allocated"
    )
    parser.set_defaults(measure=_plan)
    return parser


def _add_logging(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "logging", help="Measure the cost of a row of metrics for a step, with all sinks"
    )
    _add_number(parser, "--batch", 2, "Samples per step")
    _add_number(parser, "--num-steps", 60, "Number of steps, half of which follow a row")
    _add_number(parser, "--num-rows", 500, "Number of rows that are written alone")
    parser.set_defaults(measure=_logging)
    return parser


def _add_runs(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "runs", help="Measure the time of `pomscale runs` with many run folders"
    )
    _add_number(parser, "--num-runs", 200, "Number of run folders")
    _add_number(parser, "--num-rows", 1000, "Number of rows of metrics in each")
    parser.set_defaults(measure=_runs)
    return parser


def _add_video(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "video", help="Measure memory and time of clips of any length, with PoM and with attention"
    )
    _add_number(parser, "--num-groups", 1000, "Number of frame groups of the longest clip")
    parser.add_argument(
        "--num-tokens",
        type=positive,
        metavar="N",
        help="Most tokens that are trained on (default: 16384, or 131072 on a GPU)",
    )
    _add_number(parser, "--num-turns", 7, "Number of turns of each training step")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="PNG that receives the curves")
    parser.set_defaults(measure=_video)
    return parser


def _add_images(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "images",
        help="Measure `evaluate images`: overhead, two processes, memory; also beside torch-fidelity",
    )
    parser.add_argument(
        "--rival",
        type=Path,
        metavar="PYTHON",
        help="Python interpreter of an environment with torch-fidelity==0.4.0 and torchvision",
    )
    _add_number(parser, "--num-pictures", 256, "Number of pictures of 256x256 on each side, and of digits to draw")
    _add_number(parser, "--num-turns", 3, "Number of turns beside the rival")
    _add_number(parser, "--num-threads", 2, "Number of threads beside the rival")
    parser.set_defaults(measure=_images)
    return parser


def _add_network(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "network", help="Measure the time of a recipe's network: forward, forward and backward, generation"
    )
    add_recipe(parser)
    _add_number(parser, "--batch", 1, "Samples of a forward pass")
    _add_number(parser, "--num-turns", 5, "Number of turns of each measurement")
    parser.add_argument(
        "--generate", type=positive, metavar="N", help="Number of frame groups of a clip to generate (default: none)"
    )
    add_device(parser)
    parser.set_defaults(measure=_network)
    return parser


def _add_step(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "step", help="Measure a training step of a JiT beside the authors' own modules"
    )
    add_recipe(parser)
    for name in ("JiTpp", "pom"):
        parser.add_argument(
            f"--{name.lower()}", type=Path, required=True, metavar="DIR", help=f"Checkout of davidpicard/{name}"
        )
    _add_number(parser, "--batch", 2, "Pictures of a step")
    _add_number(parser, "--num-turns", 5, "Number of turns of each")
    add_device(parser)
    parser.set_defaults(measure=_step)
    return parser


def _add_number(parser: argparse.ArgumentParser, option: str, default: int, what: str) -> None:
    parser.add_argument(option, type=positive, default=default, metavar="N", help=f"{what} (default: %(default)s)")


def _run(arguments: argparse.Namespace) -> int:
    report: BenchReport = arguments.measure(arguments)
    if arguments.out:
        report.write(arguments.out)
    for failure in report.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


def _loader(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.loader import bench_loader

    numbers = {
        "latents": arguments.num_samples,
        "resume": arguments.num_resume,
        "pixels": arguments.num_pictures,
    }
    num = {part: 0 if arguments.only not in (None, part) else number for part, number in numbers.items()}
    return bench_loader(
        num_samples=num["latents"],
        num_resume=num["resume"],
        num_pictures=num["pixels"],
        seconds=arguments.seconds,
        folder=arguments.folder,
    )


def _encode(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.encode import bench_encode

    numbers = {"pictures": arguments.num_pictures, "memory": arguments.num_items, "decode": arguments.num_clips}
    num = {part: 0 if arguments.only not in (None, part) else number for part, number in numbers.items()}
    return bench_encode(num_pictures=num["pictures"], num_items=num["memory"], num_clips=num["decode"])


def _codecs(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.codecs import CodecBench, bench_codecs
    from pomscale.distributed.world import resolve_device

    bench = CodecBench(
        device=resolve_device(arguments.device),
        picture=arguments.size,
        clip=arguments.clip,
        batch=arguments.batch,
        seconds=arguments.seconds,
        precision=arguments.precision,
    )
    return bench_codecs(arguments.names, bench)


def _checkpoint(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.checkpoint import bench_checkpoint

    return bench_checkpoint(depth=arguments.depth, num_saves=arguments.num_saves, folder=arguments.folder)


def _engine(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.engine import bench_engine

    return bench_engine(
        batch=arguments.batch,
        num_steps=arguments.num_steps,
        num_turns=arguments.num_turns,
        compile_start=not arguments.no_compile,
    )


def _plan(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.plan import bench_plan

    return bench_plan()


def _logging(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.logging import bench_logging

    return bench_logging(batch=arguments.batch, num_steps=arguments.num_steps, num_rows=arguments.num_rows)


def _runs(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.runs import bench_runs

    return bench_runs(num_runs=arguments.num_runs, num_rows=arguments.num_rows)


def _video(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.video import bench_video

    return bench_video(
        num_groups=arguments.num_groups,
        num_tokens=arguments.num_tokens,
        num_turns=arguments.num_turns,
        plot=arguments.plot,
    )


def _images(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.images import bench_images

    return bench_images(
        rival=arguments.rival,
        num_pictures=arguments.num_pictures,
        num_turns=arguments.num_turns,
        num_threads=arguments.num_threads,
    )


def _recipe_and_device(arguments: argparse.Namespace) -> tuple[TrainRecipe, torch.device]:
    """Load the recipe before torch, so that an error in it comes at once."""
    from pomscale.config.load import load_train_recipe

    recipe = load_train_recipe(arguments.recipe, arguments.overrides)

    from pomscale.distributed.world import resolve_device

    return recipe, resolve_device(arguments.device)


def _network(arguments: argparse.Namespace) -> BenchReport:
    recipe, device = _recipe_and_device(arguments)

    from pomscale.benchmarks.network import bench_network

    return bench_network(
        recipe, device, batch=arguments.batch, num_turns=arguments.num_turns, num_groups=arguments.generate
    )


def _add_packed(verbs: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "packed", help="Measure packed training steps beside steps of samples of one shape"
    )
    add_device(parser)
    _add_number(parser, "--dim", 256, "Width of the networks")
    _add_number(parser, "--depth", 4, "Number of blocks of the networks")
    _add_number(parser, "--tokens", 4096, "Most tokens of a step")
    _add_number(parser, "--num-turns", 5, "Number of turns of each step")
    parser.set_defaults(measure=_packed)
    return parser


def _packed(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.packed import bench_packed
    from pomscale.distributed.world import resolve_device

    return bench_packed(
        resolve_device(arguments.device),
        dim=arguments.dim,
        depth=arguments.depth,
        tokens=arguments.tokens,
        num_turns=arguments.num_turns,
    )


def _step(arguments: argparse.Namespace) -> BenchReport:
    recipe, device = _recipe_and_device(arguments)

    from pomscale.benchmarks.training_step import bench_step

    return bench_step(
        recipe,
        device,
        jitpp=arguments.jitpp,
        pom=arguments.pom,
        batch=arguments.batch,
        num_turns=arguments.num_turns,
    )
