"""Lines of `bench gpu-acceptance`: their verdicts, and their measurements on the CPU at small sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pomscale.benchmarks.gpu_acceptance import Target, Verdict, bench_gpu_acceptance, targets, verdicts
from pomscale.benchmarks.gpu_acceptance_lines import H200, Sizes, official_over_ours
from pomscale.benchmarks.operators.official import Official
from pomscale.cli import main
from pomscale.ops.pom.dispatch import CannotServeError

CPU = torch.device("cpu")
SMALL = Sizes(
    dtype="fp32",
    dim=16,
    heads=4,
    batch=2,
    aggregated_tokens=64,
    official_tokens=(8, 16),
    product_tokens=(16,),
    heads_tokens=(8, 16),
    tokens_at_once=32,
    checked_dim=16,
    checked=((7, "fp32"),),
    recipe="image/dipom-s-2",
    overrides=(
        *("model.dim=16", "model.depth=1", "model.latent_shape=[4, 8, 8]", "model.num_classes=8", "model.num_heads=2"),
        *("training.global_batch=2", "training.micro_batch=1", "training.total_samples=1000"),
        *("schedule.cooldown_samples=0", "compute.precision=fp32", "compute.device=cpu"),
    ),
    num_turns=1,
)


def run(*lines: Target, seconds: float = 60.0) -> list[Verdict]:
    return list(verdicts(lines, seconds))


def measured(value: float) -> Any:
    return lambda: (value, {"a figure": value})


def failing(error: Exception) -> Any:
    def measure() -> tuple[float, dict[str, Any]]:
        raise error

    return measure


RIGHT = Target("wrong paths", 0, measured(0), at_least=False)


@pytest.mark.parametrize(
    ("value", "at_least", "passed"), [(0.6, True, True), (0.59, True, False), (0.6, False, True), (0.61, False, False)]
)
def test_a_value_is_compared_with_the_wanted_one(value: float, at_least: bool, passed: bool) -> None:
    verdict = run(RIGHT, Target("share", 0.6, measured(value), at_least))[1]
    assert verdict.passed is passed
    assert str(verdict).startswith("PASS" if passed else "FAIL")
    assert ("at least 0.6" if at_least else "at most 0.6") in str(verdict)


def test_no_value_that_is_not_a_number_passes() -> None:
    assert run(RIGHT, Target("share", 0.6, measured(float("nan"))))[1].passed is False


def test_an_error_fails_its_own_line_alone() -> None:
    _, failed, passed = run(RIGHT, Target("a", 1, failing(RuntimeError("no kernel"))), Target("b", 1, measured(2)))
    assert (failed.passed, failed.value) == (False, None)
    assert "no kernel" in str(failed)
    assert passed.passed is True


def test_a_line_without_its_rival_is_neither_passed_nor_failed() -> None:
    verdict = run(RIGHT, Target("a", 1, failing(CannotServeError("no checkout"))))[1]
    assert verdict.passed is None
    assert str(verdict).startswith("not run")


@pytest.mark.parametrize("first", [measured(1), failing(RuntimeError("crash"))])
def test_nothing_is_measured_of_paths_that_are_wrong(first: Any) -> None:
    found = run(Target("wrong paths", 0, first, at_least=False), Target("speed", 1, measured(9)))
    assert [verdict.passed for verdict in found] == [False, False]
    assert found[1].value is None


def test_a_line_that_does_not_begin_in_time_has_failed() -> None:
    verdict = run(RIGHT, seconds=-1.0)[0]
    assert verdict.passed is False
    assert "not begun" in str(verdict)


def test_lines_of_an_h200_are_the_targets() -> None:
    lines = targets(CPU, Official(), H200)
    assert [line.wanted for line in lines] == [0, 0.6, 0.3, 5, 10, 1, 1, 0.45]
    assert lines[0].at_least is False
    assert (min(H200.official_tokens), min(H200.product_tokens), min(H200.heads_tokens)) == (1024, 4096, 256)
    assert (H200.batch, H200.heads, H200.recipe) == (4, 16, "image/dipom-xl-2")


def test_all_lines_are_measured_on_a_cpu() -> None:
    report = bench_gpu_acceptance(CPU, Official(), seconds=300.0, sizes=SMALL)
    rows = {row["what"]: row for row in report.rows}
    assert list(rows) == [line.what for line in targets(CPU, Official(), SMALL)]
    first, *others = rows.values()
    assert (first["value"], first["passed"]) == (0, True)
    for row in others:
        if "authors" in row["what"]:
            assert (row["value"], row["passed"]) == (None, None)
            assert "--official" in row["reason"]
        else:
            assert row["value"] > 0
            assert row["passed"] is (row["value"] >= row["wanted"])
    assert report.failures == [what for what, row in rows.items() if row["passed"] is False]
    heads = next(row for what, row in rows.items() if "4 heads" in what)
    assert list(heads["details"]) == ["N = 8, B = 4, against attention", "N = 16, B = 2, against attention"]
    assert heads["value"] == min(heads["details"].values())


def plain_aggregation(u: torch.Tensor, coefficients: torch.Tensor, degree: int) -> torch.Tensor:
    v = torch.nn.functional.leaky_relu(u, 0.01).clamp(-0.1, 6.0)
    return sum(coefficients[:, power - 1] * v**power for power in range(1, degree + 1)).mean(1, keepdim=True)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_the_authors_aggregation_is_compared_first(which: str) -> None:
    value, ratios = official_over_ours(which, SMALL, CPU, Official(aggregate=plain_aggregation))
    assert list(ratios) == ["N = 8", "N = 16"]
    assert value == min(ratios.values())
    assert value > 0
    wrong = Official(aggregate=lambda u, coefficients, degree: 1.001 * plain_aggregation(u, coefficients, degree))
    with pytest.raises(RuntimeError, match="differ by"):
        official_over_ours(which, SMALL, CPU, wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_machine_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "gpu-acceptance"])
    assert ended.value.code == 2
    assert "no GPU" in capsys.readouterr().err
