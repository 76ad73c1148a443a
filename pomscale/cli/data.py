"""`pomscale data ...`: make, check and inspect datasets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_recipe, positive


def add(verbs: Any) -> None:
    """Add the verb and its own verbs."""
    data = verbs.add_parser("data", help="Make, check and inspect datasets of shards")
    data_verbs = data.add_subparsers(metavar="VERB", required=True)
    _add_encode(data_verbs)
    _add_checks(data_verbs)
    _add_derivation(data_verbs)
    _add_inspection(data_verbs)


def _add_encode(verbs: Any) -> None:
    encode = verbs.add_parser(
        "encode", help="Encode pictures, clips or captions as a dataset, or continue an encode that stopped"
    )
    add_recipe(encode)
    encode.add_argument(
        "--dry-run", action="store_true", help="Encode a short sample, and report the sizes and the time of the whole"
    )
    encode.add_argument(
        "--task",
        metavar="INDEX/COUNT",
        help="Number of this process among those that share one output (default: from SLURM or torchrun)",
    )
    encode.add_argument("--only-failed", action="store_true", help="Make the parts again that list failed items")
    encode.add_argument(
        "--rescan", action="store_true", help="List the source again, and refuse to continue if it has changed"
    )
    encode.set_defaults(run=_encode, leaves_threads=True)


def _add_checks(verbs: Any) -> None:
    verify = verbs.add_parser("verify", help="Verify every byte, record and item of a dataset")
    _add_dataset(verify)
    _add_num_workers(verify)
    verify.set_defaults(run=_verify)
    repair = verbs.add_parser("repair", help="Make the damaged shards of a dataset again, and only those")
    _add_dataset(repair)
    repair.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="Changes to the dataset's recipe, such as source.path=/new"
    )
    _add_num_workers(repair)
    repair.set_defaults(run=_repair)


def _add_derivation(verbs: Any) -> None:
    split = verbs.add_parser("split", help="Distribute the records over several datasets, by key")
    _add_dataset(split)
    split.add_argument(
        "parts",
        nargs="+",
        metavar="FOLDER=SHARE",
        help="New dataset and its share of the records, such as data/train=0.99 data/heldout=0.01",
    )
    split.add_argument("--seed", type=int, default=0, help="Seed of the distribution (default: %(default)s)")
    _add_num_workers(split)
    split.set_defaults(run=_split)
    merge = verbs.add_parser("merge", help="Combine several datasets of one kind; shards are linked, not copied")
    merge.add_argument("datasets", nargs="+", type=Path, metavar="DATASET", help="Dataset to combine with the others")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="Directory of the new dataset")
    _add_num_workers(merge)
    merge.set_defaults(run=_merge)
    join = verbs.add_parser("join", help="Match the text embeddings of a companion dataset with a dataset, by key")
    join.add_argument("dataset", type=Path, metavar="DATASET", help="Dataset with the latents")
    join.add_argument(
        "companion", type=Path, metavar="COMPANION", help="Dataset with the embeddings, which receives the join table"
    )
    join.set_defaults(run=_join)


def _add_inspection(verbs: Any) -> None:
    info = verbs.add_parser("info", help="Describe a dataset")
    _add_dataset(info)
    info.set_defaults(run=_info)
    show = verbs.add_parser(
        "show", help="Show samples: pictures as a PNG grid, clips as a contact sheet, captions as text"
    )
    _add_dataset(show)
    show.add_argument(
        "--num-samples",
        "--num",
        dest="num",
        type=positive,
        default=64,
        metavar="N",
        help="Number of samples (default: %(default)s)",
    )
    show.add_argument("--seed", type=int, default=0, help="Seed that chooses the samples (default: %(default)s)")
    show.add_argument(
        "--out", type=Path, default=Path("grid.png"), metavar="PNG", help="PNG to write (default: %(default)s)"
    )
    show.set_defaults(run=_show)
    stats = verbs.add_parser("stats", help="Measure means, ranges, classes and lengths in one pass over the shards")
    _add_dataset(stats)
    stats.add_argument("--out", type=Path, metavar="PNG", help="PNG that receives the distributions")
    _add_num_workers(stats)
    stats.set_defaults(run=_stats)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="Directory of the dataset")


def _add_num_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-workers", type=positive, metavar="N", help="Number of processes (default: the number of cores)"
    )


def _encode(arguments: argparse.Namespace) -> int:
    from pomscale.config.load import load_encode_recipe

    recipe = load_encode_recipe(arguments.recipe, arguments.overrides)

    from pomscale.distributed.stop import StopRequest

    request = StopRequest(nothing_to_save=True)  # before torch, so that no signal arrives before its handler

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
    prefix = f"task {task.index}/{task.count}: " if task.count > 1 else ""  # tasks of one torchrun share a terminal
    print("\n".join(prefix + line for line in str(report).splitlines()))
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
    from pomscale.base.files import check_can_be_written, check_suffix

    if arguments.out:
        check_can_be_written(arguments.out)
        check_suffix(arguments.out, ".png")
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
    """Parse FOLDER=SHARE words. Raise InputError for other words, and for a folder that is there twice."""
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
        from pomscale.base.files import check_suffix
        from pomscale.codecs import build_codec
        from pomscale.shards.schema import read_manifest

    check_suffix(arguments.out, ".png")
    made_with = read_manifest(arguments.dataset).codec
    codec = None if made_with is None else build_codec(made_with.config)
    print(show(arguments.dataset, codec, arguments.num, arguments.out, seed=arguments.seed))
    return 0
