"""`pomscale evaluate ...`: measure a trained model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pomscale.base.imports import large_imports
from pomscale.cli.arguments import add_device, add_model, positive
from pomscale.cli.evaluate import images, record, vbench


def add(verbs: Any) -> None:
    """Add the verb and its own verbs."""
    evaluate = verbs.add_parser("evaluate", help="Measure a trained model, and record figures in its run")
    evaluate_verbs = evaluate.add_subparsers(metavar="VERB", required=True)
    _add_heldout(evaluate_verbs)
    images.add(evaluate_verbs)
    digits = evaluate_verbs.add_parser(
        "digits", help="Classify generated digits, and measure how far they are from training pictures"
    )
    _add_generated(digits, "pictures", "data/digits")
    digits.set_defaults(run=_digits)
    moving = evaluate_verbs.add_parser(
        "moving-digits", help="Classify the digits in generated clips, and measure where they move"
    )
    _add_generated(moving, "clips", "data/moving-digits")
    moving.set_defaults(run=_moving_digits)
    record.add(evaluate_verbs)
    vbench.add(evaluate_verbs)


def _add_heldout(verbs: Any) -> None:
    heldout = verbs.add_parser(
        "heldout", help="Measure the held-out loss by time bin, of training and in v, with fixed noise"
    )
    add_model(heldout)
    heldout.add_argument("--data", metavar="DATASET", help="Held-out dataset (default: the recipe's validation.path)")
    heldout.add_argument(
        "--text",
        metavar="DATASET",
        help="Companion dataset with the texts of --data (default: its own shards, or the recipe's validation.text)",
    )
    heldout.add_argument(
        "--num-samples", type=positive, metavar="N", help="Number of samples (default: the recipe's, or 1024)"
    )
    heldout.add_argument(
        "--num-time-bins", type=positive, metavar="N", help="Number of time bins (default: the recipe's, or 8)"
    )
    add_device(heldout)
    _add_out(heldout)
    heldout.set_defaults(run=_heldout)


def _add_generated(parser: argparse.ArgumentParser, things: str, folder: str) -> None:
    parser.add_argument("npz", type=Path, metavar="NPZ", help=f"Generated {things}: a file of `pomscale sample --npz`")
    parser.add_argument(
        "--train",
        type=Path,
        default=Path(folder, "train"),
        metavar="DIR",
        help=f"Directory with the {things} that were trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--heldout",
        type=Path,
        default=Path(folder, "heldout"),
        metavar="DIR",
        help=f"Directory with {things} that were not trained on (default: %(default)s)",
    )
    _add_out(parser)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="File that also receives the figures, as JSON")


def _heldout(arguments: argparse.Namespace) -> int:
    from pomscale.base.files import check_can_be_written, write_text

    with large_imports():
        from pomscale.evaluation.heldout import measure_heldout

    if arguments.out:
        check_can_be_written(arguments.out)
    loss, space = measure_heldout(
        arguments.model,
        data=arguments.data,
        text=arguments.text,
        num_samples=arguments.num_samples,
        num_time_bins=arguments.num_time_bins,
        weights=arguments.weights,
        device=arguments.device,
    )
    own = {"space": space, "mean": loss.mean, "by_bin": loss.by_bin}
    figures = json.dumps({**own, "v_mean": loss.v_mean, "v_by_bin": loss.v_by_bin})
    print(figures)
    if arguments.out:
        write_text(arguments.out, figures)
    return 0


def _digits(arguments: argparse.Namespace) -> int:
    with large_imports():
        from pomscale.evaluation.digits import evaluate_digits

    return _evaluate_generated(evaluate_digits, arguments)


def _moving_digits(arguments: argparse.Namespace) -> int:
    with large_imports():
        from pomscale.evaluation.moving_digits import evaluate_moving_digits

    return _evaluate_generated(evaluate_moving_digits, arguments)


def _evaluate_generated(evaluate: Any, arguments: argparse.Namespace) -> int:
    from pomscale.base.files import check_can_be_written, write_text

    if arguments.out:
        check_can_be_written(arguments.out)
    report = evaluate(arguments.npz, arguments.train, arguments.heldout)
    print(report.table())
    if arguments.out:
        write_text(arguments.out, report.to_json())
    return 0
