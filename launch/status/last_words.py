"""Last words of a job that has ended without a record: what its script, srun or a rank's Python has printed.

A rank that dies before its guard runs (no such interpreter, a module that is missing, a container that does not start)
leaves nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from launch.status.tail import tail
from pomscale.runs.layout import SUBMITIT_FOLDER

_BYTES = 8192
_MOST_CHARACTERS = 300
_SAME_MOMENT_S = 1.0  # file systems keep whole seconds

# What srun and slurmstepd print about every job that ends badly.
_SAYS_NOTHING = re.compile(
    r"srun: (error: .*: tasks? [\d,-]+: (Exited with exit code|Terminated|Killed)|launch/slurm: |Terminating|"
    r"Job step aborted|Force Terminated)|slurmstepd\S*: error: \*\*\* STEP "
)
_IS_AN_ERROR = re.compile(
    r"error|cannot|can't|could not|no such|not found|denied|fail|refused|invalid|unknown|killed|limit", re.IGNORECASE
)


@dataclass(frozen=True)
class LastWords:
    """The line that tells most about the end of a job, and the file that it is in."""

    line: str
    log: str


def last_words(job_folder: Path, task: str, since_unix_s: float, output: str | None = None) -> LastWords | None:
    """Return the last words of a job, or of one task of an array; None if it has printed nothing.

    Args:
        job_folder: Job folder of the job.
        task: Id of the job, or of the task, such as "12_3".
        since_unix_s: Files that were last written before this tell of an earlier start.
        output: File of the job's output if it is not in submitit/, see Submission.
    """
    paths = [Path(output)] if output is not None else sorted((job_folder / SUBMITIT_FOLDER).glob(f"{task}_*_log.*"))
    found: list[LastWords] = []
    for path in paths:
        if path.is_file() and path.stat().st_mtime >= since_unix_s - _SAME_MOMENT_S:
            lines = [line.strip() for line in tail(path, _BYTES).decode(errors="replace").splitlines()]
            found += [LastWords(line[:_MOST_CHARACTERS], str(path)) for line in _telling(lines)]
    return next((words for words in found if _IS_AN_ERROR.search(words.line)), found[0] if found else None)


def _telling(lines: list[str]) -> list[str]:
    """Return the last line that is an error, and the last line of any kind, as far as there are such."""
    lines = [line for line in lines if line and not _SAYS_NOTHING.match(line)]
    errors = [line for line in lines if _IS_AN_ERROR.search(line)]
    return [*errors[-1:], *lines[-1:]]
