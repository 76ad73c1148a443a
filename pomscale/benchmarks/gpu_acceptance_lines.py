"""Measurements of `pomscale bench gpu-acceptance`; each returns its value and the figures that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pomscale.benchmarks.operators.cases import DTYPES, Case, DtypeLabel, FormLabel, MaskLabel
from pomscale.benchmarks.operators.contenders import ATTENTION, FLOOR, OURS, PLAIN, contenders
from pomscale.benchmarks.operators.gate import TOLERANCES, check
from pomscale.benchmarks.operators.measurer import Measurer
from pomscale.benchmarks.operators.official import Official
from pomscale.benchmarks.operators.timing import Times, measured, take_turns
from pomscale.benchmarks.plan import real_step
from pomscale.config.load import load_train_recipe
from pomscale.distributed.world import join_world
from pomscale.ops.pom import Context, Form, Queries, polynomial_mixer
from pomscale.ops.pom.dispatch import CannotServeError
from pomscale.plan import training_flops

_PEAK_FLOPS = 989e12  # dense bf16 of an H200's data sheet
_FORMS: tuple[FormLabel, ...] = ("product", "coefficients", "heads", "rope")
_MASKS: tuple[MaskLabel, ...] = ("none", "causal", "block-causal", "padding", "segments")


@dataclass(frozen=True)
class Sizes:
    """Sizes of all measurements.

    Attributes:
        dtype: Type of all but the checks.
        dim: Width of the tokens.
        heads: Selection heads.
        batch: Samples, where the authors' kernels are compared, and of the aggregations.
        aggregated_tokens: Tokens of a sample where bandwidth is measured: many times the caches.
        official_tokens: Tokens of a sample where the authors' kernels are compared.
        product_tokens: Tokens where the mixer of v1 is compared with attention.
        heads_tokens: Tokens where the mixer of v2 is.
        tokens_at_once: Tokens of all samples together, where mixers are compared.
        checked_dim: Width of the checks.
        checked: Tokens and dtype of the checks.
        recipe: Shipped recipe whose training step is measured.
        overrides: Changes to the recipe.
        num_turns: Turns; the least time counts.
    """

    dtype: DtypeLabel
    dim: int
    heads: int
    batch: int
    aggregated_tokens: int
    official_tokens: tuple[int, ...]
    product_tokens: tuple[int, ...]
    heads_tokens: tuple[int, ...]
    tokens_at_once: int
    checked_dim: int
    checked: tuple[tuple[int, DtypeLabel], ...]
    recipe: str
    overrides: tuple[str, ...]
    num_turns: int


H200 = Sizes(
    dtype="bf16",
    dim=1152,
    heads=16,
    batch=4,
    aggregated_tokens=16384,
    official_tokens=(1024, 4096, 16384),
    product_tokens=(4096, 16384),
    heads_tokens=(256, 1024, 4096, 16384),
    tokens_at_once=32768,
    checked_dim=192,
    checked=((67, "fp32"), (67, "bf16"), (1025, "bf16")),
    recipe="image/dipom-xl-2",
    overrides=("compute.compile=true",),
    num_turns=9,
)


def wrong_results(sizes: Sizes, device: torch.device, official: Official) -> tuple[float, dict[str, Any]]:
    """Count the results that are wrong: every contender but the compiled, in every form and mask, of two samples."""
    wrong, num_compared, refused = {}, 0, {}
    for form in _FORMS:
        for mask in _MASKS:
            for num_tokens, dtype in sizes.checked:
                case = Case(num_tokens, sizes.checked_dim, form, heads=sizes.heads, mask=mask, batch=2, dtype=dtype)
                for contender in contenders(official, device, with_compiled=False):
                    found = check(contender, case, device)
                    if found.refused is not None and contender.name != OURS:
                        refused[f"{case}, {contender.name}"] = str(found)
                    elif not found.passed:
                        wrong[f"{case}, {contender.name}"] = str(found)
                    num_compared += found.refused is None
    return len(wrong), {"results compared": num_compared, "refused": len(refused), **refused, **wrong}


def aggregation_of_copy(form: FormLabel, sizes: Sizes, device: torch.device) -> tuple[float, dict[str, Any]]:
    """Return the bandwidth at which the features of all tokens are averaged, over that of a copy of the same tensor.

    The aggregation is the operator with one query per sample; it reads what the copy reads and writes next to nothing.
    """
    case = Case(sizes.aggregated_tokens, sizes.dim, form, batch=sizes.batch, dtype=sizes.dtype)
    context, queries = _one_query(case, device)
    target = torch.empty_like(context.u)

    def aggregate() -> None:
        with torch.no_grad():
            polynomial_mixer(context, queries)

    steps: dict[str, Callable[[], object]] = {"aggregation": aggregate, "copy": lambda: target.copy_(context.u)}
    for step in steps.values():
        step()
    times = take_turns(steps, device, sizes.num_turns)
    size = context.u.nbytes
    read, copied = size / times["aggregation"].busy_s, 2 * size / times["copy"].busy_s
    return read / copied, {"aggregation, TB/s": read / 1e12, "copy, TB/s": copied / 1e12}


def official_over_ours(
    which: str, sizes: Sizes, device: torch.device, official: Official
) -> tuple[float, dict[str, Any]]:
    """Return the time of the authors' aggregation of v2 over ours, forward or backward, the least over all N."""
    theirs = official.aggregate
    if theirs is None:
        raise CannotServeError("no checkout of davidpicard/pom was given with --official")
    ratios = {}
    for num_tokens in sizes.official_tokens:
        case = Case(num_tokens, sizes.dim, "coefficients", batch=sizes.batch, dtype=sizes.dtype)
        context, queries = _one_query(case, device)
        assert context.coefficients is not None
        leaves = context.u.requires_grad_(), context.coefficients.requires_grad_()
        calls: dict[str, Callable[[], Tensor]] = {
            "ours": partial(polynomial_mixer, context, queries),
            "authors": partial(theirs, *leaves, case.degree),
        }
        ours, expected = (call().detach().double() for call in calls.values())
        error = float((ours - expected).norm() / expected.norm())
        if not error <= TOLERANCES[case.dtype]:
            raise RuntimeError(f"N = {num_tokens}: ours and theirs differ by {error:.1e}")
        grad = torch.randn_like(ours).to(context.u.dtype)
        least: dict[str, Times] = {}
        for _ in range(sizes.num_turns):
            for name, call in calls.items():
                times = _one_pass(which, call, grad, device)
                least[name] = least[name] | times if name in least else times
                for leaf in leaves:
                    leaf.grad = None
        ratios[f"N = {num_tokens}"] = least["authors"].busy_s / least["ours"].busy_s
    return min(ratios.values()), ratios


def _one_pass(which: str, call: Callable[[], Tensor], grad: Tensor, device: torch.device) -> Times:
    """Return the times of the forward pass as training runs it, or of the backward pass alone."""
    if which == "forward":
        return measured(call, device)
    result = call()
    return measured(lambda: result.backward(grad), device)


def _one_query(case: Case, device: torch.device) -> tuple[Context, Queries]:
    """Return random tokens, and one query per sample with its gates fully open in the coefficient form."""
    dtype = DTYPES[case.dtype]
    u = torch.randn(case.batch, case.num_tokens, case.num_channels, device=device).to(dtype)
    gate = torch.full((case.batch, 1, case.num_channels), 10.0, device=device, dtype=dtype)
    if case.form == "product":
        return Context(u, Form("product", case.degree)), Queries(gate)
    coefficients = torch.randn(case.num_channels, case.degree, device=device).to(dtype)
    return Context(u, Form("coefficients", case.degree), coefficients), Queries(gate)


def attention_over_ours(
    form: FormLabel, tokens: tuple[int, ...], sizes: Sizes, device: torch.device
) -> tuple[float, dict[str, Any]]:
    """Return the time of forward and backward of the fastest attention layer over that of ours, the least over all N.

    Samples are as many as make `tokens_at_once` tokens, at least one.
    """
    chosen = [one for one in contenders(Official(), device) if one.name in (FLOOR, OURS) or ATTENTION in one.name]
    measurer = Measurer([one for one in chosen if one.name != PLAIN], device, sizes.num_turns)
    ratios: dict[str, Any] = {}
    for num_tokens in tokens:
        batch = max(1, sizes.tokens_at_once // num_tokens)
        case = Case(num_tokens, sizes.dim, form, heads=sizes.heads, batch=batch, dtype=sizes.dtype)
        rows = {row.contender: row for row in measurer.measure(case)}
        if not rows[OURS].times:
            raise RuntimeError(f"{case}: {rows[OURS].check}")
        found = {name: row.times["training"].busy_s for name, row in rows.items() if ATTENTION in name and row.times}
        if not found:
            raise RuntimeError(f"{case}: no backend of attention serves it")
        best = min(found, key=lambda name: found[name])
        ratios[f"N = {num_tokens}, B = {batch}, against {best}"] = found[best] / rows[OURS].times["training"].busy_s
    return min(ratios.values()), ratios


def training_mfu(sizes: Sizes, device: torch.device) -> tuple[float, dict[str, Any]]:
    """Return the MFU of whole steps of a recipe as the engine runs them on one device, of 989 TFLOP/s."""
    recipe = load_train_recipe(sizes.recipe, list(sizes.overrides))
    with join_world(device.type) as world:
        _, step = real_step(recipe, world)
        for _ in range(2):
            step()  # compiles and warms up
        step_s = take_turns({"step": step}, device, sizes.num_turns)["step"].wall_s
    per_s = recipe.samples_per_step / step_s
    figures = {"samples/s": per_s, "step, s": step_s, "micro-batch": recipe.training.micro_batch}
    return per_s * training_flops(recipe.model) / _PEAK_FLOPS, figures
