"""`pomscale completion`: scripts for shells, and what bash completes with one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pomscale.cli import main
from pomscale.cli.completion import _SHELLS

# Run the function that the script has registered, as bash does on TAB, and print the words it offers.
COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
[[ $(complete -p pomscale) =~ -F\\ ([^ ]+) ]]
"${BASH_REMATCH[1]}" pomscale "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", _SHELLS)
def test_every_shell_gets_a_script_with_all_verbs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = script(shell, capsys)
    for word in ("pomscale", "launch", "evaluate", "moving-digits", "completion"):
        assert word in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pomscale", "pl"], {"plan"}),
        (["pomscale", "e"], {"evaluate", "experiment", "export", "ema"}),
        (["pomscale", "runs", "sta"], {"status"}),
        (["pomscale", "sample", "run", "--sampler", "h"], {"heun"}),
        (["pomscale", "sample", "run", "--guidance-i"], {"--guidance-interval"}),
    ],
)
def test_bash_completes(
    words: list[str], expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "completion.bash"
    path.write_text(script("bash", capsys))
    command = ["bash", "--norc", "-c", COMPLETE, "bash", str(path), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == expected


def test_bash_completes_file_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "completion.bash"
    path.write_text(script("bash", capsys))
    (tmp_path / "digits.yaml").touch()
    command = ["bash", "--norc", "-c", COMPLETE, "bash", str(path), "pomscale", "train", f"{tmp_path}/dig"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{tmp_path}/digits.yaml\n", "")


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "ksh"])
    assert ended.value.code == 2
    assert "'ksh'" in capsys.readouterr().err


def test_completion_imports_nothing_heavy() -> None:
    code = "import sys; from pomscale.cli import main\ntry: main(['completion', 'bash'])\n"
    code += "finally: print({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "set()\n"
