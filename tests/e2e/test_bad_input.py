"""Whatever is wrong, one clear error that names it, the right exit code, and nothing already done is lost."""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pomscale.runs.checkpoint_folder import complete_checkpoints
from pomscale.runs.layout import MARKER
from support.running import GLOBAL_BATCH, Finished, losses, mounted_disk, outcome, pomscale, run, train, train_command


def test_unknown_key_names_file_line_key_and_the_nearest(tiny_recipe: Path) -> None:
    tiny_recipe.write_text(tiny_recipe.read_text().replace("grad_clip", "x") + "emma: {}\n")
    done = pomscale("train", tiny_recipe, "optimizer.lrr=1", expect=2)
    line = tiny_recipe.read_text().splitlines().index("emma: {}") + 1
    assert f"{tiny_recipe}:{line}: emma: unknown key; did you mean 'ema'?" in done.stderr
    assert "override 'optimizer.lrr=1': optimizer.lrr: unknown key; did you mean 'lr'?" in done.stderr


def test_missing_dataset(tiny_recipe: Path) -> None:
    done = pomscale("train", tiny_recipe, "data.path=nowhere/latents", expect=2)
    assert "nowhere/latents" in done.stderr
    assert "pomscale data encode" in done.stderr
    assert not (tiny_recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("codec.block=4", "codec"),
        ("model.latent_shape=[4, 8, 8]", "model.latent_shape"),
        ("model.num_classes=12", "model.num_classes"),
    ],
)
def test_dataset_that_does_not_fit_is_refused(tiny_recipe: Path, override: str, words: str) -> None:
    done = pomscale("train", tiny_recipe, override, expect=2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_truncated_shard_is_named(tiny_recipe: Path, digits: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(digits / "latents" / "train", broken)
    shard = broken / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:10_000])
    done = pomscale("train", tiny_recipe, f"data.path={broken}", expect=2)
    assert "shard-000001.tar" in done.stderr
    assert f"pomscale data verify {broken}" in done.stderr
    assert "Traceback" not in done.stderr
    verified = pomscale("data", "verify", broken, expect=1)
    assert "shard-000001.tar" in verified.stdout


def test_checkpoint_without_its_marker_is_ignored_with_a_warning(tiny_recipe: Path) -> None:
    short = f"training.total_samples={30 * GLOBAL_BATCH}"
    train(tiny_recipe, short)
    folder = tiny_recipe.parent / "runs" / "tiny"
    newest = complete_checkpoints(folder / "checkpoints")[-1]
    before = losses(folder)
    (newest / MARKER).unlink()
    (newest / ".metadata").write_bytes(b"torn")
    done = train(tiny_recipe, short)
    assert f"{newest} has no {MARKER} marker" in done.stderr
    assert f"({20 * GLOBAL_BATCH:,} samples)" in done.stdout
    assert losses(folder) == before
    assert (newest / MARKER).is_file()
    assert "COMPLETE" in pomscale("sample", _without_marker(newest), expect=2).stderr


def _without_marker(checkpoint: Path) -> Path:
    copy = checkpoint.parent / "samples-999999999999"
    shutil.copytree(checkpoint, copy)
    (copy / MARKER).unlink()
    return copy


def test_a_run_folder_of_another_recipe_is_refused(tiny_recipe: Path) -> None:
    short = f"training.total_samples={10 * GLOBAL_BATCH}"
    train(tiny_recipe, short, "schedule.warmup_samples=0", "schedule.cooldown_samples=0")
    done = pomscale("train", tiny_recipe, "seed=1", "model.depth=1", expect=2)
    assert "seed: 0 then, 1 now" in done.stderr
    assert outcome(tiny_recipe.parent / "runs" / "tiny")["state"] == "finished"  # the other run's folder is untouched
    assert "model.depth: 2 then, 1 now" in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 6 MiB."""
    with mounted_disk(tmp_path / "disk", "6m") as disk:
        yield disk


@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.exhaustive)])
def test_disk_full_while_saving_keeps_the_previous_checkpoint(
    tiny_recipe: Path, small_disk: Path, asynchronous: str
) -> None:
    # Preflight would find the disk full before there is anything to save.
    overrides = [f"output={small_disk}", f"checkpoint.asynchronous={asynchronous}", "faults.preflight=false"]
    saved, content = _train_to_one_checkpoint(tiny_recipe, small_disk / "tiny", overrides)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 600_000))
    done = train(tiny_recipe, *overrides, expect=1)
    assert re.search(r"0\.\d MiB are free there", done.stderr)
    _assert_kept(saved, content, done)

    filler.unlink()
    assert "resuming from" in train(tiny_recipe, *overrides).stdout


def test_a_write_that_fails_while_saving_keeps_the_previous_checkpoint(tiny_recipe: Path) -> None:
    """As above on any machine: the kernel refuses files of more than 600 kB."""
    saved, content = _train_to_one_checkpoint(tiny_recipe, tiny_recipe.parent / "runs" / "tiny", [])
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))  # noqa: E731
    done = run(train_command(tiny_recipe, "faults.preflight=false"), expect=1, preexec_fn=limit)
    _assert_kept(saved, content, done)
    assert "resuming from" in train(tiny_recipe).stdout


def _train_to_one_checkpoint(recipe: Path, folder: Path, overrides: list[str]) -> tuple[Path, dict[str, bytes]]:
    train(recipe, *overrides, f"training.total_samples={20 * GLOBAL_BATCH}", "checkpoint.keep_last=1")
    (saved,) = complete_checkpoints(folder / "checkpoints")
    return saved, {path.name: path.read_bytes() for path in saved.iterdir()}


def _assert_kept(saved: Path, content: dict[str, bytes], done: Finished) -> None:
    assert "could not be written" in done.stderr
    assert str(saved.parent) in done.stderr
    assert "Traceback" not in done.stderr
    assert complete_checkpoints(saved.parent) == [saved]
    assert list(saved.parent.iterdir()) == [saved], "half a checkpoint still takes up space"
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == content
    assert outcome(saved.parent.parent)["state"] == "failed"
    assert "could not be written" in outcome(saved.parent.parent)["reason"]


def test_more_ranks_than_samples_per_step(tiny_recipe: Path) -> None:
    overrides = ["training.global_batch=1", "training.total_samples=1", "schedule={}"]
    done = run(train_command(tiny_recipe, *overrides, num_processes=2), expect=1)  # torchrun's own exit code
    assert "training.global_batch: 1 samples cannot be shared by 2 ranks" in done.stderr


def test_model_that_is_not_there(tmp_path: Path) -> None:
    assert f"{tmp_path}: no complete checkpoint here" in pomscale("sample", tmp_path, expect=2).stderr


def test_a_place_where_no_run_can_be_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = pomscale("train", tiny_recipe, f"output={tmp_path}/file", expect=2)
    assert f"error: {tmp_path}/file/tiny: this folder cannot be made" in done.stderr


def test_where_pictures_cannot_go_is_said_before_they_are_made(tiny_recipe: Path, digits: Path, tmp_path: Path) -> None:
    train(tiny_recipe, f"training.total_samples={10 * GLOBAL_BATCH}", "schedule={}")
    run_folder = tiny_recipe.parent / "runs" / "tiny"
    few = ["--classes", "1", "--num", "1", "--steps", "1", "--device", "cpu"]
    folder = tmp_path / "a folder"
    folder.mkdir()
    for option in ("--out", "--npz"):
        done = pomscale("sample", run_folder, *few, option, folder, expect=2)
        assert f"error: {folder}: this is a folder" in done.stderr
    data = ["--train", digits / "digits" / "train", "--heldout", digits / "digits" / "heldout"]
    assert "nan" in pomscale("sample", run_folder, *few, "--guidance", "nan", expect=2).stderr
    for words, message in (
        (["--guidance-interval", "0.9,0.1"], "error: sampling: guidance_interval: 0.9 is not below 0.1"),
        (["--sampler", "heun", "--eta", "0.5"], "error: sampling: eta: heun adds no noise; use ddim or sde"),
        (["--guide", run_folder], "error: guide: guidance is 0, so that a guide would change nothing"),
    ):
        assert message in pomscale("sample", run_folder, *few, *words, expect=2).stderr
    out = tmp_path / "figures.json" / "below"
    out.parent.write_text("")
    pictures = tmp_path / "no suffix"
    pomscale("sample", run_folder, *few, "--out", tmp_path / "grid.png", "--npz", pictures)
    assert pictures.is_file()
    done = pomscale("evaluate", "digits", pictures, *data, "--out", out, expect=2)
    assert "this folder cannot be made" in done.stderr
    assert "Traceback" not in done.stderr
