"""`pomscale bench ...`: measure this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomscale.cli.arguments import positive

if TYPE_CHECKING:
    from pomscale.benchmarks.report import BenchReport


def add(verbs: Any) -> None:
    bench = verbs.add_parser("bench", help="measure this machine, beside named rivals")
    bench_verbs = bench.add_subparsers(metavar="WHAT", required=True)
    bench_loader = bench_verbs.add_parser("loader", help="samples per second, resume, memory of the training loader")
    bench_loader.add_argument("--num-samples", type=positive, default=20_000, help="in the set that is read (20,000)")
    bench_loader.add_argument("--num-resume", type=positive, default=1_000_000, help="in the set that is resumed (1 M)")
    bench_loader.add_argument("--seconds", type=float, default=5.0, help="per reader and setting (default 5)")
    bench_loader.add_argument("--folder", type=Path, help="keep the datasets here (default: a temporary folder)")
    bench_loader.set_defaults(run=_run, measure=_loader)
    bench_encode = bench_verbs.add_parser("encode", help="overhead, scaling and memory of `data encode`")
    bench_encode.add_argument("--num-pictures", type=positive, default=512, help="JPEG files (default 512)")
    bench_encode.add_argument("--num-items", type=positive, default=1_000_000, help="for memory (default 1 M)")
    bench_encode.set_defaults(run=_run, measure=_encode)
    bench_checkpoint = bench_verbs.add_parser("checkpoint", help="stall and time of saves, beside torch's own; loads")
    bench_checkpoint.add_argument("--depth", type=positive, default=15, help="15 = 200 M parameters (default)")
    bench_checkpoint.add_argument("--num-saves", type=positive, default=5, help="of each kind (default 5)")
    bench_checkpoint.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    bench_checkpoint.set_defaults(run=_run, measure=_checkpoint)
    bench_engine = bench_verbs.add_parser("engine", help="cost of the trainer, of averages, and of a cold start")
    bench_engine.add_argument("--batch", type=positive, default=16, help="samples per step (default 16)")
    bench_engine.add_argument("--num-steps", type=positive, default=4, help="measured per turn (default 4)")
    bench_engine.add_argument("--num-turns", type=positive, default=3, help="of trainer and rival (default 3)")
    bench_engine.add_argument("--no-compile", action="store_true", help="leave out starts with torch.compile")
    bench_engine.set_defaults(run=_run, measure=_engine)
    bench_plan = bench_verbs.add_parser("plan", help="what `pomscale plan` says of memory, beside what is allocated")
    bench_plan.set_defaults(run=_run, measure=_plan)
    bench_logging = bench_verbs.add_parser("logging", help="what a row of metrics costs a step, with all sinks")
    bench_logging.add_argument("--batch", type=positive, default=2, help="samples per step (default 2)")
    bench_logging.add_argument("--num-steps", type=positive, default=60, help="half of them after a row (default 60)")
    bench_logging.add_argument("--num-rows", type=positive, default=500, help="written alone (default 500)")
    bench_logging.set_defaults(run=_run, measure=_logging)
    bench_runs = bench_verbs.add_parser("runs", help="seconds of `pomscale runs` with many run folders")
    bench_runs.add_argument("--num-runs", type=positive, default=200, help="run folders (default 200)")
    bench_runs.add_argument("--num-rows", type=positive, default=1000, help="of metrics in each (default 1,000)")
    bench_runs.set_defaults(run=_run, measure=_runs)
    bench_video = bench_verbs.add_parser("video", help="clips of any length: memory and time, with PoM and attention")
    bench_video.add_argument("--num-groups", type=positive, default=1000, help="of the longest clip (default 1,000)")
    bench_video.add_argument(
        "--num-tokens", type=positive, help="the most that are trained on (default 16,384; on a GPU 131,072)"
    )
    bench_video.add_argument("--num-turns", type=positive, default=7, help="of each training step (default 7)")
    bench_video.add_argument("--plot", type=Path, help="draw the curves into this PNG")
    bench_video.set_defaults(run=_run, measure=_video)
    benches = (
        bench_loader,
        bench_encode,
        bench_checkpoint,
        bench_engine,
        bench_plan,
        bench_logging,
        bench_runs,
        bench_video,
    )
    for one in benches:
        one.add_argument("--out", type=Path, help="also write the figures as JSON, with machine, versions and commit")


def _run(arguments: argparse.Namespace) -> int:
    report: BenchReport = arguments.measure(arguments)
    if arguments.out:
        report.write(arguments.out)
    return 0


def _loader(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.loader import bench_loader

    return bench_loader(
        num_samples=arguments.num_samples,
        num_resume=arguments.num_resume,
        seconds=arguments.seconds,
        folder=arguments.folder,
    )


def _encode(arguments: argparse.Namespace) -> BenchReport:
    from pomscale.benchmarks.encode import bench_encode

    return bench_encode(num_pictures=arguments.num_pictures, num_items=arguments.num_items)


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
