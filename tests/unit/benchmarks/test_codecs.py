"""`pomscale bench codecs` measures a codec beside its module, and notices one that gives other latents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pomscale.benchmarks.codec_networks import AUTOENCODERS, TEXT_TOWERS, Autoencoder, TextTower
from pomscale.benchmarks.codecs import CodecBench, bench_codecs
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
    (failure,) = bench_codecs(["small"], TINY).failures
    assert failure == "small: codec and module differ by 0.01"


@pytest.mark.parametrize("name", ["clip-l", "t5-v1.1-xxl", "umt5-xxl", "gemma-2-2b", "qwen3-4b"])
def test_captions_have_all_their_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TEXT_TOWERS[name]
    small = {"vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
    small |= {"d_model": 16, "d_ff": 32, "num_layers": 2, "head_dim": 8, "d_kv": 8}
    small |= dict.fromkeys(("num_attention_heads", "num_heads"), 2) | {"num_key_value_heads": 1}
    fields = {key: small.get(key, value) for key, value in real.fields.items()} | {"vocab_size": 300}
    monkeypatch.setitem(TEXT_TOWERS, "small", TextTower(real.class_name, real.config_name, fields, max_length=20))
    report = bench_codecs(["small"], TINY)
    assert report.failures == []
    (row,) = report.rows
    assert "small, 20 tokens" in row["what"]
    assert row["bytes_per_sample"] > 20 * 16 * 2
    assert row["tokens_per_s"] > 0


def test_a_network_without_room_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pomscale.benchmarks.codecs._COPIES", 1e6)
    report = bench_codecs(["taesd"], TINY)
    assert report.rows == []
    assert "taesd: left out" in report.notes[0]


def test_the_table_has_every_class_that_the_codec_takes() -> None:
    assert {autoencoder.class_name for autoencoder in AUTOENCODERS.values()} == set(CONVENTIONS)
    clips = {autoencoder.class_name for autoencoder in AUTOENCODERS.values() if autoencoder.frames is not None}
    assert clips == {name for name, conventions in CONVENTIONS.items() if conventions.takes == "clips"}
