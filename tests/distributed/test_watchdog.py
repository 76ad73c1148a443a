"""Real hangs: a process that sleeps, one in C without Python's lock, one that holds it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from support.running import open_process

# On a busy machine a process may stand still for seconds, which no test here means. Those that are to be left alone are
# watched by a clock that stands still with them; and faulthandler's timer, which leaves the thread a second to write
# its reason, comes much later where it is not itself what is tested.
PROGRAM = """
import ctypes, faulthandler, sys, threading, time
from pathlib import Path
from pomscale.distributed import watchdog as of_watchdog
from pomscale.distributed.watchdog import Watchdog

LEFT_ALONE = sys.argv[3].split()

class PatientClock:
    sleep = staticmethod(time.sleep)

    def __init__(self):
        self.now_s = 0.0
        threading.Thread(target=self.tick, daemon=True).start()

    def monotonic(self):
        return self.now_s

    def tick(self):
        before_s = time.monotonic()
        while True:
            time.sleep(0.02)
            now_s = time.monotonic()
            self.now_s += min(now_s - before_s, 0.05)
            before_s = now_s

def sleeping():
    time.sleep(60)

def stuck_in_c():
    ctypes.CDLL(None).poll(None, 0, 60_000)

def holding_the_lock():
    ctypes.PyDLL(None).poll(None, 0, 60_000)  # PyDLL keeps Python's lock during the call

def training():  # longer than either limit, in all
    for _ in range(15):
        time.sleep(0.2)
        watchdog.beat()
    with watchdog.slow("validation"):
        time.sleep(2.5)
        with watchdog.slow("pictures"):
            time.sleep(2.5)
    print("alive", flush=True)

def slow_validation():
    with watchdog.slow("validation"):
        time.sleep(60)

def long_first_step():
    time.sleep(2.5)
    training()

def compilation():  # holds Python's lock past the shorter limit, for which the timer is set by then
    time.sleep(0.5)
    with watchdog.slow("compilation"):
        ctypes.PyDLL(None).poll(None, 0, 3700)
    print("alive", flush=True)

def broken_record():
    sleeping()

how, folder = sys.argv[1], Path(sys.argv[2])
if how in LEFT_ALONE:
    of_watchdog.time = PatientClock()
if how not in ("compilation", "holding_the_lock"):
    dump_later = faulthandler.dump_traceback_later
    faulthandler.dump_traceback_later = lambda later_s, **options: dump_later(later_s + 100.0, **options)
slow_s = 60.0 if how == "compilation" else 4.0

def on_hang(reason):
    if how == "broken_record":
        time.sleep(60)  # a file system that is away
    (folder / "outcome").write_text(reason)

with Watchdog(None if how == "unwatched" else 2.0, slow_s, folder / "stacks" / "rank-0.txt", on_hang) as watchdog:
    if how not in ("long_first_step", "slow_first_step"):
        watchdog.beat()
    {"slow_first_step": sleeping, "unwatched": training}.get(how, globals().get(how))()
"""


@dataclass(frozen=True)
class Watched:
    """End of a process: its exit code, the outcome that on_hang wrote, and its stacks, empty without a file."""

    code: int
    out: str
    outcome: str | None
    stacks: str


LEFT_ALONE = ("training", "long_first_step", "compilation", "unwatched")
HANGS = {
    "sleeping": ("sleeping", "no step for 2 s"),
    "stuck_in_c": ("stuck_in_c", "no step for 2 s"),
    "slow_validation": ("slow_validation", "validation takes longer than 4 s"),
    "slow_first_step": ("sleeping", "start-up and first step take longer than 4 s"),
}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Watched]:
    """All processes at once: they only wait."""
    started = {}
    for how in (*LEFT_ALONE, *HANGS, "holding_the_lock", "broken_record"):
        folder = tmp_path_factory.mktemp(how)
        command = [sys.executable, "-c", PROGRAM, how, str(folder), " ".join(LEFT_ALONE)]
        started[how] = folder, open_process(command, stdout=subprocess.PIPE, text=True)

    def end(how: str) -> Watched:
        folder, process = started[how]
        out, _ = process.communicate(timeout=200)
        outcome, stacks = folder / "outcome", folder / "stacks" / "rank-0.txt"
        return Watched(
            process.returncode,
            out,
            outcome.read_text() if outcome.exists() else None,
            stacks.read_text() if stacks.exists() else "",
        )

    return end


@pytest.mark.parametrize("how", LEFT_ALONE)
def test_what_goes_on_is_left_alone(how: str, watched: Callable[[str], Watched]) -> None:
    assert watched(how) == Watched(0, "alive\n", None, "")


@pytest.mark.parametrize("how", HANGS)
def test_a_hang_leaves_stacks_and_outcome(how: str, watched: Callable[[str], Watched]) -> None:
    function, reason = HANGS[how]
    hung = watched(how)
    assert (hung.code, hung.out, hung.outcome) == (1, "", reason)
    assert hung.stacks.startswith(f"{reason}\n")
    assert ": MainThread\n" in hung.stacks
    assert f" in {function}\n" in hung.stacks


def test_a_hang_that_holds_pythons_lock(watched: Callable[[str], Watched]) -> None:
    hung = watched("holding_the_lock")
    assert (hung.code, hung.outcome) == (1, None)
    assert hung.stacks.startswith("Timeout (")
    assert " in holding_the_lock\n" in hung.stacks


def test_an_outcome_that_cannot_be_written_does_not_keep_the_process(watched: Callable[[str], Watched]) -> None:
    hung = watched("broken_record")
    assert (hung.code, hung.outcome) == (1, None)
    assert " in broken_record\n" in hung.stacks
