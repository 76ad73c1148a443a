"""One line of progress for all processes that share a work, and an ETA at the rate of all of them."""

from __future__ import annotations

import pytest

from pomscale.base import console, shared_progress
from pomscale.base.shared_progress import SharedProgress


class Work:
    """A work of 100 items in parts of 10, and a clock that the test sets."""

    def __init__(self) -> None:
        self.now_s, self.recorded = 1000.0, 0

    def monotonic(self) -> float:
        return self.now_s

    def opened(self, num_processes: int) -> SharedProgress:
        return SharedProgress("pictures", 100, lambda: self.recorded, num_processes, every_s=0.0)

    def make_part(self, progress: SharedProgress, seconds: float, by_others: int = 0) -> None:
        """Let this process make a part in two batches, and the others record as many items meanwhile."""
        for _ in range(2):
            self.now_s += seconds / 2
            progress.advance(5)
        self.recorded += 10 + by_others
        progress.end_part()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()
    for module in (console, shared_progress):
        monkeypatch.setattr(module, "time", work)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    return work


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_one_process_counts_its_batches(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    with work.opened(1) as progress:
        work.make_part(progress, 4.0)
        work.make_part(progress, 4.0)
    assert lines(capsys) == [
        *("pictures: 5 of 100, 0.4 s each, ETA 38s", "pictures: 10 of 100, 0.4 s each, ETA 36s"),
        "pictures: 10 of 100, 0.4 s each, ETA 36s",
        *("pictures: 15 of 100, 0.4 s each, ETA 34s", "pictures: 20 of 100, 0.4 s each, ETA 32s"),
        "pictures: 20 of 100, 0.4 s each, ETA 32s",
    ]


def test_four_processes_have_the_eta_of_four_from_the_first_batch_on(work: Work) -> None:
    with work.opened(4) as progress:
        work.now_s += 2.0
        progress.advance(5)
        assert progress.eta_s == pytest.approx(95 / 10), "the others are as fast, before anybody can know"
        work.now_s += 2.0
        progress.advance(5)
        work.recorded = 40  # all four have made a part in 4 s
        progress.end_part()
        assert (progress.num_done, progress.eta_s) == (40, pytest.approx(60 / 10))
        work.now_s += 2.0
        progress.advance(5)
        assert progress.eta_s == pytest.approx(55 / 10), "parts at hand take nothing from the rate"


def test_slower_processes_count_with_what_they_do(work: Work) -> None:
    """Nine of ten tasks have not begun yet: the first guess is wrong, and the first part of another one mends it."""
    with work.opened(10) as progress:
        work.make_part(progress, 4.0)
        assert progress.rate_per_s == pytest.approx(25.0)
        work.make_part(progress, 4.0, by_others=10)
        assert progress.rate_per_s == pytest.approx(30 / 8)


def test_what_was_recorded_before_is_done_and_not_in_the_rate(work: Work) -> None:
    work.recorded = 50
    with work.opened(1) as progress:
        assert progress.num_done == 50
        work.make_part(progress, 5.0)
        assert (progress.num_done, progress.rate_per_s, progress.eta_s) == (60, pytest.approx(2.0), pytest.approx(20.0))


def test_records_that_were_deleted_in_the_end_stay_counted(work: Work) -> None:
    with work.opened(2) as progress:
        work.make_part(progress, 4.0, by_others=80)
        work.recorded = 0  # the last one has put the parts together
        progress.end_part()
        assert progress.num_done == 90


@pytest.mark.parametrize(
    ("name", "value", "speaks"), [("LOCAL_RANK", "0", True), ("LOCAL_RANK", "1", False), ("SLURM_LOCALID", "3", False)]
)
def test_the_first_of_a_machine_speaks_for_all(
    work: Work,
    name: str,
    value: str,
    speaks: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    with work.opened(2) as progress:
        work.make_part(progress, 4.0)
    assert bool(lines(capsys)) == speaks
