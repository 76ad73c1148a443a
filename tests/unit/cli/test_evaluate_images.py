"""`evaluate images` refuses options that would change nothing, before any work."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from pomscale.base.errors import InputError
from pomscale.cli import _parser
from support.generated_pictures import make_pixels, write_folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.npz --guidance 2 --steps 9", "--num-steps, --guidance: only where a model draws pictures"),
        ("b --reference a.npz --labels random", "--labels: only where a model draws pictures"),
        ("a.npz --reference a.npz --fit 8", "--fit: only where pictures or clips lie in files or tars"),
        ("a.npz --reference b --fit 8", ""),
    ],
)
def test_options_that_nothing_obeys_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", make_pixels(12))
    write_folder(tmp_path / "b", make_pixels(12))
    arguments = _parser().parse_args(["evaluate", "images", *words.split(), "--extractor", "digits", "--dry-run"])
    with pytest.raises(InputError, match=message) if message else nullcontext():
        assert arguments.run(arguments) == 0


def test_a_name_that_no_record_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["evaluate", "images", "a.npz", "--name", "a/b"])
    assert "--name: must have no /, @ or space, got 'a/b'" in capsys.readouterr().err
