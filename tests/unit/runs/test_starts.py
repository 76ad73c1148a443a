"""Split brain: of all starts of a run, only the newest may write."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pomscale.base.errors import PomscaleError
from pomscale.distributed.stop import StopRequest
from pomscale.distributed.watchdog import Watchdog
from pomscale.distributed.world import World
from pomscale.runs.starts import Start, Superseded, newest_claim
from pomscale.training.process import Process

CLAIM = "import sys, pathlib; from pomscale.runs.starts import Start as S; "
CLAIM += "print([S.claim(pathlib.Path(sys.argv[1])).number for _ in range(20)], 'torch' in sys.modules)"


def test_starts_at_the_same_time_get_different_numbers_and_only_the_highest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: Start.claim(tmp_path), range(64)))
    assert sorted(start.number for start in claimed) == list(range(1, 65))
    for start in claimed:
        if start.number == 64:
            start.check()
        else:
            with pytest.raises(Superseded, match=r"a newer start \(.*SLURM job 4711.*\) of this run has taken over"):
                start.check()
    Start(tmp_path, 64).check()  # another rank of the newest start


def test_a_start_that_is_still_alive_here_is_named(tmp_path: Path) -> None:
    lives = CLAIM.partition("print")[0] + "S.claim(pathlib.Path(sys.argv[1])); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", lives, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        second = Start.claim(tmp_path)
        assert f"process {process.pid}, " in str(second.other_alive())
        claim = tmp_path / "generations" / "000001"
        content = claim.read_text()
        claim.write_text(re.sub('"time": "[0-9]+', '"time": "1999', content))
        assert second.other_alive() is None, "its number has been given to another process"
        claim.write_text(content.replace('"host": "', '"host": "not-'))
        assert second.other_alive() is None, "processes of another machine cannot be seen"
        claim.write_text("")
        assert second.other_alive() is None, "it has not said yet who it is"
        claim.write_text(content)
        process.communicate("")
    assert second.other_alive() is None
    assert Start(tmp_path, 1).other_alive() is None, "there is none before the first"


def test_a_start_of_the_original_is_none_of_a_copy(tmp_path: Path) -> None:
    original = tmp_path / "a"
    first = Start.claim(original)  # by this process, which lives
    copy = Path(shutil.copytree(original, tmp_path / "b"))
    assert Start.claim(copy).other_alive() is None
    assert Start.claim(original).other_alive() is not None
    claim = newest_claim(copy)
    assert claim is not None
    assert claim.original is None
    shutil.rmtree(original)
    assert Start(copy, 2).other_alive() is not None, "it was moved"
    assert first.number == 1


def test_processes_race_without_torch(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", CLAIM, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    numbers: list[int] = []
    for process in processes:
        out, _ = process.communicate(timeout=240)
        listed, _, has_torch = out.strip().rpartition(" ")
        numbers += [int(number) for number in listed.strip("[]").split(",")]
        assert has_torch == "False"
    assert sorted(numbers) == list(range(1, 61))


def test_a_claim_that_was_killed_before_it_said_who_it_is_counts(tmp_path: Path) -> None:
    first = Start.claim(tmp_path)
    (tmp_path / "generations" / "000002").touch()
    with pytest.raises(Superseded, match=r"a newer start \(just now\)"):
        first.check()
    assert Start.claim(tmp_path).number == 3


def test_a_run_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "generations").write_text("a file where the folder should be")
    with pytest.raises(PomscaleError, match=r"generations: this start of the run cannot be recorded"):
        Start.claim(tmp_path)


def test_a_look_that_fails_is_one_clear_error(tmp_path: Path) -> None:
    start = Start.claim(tmp_path)
    (tmp_path / "generations").rename(tmp_path / "gone")
    with pytest.raises(PomscaleError, match=r"generations cannot be read .* a newer start of this run may have taken"):
        start.check()


def test_a_stutter_of_the_file_system_while_logging_is_a_warning_and_a_newer_start_is_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = StopRequest()
    watchdog = Watchdog(None, 1.0, tmp_path / "stacks.txt", print)
    try:
        process = Process(World(0, 1, torch.device("cpu")), Start(tmp_path, 1), stop, watchdog)
        process.check_start()  # generations/ is not there
        assert "cannot be read" in capsys.readouterr().err
        Start.claim(tmp_path)
        process.check_start()
        Start.claim(tmp_path)
        with pytest.raises(Superseded):
            process.check_start()
    finally:
        stop.restore()
