"""Whatever is wrong, one clear error that names it, the right exit code, and nothing already done is lost."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ENVIRONMENT, GLOBAL_BATCH, losses, pomscale, train, train_command

from pomscale.checkpoint.store import MARKER, complete_checkpoints


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
    assert "model:" in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_disk_full_while_saving_keeps_the_previous_checkpoint(
    tiny_recipe: Path, small_disk: Path, asynchronous: str
) -> None:
    checkpoints = small_disk / "tiny" / "checkpoints"
    overrides = [f"output={small_disk}", f"checkpoint.asynchronous={asynchronous}"]
    train(tiny_recipe, *overrides, f"training.total_samples={20 * GLOBAL_BATCH}", "checkpoint.keep_last=1")
    (saved,) = complete_checkpoints(checkpoints)
    content = {path.name: path.read_bytes() for path in saved.iterdir()}
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - 60_000))

    done = train(tiny_recipe, *overrides, expect=1)
    assert "could not be written" in done.stderr
    assert "0.1 MiB are free there" in done.stderr or "0.0 MiB are free there" in done.stderr
    assert str(checkpoints) in done.stderr
    assert "Traceback" not in done.stderr
    assert complete_checkpoints(checkpoints) == [saved]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == content

    filler.unlink()
    assert "resuming from" in train(tiny_recipe, *overrides).stdout


def test_more_ranks_than_samples_per_step(tiny_recipe: Path) -> None:
    overrides = ["training.global_batch=1", "training.total_samples=1", "schedule={}"]
    command = train_command(tiny_recipe, *overrides, num_processes=2)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "training.global_batch: 1 samples cannot be shared by 2 ranks" in done.stderr


def test_model_that_is_not_there(tmp_path: Path) -> None:
    assert f"{tmp_path}: no complete checkpoint here" in pomscale("sample", tmp_path, expect=2).stderr
