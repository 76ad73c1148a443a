"""`bench ops`: checks that gate every figure, memory, budget, what is kept; on small sizes."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.benchmarks.memory import peak_allocated_bytes
from pomscale.benchmarks.operators import figures, sweep
from pomscale.benchmarks.operators.cases import Case, DtypeLabel, FormLabel, MaskLabel
from pomscale.benchmarks.operators.contenders import FLOOR, LAYERED, OFFICIAL, OURS, PLAIN, Contender, contenders
from pomscale.benchmarks.operators.entries import CompiledPlain, Entry, Gemms, Ours
from pomscale.benchmarks.operators.gate import check
from pomscale.benchmarks.operators.measurer import PASSES, Measurer
from pomscale.benchmarks.operators.official import Official, load_official
from pomscale.benchmarks.operators.sweep import Sweep, add_rows, bench_operators
from pomscale.benchmarks.operators.timing import Times, take_turns
from pomscale.benchmarks.report import BenchReport
from pomscale.cli import bench_mixer, main
from pomscale.cli.bench import _run
from pomscale.ops.pom import Segments, dispatch
from pomscale.ops.pom.dispatch import CannotServeError
from support.pairs import every_pair

CPU = torch.device("cpu")
SMALL = Case(12, 16, heads=4, batch=2)
FORMS: tuple[FormLabel, ...] = ("product", "coefficients", "heads", "rope")
MASKS: tuple[MaskLabel, ...] = ("none", "causal", "block-causal", "padding", "segments")

# A layer with the parameters and the equations of HoM, whose name and file are those of a checkout.
HOMM = """
import torch
from torch import nn

class HoM(nn.Module):
    def __init__(self, dim, order, order_expand):
        super().__init__()
        self.order, width = order, order * order_expand * dim
        self.ho_proj, self.se_proj, self.ag_proj = nn.Linear(dim, width), nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, xq, xc=None, mask=None):
        h = list(nn.functional.gelu(self.ho_proj(xq)).chunk(self.order, dim=-1))
        for number in range(1, self.order):
            h[number] = h[number] * h[number - 1]
        h = torch.cat(h, dim=-1)
        if mask is None:
            h = h.mean(1, keepdim=True)
        else:
            mask = mask[:, None] if mask.dim() == 2 else mask
            h = mask.to(h.dtype) @ h / (1e-7 + mask.sum(2, keepdim=True))
        return self.ag_proj(torch.sigmoid(self.se_proj(xq)) * h)
"""


def homm_checkout(folder: Path, text: str = HOMM) -> Path:
    file = folder / "src/model/network/layers.py"
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("form", "mask", "dtype"), every_pair(FORMS, MASKS, ["fp64", "fp32", "bf16"]))
def test_every_contender_passes_its_check(form: FormLabel, mask: MaskLabel, dtype: DtypeLabel) -> None:
    case = replace(SMALL, form=form, mask=mask, dtype=dtype)
    for contender in contenders(Official(), CPU):
        with torch.compiler.set_stance("force_eager"):  # compiling takes seconds
            found = check(contender, case, CPU)
        if contender.name in (FLOOR, OURS, LAYERED, PLAIN, "attention"):
            assert found.passed, f"{contender.name}: {found}"
        assert not found.failed, f"{contender.name}: {found}"


@pytest.mark.slow
def test_the_compiled_plain_form_is_right() -> None:
    assert check(Contender(PLAIN, CompiledPlain), SMALL, CPU).passed


class Scaled(Ours):
    """A layer whose output and gradients are a tenth of a thousandth too large."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.0001 * super().forward(x)


class WrongGradient(torch.autograd.Function):
    """Identity with a wrong gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 1.0001 * grad


class Backward(Ours):
    """A layer whose gradient alone is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(WrongGradient.apply(x))


class NotANumber(Ours):
    """A layer that gives NaN for one channel."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y[..., :1] * float("nan"), y[..., 1:]], dim=-1)


class Forgetful(Ours):
    """A layer that gives its gate's weights no gradient."""

    def gradients(self) -> dict[str, Tensor]:
        return {name: grad for name, grad in super().gradients().items() if "gate" not in name}


class Crash(Ours):
    """A layer that fails."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (Scaled, ""),
        (Backward, "gradient of x"),
        (NotANumber, ""),
        (Forgetful, "layer.gate.weight"),
        (Crash, "no such kernel"),
    ],
)
def test_a_wrong_contender_is_reported_and_not_measured(make: Callable[..., Entry], where: str) -> None:
    rows = Measurer([Contender(FLOOR, Gemms), Contender("wrong", make)], CPU, 1).measure(SMALL)
    right, wrong = rows
    assert right.check.passed
    assert right.times.keys() == set(PASSES)
    assert wrong.check.failed
    assert where in str(wrong.check)
    assert not wrong.times
    report = BenchReport("test")
    add_rows(report, SMALL, rows)
    assert len(report.failures) == 1
    assert _run(Namespace(measure=lambda _: report, out=None)) == 1


class WrongBeyondAChunk(Ours):
    """A layer that forgets the tokens after the first thousand."""

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.layer(x, context=x[:, :1024], context_positions=None)
        return mixed


def test_what_may_take_chunks_is_checked_beyond_one() -> None:
    contender = Contender("wrong", WrongBeyondAChunk)
    assert Measurer([contender], CPU, 1).measure(SMALL)[0].check.passed
    assert Measurer([replace(contender, in_chunks=True)], CPU, 1).measure(SMALL)[0].check.failed
    assert {one.name for one in contenders(Official(), CPU) if one.in_chunks} >= {OURS, LAYERED}


def test_a_contender_that_refuses_is_listed_and_no_failure() -> None:
    def refuse(case: Case, device: torch.device) -> Entry:
        raise CannotServeError("no form for it")

    rows = Measurer([Contender("a", refuse)], CPU, 1).measure(SMALL)
    assert [str(row.check) for row in rows] == ["left out: no form for it"]
    report = BenchReport("test")
    add_rows(report, SMALL, rows)
    assert not report.failures


def test_a_value_error_of_a_layer_is_a_failure() -> None:
    class Broken(Ours):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("expected (b n d)")

    rows = Measurer([Contender("ours", Broken)], CPU, 1).measure(SMALL)
    report = BenchReport("test")
    add_rows(report, SMALL, rows)
    assert [str(row.check) for row in rows] == ["FAILED: ValueError: expected (b n d)"]
    assert len(report.failures) == 1


def test_a_path_that_cannot_serve_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_FORCED", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = check(Contender("ours", Ours), SMALL, CPU)
    assert str(found).startswith(
        "left out: the triton path of the Polynomial Mixer cannot serve: it needs tensors on CUDA"
    )


def test_sizes_that_no_layer_has_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(InputError, match=r"d 16, form heads: .*do not divide"):
        Sweep((12,), dim=(16,), form=("heads",), heads=5).cases()


def test_the_oracle_is_left_out_of_long_sequences() -> None:
    naive = next(one for one in contenders(Official(), CPU) if one.name == "layered, naive")
    with pytest.raises(CannotServeError, match="512 tokens"):
        naive.build(replace(SMALL, num_tokens=513), CPU)
    assert naive.build(replace(SMALL, num_tokens=512), CPU).case.num_tokens == 512


# --- the authors' layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_official_layers_come_from_a_folder(tmp_path: Path, mask: MaskLabel) -> None:
    official = load_official([homm_checkout(tmp_path)])
    found = {one.name: one for one in contenders(official, CPU)}
    assert check(found[OFFICIAL], replace(SMALL, mask=mask), CPU).passed
    refused = check(found[OFFICIAL], replace(SMALL, mask=mask, form="heads"), CPU)
    assert "davidpicard/pom" in str(refused)


def test_official_layers_that_differ_from_ours_are_reported(tmp_path: Path) -> None:
    official = load_official([homm_checkout(tmp_path, HOMM.replace("sigmoid", "tanh"))])
    found = {one.name: one for one in contenders(official, CPU)}
    assert check(found[OFFICIAL], SMALL, CPU).failed


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="davidpicard/HoMM"):
        load_official([tmp_path])
    with pytest.raises(SystemExit) as ended:
        main(["bench", "ops", "--official", str(tmp_path)])
    assert ended.value.code == 2
    assert not any(one.name.startswith("official") for one in contenders(Official(), CPU))
    capsys.readouterr()


# --- figures ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pomscale_test::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """Double x, by way of a tensor four times as large."""
    return x.repeat(4)[: x.numel()] * 2


def test_memory_counts_what_an_operator_makes_within_itself() -> None:
    x = torch.ones(1000)
    for step, most in (
        (lambda: opaque(x), 5000),
        (lambda: (x + 1, x + 2), 2000),
        (lambda: torch.stack([x + 1 for _ in range(5)]), 10000),
        (lambda: [(x + 1).sum().item() for _ in range(5)], 1000),  # each is gone before the next is made
    ):
        # Scalars have a few bytes each.
        assert peak_allocated_bytes(step, CPU) == pytest.approx(4 * most, abs=64)


def test_memory_is_in_units_of_the_pre_activations() -> None:
    case = replace(SMALL, num_tokens=512, batch=1)
    floor = Measurer([Contender(FLOOR, Gemms)], CPU, 1).measure(case)[0]
    # Projection and gate are a unit each, and the output a quarter of one for degree 2 and expand 2.
    assert floor.peak_units["forward"] == pytest.approx(2.25, abs=0.01) or floor.peak_units["forward"] == pytest.approx(
        1.25, abs=0.01
    )
    assert floor.over_floor == {"forward": 1.0, "training": 1.0}


def test_the_least_time_of_each_step_counts() -> None:
    calls: list[str] = []
    times = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, CPU, 3)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert times.keys() == {"a", "b"}
    assert Times(1.0, 4.0) | Times(2.0, 3.0) == Times(1.0, 3.0)


def test_cases_vary_one_setting_at_a_time() -> None:
    cases = Sweep((64, 16), dim=(16, 32), form=FORMS, mask=("none", "padding"), batch=(1, 2)).cases()
    base = Case(16, 16)
    assert len(cases) == 2 * (1 + 1 + 3 + 1 + 1)
    assert cases[0] == base
    for case in cases:
        fields = ("dim", "form", "mask", "batch", "degree", "expand", "dtype")
        assert sum(getattr(case, name) != getattr(base, name) for name in fields) <= 1
    sizes = [case.batch * case.num_tokens for case in cases]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("num_tokens", [1, 4, 67, 100])
def test_masks_and_positions_fit_their_case(num_tokens: int) -> None:
    for mask in MASKS:
        for form in FORMS:
            case = replace(SMALL, num_tokens=num_tokens, mask=mask, form=form)
            assert Ours(case, CPU).prepared()(case.make_input(CPU)).shape == (2, num_tokens, 16)
    positions = replace(SMALL, num_tokens=num_tokens, form="rope").make_positions(CPU)
    assert positions is not None
    assert len(set(map(tuple, positions.tolist()))) == num_tokens
    segments = replace(SMALL, num_tokens=num_tokens, mask="segments").make_mask(CPU)
    assert isinstance(segments, Segments)
    assert sum(segments.lengths) == num_tokens


TINY = Sweep((8, 16), dim=(16,), form=("product", "heads"), mask=("none", "causal"), heads=4)


def run(tmp_path: Path, seconds: float = 1e6) -> BenchReport:
    out, plot = tmp_path / "ops.json", tmp_path / "ops.png"
    return bench_operators(TINY, Official(), CPU, with_compiled=False, num_turns=2, seconds=seconds, out=out, plot=plot)


def test_a_sweep_writes_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path)
    assert not report.failures
    content = json.loads((tmp_path / "ops.json").read_text())
    assert content["rows"] == report.rows
    assert content["versions"]["torch"]
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    rows = {(row["num_tokens"], row["form"], row["mask"], row["contender"]): row for row in report.rows}
    for case in TINY.cases():
        for name in (FLOOR, OURS, LAYERED, "attention"):
            row = rows[case.num_tokens, case.form, case.mask, name]
            assert row["error"] <= 1e-5
            assert row["training_over_gemms"] > 0
            assert row["training_peak_units"] > row["forward_peak_units"] > 0
    assert str(TINY.cases()[0]) in capsys.readouterr().out
    assert "--official" in " ".join(report.notes)


def test_a_budget_that_has_ended_leaves_cases_out_by_name(tmp_path: Path) -> None:
    report = run(tmp_path, seconds=0.0)
    assert not report.rows
    for case in TINY.cases():
        assert any(note.startswith(str(case)) and "--seconds" in note for note in report.notes)


def test_ctrl_c_keeps_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Gemms):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if x.shape[1] == 16:
                raise KeyboardInterrupt
            return super().forward(x)

    monkeypatch.setattr(sweep, "contenders", lambda *_, **__: [Contender(FLOOR, Interrupted)])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    assert [row["num_tokens"] for row in rows] == [8, 8, 8]
    assert (tmp_path / "ops.png").exists()


def test_a_case_that_does_not_fit_in_memory_is_left_out() -> None:
    with pytest.raises(CannotServeError, match="GiB"):
        Measurer([Contender(FLOOR, Gemms)], CPU, 1).measure(replace(SMALL, num_tokens=10**12))


def test_choices_of_the_command_are_those_of_the_cases() -> None:
    assert bench_mixer._FORMS == FORMS
    assert bench_mixer._MASKS == MASKS
    assert set(bench_mixer._DTYPES) == {"fp64", "fp32", "bf16"}


def test_every_figure_has_its_line() -> None:
    report = BenchReport("test")
    measurer = Measurer(contenders(Official(), CPU, with_compiled=False), CPU, 1)

    def measure(case: Case) -> figures._Rows:
        small = replace(case, num_tokens=case.num_tokens // 64, dim=16)
        return {row.contender: row for row in measurer.measure(small)}

    figures._product(report, measure)
    figures._causal(report, measure)
    figures._heads(report, measure)
    figures._memory(report, measure)
    wanted = [
        float(line.split("at least " if "at least" in line else "at most ")[1].split(":")[0])
        for line in report.verdicts
    ]
    expected = [0.041, 0.041, 0.08, 0.08, 0.2, 0.2, 0.08, 0.1, 0.65, 0.9, 1.02, 1.02, 0.45, 2.9]
    assert [number for number in wanted if number in expected][: len(expected)] == expected


def test_the_operator_and_the_einsum_agree() -> None:
    case = replace(SMALL, num_tokens=40, mask="block-causal")
    steps = figures.operator_steps(case, case.make_mask(CPU), CPU)
    for one in PASSES:
        torch.testing.assert_close(steps["ours", one](), steps["einsum", one]())


def test_steps_of_a_network_run() -> None:
    steps = figures.step_of_a_network("dipom-s-2", (4, 4, 4), 1, CPU)
    assert {OURS, LAYERED} <= steps.keys()
    for step in steps.values():
        step()
