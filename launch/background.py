"""Start a local job so that it outlives the terminal: in a session of its own, with no file of the terminal open.

    python -m launch.background JOB_FOLDER NUM_GPUS PYTHON      prints the job id

This is a separate process because submitit's controller stays in the session of the process that starts it, and a
Ctrl-C in that session would end it.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import psutil
from submitit import LocalExecutor

from launch.task import LocalTask
from pomscale.base.errors import InputError
from pomscale.base.files import make_folder
from pomscale.runs.layout import CONTROLLER_LOG_FILE, SUBMITIT_FOLDER

_LOOK_EVERY_S = 0.02
_FOREVER_MIN = 10 * 365 * 24 * 60  # submitit's own limit is two minutes


def main() -> None:
    job_folder, num_gpus, python = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    # `pomscale launch` blocks Ctrl-C while it waits for this process; the job shall receive it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    try:
        executor = LocalExecutor(job_folder / SUBMITIT_FOLDER, python=f"{shlex.quote(python)} -m launch.held")
        executor.update_parameters(
            timeout_min=_FOREVER_MIN, gpus_per_node=num_gpus, visible_gpus=_visible_gpus(num_gpus), tasks_per_node=1
        )
        answer = _leave_the_terminal(job_folder / CONTROLLER_LOG_FILE)
        job = executor.submit(LocalTask(str(job_folder)))
        controller = psutil.Process(int(job.job_id))
        # Wait until the controller has a child to forward a request to end to.
        while controller.status() != psutil.STATUS_ZOMBIE and not controller.children():
            time.sleep(_LOOK_EVERY_S)
        os.write(answer, job.job_id.encode())
    except InputError as error:
        sys.exit(str(error))


def _leave_the_terminal(log: Path) -> int:
    """Detach this process, and all that it starts from now on, from the terminal. Return the former standard output."""
    make_folder(log.parent)
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor, target in ((null, 0), (written, 1), (written, 2)):
        os.dup2(descriptor, target)
    return answer


def _visible_gpus(num_gpus: int) -> tuple[int, ...]:
    """Return the GPUs that this process may use, since submitit would take the first of the machine; () for all."""
    words = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    if not words or not num_gpus:
        return ()
    if not all(word.isdecimal() for word in words) or len(words) < num_gpus:
        raise InputError(f"CUDA_VISIBLE_DEVICES={','.join(words)}: give the numbers of {num_gpus} GPUs, or unset it")
    return tuple(map(int, words))


if __name__ == "__main__":
    main()
