"""`pomscale data ...`: make and check datasets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_recipe, positive


def add(verbs: Any) -> None:
    data = verbs.add_parser("data", help="make and check datasets of latent shards")
    data_verbs = data.add_subparsers(metavar="VERB", required=True)
    encode = data_verbs.add_parser("encode", help="pictures, clips, captions -> shards; goes on where it stopped")
    add_recipe(encode)
    encode.add_argument("--dry-run", action="store_true", help="encode a short sample, tell sizes and time")
    encode.add_argument("--task", help="INDEX/COUNT, one of several on one output (default: from SLURM or torchrun)")
    encode.add_argument("--only-failed", action="store_true", help="make the parts again that list failed items")
    encode.add_argument("--rescan", action="store_true", help="list the source again; refuse if it has changed")
    encode.set_defaults(run=_encode, leaves_threads=True)
    verify = data_verbs.add_parser("verify", help="prove a dataset whole: every byte, record and item")
    verify.set_defaults(run=_verify)
    repair = data_verbs.add_parser("repair", help="make the damaged shards of a dataset again, and only those")
    repair.set_defaults(run=_repair)
    stats = data_verbs.add_parser("stats", help="means, ranges, classes and lengths, from one pass over the shards")
    stats.set_defaults(run=_stats)
    stats.add_argument("--out", type=Path, help="also a PNG of the distributions")
    split = data_verbs.add_parser("split", help="deal the records to several datasets, by key")
    split.set_defaults(run=_split)
    for one in (verify, repair, stats, split):
        one.add_argument("dataset", type=Path)
    split.add_argument("parts", nargs="+", metavar="FOLDER=SHARE", help="e.g. data/train=0.99 data/heldout=0.01")
    split.add_argument("--seed", type=int, default=0)
    repair.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to its recipe, e.g. source.path=/new")
    merge = data_verbs.add_parser("merge", help="several datasets of one kind as one; shards are linked, not copied")
    merge.set_defaults(run=_merge)
    merge.add_argument("datasets", nargs="+", type=Path, metavar="DATASET")
    merge.add_argument("--out", type=Path, required=True, help="folder of the new dataset")
    for one in (verify, repair, stats, split, merge):
        one.add_argument("--num-workers", type=positive, help="processes (default: as many as there are cores)")
    join = data_verbs.add_parser("join", help="match text embeddings of a companion set with a dataset, by key")
    join.set_defaults(run=_join)
    join.add_argument("dataset", type=Path, help="the set with the latents")
    join.add_argument("companion", type=Path, help="the set with the embeddings; the table is written there")
    info = data_verbs.add_parser("info", help="what a dataset is")
    info.add_argument("dataset", type=Path)
    info.set_defaults(run=_info)
    show = data_verbs.add_parser("show", help="pictures as a PNG grid, clips as a contact sheet, captions as text")
    show.add_argument("dataset", type=Path)
    show.add_argument("--num", type=positive, default=64, help="number of samples (default 64)")
    show.add_argument("--seed", type=int, default=0, help="chooses the samples (default 0)")
    show.add_argument("--out", type=Path, default=Path("grid.png"))
    show.set_defaults(run=_show)


def _encode(arguments: argparse.Namespace) -> int:
    from pomscale.config.load import load_encode_recipe

    recipe = load_encode_recipe(arguments.recipe, arguments.overrides)

    from pomscale.distributed.stop import StopRequest

    request = StopRequest(nothing_to_save=True)  # before torch, so that no signal finds nobody there

    with large_imports():
        from data_pipelines.encode.dry_run import describe
        from data_pipelines.encode.encode import encode
        from pomscale.base.task_index import this_task

    task = this_task(arguments.task)
    if arguments.dry_run:
        print(describe(recipe, task=task))
        return 0

    def stop() -> bool:
        request.nothing_to_save = False  # asked with every item: from the first on, there is something to finish
        return request.requested

    report = encode(recipe, task=task, only_failed=arguments.only_failed, rescan=arguments.rescan, stop=stop)
    print(report)
    return report.exit_code


def _verify(arguments: argparse.Namespace) -> int:
    from data_pipelines.check.verify import verify

    report = verify(arguments.dataset, num_workers=arguments.num_workers)
    print(report)
    return report.exit_code


def _repair(arguments: argparse.Namespace) -> int:
    from data_pipelines.check.repair import repair

    report = repair(arguments.dataset, arguments.overrides, num_workers=arguments.num_workers)
    print(report)
    return report.exit_code


def _stats(arguments: argparse.Namespace) -> int:
    from data_pipelines.inspect.stats import stats

    report = stats(arguments.dataset, num_workers=arguments.num_workers)
    print(report)
    if arguments.out:
        from data_pipelines.inspect.stats_picture import draw_stats  # matplotlib, a second

        draw_stats(report, arguments.out)
    return report.exit_code


def _split(arguments: argparse.Namespace) -> int:
    from data_pipelines.derive.split import split

    parts = parse_shares(arguments.parts)
    print(split(arguments.dataset, parts, seed=arguments.seed, num_workers=arguments.num_workers))
    return 0


def parse_shares(words: list[str]) -> dict[str | Path, float]:
    """FOLDER=SHARE words. Raises InputError for what is none, and for a folder that is there twice."""
    shares: dict[str | Path, float] = {}
    for word in words:
        folder, _, share = word.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not folder or not 0.0 < value < 1.0 or folder in shares:
            raise InputError(f"{word!r}: give each folder once, as FOLDER=SHARE with a share between 0 and 1")
        shares[folder] = value
    return shares


def _merge(arguments: argparse.Namespace) -> int:
    from data_pipelines.derive.merge import merge

    print(merge(arguments.datasets, arguments.out, num_workers=arguments.num_workers))
    return 0


def _join(arguments: argparse.Namespace) -> int:
    from data_pipelines.derive.join import join

    report = join(arguments.dataset, arguments.companion)
    print(report)
    return report.exit_code


def _info(arguments: argparse.Namespace) -> int:
    from data_pipelines.inspect.info import info

    print(info(arguments.dataset))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with large_imports():
        from data_pipelines.inspect.show import show
        from pomscale.codecs import build_codec
        from pomscale.shards.schema import read_manifest

    made_with = read_manifest(arguments.dataset).codec
    codec = None if made_with is None else build_codec(made_with.config)
    print(show(arguments.dataset, codec, arguments.num, arguments.out, seed=arguments.seed))
    return 0
