"""The Triton path against the oracle, outputs and every gradient, and what its kernels compile to.

Without a GPU the kernels are interpreted (tests/conftest.py), about a millisecond for each operation on a token: sizes
are tiny, and items of 4 tokens stand for those of 64. The interpreter hides what only hardware shows: races, and wrong
hints about alignment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from pomscale.ops.pom import (
    BlockCausal,
    Context,
    Form,
    Mask,
    PomState,
    Queries,
    Segments,
    dispatch,
    polynomial_mixer,
    polynomial_mixer_step,
)
from pomscale.ops.pom.triton_path import layout
from support.paths import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, TOKENS, WIDTH = 2, 9, 12

V1, V2 = Form(degree=2), Form("coefficients", 2)
PADDING = torch.tensor([[True, False, True, True, False, True, True, False, True], [False] * 9])
FRAMES, PACKED = BlockCausal(4), Segments((4, 0, 5))
CROSS = Segments((2, 3, 2), context_lengths=(5, 0, 4))

# Every mask with one form, then every form with masks of either kind of kernel.
CASES: list[tuple[Form, Mask, int]] = [
    (V1, None, TOKENS),
    (V1, None, 3),
    (V1, PADDING, TOKENS),
    (V1, PADDING, 3),
    (V1, "causal", TOKENS),
    (V1, FRAMES, TOKENS),
    (V1, BlockCausal(100), TOKENS),
    (V1, PACKED, TOKENS),
    (V1, Segments((4, 0, 5), inner="causal"), TOKENS),
    (V1, Segments((4, 0, 5), inner=BlockCausal(3)), TOKENS),
    (V1, CROSS, 7),
    (Form(degree=1), None, TOKENS),
    (Form(degree=3), "causal", TOKENS),
    (Form(degree=4), FRAMES, TOKENS),
    (Form(degree=6), None, 3),
    (Form("coefficients", 1), PADDING, TOKENS),
    (Form("coefficients", 3), "causal", TOKENS),
    (Form("coefficients", 5), FRAMES, TOKENS),
    (Form("coefficients", 2, rope=1), "causal", TOKENS),
    (Form("coefficients", 1, rope=2), None, 5),
    (Form("coefficients", 2, rope=3), FRAMES, TOKENS),
    (Form("coefficients", 2, heads=4), None, 5),
    (Form("coefficients", 2, heads=4), "causal", TOKENS),
    (Form("coefficients", 2, heads=4), CROSS, 7),
    (Form("coefficients", 1, heads=2, rope=1), "causal", TOKENS),
    (Form("coefficients", 1, heads=6, rope=3), Segments((4, 0, 5), inner=BlockCausal(3)), TOKENS),
]


@pytest.fixture(autouse=True)
def _short_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHORTEST_ITEM", 4)


@pytest.fixture(autouse=True, scope="module")
def _interpreter_patches_once() -> Iterator[None]:
    """Let the interpreter patch triton.language once; it does so anew, and at length, in each call of a function."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter  # noqa: PLC0415

    namespace = {"tl": tl, "core": tl.core}
    scope = interpreter._patch_lang(types.FunctionType((lambda: None).__code__, namespace))
    with pytest.MonkeyPatch.context() as monkeypatch:
        nothing = types.SimpleNamespace(restore=lambda: None)
        monkeypatch.setattr(interpreter, "_patch_lang", lambda function: nothing)
        yield
    scope.restore()


def strided(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Return values of which some are beyond all clamps, in a view whose rows are apart and not aligned."""
    generator = torch.Generator().manual_seed(seed)
    whole = 3 * torch.randn(*shape[:-1], shape[-1] + 3, generator=generator, dtype=torch.float64)
    return whole.to(DEVICE, dtype)[..., 1:-2].requires_grad_()


def operands(form: Form, num_queries: int, dtype: torch.dtype) -> tuple[Context, Queries]:
    def positions(num_tokens: int, seed: int) -> Tensor | None:
        if form.rope is None:
            return None
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-50, 50, (BATCH, num_tokens, form.rope), generator=generator).to(DEVICE)

    is_product = form.name == "product"
    context = Context(
        strided((BATCH, TOKENS, WIDTH), 1, dtype),
        form,
        None if is_product else strided((WIDTH, form.degree), 2, dtype),
        positions(TOKENS, 3),
    )
    gate = strided((BATCH, num_queries, form.num_gates(WIDTH)), 4, dtype)
    return context, Queries(gate, positions(num_queries, 5), strided((5, WIDTH), 6, dtype) if form.heads > 1 else None)


def in_float64(context: Context, queries: Queries) -> tuple[Context, Queries]:
    def copy(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().requires_grad_()

    return (
        replace(context, u=copy(context.u), coefficients=copy(context.coefficients)),
        replace(queries, gate=copy(queries.gate), output=copy(queries.output)),
    )


def results(context: Context, queries: Queries, mask: Mask, implementation: Any) -> dict[str, Tensor]:
    y = polynomial_mixer(context, queries, mask, implementation=implementation)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    leaves = {"u": context.u, "gate": queries.gate, "coefficients": context.coefficients, "output": queries.output}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream.to(DEVICE, y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        assert found[name].shape == theirs.shape
        error = (found[name].double() - theirs).norm() / theirs.norm().clamp(min=1e-30)
        assert error < tolerance, name


def on_device(mask: Mask) -> Mask:
    return mask.to(DEVICE) if isinstance(mask, Tensor) else mask


@pytest.mark.parametrize(("form", "mask", "num_queries"), CASES)
def test_equals_oracle(form: Form, mask: Mask, num_queries: int) -> None:
    context, queries = operands(form, num_queries, torch.float32)
    found = results(context, queries, on_device(mask), "triton")
    assert_equal(found, results(*in_float64(context, queries), on_device(mask), "naive"), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("form", "mask"),
    [
        (V1, PADDING),
        (V1, "causal"),
        (Form("coefficients", 2, heads=4), FRAMES),
        (Form("coefficients", 3, rope=2), PADDING),
        (Form("coefficients", 1, rope=1), "causal"),
    ],
)
def test_half_precision_is_rounded_once(form: Form, mask: Mask, dtype: torch.dtype) -> None:
    context, queries = operands(form, TOKENS, dtype)
    found = results(context, queries, on_device(mask), "triton")
    assert {x.dtype for x in found.values()} == {dtype}
    assert_equal(found, results(*in_float64(context, queries), on_device(mask), "naive"), 2e-2)


@pytest.mark.parametrize("mask", [None, "causal"], ids=str)
def test_repeated_runs_give_the_same_bits(mask: Mask) -> None:
    context, queries = operands(V2, TOKENS, torch.float32)
    first, second = (results(context, queries, mask, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nan_of_padded_tokens_goes_nowhere_and_others_are_not_hidden() -> None:
    context, queries = operands(V2, 3, torch.float32)
    clean = results(context, queries, PADDING.to(DEVICE), "triton")
    with torch.no_grad():
        context.u[0, 1] = float("nan")
    found = results(context, queries, PADDING.to(DEVICE), "triton")
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    assert polynomial_mixer(context, queries, implementation="triton")[0].isnan().all()


@pytest.mark.parametrize(
    "mask", [None, PADDING[:, :5], "causal", BlockCausal(2)], ids=["none", "padding", "causal", "frames"]
)
def test_step_carries_the_state(mask: Mask) -> None:
    context, queries = operands(V1, TOKENS, torch.float32)
    context, queries = replace(context, u=context.u[:, :5]), replace(queries, gate=queries.gate[:, :5])
    past = PomState(strided((BATCH, WIDTH), 8, torch.float32), torch.tensor([4, 1], device=DEVICE))
    found = polynomial_mixer_step(context, queries, past, on_device(mask), implementation="triton")
    expected = polynomial_mixer_step(context, queries, past, on_device(mask), implementation="naive")
    torch.testing.assert_close(found[1].count, expected[1].count)
    leaves = (context.u, queries.gate, past.sum)
    outputs = [
        [y, state.sum, *torch.autograd.grad(y.sum() + (state.sum**2).sum(), leaves)] for y, state in (found, expected)
    ]
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [None, "causal", FRAMES], ids=str)
def test_no_tokens(mask: Mask) -> None:
    u, gate = torch.ones(BATCH, 0, WIDTH, device=DEVICE), torch.ones(BATCH, 0 if mask else 3, WIDTH, device=DEVICE)
    y = polynomial_mixer(Context(u, V1), Queries(gate), mask, implementation="triton")
    assert torch.equal(y, torch.zeros_like(gate))


def test_compiles_without_graph_breaks() -> None:
    context, queries = operands(V2, TOKENS, torch.float32)

    def mix(u: Tensor, gate: Tensor, mask: Mask) -> Tensor:
        operands = replace(context, u=u), replace(queries, gate=gate)
        return polynomial_mixer(*operands, mask, implementation="triton")

    compiled = torch.compile(mix, backend="aot_eager", fullgraph=True)
    for mask in (None, "causal"):
        y = compiled(context.u, queries.gate, mask)
        expected = results(context, queries, mask, "triton")
        torch.testing.assert_close(y, expected["y"])
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        torch.testing.assert_close(torch.autograd.grad(y, context.u, upstream.to(y))[0], expected["u"])


@pytest.mark.parametrize(
    ("implementation", "change", "message"),
    [
        ("triton", {"dtype": torch.float64}, r"triton path .* fp32, and u is torch.float64"),
        ("triton", {"mask": torch.ones(BATCH, TOKENS, TOKENS, dtype=torch.bool)}, r"no masks \(b m n\)"),
        ("triton", {"device": "meta"}, "needs tensors on CUDA, and u is on meta"),
        ("fast", {}, "POMSCALE_POM: expected one of naive, torch, triton, got 'fast'"),
    ],
)
def test_a_path_that_cannot_serve_raises(
    monkeypatch: pytest.MonkeyPatch, implementation: str, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(dispatch, "_FORCED", implementation)
    u = torch.ones(BATCH, TOKENS, WIDTH, dtype=change.get("dtype"), device=change.get("device"))
    with pytest.raises(ValueError, match=message):
        polynomial_mixer(Context(u, V1), Queries(u), change.get("mask"))


@pytest.mark.parametrize("position", [0, 1, 3, 1000, 4095, -77_777])
def test_angles_are_those_of_the_other_paths(position: int) -> None:
    """One token through open gates leaves the rotation, by the kernel's own cosine and sine."""
    form = Form("coefficients", 1, rope=1)
    u = torch.ones(1, 1, 24, device=DEVICE)
    coefficients, where = torch.ones(24, 1, device=DEVICE), torch.full((1, 1), position, device=DEVICE)
    context, queries = Context(u, form, coefficients, where), Queries(100 * u, torch.zeros_like(where))
    found, expected = (polynomial_mixer(context, queries, implementation=name) for name in ("triton", "naive"))
    # The interpreter rounds where the compiled kernel fuses, which shows in the largest angles.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if abs(position) < 5000 else 1e-4)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_gelu_is_exact() -> None:
    """One token through open gates leaves GELU by the kernel's own normal distribution."""
    extremes = [1e30, -1e30, float("inf"), -float("inf"), float("nan")]
    u = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor(extremes)]).to(DEVICE)[None, None]
    found = polynomial_mixer(Context(u, Form(degree=1)), Queries(torch.full_like(u, 100)), implementation="triton")
    expected = torch.nn.functional.gelu(u.double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=2e-7, equal_nan=True)


@pytest.fixture(
    scope="module", params=[pytest.param((), id="some"), pytest.param(("all",), id="all", marks=pytest.mark.exhaustive)]
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "support.triton_compiling", *request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_load_16_bytes_and_spill_nothing(compiled: list[dict[str, Any]]) -> None:
    assert len(compiled) >= 24
    for one in compiled:
        assert one["spilled"] == 0, one
        assert one["loads"][0] == 128, one
        # A sum over the tokens of an item is stored once, two pairs by each thread.
        of_sums = {"sum_items": 32, "aggregate": 64 if "rotary" in one["form"] else 128}
        assert one["stores"][0] == of_sums.get(one["kernel"], 128), one


def test_aggregations_leave_room_for_many_threads(compiled: list[dict[str, Any]]) -> None:
    """Hold 64 registers, which are half of an SM's threads at once."""
    for one in compiled:
        is_aggregation = one["kernel"] in ("aggregate", "sum_items", "running_sums")
        assert one["registers"] <= (64 if is_aggregation else 254), one
