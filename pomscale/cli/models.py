"""Verbs for trained models: sample, evaluate, export, import, ema."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.base.imports import large_imports
from pomscale.cli import clips, record, vbench
from pomscale.cli.arguments import finite, positive, seed

_WEIGHTS = "ema (what stands for the model), model (as last trained), or the name of an average"


def add(verbs: Any) -> None:
    """The verbs."""
    _add_sample(verbs)
    _add_evaluate(verbs)
    _add_export(verbs)
    _add_import(verbs)
    _add_ema(verbs)


def _add_sample(verbs: Any) -> None:
    sample = verbs.add_parser("sample", help="draw pictures or clips from a trained model")
    sample.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    sample.add_argument("--classes", help="class ids, e.g. 0,5,7-9, or all (default: those of the recipe's grid)")
    sample.add_argument(
        "--num", type=positive, help="pictures per class (default 8), clips per prompt (default: the recipe's)"
    )
    sample.add_argument("--sampler", choices=["ddim", "euler", "heun"], help="default: as the recipe says")
    sample.add_argument("--steps", type=positive, help="default: as the recipe says")
    sample.add_argument("--guidance", type=finite, help="w in pred_c + w (pred_c - pred_u); default: the recipe's")
    sample.add_argument("--seed", type=seed, default=0, help="picture or clip i has seed + i (default 0)")
    sample.add_argument(
        "--batch",
        type=positive,
        default=64,
        help="does not change the pictures (default 64); clips made frame by frame grow all together",
    )
    sample.add_argument("--weights", default="ema", help=f"{_WEIGHTS} (default ema)")
    sample.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    sample.add_argument("--codec-path", help="folder of the codec's weights on this machine, if they have moved")
    sample.add_argument(
        "--out",
        type=Path,
        help="PNG grid, one row per class (default grid.png); clips: NAME.mp4 with all of them, one row per prompt "
        "(default clips.mp4), or a folder, with one file per clip",
    )
    sample.add_argument(
        "--npz", type=Path, help="also write pictures (uint8 n h w c), classes and seeds; or clips (n f h w c), prompts"
    )
    clips.add_to_sample(sample)
    vbench.add_to_sample(sample)
    sample.set_defaults(run=_sample)


def _add_evaluate(verbs: Any) -> None:
    evaluate = verbs.add_parser("evaluate", help="measure a trained model")
    evaluate_verbs = evaluate.add_subparsers(metavar="VERB", required=True)
    heldout = evaluate_verbs.add_parser("heldout", help="held-out loss by time bin, noise fixed")
    heldout.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    heldout.add_argument("--data", help="dataset; default: the recipe's validation.path")
    heldout.add_argument("--text", help="companion set with its texts; default: its own, or the recipe's")
    heldout.add_argument("--num-samples", type=positive, help="default: the recipe's, or 1024")
    heldout.add_argument("--num-time-bins", type=positive, help="default: the recipe's, or 8")
    heldout.add_argument("--weights", default="ema", help=f"{_WEIGHTS} (default ema)")
    heldout.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    heldout.add_argument("--out", type=Path, help="also write the figures as JSON")
    heldout.set_defaults(run=_evaluate_heldout)
    digits = evaluate_verbs.add_parser("digits", help="are generated digits recognised, and are they no copies?")
    digits.add_argument("npz", type=Path, help="from pomscale sample --npz")
    digits.add_argument("--train", type=Path, default=Path("data/digits/train"), help="pictures trained on")
    digits.add_argument("--heldout", type=Path, default=Path("data/digits/heldout"), help="pictures not trained on")
    digits.add_argument("--out", type=Path, help="also write the figures as JSON")
    digits.set_defaults(run=_evaluate_digits)
    moving = evaluate_verbs.add_parser("moving-digits", help="do clips show the digit and direction asked for?")
    moving.add_argument("npz", type=Path, help="from pomscale sample --npz")
    moving.add_argument("--train", type=Path, default=Path("data/moving-digits/train"), help="clips trained on")
    moving.add_argument("--heldout", type=Path, default=Path("data/moving-digits/heldout"), help="clips not trained on")
    moving.add_argument("--out", type=Path, help="also write the figures as JSON")
    moving.set_defaults(run=_evaluate_moving_digits)
    record.add(evaluate_verbs)
    vbench.add(evaluate_verbs)


def _add_export(verbs: Any) -> None:
    export = verbs.add_parser("export", help="weights as safetensors with a config, for load_pretrained anywhere")
    export.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    export.add_argument("--out", type=Path, required=True, help="new folder")
    export.add_argument("--weights", default="ema", help=f"{_WEIGHTS} (default ema)")
    export.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    export.set_defaults(run=_export)


def _add_import(verbs: Any) -> None:
    homm = verbs.add_parser("import", help="a Lightning checkpoint of davidpicard/HoMM, for load_pretrained")
    homm.add_argument("file", type=Path, metavar="FILE", help="of ClassConditionalDiH or ClassConditionalDiT")
    homm.add_argument("--out", type=Path, required=True, help="new folder")
    homm.add_argument("--degree", type=positive, default=2, help="DiH: degree of the polynomial (default 2)")
    homm.add_argument("--heads", type=positive, help="DiT: attention heads (default: of the published model)")
    homm.add_argument("--latent-size", type=positive, default=32, help="side of the latents (default 32)")
    homm.add_argument("--objective", choices=["eps", "flow"], default="eps", help="theirs: eps, or fm = flow")
    homm.add_argument("--codec-path", help="folder of the VAE, whose weights are then recorded")
    homm.set_defaults(run=_import)


def _add_ema(verbs: Any) -> None:
    ema = verbs.add_parser("ema", help="an average of any length, from the snapshots of a run (ema.post_hoc)")
    ema.add_argument("run_folder", type=Path, metavar="RUN")
    length = ema.add_mutually_exclusive_group(required=True)
    length.add_argument("--width", type=finite, help="of a power function: sigma_rel of EDM2, e.g. 0.07")
    length.add_argument("--halflife-samples", type=positive, help="of an exponential")
    ema.add_argument("--samples", type=positive, help="ends at the last snapshot up to these (default: at the last)")
    ema.add_argument("--out", type=Path, required=True, help="new folder, for load_pretrained")
    ema.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    ema.set_defaults(run=_ema)


def _sample(arguments: argparse.Namespace) -> int:
    if arguments.vbench is not None:
        return vbench.sample(arguments)
    vbench.refuse(arguments)

    with large_imports():
        from pomscale.pretrained.load import PretrainedVDiPoM, load_pretrained
        from pomscale.sampling.pictures import draw_pictures

    model = load_pretrained(
        arguments.model,
        weights=arguments.weights,
        device=arguments.device,
        codec_path=arguments.codec_path,
        text_path=arguments.text_path,
    )
    if isinstance(model, PretrainedVDiPoM):
        return clips.sample(arguments, model)
    clips.refuse(arguments)
    draw_pictures(
        model,
        parse_classes(arguments.classes, model.config.num_classes) if arguments.classes else None,
        num_each=arguments.num or 8,
        seed=arguments.seed,
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=arguments.guidance,
        batch=arguments.batch,
        out=arguments.out or Path("grid.png"),
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
    from pomscale.base.files import check_can_be_written, write_text

    with large_imports():
        from pomscale.evaluation.measure import measure_heldout

    if arguments.out:
        check_can_be_written(arguments.out)
    loss = measure_heldout(
        arguments.model,
        data=arguments.data,
        text=arguments.text,
        num_samples=arguments.num_samples,
        num_time_bins=arguments.num_time_bins,
        weights=arguments.weights,
        device=arguments.device,
    )
    figures = json.dumps({"mean": loss.mean, "by_bin": loss.by_bin})
    print(figures)
    if arguments.out:
        write_text(arguments.out, figures)
    return 0


def _evaluate_digits(arguments: argparse.Namespace) -> int:
    from pomscale.base.files import check_can_be_written, write_text

    with large_imports():
        from pomscale.evaluation.digits import evaluate_digits

    if arguments.out:
        check_can_be_written(arguments.out)
    report = evaluate_digits(arguments.npz, arguments.train, arguments.heldout)
    print(report.table())
    if arguments.out:
        write_text(arguments.out, report.to_json())
    return 0


def _evaluate_moving_digits(arguments: argparse.Namespace) -> int:
    from pomscale.base.files import check_can_be_written, write_text

    with large_imports():
        from pomscale.evaluation.moving_digits import evaluate_moving_digits

    if arguments.out:
        check_can_be_written(arguments.out)
    report = evaluate_moving_digits(arguments.npz, arguments.train, arguments.heldout)
    print(report.table())
    if arguments.out:
        write_text(arguments.out, report.to_json())
    return 0


def _export(arguments: argparse.Namespace) -> int:
    with large_imports():
        from pomscale.pretrained.export import export

    export(arguments.model, arguments.out, weights=arguments.weights, dtype=arguments.dtype)
    print(f"wrote {arguments.out}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    with large_imports():
        from pomscale.pretrained.homm import import_homm

    imported = import_homm(
        arguments.file,
        arguments.out,
        degree=arguments.degree,
        heads=arguments.heads,
        latent_size=arguments.latent_size,
        objective=arguments.objective,
        codec_path=arguments.codec_path,
    )
    print(imported)
    return 0


def _ema(arguments: argparse.Namespace) -> int:
    with large_imports():
        from pomscale.pretrained.post_hoc_ema import export_post_hoc

    average = export_post_hoc(
        arguments.run_folder,
        arguments.out,
        width=arguments.width,
        halflife_samples=arguments.halflife_samples,
        samples=arguments.samples,
        dtype=arguments.dtype,
    )
    print(f"{average}; wrote {arguments.out}")
    return 0
