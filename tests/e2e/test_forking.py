"""Commands that tests start by a fork (tests/support/forking.py) behave as commands that are started for real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.forking import ForkedPopen, may_fork, standing_in
from support.paths import ROOT
from support.running import ENVIRONMENT, UNHURRIED, open_process

STAND_IN = ROOT / "tests" / "support" / "stand_in.py"
SEEN = """
import json, os, signal, sys, tempfile
print(json.dumps({
    "argv": sys.argv, "orig_argv": sys.orig_argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ),
    "path": sys.path, "name": __name__, "file": __file__, "input": sys.stdin.read(), "temporary": tempfile.gettempdir(),
    "session": os.getsid(0) == os.getpid(), "group": os.getpgid(0) == os.getpid(), "parent": os.getppid(),
    "buffers": [type(s.buffer).__name__ for s in (sys.stdin, sys.stdout, sys.stderr)],
    "encodings": [(s.encoding, s.errors, s.line_buffering) for s in (sys.stdin, sys.stdout, sys.stderr)],
    "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE)],
    "descriptors": len(os.listdir("/proc/self/fd")),
}))
print("to stderr", file=sys.stderr)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SEEN)
    return path


def ended(kind: type[subprocess.Popen[str]], command: list[str], given: str | None = None, **options: Any) -> Any:
    """Exit code, output and error output of a command that is started in one of the two ways."""
    pipe = subprocess.PIPE
    with kind(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **{"env": ENVIRONMENT, **options}) as process:
        out, err = process.communicate(given, timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("options", [{}, {"start_new_session": True}, {"process_group": 0}], ids=str)
@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_program_sees_what_it_would_see(
    script: Path, tmp_path: Path, options: dict[str, Any], flags: list[str]
) -> None:
    (tmp_path / "t").mkdir()
    command = [sys.executable, *flags, str(script), "a b", "--c=é"]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    options |= {"cwd": tmp_path, "env": environment | {"TMPDIR": str(tmp_path / "t"), "SEEN": "é"}}
    assert may_fork(command, options)
    (code, out, err), real = (ended(kind, command, "a line\n", **options) for kind in (ForkedPopen, subprocess.Popen))
    assert (code, err) == (real[0], real[2]) == (0, "to stderr\n")
    ours, theirs = json.loads(out), json.loads(real[1])
    assert ours.pop("descriptors") <= theirs.pop("descriptors") + 1
    assert ours == theirs
    assert ours["parent"] == os.getpid()


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("raise SystemExit(75)", 75),
        ("raise SystemExit('a word')", 1),
        ("import os; print('x', flush=True); os._exit(3)", 3),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import atexit; atexit.register(print, 'at the end')", 0),
        ("import threading, time; threading.Timer(0.1, lambda: print('a thread')).start()", 0),
    ],
)
def test_it_ends_as_it_would_end(tmp_path: Path, program: str, code: int) -> None:
    path = tmp_path / "program.py"
    path.write_text(program)
    forked, real = (ended(kind, [sys.executable, str(path)]) for kind in (ForkedPopen, subprocess.Popen))
    assert forked[:2] == real[:2]
    assert forked[0] == code
    # Among others: what is preloaded may have more to say at its end, as triton's bindings do with torch 2.15.
    assert set(real[2].splitlines()[-1:]) <= set(forked[2].splitlines())


def test_signals_reach_it_and_it_is_gone_once_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "sleeper.py"
    path.write_text("import time\nprint('ready', flush=True)\ntime.sleep(600)\n")
    with ForkedPopen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert psutil.Process(process.pid).ppid() == os.getpid()
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == -signal.SIGUSR1
    assert not psutil.pid_exists(process.pid)


@pytest.mark.parametrize("words", [["-m", "mine"], ["-c", "import mine"]])
def test_a_module_or_a_string_is_the_main_program(tmp_path: Path, words: list[str]) -> None:
    told = "import sys\nprint(__name__, sys.argv, getattr(sys.modules['__main__'], '__file__', None))\n"
    (tmp_path / "mine.py").write_text(told)
    command = [sys.executable, *words, "x"]
    forked, real = (ended(kind, command, cwd=tmp_path) for kind in (ForkedPopen, subprocess.Popen))
    assert forked == real
    assert forked[0] == 0


def test_torchrun_starts_its_ranks_and_reports_them(tmp_path: Path) -> None:
    path = tmp_path / "rank.py"
    path.write_text(
        "import os, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.ones(1)\n"
        "dist.all_reduce(total)\n"
        "if os.environ['RANK'] == '0': print(int(total), os.getsid(0) == os.getpid(), flush=True)\n"
        "raise SystemExit(int(os.environ['RANK']))\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    code, out, err = ended(ForkedPopen, [sys.executable, *launcher, str(path)])
    assert (code, out) == (1, "2 True\n")
    assert "exitcode  : 1" in err


def test_what_starts_for_real(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pomscale", "--version"]
    assert may_fork(command, {"env": ENVIRONMENT})
    assert may_fork(command, {"env": UNHURRIED})
    assert may_fork(command, {"env": ENVIRONMENT, "cwd": ROOT})
    assert may_fork(command, {"env": ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": "/tmp/any"}})
    assert not may_fork(["env", *command], {})
    assert not may_fork([sys.executable], {})
    assert not may_fork([sys.executable, "-W", "error", *command[1:]], {})
    assert not may_fork(command, {"preexec_fn": print})
    assert not may_fork(command, {"env": ENVIRONMENT | {"PYTHONIOENCODING": "latin-1"}})
    assert not may_fork(command, {"env": ENVIRONMENT | {"TORCH_LOGS": "all"}})
    (tmp_path / "pomscale").mkdir()  # another copy of the code
    assert not may_fork(command, {"env": ENVIRONMENT, "cwd": tmp_path})
    assert not may_fork(command, {"env": ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}})
    with open_process(["true"]) as process:
        assert not isinstance(process, ForkedPopen)


def stood_in(words: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a stand-in, as a guard does for a rank; what it asks for runs as a fork, or for real."""
    command = [sys.executable, "-I", "-S", str(STAND_IN), standing_in()["FORKED_RANKS"], str(ROOT), *words]
    pipe = subprocess.PIPE
    options = {"env": ENVIRONMENT, "process_group": 0, "stdout": pipe, "stderr": pipe, "text": True, **options}
    return subprocess.Popen(command, **options)


def test_what_is_stood_in_for_sees_what_a_rank_would_see(script: Path, tmp_path: Path) -> None:
    options = {"cwd": tmp_path, "env": ENVIRONMENT | {"SEEN": "é", "PYTHONSAFEPATH": "1"}, "stdin": subprocess.DEVNULL}
    with stood_in(["-u", str(script), "a b"], **options) as process:
        out, err = process.communicate(timeout=120)
    real = subprocess.run(
        [sys.executable, "-u", script, "a b"], process_group=0, capture_output=True, text=True, check=True, **options
    )
    ours, theirs = json.loads(out), json.loads(real.stdout)
    assert (process.returncode, err) == (0, real.stderr)
    assert theirs.pop("parent") == os.getpid()
    for seen in (ours, theirs):
        for key in ("parent", "descriptors", "path"):  # with PYTHONSAFEPATH the script's folder is not on the path
            seen.pop(key, None)
    assert ours == theirs


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("raise SystemExit(75)", 75),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_a_stand_in_ends_as_its_rank_ends(program: str, code: int) -> None:
    with stood_in(["-c", program]) as process:
        assert process.wait(120) == code


def test_a_stand_in_passes_signals_on_and_takes_its_rank_along() -> None:
    program = "import os, signal, time; signal.signal(signal.SIGUSR2, lambda *_: print('heard', flush=True))\n"
    with stood_in(["-u", "-c", f"{program}print(os.getpid())\ntime.sleep(300)"]) as process:
        assert process.stdout is not None
        rank = psutil.Process(int(process.stdout.readline()))
        assert rank.pid != process.pid
        process.send_signal(signal.SIGUSR2)
        assert process.stdout.readline() == "heard\n"
        process.kill()
        psutil.wait_procs([rank], timeout=60)
        assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


def test_a_stand_in_becomes_the_rank_where_a_fork_would_be_another(tmp_path: Path) -> None:
    who = ["-c", "import os; print(os.getpid())"]
    code = {"PYTHONPATH": str(tmp_path)}
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for environment, is_real in ((code, False), ({"TORCH_LOGS": "all"}, True), (code, True)):
        with stood_in(who, env=ENVIRONMENT | environment) as process:
            out, err = process.communicate(timeout=120)
            assert (int(out) == process.pid) == is_real, err
        (tmp_path / "launch" / "held.py").write_text("other = 1\n")
