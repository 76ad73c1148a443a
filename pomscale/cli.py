"""The `pomscale` command: one verb per wish.

Parsing imports neither torch nor any of our rooms, so that --help, completion and errors in the arguments are
instant on a login node; each verb imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from pomscale import __version__
from pomscale.errors import InputError, PomscaleError


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong input, 3 done with skipped items, 75 stopped on request."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes no positional arguments after an option: `encode RECIPE --dry-run a.b=c` leaves a.b=c over.
    if rest and not (hasattr(parsed, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    try:
        code = parsed.run(parsed)
    except PomscaleError as error:
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{rank}error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        code = 130  # as shells report Ctrl-C
    if parsed.run in (_train, _data_encode):
        # All is saved, closed and written by now. What is left is the interpreter taking down torch's background
        # threads, which once in a few hundred exits aborts ("terminate called without an active exception") and turns
        # a finished run into a crashed one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pomscale", description="Train attention-free diffusion models from latent shards, on one machine or many."
    )
    parser.add_argument("--version", action="version", version=f"pomscale {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    train = verbs.add_parser("train", help="train a model from a recipe; resumes by itself")
    _add_recipe(train)
    train.set_defaults(run=_train)
    _add_config(verbs)
    _add_data(verbs)
    _add_sample(verbs)
    _add_evaluate(verbs)
    _add_bench(verbs)
    report = verbs.add_parser("report", help="curves of a run: report.png and a self-contained report.html")
    report.add_argument("run_folder", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="folder; default: the run folder")
    report.set_defaults(run=_report)
    return parser


def _add_config(verbs: Any) -> None:
    config = verbs.add_parser("config", help="look at recipes")
    config_verbs = config.add_subparsers(metavar="VERB", required=True)
    show = config_verbs.add_parser("show", help="print the resolved recipe: defaults, bases and overrides applied")
    _add_recipe(show)
    show.set_defaults(run=_config_show)
    validate = config_verbs.add_parser("validate", help="check recipes; lists every problem with file and line")
    validate.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    validate.set_defaults(run=_config_validate)
    schema = config_verbs.add_parser("schema", help="print the JSON schema of recipes")
    schema.set_defaults(run=_config_schema)


def _add_data(verbs: Any) -> None:
    data = verbs.add_parser("data", help="make and check datasets of latent shards")
    data_verbs = data.add_subparsers(metavar="VERB", required=True)
    encode = data_verbs.add_parser("encode", help="pictures, clips, captions -> shards; goes on where it stopped")
    _add_recipe(encode)
    encode.add_argument("--dry-run", action="store_true", help="encode a short sample, tell sizes and time")
    encode.add_argument("--task", help="INDEX/COUNT, one of several on one output (default: from SLURM or torchrun)")
    encode.add_argument("--only-failed", action="store_true", help="make the parts again that list failed items")
    encode.add_argument("--rescan", action="store_true", help="list the source again; refuse if it has changed")
    encode.set_defaults(run=_data_encode)
    verify = data_verbs.add_parser("verify", help="prove a dataset whole: every byte, record and item")
    verify.set_defaults(run=_data_verify)
    repair = data_verbs.add_parser("repair", help="make the damaged shards of a dataset again, and only those")
    repair.set_defaults(run=_data_repair)
    stats = data_verbs.add_parser("stats", help="means, ranges, classes and lengths, from one pass over the shards")
    stats.set_defaults(run=_data_stats)
    stats.add_argument("--out", type=Path, help="also a PNG of the distributions")
    split = data_verbs.add_parser("split", help="deal the records to several datasets, by key")
    split.set_defaults(run=_data_split)
    for one in (verify, repair, stats, split):
        one.add_argument("dataset", type=Path)
    split.add_argument("parts", nargs="+", metavar="FOLDER=SHARE", help="e.g. data/train=0.99 data/heldout=0.01")
    split.add_argument("--seed", type=int, default=0)
    repair.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to its recipe, e.g. source.path=/new")
    merge = data_verbs.add_parser("merge", help="several datasets of one kind as one; shards are linked, not copied")
    merge.set_defaults(run=_data_merge)
    merge.add_argument("datasets", nargs="+", type=Path, metavar="DATASET")
    merge.add_argument("--out", type=Path, required=True, help="folder of the new dataset")
    for one in (verify, repair, stats, split, merge):
        one.add_argument("--num-workers", type=_positive, help="processes (default: as many as there are cores)")
    join = data_verbs.add_parser("join", help="match text embeddings of a companion set with a dataset, by key")
    join.set_defaults(run=_data_join)
    join.add_argument("dataset", type=Path, help="the set with the latents")
    join.add_argument("companion", type=Path, help="the set with the embeddings; the table is written there")
    info = data_verbs.add_parser("info", help="what a dataset is")
    info.add_argument("dataset", type=Path)
    info.set_defaults(run=_data_info)
    data_show = data_verbs.add_parser("show", help="pictures as a PNG grid, clips as a contact sheet, captions as text")
    data_show.add_argument("dataset", type=Path)
    data_show.add_argument("--num", type=_positive, default=64, help="number of samples (default 64)")
    data_show.add_argument("--seed", type=int, default=0, help="chooses the samples (default 0)")
    data_show.add_argument("--out", type=Path, default=Path("grid.png"))
    data_show.set_defaults(run=_data_show)


def _add_sample(verbs: Any) -> None:
    sample = verbs.add_parser("sample", help="draw pictures from a trained model")
    sample.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    sample.add_argument("--classes", help="class ids, e.g. 0,5,7-9, or all (default: those of the recipe's grid)")
    sample.add_argument("--num", type=_positive, default=8, help="pictures per class (default 8)")
    sample.add_argument("--sampler", choices=["ddim", "euler", "heun"], help="default: as the recipe says")
    sample.add_argument("--steps", type=_positive, help="default: as the recipe says")
    sample.add_argument("--guidance", type=float, help="w in pred_c + w (pred_c - pred_u); default: the recipe's")
    sample.add_argument("--seed", type=int, default=0, help="picture i has seed + i (default 0)")
    sample.add_argument("--batch", type=_positive, default=64, help="does not change the pictures (default 64)")
    sample.add_argument("--weights", choices=["ema", "model"], default="ema")
    sample.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    sample.add_argument("--codec-path", help="folder of the codec's weights on this machine, if they have moved")
    sample.add_argument("--out", type=Path, default=Path("grid.png"), help="PNG grid, one row per class")
    sample.add_argument("--npz", type=Path, help="also write pictures (uint8 n h w c), classes and seeds")
    sample.set_defaults(run=_sample)


def _add_evaluate(verbs: Any) -> None:
    evaluate = verbs.add_parser("evaluate", help="measure a trained model")
    evaluate_verbs = evaluate.add_subparsers(metavar="VERB", required=True)
    heldout = evaluate_verbs.add_parser("heldout", help="held-out loss by time bin, noise fixed")
    heldout.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    heldout.add_argument("--data", help="dataset; default: the recipe's validation.path")
    heldout.add_argument("--num-samples", type=_positive, help="default: the recipe's, or 1024")
    heldout.add_argument("--num-time-bins", type=_positive, help="default: the recipe's, or 8")
    heldout.add_argument("--weights", choices=["ema", "model"], default="ema")
    heldout.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    heldout.set_defaults(run=_evaluate_heldout)
    digits = evaluate_verbs.add_parser("digits", help="are generated digits recognised, and are they no copies?")
    digits.add_argument("npz", type=Path, help="from pomscale sample --npz")
    digits.add_argument("--train", type=Path, default=Path("data/digits/train"), help="pictures trained on")
    digits.add_argument("--heldout", type=Path, default=Path("data/digits/heldout"), help="pictures not trained on")
    digits.add_argument("--out", type=Path, help="also write the figures as JSON")
    digits.set_defaults(run=_evaluate_digits)


def _add_bench(verbs: Any) -> None:
    bench = verbs.add_parser("bench", help="measure this machine, beside named rivals")
    bench_verbs = bench.add_subparsers(metavar="WHAT", required=True)
    bench_loader = bench_verbs.add_parser("loader", help="samples per second, resume, memory of the training loader")
    bench_loader.add_argument("--num-samples", type=_positive, default=20_000, help="in the set that is read (20,000)")
    bench_loader.add_argument(
        "--num-resume", type=_positive, default=1_000_000, help="in the set that is resumed (1 M)"
    )
    bench_loader.add_argument("--seconds", type=float, default=5.0, help="per reader and setting (default 5)")
    bench_loader.add_argument("--folder", type=Path, help="keep the datasets here (default: a temporary folder)")
    bench_loader.set_defaults(run=_bench_loader)
    bench_encode = bench_verbs.add_parser("encode", help="overhead, scaling and memory of `data encode`")
    bench_encode.add_argument("--num-pictures", type=_positive, default=512, help="JPEG files (default 512)")
    bench_encode.add_argument("--num-items", type=_positive, default=1_000_000, help="for memory (default 1 M)")
    bench_encode.set_defaults(run=_bench_encode)
    for one in (bench_loader, bench_encode):
        one.add_argument("--out", type=Path, help="also write the figures as JSON, with machine, versions and commit")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to the recipe, e.g. optimizer.lr=3e-4")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _train(arguments: argparse.Namespace) -> int:
    from pomscale.config.recipe import load_train_recipe

    recipe = load_train_recipe(arguments.recipe, arguments.overrides)  # before torch: a typo is told at once

    from pomscale.train import train

    return train(recipe)


def _config_show(arguments: argparse.Namespace) -> int:
    from pomscale.config.recipe import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(arguments.recipe, arguments.overrides)), end="")
    return 0


def _config_validate(arguments: argparse.Namespace) -> int:
    from pomscale.config.recipe import RecipeError, load_recipe

    problems: list[str] = []
    for recipe in arguments.recipes:
        try:
            load_recipe(recipe)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    print(f"{len(arguments.recipes)} recipe(s) valid")
    return 0


def _config_schema(arguments: argparse.Namespace) -> int:
    from pomscale.config.recipe import json_schema

    print(json.dumps(json_schema(), indent=1))
    return 0


def _data_encode(arguments: argparse.Namespace) -> int:
    from pomscale.config.recipe import load_encode_recipe

    recipe = load_encode_recipe(arguments.recipe, arguments.overrides)

    from pomscale.distributed.stop import StopRequest

    request = StopRequest(nothing_to_save=True)  # before torch, so that no signal finds nobody there

    from data_pipelines.common.dry_run import describe
    from data_pipelines.common.encode import encode
    from data_pipelines.common.tasks import this_task

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


def _data_verify(arguments: argparse.Namespace) -> int:
    from data_pipelines.common.verify import verify

    report = verify(arguments.dataset, num_workers=arguments.num_workers)
    print(report)
    return report.exit_code


def _data_repair(arguments: argparse.Namespace) -> int:
    from data_pipelines.common.repair import repair

    report = repair(arguments.dataset, arguments.overrides, num_workers=arguments.num_workers)
    print(report)
    return report.exit_code


def _data_stats(arguments: argparse.Namespace) -> int:
    from data_pipelines.common.stats import stats

    report = stats(arguments.dataset, num_workers=arguments.num_workers)
    print(report)
    if arguments.out:
        from data_pipelines.common.stats_picture import draw_stats  # matplotlib, a second

        draw_stats(report, arguments.out)
    return report.exit_code


def _data_split(arguments: argparse.Namespace) -> int:
    from data_pipelines.common.split import split

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


def _data_merge(arguments: argparse.Namespace) -> int:
    from data_pipelines.common.merge import merge

    print(merge(arguments.datasets, arguments.out, num_workers=arguments.num_workers))
    return 0


def _data_join(arguments: argparse.Namespace) -> int:
    from data_pipelines.common.join import join

    report = join(arguments.dataset, arguments.companion)
    print(report)
    return report.exit_code


def _data_info(arguments: argparse.Namespace) -> int:
    from data_pipelines.common.show import info

    print(info(arguments.dataset))
    return 0


def _data_show(arguments: argparse.Namespace) -> int:
    from data_pipelines.common.show import show
    from pomscale.codecs import build_codec
    from pomscale.data.schema import read_manifest

    made_with = read_manifest(arguments.dataset).codec
    codec = None if made_with is None else build_codec(made_with.config)
    print(show(arguments.dataset, codec, arguments.num, arguments.out, seed=arguments.seed))
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from pomscale.drawing import draw_pictures
    from pomscale.pretrained import load_pretrained

    model = load_pretrained(
        arguments.model, weights=arguments.weights, device=arguments.device, codec_path=arguments.codec_path
    )
    draw_pictures(
        model,
        parse_classes(arguments.classes, model.config.num_classes) if arguments.classes else None,
        num_per_class=arguments.num,
        seed=arguments.seed,
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=arguments.guidance,
        batch=arguments.batch,
        out=arguments.out,
        npz=arguments.npz,
    )
    return 0


def parse_classes(text: str, num_classes: int) -> list[int]:
    """ "all" or a list such as "0,5,7-9". Raises InputError for what is no class of the model."""
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


def _evaluate_heldout(arguments: argparse.Namespace) -> int:
    from pomscale.measure import measure_heldout

    loss = measure_heldout(
        arguments.model,
        data=arguments.data,
        num_samples=arguments.num_samples,
        num_time_bins=arguments.num_time_bins,
        weights=arguments.weights,
        device=arguments.device,
    )
    print(json.dumps({"mean": loss.mean, "by_bin": loss.by_bin}))
    return 0


def _evaluate_digits(arguments: argparse.Namespace) -> int:
    from pomscale.evaluation.digits import evaluate_digits

    report = evaluate_digits(arguments.npz, arguments.train, arguments.heldout)
    print(report.table())
    if arguments.out:
        arguments.out.write_text(report.to_json(), encoding="utf-8")
    return 0


def _bench_loader(arguments: argparse.Namespace) -> int:
    from pomscale.benchmarks.loader import bench_loader

    report = bench_loader(
        num_samples=arguments.num_samples,
        num_resume=arguments.num_resume,
        seconds=arguments.seconds,
        folder=arguments.folder,
    )
    if arguments.out:
        report.write(arguments.out)
    return 0


def _bench_encode(arguments: argparse.Namespace) -> int:
    from pomscale.benchmarks.encode import bench_encode

    report = bench_encode(num_pictures=arguments.num_pictures, num_items=arguments.num_items)
    if arguments.out:
        report.write(arguments.out)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pomscale.monitoring.report import write_report

    paths = write_report(arguments.run_folder, arguments.out)
    print(f"wrote {paths.png} and {paths.html}")
    return 0
