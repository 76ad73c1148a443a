"""Stand in for a rank that a guard starts: the server of forks (support.forking) runs it, without a start's imports.

    python -I -S stand_in.py SOCKET ROOT -u -m pomscale ...

To the guard and to SLURM this process is the rank: it passes signals on to the forked process, ends as that one ends,
and takes it along when it is killed. Where the fork would not be what a start is (another code on PYTHONPATH than the
checkout's, variables that Python or torch read when they start), it becomes the real rank. A rank that is to be stopped
by SIGSTOP must be started for real: that signal cannot be passed on.
"""

from __future__ import annotations

import filecmp
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

_PACKAGES = ("pomscale", "launch", "data_pipelines")
_PASSED_ON = {
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT
}  # fmt: skip
_LOOK_EVERY_S = 0.05


def has_other_code(root: Path) -> bool:
    """Tell whether PYTHONPATH leads to packages that differ from those of the checkout, `root`."""
    for folder in map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))):
        for package in _PACKAGES:
            if not (folder / package).is_dir() or folder.resolve() == root:
                continue
            for theirs in (folder / package).rglob("*.py"):
                ours = root / theirs.relative_to(folder)
                if not ours.is_file() or not filecmp.cmp(ours, theirs, shallow=False):
                    return True
    return False


def request_fork(server: socket.socket, words: list[str], blocked: set[signal.Signals]) -> int | None:
    """Return the number of the forked process; None if the server says that a fork would not be the same."""
    request = {
        "command": [sys.executable, *words],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "new_session": False,
        "process_group": 0,
        "blocked": sorted(blocked),
    }
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    return int(server.recv(64)) or None


def stand_in(server: socket.socket, process: int) -> int:
    """Pass signals on until the process has ended. Return its status, as of os.waitpid."""
    while True:
        while (found := signal.sigtimedwait(_PASSED_ON, 0)) is not None:
            os.kill(process, found.si_signo)
        if select.select([server], [], [], _LOOK_EVERY_S)[0]:
            return int(server.recv(64) or signal.SIGKILL)


def main() -> None:
    """Run as the rank whose words, after the interpreter, follow the first two arguments."""
    path, root, *words = sys.argv[1:]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = None
    if not has_other_code(Path(root)):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        server.connect(path)
        process = request_fork(server, words, blocked)
    if process is None:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.execv(sys.executable, [sys.executable, *words])
    status = stand_in(server, process)
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL) if os.WTERMSIG(status) != signal.SIGKILL else None
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
