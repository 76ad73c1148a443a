"""Real signals to real processes, busy in the ways in which training is busy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pomscale.distributed.stop import StopRequest
from support.running import wait_until

PROGRAM = """
import ctypes, os, signal, sys, time
from pathlib import Path
from pomscale.distributed import stop as of_stop
from pomscale.distributed.stop import StopRequest

class Told(StopRequest):  # says when its thread has read a signal
    def _handle(self, number, frame):
        super()._handle(number, frame)
        if frame is None and sys.argv[1] == "stuck":
            os.write(1, b"read\\n")

if sys.argv[1] == "polite":
    of_stop._DUPLICATE_S = 60.0  # what comes at once may arrive seconds apart on a busy machine
stop = Told(nothing_to_save=sys.argv[1] == "start_up")
stop.on_quit = Path(sys.argv[2]).write_text
if sys.argv[1] == "late":
    of_stop._DUPLICATE_S = 0.1
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # another thread gets it, so that this one stays in C
print("ready", flush=True)
if sys.argv[1] == "polite":
    while not stop.requested:
        time.sleep(0.01)
    print(stop.signal_name, flush=True)
    time.sleep(3)  # the save
    print("saved", flush=True)
    sys.exit(75)
if sys.argv[1] == "late":  # in C with Python's lock, where nobody reads signals, until something can be read from stdin
    ctypes.PyDLL(None).poll(ctypes.byref(ctypes.c_uint64(1 << 32)), 1, -1)
while True:  # as in a collective: in C without Python's lock, where no Python handler runs
    ctypes.CDLL(None).poll(None, 0, 10**6)
"""


def start(how: str, outcome: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, how, str(outcome)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_duplicates_do_not_disturb_the_save(tmp_path: Path) -> None:
    """srun signals every process of the job, and torchrun forwards what it got: the same signal several times."""
    process = start("polite", tmp_path / "outcome")
    assert process.stdout is not None
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.readline() == "SIGUSR2\n"  # it saves
    for _ in range(2):
        process.send_signal(signal.SIGUSR2)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # another kind is no repetition
    out, _ = process.communicate(timeout=90)
    assert out == "saved\n"
    assert process.returncode == 75
    assert not (tmp_path / "outcome").exists()


def test_second_request_ends_a_process_that_is_stuck_in_c(tmp_path: Path) -> None:
    process = start("stuck", tmp_path / "outcome")
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "read\n"  # the time of the first one counts from then
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "outcome").read_text() == "SIGTERM twice: ended at once, without a save"
    assert err == "SIGTERM twice: ended at once, without a save\n"


def is_pending(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether a signal has not come to any of the process's threads yet."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    masks = [line.split()[1] for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_two_requests_that_are_read_late_are_two(tmp_path: Path) -> None:
    process = start("late", tmp_path / "outcome")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_pending(process, signal.SIGTERM), "its thread does not run", timeout_s=60)
        time.sleep(0.3)
    _, err = process.communicate("read", timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "SIGTERM twice: ended at once, without a save\n"


def test_during_the_start_up_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    process = start("start_up", tmp_path / "outcome")
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 75
    assert "SIGUSR1: stopped before the work began" in err


def test_a_signal_to_a_forked_child_is_not_the_parents() -> None:
    """A pool of worker processes is ended by SIGTERM."""
    stop = StopRequest()
    try:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, b"forked")
            time.sleep(60)
            os._exit(0)
        os.read(reader, 6)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.2)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    finally:
        stop.restore()


def own_threads() -> set[str]:
    """Their ids, where the system has them: others of this process may end meanwhile."""
    tasks = Path("/proc/self/task")
    return {task.name for task in tasks.iterdir()} if tasks.is_dir() else set()


def test_a_request_at_the_end_does_not_cost_the_last_line() -> None:
    program = "import os, signal; from pomscale.distributed.stop import StopRequest; stop = StopRequest(); "
    program += "stop.restore(process_ends=True); os.kill(os.getpid(), signal.SIGTERM); print('the last line')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "the last line\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_restore_gives_the_signals_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    threads = own_threads()
    stop = StopRequest()
    assert signal.getsignal(number) != before
    stop.restore()
    assert signal.getsignal(number) == before
    wait_until(lambda: own_threads() <= threads, "its thread has not ended", timeout_s=60)
