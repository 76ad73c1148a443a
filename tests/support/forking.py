"""Commands of Python that start as a fork of a process which has imported torch and pomscale: 4 s of imports less.

    this process ── server (imports once, then waits)
        └────────── a command, forked by the server; its parent is this process, as if subprocess.Popen had started it

`ForkedPopen` is a `subprocess.Popen` for `python -m MODULE ...`, `python -c CODE ...` and `python SCRIPT ...`. The
command gets arguments, environment, working folder, standard streams, session and exit code as usual; `may_fork` tells
which commands must be started for real all the same. The ranks of `python -m torch.distributed.run` are forked as well:
torchrun itself runs, only the starts of its workers are replaced.

The ranks that a guard starts, of local and of SLURM jobs, are children of the guard, so they cannot be forked by the
server. `standing_in` gives such a job variables by which its guards start a small process in the place of each rank
(support.stand_in), and that one asks for a fork.

What differs from a real start: modules are there already, /proc shows the server's command line and environment, and
hashes of strings are the same in all commands.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

_TORCHRUN = "torch.distributed.run"
_PRELOADED = ("pomscale.training.run", "pomscale.cli", _TORCHRUN, "matplotlib.figure", "torch._dynamo")
# Adapters of optional packages, 4 s of imports for each command that needs them.
_PRELOADED_IF_INSTALLED = {
    "diffusers": "pomscale.codecs.vae",
    "transformers": "pomscale.codecs.t5",
    "wandb": "wandb",
}
_PACKAGES = ("pomscale", "launch", "data_pipelines")  # a forked command has those of the server
_FLAGS = ("-u",)
_MESSAGE_BYTES = 1 << 20
# torch.compile neither tries out vector extensions nor compiles headers: 10 s of a machine's first compilation.
_QUICK_COMPILATION = {"TORCHINDUCTOR_VEC_ISA_OK": "1", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
# Variables that the interpreter or a library reads when it starts; these few are set before the command runs, or later.
# torch itself sets TORCHINDUCTOR_CACHE_DIR in a process that has compiled, and looks for it each time.
_READ_AT_START = ("PYTHON", "LD_", "TORCH", "OMP_", "MKL_", "CUDA_", "LC_", "LANG", "MPL")
_SET_BY_US = (
    "PYTHONPATH",
    "PYTHONSAFEPATH",
    "PYTHONUNBUFFERED",
    "TORCHELASTIC_",
    "TORCHINDUCTOR_CACHE_DIR",
    *_QUICK_COMPILATION,
)
_OPTIONS = {"args", "stdin", "stdout", "stderr", "text", "env", "cwd", "start_new_session", "process_group", "bufsize"}
_PR_SET_CHILD_SUBREAPER = 36

ROOT = Path(__file__).resolve().parents[2]
# Environment of the server and of commands: as pytest got it, before imports have added to it.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", **_QUICK_COMPILATION}


@dataclass(frozen=True)
class _Request:
    """A command for a forked process; its standard streams come along as file descriptors.

    blocked: numbers of the signals that wait until the process unblocks them.
    """

    command: list[str]
    environment: dict[str, str]
    folder: str
    new_session: bool
    process_group: int
    blocked: list[int] = field(default_factory=list)


# The side of the tests


def may_fork(command: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Tell whether ForkedPopen(command, **options) does what subprocess.Popen would do."""
    if isinstance(command, str) or command[0] != sys.executable or not set(options) <= _OPTIONS:
        return False
    words = _without_flags(command)
    if not words or not (words[0] in ("-m", "-c") or str(words[0]).endswith(".py")):
        return False
    environment = options.get("env") or os.environ
    if _start_variables(environment) != _start_variables(ENVIRONMENT):
        return False
    folders = [options.get("cwd") or os.getcwd(), *_python_path(environment)]
    others = [Path(folder).resolve() for folder in folders if Path(folder).resolve() != ROOT]
    return not any((folder / package).is_dir() for folder in others for package in _PACKAGES)


def _without_flags(command: Sequence[Any]) -> list[Any]:
    """Return the words of a command after the interpreter and its flags."""
    return list(itertools.dropwhile(_FLAGS.__contains__, command[1:]))


def _python_path(environment: Mapping[str, str]) -> list[str]:
    return list(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))


def _start_variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_START) and not name.startswith(_SET_BY_US)
    }


class ForkedPopen(subprocess.Popen):
    """A subprocess.Popen whose process is a fork of the server's."""

    def _execute_child(self, *arguments: Any) -> None:
        """Replace Popen's fork and exec, which gets everything that __init__ has prepared."""
        given = inspect.signature(super()._execute_child).bind(*arguments).arguments  # type: ignore[misc]
        streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        request = _Request(
            [os.fspath(word) for word in given["args"]],
            dict(os.environ if given["env"] is None else given["env"]),
            os.fspath(given["cwd"] or os.getcwd()),
            given["start_new_session"],
            given["process_group"],
        )
        try:
            inherited = [own if stream == -1 else stream for own, stream in enumerate(streams)]
            self.pid = self._fork(request, inherited)
            self._child_created = True
        finally:
            pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
            self._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]

    def _fork(self, request: _Request, streams: list[int]) -> int:
        return _server().fork(request, streams)


def fork_commands() -> None:
    """Let everything in this process that uses subprocess start commands by forks."""
    really = subprocess.Popen

    def popen(command: Any, **options: Any) -> subprocess.Popen[Any]:
        return (ForkedPopen if may_fork(command, options) else really)(command, **options)

    subprocess.Popen = popen  # type: ignore[misc, assignment]


class _Server:
    """The server, from the side of the process that started it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._socket, theirs = _connected()
        # Not under pytest's folders: the path of a socket has at most 107 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        self.path = f"{self._folder.name}/socket"
        with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.path)
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(listener.fileno())],
                stdin=subprocess.DEVNULL,
                env=ENVIRONMENT,
                pass_fds=[theirs.fileno(), listener.fileno()],
            )
        assert self._socket.recv(64), "the server of forks cannot import what it is to have"

    def fork(self, request: _Request, streams: list[int]) -> int:
        """Return the number of the new process, a child of this one."""
        assert self._process.poll() is None, f"the server of forks has ended: exit code {self._process.returncode}"
        with self._lock, _adopting():
            _send(self._socket, request, streams)
            answer = self._socket.recv(64)
        assert answer, f"the server of forks has ended: exit code {self._process.wait()}"
        return int(answer)

    def stop(self) -> None:
        self._socket.close()
        self._process.wait()
        self._folder.cleanup()


_running: _Server | None = None


def _server() -> _Server:
    """Start it at the first command."""
    global _running  # noqa: PLW0603
    if _running is None or _running.owner != os.getpid():
        _running = _Server()
    return _running


def stop_server() -> None:
    """End the server of this process, if it has one."""
    global _running  # noqa: PLW0603
    if _running is not None and _running.owner == os.getpid():
        _running.stop()
    _running = None


def standing_in() -> dict[str, str]:
    """Return the variables of a job whose guards are to have their ranks forked; unhurried/sitecustomize.py reads them.

    Guards need UNHURRIED's PYTHONPATH for it. Ranks that a test stops by SIGSTOP must do without.
    """
    return {"FORKED_RANKS": _server().path}


class _adopting:
    """While this holds, orphans below this process become its children: the server's fork makes one on purpose."""

    def __enter__(self) -> None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def __exit__(self, *exception: object) -> None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _prctl(option: int, value: int) -> None:
    assert ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0


def _connected() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE_BYTES)
    return ours, theirs


def _send(connection: socket.socket, request: _Request, streams: list[int]) -> None:
    socket.send_fds(connection, [json.dumps(vars(request)).encode()], streams)


def _receive(connection: socket.socket) -> tuple[_Request, list[int]] | None:
    """The next request and its streams; None when the other side has gone."""
    message, streams, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 3)
    if not message:
        return None
    return _Request(**json.loads(message)), streams


# The side of the server and of what it forks


class _StandIns:
    """The ranks that the server has forked for stand-ins: each ends with its stand-in, which is told how it ended."""

    def __init__(self, listener: socket.socket, selector: selectors.BaseSelector) -> None:
        self._listener = listener
        self._selector = selector
        self._processes: dict[int, tuple[int, socket.socket]] = {}  # by their descriptors of os.pidfd_open
        selector.register(listener, selectors.EVENT_READ, self._fork)

    def _fork(self, _: object) -> tuple[_Request, list[int]] | None:
        """Fork for a stand-in that has connected. Return the request in the forked process."""
        stand_in = self._listener.accept()[0]
        received = _receive(stand_in)
        if received is None:  # killed before it has asked
            stand_in.close()
            return None
        request, streams = received
        is_same = _start_variables(request.environment) == _start_variables(ENVIRONMENT)
        if is_same and (process := os.fork()) == 0:
            return received
        for stream in streams:
            os.close(stream)
        with suppress(OSError):  # killed meanwhile
            stand_in.send(str(process if is_same else 0).encode())
        if not is_same:
            stand_in.close()
            return None
        descriptor = os.pidfd_open(process)
        self._processes[descriptor] = process, stand_in
        self._selector.register(descriptor, selectors.EVENT_READ, self._ended)
        self._selector.register(stand_in, selectors.EVENT_READ, lambda _: self._deserted(descriptor))
        return None

    def _deserted(self, descriptor: int) -> None:
        """End the rank of a stand-in that has ended."""
        _, stand_in = self._processes[descriptor]
        self._selector.unregister(stand_in)
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)

    def _ended(self, descriptor: int) -> None:
        """Tell the stand-in of a rank that has ended."""
        process, stand_in = self._processes.pop(descriptor)
        status = os.waitpid(process, 0)[1]
        self._selector.unregister(descriptor)
        os.close(descriptor)
        with suppress(KeyError):  # deserted
            self._selector.unregister(stand_in)
        with stand_in, suppress(OSError):
            stand_in.send(str(status).encode())

    def end_all(self) -> None:
        for descriptor in self._processes:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def _serve(connection: socket.socket, listener: socket.socket) -> tuple[_Request, list[int]] | None:
    """Fork for each request. Return it in the forked process; None in the server, at its end."""
    with selectors.DefaultSelector() as selector:
        stand_ins = _StandIns(listener, selector)
        selector.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is connection:
                    received = _receive(connection)
                    if received is None:
                        stand_ins.end_all()
                        return None
                    is_forked = _fork_for(connection, received[1])
                else:
                    received = key.data(key.fileobj)
                    is_forked = received is not None
                if is_forked:
                    return received


def _fork_for(connection: socket.socket, streams: list[int]) -> bool:
    """Fork a process that becomes a child of who asked for it. Return True in the forked process."""
    reading, writing = os.pipe()
    if (between := os.fork()) == 0:
        # The process between the two ends at once, so that the command becomes a child of who asked for it.
        if (command := os.fork()) != 0:
            os.write(writing, str(command).encode())
            os._exit(0)
        os.close(reading)
        os.close(writing)
        return True
    os.close(writing)
    for stream in streams:
        os.close(stream)
    os.waitpid(between, 0)
    connection.send(os.read(reading, 64))
    os.close(reading)
    return False


def _become(request: _Request, streams: list[int]) -> None:
    """Turn this forked process into what the command's own interpreter would be before it runs a line."""
    if request.new_session:
        os.setsid()
    elif request.process_group >= 0:
        os.setpgid(0, request.process_group)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request.folder)
    path = [path for path in sys.path if path not in _python_path(os.environ)]
    os.environ.clear()
    os.environ.update(request.environment)
    sys.path[:] = [*_python_path(os.environ), *path]
    sys.orig_argv = list(request.command)
    unbuffered = "-u" in request.command[1:2] or bool(os.environ.get("PYTHONUNBUFFERED"))
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        stream = _text_stream(number, unbuffered=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    tempfile.tempdir = None
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if any((Path(folder) / "sitecustomize.py").is_file() for folder in _python_path(os.environ)):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")


def _text_stream(number: int, *, unbuffered: bool) -> io.TextIOWrapper:
    """Return a standard stream as Python makes it."""
    raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
    buffer: Any = io.BufferedReader(raw) if number == 0 else raw if unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=sys.stdout.encoding,
        errors="backslashreplace" if number == 2 else sys.stdout.errors,
        line_buffering=not unbuffered and (number == 2 or raw.isatty()),
        write_through=unbuffered and number != 0,
    )


def _run(request: _Request) -> None:
    """Run the command's module or script as the main program."""
    words = _without_flags(request.command)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-m":
        if words[1] == _TORCHRUN:
            _fork_the_workers(words)
        if not os.environ.get("PYTHONSAFEPATH"):
            sys.path.insert(0, request.folder)
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # runpy warns of a module that is to run and was imported before
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        vars(main)["__file__"] = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), vars(main))


def _fork_the_workers(torchrun: list[str]) -> None:
    """Fork torchrun's workers now, before it has threads. They wait until torchrun starts them."""
    number = re.findall(r"--nproc-per-node[ =](\d+)", " ".join(torchrun))[0]
    spares: list[tuple[int, socket.socket]] = []
    for _ in range(int(number)):
        ours, theirs = _connected()
        if (process := os.fork()) == 0:
            for connection in (ours, *(connection for _, connection in spares)):
                connection.close()
            _wait_and_run(theirs)
        theirs.close()
        spares.append((process, ours))

    class Worker(ForkedPopen):
        def _fork(self, request: _Request, streams: list[int]) -> int:
            process, connection = spares.pop(0)
            with connection:
                _send(connection, request, streams)
            return process

    handler = importlib.import_module("torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler")
    handler.Popen = Worker  # type: ignore[attr-defined]


def _wait_and_run(connection: socket.socket) -> NoReturn:
    """Run what torchrun asks for, in a process that was forked for it."""
    received = _receive(connection)
    connection.close()
    if received is None:
        os._exit(0)
    _become(*received)
    _run(received[0])
    sys.exit()


def main() -> None:
    """Be the server, on the socket whose number is the argument."""
    del sys.path[0]  # this folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the socket
    connection, listener = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    gc.disable()
    for name in _PRELOADED:
        importlib.import_module(name)
    for package, name in _PRELOADED_IF_INSTALLED.items():
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(name)
    gc.freeze()
    gc.enable()
    connection.send(b"ready")
    received = _serve(connection, listener)
    if received is not None:
        try:
            _become(*received)
            _run(received[0])
        except SystemExit as ending:
            _end(ending.code)
        _end(None)


def _end(code: int | str | None) -> NoReturn:
    """Exit as Python does, but do not take every module apart, which costs 0.3 s."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(1 if isinstance(code, str) else (code or 0) & 0xFF)


if __name__ == "__main__":
    main()
