"""The whole mixer as one operator against linear maps around the oracle: every form, mask and memory, all gradients."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from pomscale.benchmarks.storage_tracker import StorageTracker
from pomscale.layers import PoM
from pomscale.ops.pom import BlockCausal, Context, Form, Mask, Queries, Segments, polynomial_mixer
from pomscale.ops.pom.whole import Memory, Weights, layout, mix, native
from pomscale.ops.pom.whole.kernels import TorchKernels
from support.pairs import every_pair

BATCH, TOKENS, QUERIES, DIM = 3, 23, 7, 12
FORMS: dict[str, dict[str, Any]] = {
    "product-1": {"degree": 1},
    "product-3": {"degree": 3, "bias": False},
    "coefficients-2": {"form": "coefficients", "degree": 2, "bias": True},
    "coefficients-3-heads": {"form": "coefficients", "degree": 3, "heads": 4},
    "rope-2": {"form": "coefficients", "degree": 2, "rope": 2},
    "rope-3-heads": {"form": "coefficients", "degree": 1, "heads": 6, "rope": 3},
}
WIDE_FORMS: dict[str, dict[str, Any]] = {  # of 60 channels
    "product-8": {"degree": 8, "expand": 1},
    "a-head-per-channel": {"form": "coefficients", "degree": 2, "expand": 1, "heads": 60},
}
PADDING = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
PADDING[-1] = False  # one sample has no context at all
MASKS: dict[str, tuple[int | None, int, Mask]] = {  # queries (None: self), context tokens, mask
    "none": (None, TOKENS, None),
    "cross": (QUERIES, TOKENS, None),
    "cross-empty": (QUERIES, 0, None),
    "no-queries": (0, TOKENS, None),
    "padding": (None, TOKENS, PADDING),
    "cross-padding": (QUERIES, TOKENS, PADDING),
    "causal": (None, TOKENS, "causal"),
    "cross-causal": (TOKENS, TOKENS, "causal"),
    "frames-1": (None, TOKENS, BlockCausal(1)),
    "frames-4": (None, TOKENS, BlockCausal(4)),
    "frames-100": (None, TOKENS, BlockCausal(100)),
    "segments": (None, TOKENS, Segments([5, 0, 18])),
    "cross-segments": (QUERIES, TOKENS, Segments([5, 0, 2], [11, 12, 0])),
    "segments-causal": (None, TOKENS, Segments([5, 0, 18], inner="causal")),
    "segments-frames": (None, TOKENS, Segments([5, 0, 18], inner=BlockCausal(4))),
}
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the few tokens of a test into chunks whose ends fall inside samples, frames and segments."""
    monkeypatch.setattr(layout, "CHUNK_ROWS", 7)


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("POMSCALE_NATIVE", "1" if request.param == "native" else "0")
    native.native_library.cache_clear()
    yield request.param
    native.native_library.cache_clear()


def mixer(form: dict[str, Any], dtype: torch.dtype) -> PoM:
    built, generator = PoM(DIM, expand=2, **form).to(dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return built


def weights(of: PoM) -> Weights:
    maps = [getattr(m, kind) for m in (of.projection, of.gate, of.output) for kind in ("weight", "bias")]
    return Weights(*maps, of.coefficients)


def operands(mask: str, form: Form, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Return x, and context in a cross mixer, and the positions."""
    num_queries, num_context, _ = MASKS[mask]
    generator = torch.Generator().manual_seed(2)
    lengths = [num_context] if num_queries is None else [num_queries, num_context]
    inputs = [
        torch.randn(BATCH, n, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in lengths
    ]
    positions: dict[str, Any] = {"positions": None, "context_positions": None}
    if form.rope is not None:
        positions["positions"] = torch.randint(0, 9, (lengths[0], form.rope), generator=generator)
        if num_queries is not None:
            shape = (BATCH, num_context, form.rope)
            positions["context_positions"] = torch.randint(0, 9, shape, generator=generator)
    return inputs, positions


def oracle(of: PoM, inputs: list[Tensor], mask: Mask, positions: Any, context_positions: Any) -> Tensor:
    x, context = inputs[0], inputs[-1]
    read = Context(
        F.linear(context, of.projection.weight, of.projection.bias),
        of.form,
        of.coefficients,
        positions if len(inputs) == 1 else context_positions,
    )
    return of.output(polynomial_mixer(read, Queries(of.gate(x), positions), mask, implementation="naive"))


def output_and_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [
        float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))
        for ours, theirs in zip(found, expected, strict=True)
    ]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert max(errors(found, expected)) < tolerance


@pytest.mark.parametrize(("form", "mask", "dtype"), every_pair(list(FORMS), list(MASKS), list(TOLERANCES)))
def test_equals_oracle(form: str, mask: str, dtype: torch.dtype) -> None:
    of, exact = mixer(FORMS[form], dtype), mixer(FORMS[form], torch.float64)
    inputs, positions = operands(mask, of.form, dtype)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact.load_state_dict(of.state_dict())
    expected = output_and_gradients(
        oracle(exact, exact_inputs, MASKS[mask][2], **positions), [*exact_inputs, *exact.parameters()]
    )
    leaves, limits = [*inputs, *of.parameters()], [TOLERANCES[dtype]] * len(expected)
    if dtype == torch.bfloat16:
        # Where u or a gate is rounded across a corner of its activation, its gradient jumps, in any implementation.
        layered = output_and_gradients(_layered(of, inputs, MASKS[mask][2], **positions), leaves)
        limits = [max(TOLERANCES[dtype], 1.1 * error) for error in errors(layered, expected)]
    for memory in ("fast", "lean"):
        y = mix(inputs[0], *_context(inputs), weights(of), of.form, MASKS[mask][2], **positions, memory=memory)
        found = output_and_gradients(y, leaves)
        assert all(tensor.dtype == dtype for tensor in found)
        for error, limit in zip(errors(found, expected), limits, strict=True):
            assert error < limit


def _layered(of: PoM, inputs: list[Tensor], mask: Mask, positions: Any, context_positions: Any) -> Tensor:
    x, context = inputs[0], inputs[-1]
    read = Context(
        of.projection(context), of.form, of.coefficients, positions if len(inputs) == 1 else context_positions
    )
    return of.output(polynomial_mixer(read, Queries(of.gate(x), positions), mask))


def _context(inputs: list[Tensor]) -> list[Tensor | None]:
    return [inputs[1] if len(inputs) == 2 else None]


@pytest.mark.parametrize("mask", ["none", "cross-padding", "causal", "frames-4", "segments-causal"])
@pytest.mark.parametrize("form", [*FORMS, *WIDE_FORMS])
def test_both_kinds_of_kernels_equal_the_oracle_in_fp32(form: str, mask: str, kernels: str) -> None:
    how = {"expand": 2, **{**FORMS, **WIDE_FORMS}[form]}
    of = PoM(DIM * 5, **how)  # wider than a vector of the processor, and no multiple of one
    exact = PoM(DIM * 5, **how).double()
    exact.load_state_dict(of.state_dict())
    inputs, positions = operands(mask, of.form, torch.float64)
    exact_inputs = [tensor.detach().repeat(1, 1, 5).requires_grad_() for tensor in inputs]
    leaves = [tensor.detach().float().requires_grad_() for tensor in exact_inputs]
    expected = output_and_gradients(
        oracle(exact, exact_inputs, MASKS[mask][2], **positions), [*exact_inputs, *exact.parameters()]
    )
    y = mix(leaves[0], *_context(leaves), weights(of), of.form, MASKS[mask][2], **positions)
    assert_equal(output_and_gradients(y, [*leaves, *of.parameters()]), expected, 1e-5)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "frames-4"])
def test_only_the_gradients_that_are_needed(mask: str, memory: Memory) -> None:
    of = mixer(FORMS["coefficients-2"], torch.float64)
    (x,), _ = operands(mask, of.form, torch.float64)
    of.mixer_memory = memory
    names = [*dict(of.named_parameters()), "x"]
    every = dict(zip(names, output_and_gradients(of(x, mask=MASKS[mask][2]), [*of.parameters(), x])[1:], strict=True))
    for name in names:
        of.requires_grad_(False)
        leaf = x if name == "x" else of.get_parameter(name)
        source = x.detach()
        leaf.requires_grad_()
        y = of(x if name == "x" else source, mask=MASKS[mask][2])
        assert torch.equal(output_and_gradients(y, [leaf])[1], every[name]), name


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("mask", ["none", "causal", "frames-4"])
def test_strided_tokens_and_gradients(mask: str, memory: Memory) -> None:
    of = mixer(FORMS["product-3"], torch.float32)
    of.mixer_memory = memory
    wide = torch.randn(TOKENS, BATCH, 2 * DIM, generator=torch.Generator().manual_seed(4))
    strided = wide.transpose(0, 1)[..., ::2].requires_grad_()
    plain = strided.detach().contiguous().requires_grad_()
    found, expected = (of(tokens, mask=MASKS[mask][2]) for tokens in (strided, plain))
    torch.testing.assert_close(found, expected)
    # The gradient of a sum is one number with strides of 0.
    ours, theirs = (
        torch.autograd.grad(y.sum(), [t, *of.parameters()]) for y, t in ((found, strided), (expected, plain))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_padded_tokens_of_the_context_reaches_nothing(dtype: torch.dtype, kernels: str) -> None:
    of = mixer(FORMS["product-3"], dtype)
    (x, context), _ = operands("cross-padding", of.form, dtype)
    results = []
    for filling in (0.0, float("nan")):
        leaf = context.detach().masked_fill(~PADDING[..., None], filling).requires_grad_()
        results.append(output_and_gradients(of(x, leaf, PADDING), [x, leaf, *of.parameters()]))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
        assert bool(clean.isfinite().all())


def test_nan_in_tokens_that_take_part_stays(kernels: str) -> None:
    of, tokens = mixer(FORMS["product-3"], torch.float32), torch.zeros(1, TOKENS, DIM)
    tokens[0, 3] = float("nan")
    assert bool(of(tokens).isnan().all())
    assert of(tokens, mask="causal").isnan().any(2).tolist() == [[False] * 3 + [True] * (TOKENS - 3)]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_repeated_runs_give_the_same_bits(kernels: str) -> None:
    of, x = PoM(40), torch.randn(2, 900, 40, generator=torch.Generator().manual_seed(5)).requires_grad_()
    with threads(1):
        first, second = (output_and_gradients(of(x), [x, *of.parameters()]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sums_in_cpp_are_those_of_any_number_of_threads() -> None:
    """Threads share the channels, each of which is summed by one."""
    library = native.native_library()
    assert library is not None, "the tests need a C++ compiler"
    u, totals = torch.randn(900, 160, generator=torch.Generator().manual_seed(6)), []
    for number in (1, 2, 3):
        with threads(number):
            totals.append(torch.zeros(160))
            native.NativeKernels(library, PoM(40).form, None).add_features(u, native.Rows(), totals[-1])
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotary_kernels_in_cpp_equal_those_in_pytorch(axes: Literal[1, 2, 3], per_row: bool) -> None:
    """Widths are such that blocks of pairs end inside of an axis, and vectors are not full."""
    library, generator = native.native_library(), torch.Generator().manual_seed(8)
    assert library is not None, "the tests need a C++ compiler"
    form, rows, width = Form("coefficients", 3, 4, axes), 150, 812
    u, dh = (2 * torch.randn(2, rows, width, generator=generator)).unbind()
    coefficients = torch.randn(width, 3, generator=generator)
    positions = torch.randint(-3, 40, (rows, axes), generator=generator)
    positions[7] = 100_000
    turns = native.Turns.of(positions, width)
    of_rows = native.Rows(torch.rand(rows, generator=generator) < 0.8, positions, turns.index)
    found = []
    for kernels in (
        native.NativeKernels(library, form, coefficients, turns),
        TorchKernels(form, coefficients, torch.float32, torch.device("cpu")),
    ):
        total, h, du, dcoefficients = (torch.zeros(shape) for shape in ((width,), u.shape, u.shape, (width, 3)))
        for first, last in ((0, 64), (64, rows)):
            part = of_rows.part(first, last)
            kernels.add_features(u[first:last], part, total)
            kernels.features(u[first:last], part, h[first:last])
            gradient = dh[first:last] if per_row else dh[:1]
            kernels.features_backward(u[first:last], part, gradient, du[first:last], dcoefficients)
        h[~of_rows.takes_part] = 0  # type: ignore[operator]  # rows that take no part are not written
        found.append([total, h, du, dcoefficients])
    assert max(errors(*found)) < 1e-6


# --- memory and work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "most"), [("fast", 2.95), ("lean", 1.0)])
@pytest.mark.parametrize("mask", [None, BlockCausal(512)], ids=["none", "frames"])
def test_nothing_of_the_size_of_u_is_made_beside_what_is_kept(
    mask: Mask, memory: Memory, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_ROWS", 256)
    of, x = PoM(32), torch.randn(1, 4096, 32, requires_grad=True)
    of.mixer_memory = memory
    unit = 4096 * 128 * 4
    with torch.no_grad(), StorageTracker([x, *of.parameters()]) as tracker:
        held = tracker.live
        of(x, mask=mask)
    assert (tracker.peak - held) / unit < 0.45
    with StorageTracker([x, *of.parameters()]) as tracker:
        y = of(x, mask=mask)
        gradients = torch.autograd.grad(y, [x, *of.parameters()], torch.ones_like(y))
    assert (tracker.peak - held) / unit < most + 0.25  # the gradient of y is counted, too
    del gradients


@pytest.mark.parametrize("form", ["product-3", "coefficients-3-heads"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_flops_are_those_of_the_products_that_run(form: str, memory: Memory) -> None:
    of = mixer(FORMS[form], torch.float32)
    of.mixer_memory = memory
    x = torch.randn(BATCH, TOKENS, DIM, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = of(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    rows, maps = BATCH * TOKENS, [m.weight.numel() for m in (of.projection, of.gate, of.output)]
    again = 2 * rows * (maps[0] + maps[1]) if memory == "lean" else 0
    if form == "product-3":
        assert forward.get_total_flops() == 2 * rows * sum(maps)
        assert backward.get_total_flops() == 4 * rows * sum(maps) + again
    else:  # the output map reads the states of three samples, and their heads are read by the tokens
        of_states, of_heads = BATCH * maps[2], rows * of.form.heads * DIM
        assert forward.get_total_flops() == 2 * (rows * (maps[0] + maps[1]) + of_states + of_heads)
        expected = 4 * rows * (maps[0] + maps[1]) + 2 * (2 * of_heads + 3 * of_states) + again
        assert backward.get_total_flops() == expected


# --- what must see through it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "cross-padding", "causal", "segments-frames"])
def test_operators_pass_the_checks_of_torch(mask: str) -> None:
    of = mixer(FORMS["coefficients-3-heads"], torch.float64)
    inputs, _ = operands(mask, of.form, torch.float64)
    calls: list[tuple[Any, ...]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "pomscale":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        of(inputs[0], *inputs[1:], mask=MASKS[mask][2]).sum().backward()
    assert [call[0].name() for call in calls] == ["pomscale::mix", "pomscale::mix_backward"]
    for func, args in calls:
        detached = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), args)
        torch.library.opcheck(func, detached, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_compiles_and_exports_without_graph_breaks(memory: Memory) -> None:
    torch.compiler.reset()
    of, x = mixer(FORMS["product-3"], torch.float32), torch.randn(BATCH, TOKENS, DIM)
    of.mixer_memory = memory
    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
    leaf = x.requires_grad_()
    found = output_and_gradients(compiled(leaf, mask=BlockCausal(4)), [leaf, *of.parameters()])
    expected = output_and_gradients(of(leaf, mask=BlockCausal(4)), [leaf, *of.parameters()])
    torch.testing.assert_close(found, expected)
    exported = torch.export.export(of, (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), of(x).detach())


@pytest.mark.parametrize(
    "change",
    [
        lambda of: of.gate.register_forward_hook(lambda *_: None),
        lambda of: of.gate.register_full_backward_hook(lambda *_: None),
        lambda of: setattr(of.output, "forward", of.output.forward),
        lambda of: setattr(of, "projection", torch.nn.Sequential(of.projection)),
    ],
    ids=["hook", "backward hook", "another forward", "another map"],
)
def test_what_is_not_plain_takes_the_layered_path_with_the_same_result(change: Any) -> None:
    of, x = mixer(FORMS["product-3"], torch.float64), torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    assert of._is_whole(x, None)
    expected = of(x)
    change(of)
    assert not of._is_whole(x, None)
    torch.testing.assert_close(of(x), expected, rtol=1e-12, atol=1e-14)


def test_positions_of_a_context_count_in_a_self_mixer_too() -> None:
    of, x = mixer(FORMS["rope-2"], torch.float64), torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    positions = torch.arange(2 * TOKENS).view(TOKENS, 2)
    expected = oracle(of, [x, x], None, positions, positions + 3)
    torch.testing.assert_close(of(x, positions=positions, context_positions=positions + 3), expected)


def test_forward_mode_and_vmap_go_through_the_layer() -> None:
    of, generator = mixer(FORMS["coefficients-3-heads"], torch.float64), torch.Generator().manual_seed(7)
    x, dx = torch.randn(2, BATCH, TOKENS, DIM, generator=generator, dtype=torch.float64)
    _, tangent = torch.func.jvp(of, (x,), (dx,))
    differences = (of(x + 1e-6 * dx) - of(x - 1e-6 * dx)) / 2e-6
    # Between the two points a token may cross a corner of the activation.
    assert (tangent - differences).norm() < 1e-4 * differences.norm()
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(of(forward_ad.make_dual(x, dx)))
    torch.testing.assert_close(dual.tangent, tangent)
    torch.testing.assert_close(torch.func.vmap(lambda one: of(one[None])[0])(x), of(x))


# --- bad input, and no compiler --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(BATCH, TOKENS, TOKENS, dtype=torch.bool)}, "polynomial_mixer alone"),
        ({"mask": torch.ones(BATCH, TOKENS + 1, dtype=torch.bool)}, "shape"),
        ({"mask": Segments([3])}, "must add up to the 23 tokens, got 3"),
        ({"context": torch.zeros(BATCH, TOKENS, DIM + 1)}, "projection: expected a weight of shape"),
        ({"context": torch.zeros(1, TOKENS, DIM)}, "expected x"),
        ({"form": Form(degree=2)}, "degree: 2 does not divide"),
        ({"form": Form("coefficients")}, "coefficients: expected a weight of shape"),
        ({"positions": torch.zeros(TOKENS, 1, dtype=torch.int64)}, "without rope"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    of = PoM(9, degree=3, expand=1) if change.get("form") == Form(degree=2) else PoM(DIM, degree=3, expand=1)
    call = {
        "x": torch.zeros(BATCH, TOKENS, of.gate.in_features),
        "context": None,
        "form": of.form,
        "mask": None,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        mix(weights=weights(of), **call)


def test_a_missing_compiler_is_said_and_can_be_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("POMSCALE_NATIVE", raising=False)
    native.native_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no-compiler.*PyTorch serve"):
            assert native.native_library() is None
        native.native_library.cache_clear()
        monkeypatch.setenv("POMSCALE_NATIVE", "1")
        with pytest.raises(RuntimeError, match="cannot be compiled"):
            native.native_library()
        monkeypatch.setenv("POMSCALE_NATIVE", "yes")
        with pytest.raises(ValueError, match="expected 0 or 1"):
            native.native_library()
    finally:
        native.native_library.cache_clear()


def test_a_user_without_a_home_folder_is_served_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("XDG_CACHE_HOME", "POMSCALE_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    native.native_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="home directory.*PyTorch serve"):
            assert native.native_library() is None
    finally:
        native.native_library.cache_clear()


def test_the_compiled_kernels_are_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (made,) = {native._compiled() for _ in range(2)}
    assert [path.name for path in (tmp_path / "pomscale").iterdir()] == [made.name]
    monkeypatch.setattr(native, "_FLAGS", ["-no-such-flag"])
    with pytest.raises(subprocess.CalledProcessError):
        native._compiled()
    assert [path.name for path in (tmp_path / "pomscale").iterdir()] == [made.name]  # nothing half-made is left
