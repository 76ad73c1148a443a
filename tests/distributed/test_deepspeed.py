"""The DeepSpeed engine in real processes: see deepspeed_worker.py for what is compared."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from pomscale.base.errors import InputError
from support.running import run

WORKER = Path(__file__).with_name("deepspeed_worker.py")


def work(num_processes: int, *arguments: str | Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    done = run([sys.executable, *launcher, str(WORKER), *map(str, arguments)], timeout=600)
    assert done.stdout.count("engines equal the plain loop") == num_processes
    assert "MA " not in done.stdout, "DeepSpeed prints what memory is in use"


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.slow
@pytest.mark.parametrize("settings", ["train", pytest.param("all", marks=pytest.mark.exhaustive)])
def test_engines_equal_a_plain_loop_and_load_each_other(tmp_path: Path, settings: str) -> None:
    """ZeRO 2 on two ranks -> FSDP2, ZeRO 1, 2 and 3 on one; from there ZeRO 1 -> all of them on three."""
    work(2, settings, tmp_path / "zero2-x2")
    work(1, "go-on", tmp_path / "zero2-x2", tmp_path / "zero1-x1")
    work(3, "go-on", tmp_path / "zero1-x1", tmp_path / "zero1-x3")


def test_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # the import system's own way to say that it is not there
    monkeypatch.delitem(sys.modules, "pomscale.engine.deepspeed", raising=False)
    with pytest.raises(InputError, match=r"pip install 'pomscale\[deepspeed\]'"):
        importlib.import_module("pomscale.engine.deepspeed")
