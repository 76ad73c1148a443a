"""`pomscale bench codecs` measures a codec beside its module, and notices one that gives other latents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pomscale.benchmarks.codecs import AUTOENCODERS, Autoencoder, CodecBench, bench_codecs
from pomscale.cli import main
from pomscale.codecs.vae import PictureVae
from pomscale.codecs.vae_conventions import CONVENTIONS
from support.tiny_vaes import TINY_VAES

TINY = CodecBench(torch.device("cpu"), picture=32, clip=(10, 32, 32), batch=2, seconds=0.01, precision="fp32")


def test_the_command_measures_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "codecs.json"
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "codecs", "taesd", "--size", "64", "--batch", "2", "--seconds", "0.01", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["pictures_per_s"] > 0
    assert row["bytes_per_sample"] > 4 * 8 * 8 * 2
    assert "taesd: overhead over the bare loop" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "codecs", "vq"])
    assert "'vq' is none of sd, flux.1" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "frames"), [("wan21", 9), ("ltx", 9)])
def test_clips_have_frames_that_come_back(name: str, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class_name, arguments = TINY_VAES[name]
    monkeypatch.setitem(AUTOENCODERS, "small", Autoencoder(class_name, arguments, frames={"wan21": 4, "ltx": 8}[name]))
    report = bench_codecs(["small"], TINY)
    assert report.failures == []
    (row,) = report.rows
    assert f"small, {frames} x 32 x 32" in row["what"]
    assert row["clips_per_s"] > 0


def test_other_latents_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AUTOENCODERS, "small", Autoencoder(*TINY_VAES["sd"]))
    real = PictureVae.encode
    monkeypatch.setattr(PictureVae, "encode", lambda self, images, noise=None: 1.01 * real(self, images, noise))
    assert bench_codecs(["small"], TINY).failures == ["small: the codec and the module give other latents"]


def test_the_table_has_every_class_that_the_codec_takes() -> None:
    assert {autoencoder.class_name for autoencoder in AUTOENCODERS.values()} == set(CONVENTIONS)
    clips = {autoencoder.class_name for autoencoder in AUTOENCODERS.values() if autoencoder.frames is not None}
    assert clips == {name for name, conventions in CONVENTIONS.items() if conventions.takes == "clips"}
