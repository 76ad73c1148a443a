"""The logs of ranks, over all starts of a run. Written here as guards do; tests/slurm has real ones."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from launch.record.job import JobSpec, StartRecord, Verdict, keep, log_path, start_folder
from launch.status import logs
from launch.status.logs import show_logs
from pomscale.base.errors import InputError
from pomscale.runs.layout import JOB_FILE
from support.running import wait_until

HEADER = "===== start {} on n1, 2026-11-21T18:02:03+00:00 =====\n$ pomscale train r.yaml\n"


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    """Two ranks, started twice; each has printed 100 lines in each start."""
    keep(tmp_path / JOB_FILE, JobSpec(str(tmp_path), "x", [["train", "r.yaml"]], "/", is_run=True))
    for rank in range(2):
        path = log_path(tmp_path, rank)
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            for restart in range(2):
                file.write(HEADER.format(f"12-{restart}"))
                file.writelines(f"start {restart}, line {line}\n" for line in range(100))
    for restart in range(2):
        keep(
            start_folder(tmp_path, "12", restart) / "start.json",
            StartRecord("12", restart, ["n1"], 2, float(restart), 0),
        )
    return tmp_path


def shown(job_folder: Path, **options: object) -> list[str]:
    lines: list[str] = []
    wanted: dict[str, object] = {"rank": 0, "lines": None, "start": None, "follow": False}
    show_logs(job_folder, show=lines.append, **(wanted | options))  # type: ignore[arg-type]
    return lines


def test_the_last_lines_of_rank_0(job_folder: Path) -> None:
    assert shown(job_folder) == [f"start 1, line {line}" for line in range(50, 100)]
    assert shown(job_folder, lines=3) == [f"start 1, line {line}" for line in (97, 98, 99)]
    assert len(shown(job_folder, lines=10_000)) == 204


def test_long_lines_are_not_cut(job_folder: Path) -> None:
    with log_path(job_folder, 0).open("a") as file:
        file.writelines(f"{number} {'x' * 100_000}\n" for number in range(3))
    lines = shown(job_folder, lines=4)
    assert [line.split()[0] for line in lines] == ["start", "0", "1", "2"]
    assert len(lines[1]) == 100_002


def test_one_start(job_folder: Path) -> None:
    lines = shown(job_folder, start="12-0")
    assert lines[0].startswith("===== start 12-0 on n1")
    assert lines[2:] == [f"start 0, line {line}" for line in range(100)]
    assert shown(job_folder, start="12-0", lines=1) == ["start 0, line 99"]
    with pytest.raises(InputError, match=r"12-7: no such start .*there are 12-0, 12-1"):
        shown(job_folder, start="12-7")


def test_all_ranks_with_their_numbers(job_folder: Path) -> None:
    assert shown(job_folder, rank=None, lines=1) == ["[rank 0] start 1, line 99", "[rank 1] start 1, line 99"]


def test_a_rank_that_there_is_not(job_folder: Path) -> None:
    with pytest.raises(InputError, match="rank 7 has printed nothing; there are logs of 2 ranks"):
        shown(job_folder, rank=7)


def test_nothing_printed_yet(tmp_path: Path) -> None:
    keep(tmp_path / JOB_FILE, JobSpec(str(tmp_path), "x", [["train", "r.yaml"]], "/", is_run=True))
    with pytest.raises(InputError, match="no rank has printed anything yet; --follow waits for it"):
        shown(tmp_path)


def test_follow_goes_on_over_a_restart_until_the_run_is_over(job_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_ASK_AFTER_S", 0.5)
    monkeypatch.setenv("PATH", "")  # no SLURM to ask
    lines: list[str] = []
    ended: list[object] = []

    def follow() -> None:
        ended.append(show_logs(job_folder, rank=None, lines=1, start=None, follow=True, show=lines.append))

    reader = threading.Thread(target=follow)
    reader.start()
    wait_until(lambda: len(lines) == 2, timeout_s=90)
    with log_path(job_folder, 0).open("a") as file:
        file.write("half a ")
        file.flush()
        time.sleep(0.7)
        file.write("line\n")
    log_path(job_folder, 2).write_text(HEADER.format("12-2") + "a rank that was not there before\n")
    wait_until(lambda: len(lines) == 6, timeout_s=90)
    assert lines[2:] == [
        "[rank 0] half a line",
        f"[rank 2] {HEADER.format('12-2').splitlines()[0]}",
        "[rank 2] $ pomscale train r.yaml",
        "[rank 2] a rank that was not there before",
    ]
    keep(start_folder(job_folder, "12", 1) / "verdict.json", Verdict("fail", "no disk", 1, time.time()))
    reader.join(timeout=90)
    assert not reader.is_alive()
    assert (ended[0].state, ended[0].reason) == ("failed", "no disk")  # type: ignore[attr-defined]


def test_what_is_printed_while_the_last_lines_are_shown_is_not_lost(
    job_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_ASK_AFTER_S", 0.0)
    monkeypatch.setenv("PATH", "")  # no SLURM to ask
    keep(start_folder(job_folder, "12", 1) / "verdict.json", Verdict("fail", "no disk", 1, time.time()))
    lines: list[str] = []

    def show(line: str) -> None:
        lines.append(line)
        if line.startswith("[rank 1] "):
            with log_path(job_folder, 0).open("a") as file:
                file.write("meanwhile\n")

    show_logs(job_folder, rank=None, lines=1, start=None, follow=True, show=show)
    assert lines == ["[rank 0] start 1, line 99", "[rank 1] start 1, line 99", "[rank 0] meanwhile"]
