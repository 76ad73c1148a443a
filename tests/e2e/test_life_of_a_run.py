"""Train, look, sample, measure: what a user does with one run, through the real commands."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pomscale as public
from pomscale.base.errors import InputError
from pomscale.checkpoint.store import complete_checkpoints
from pomscale.config.load import load_train_recipe
from pomscale.config.train import DiffusionConfig
from pomscale.data.dataset import LatentDataset
from pomscale.diffusion.objectives import OBJECTIVES
from pomscale.evaluation.heldout import open_heldout
from support.paths import RECIPES
from support.running import GLOBAL_BATCH, checkpoint_samples, pomscale, rows, run_tour, train, write_tiny_recipe

STEPS = 20
EXTRAS = """
validation: {{path: {digits}/latents/heldout, every_samples: {every}, num_samples: 50, num_time_bins: 4, batch: 8}}
sampling: {{every_samples: {every}, num_classes: 3, num_each: 2, num_steps: 4, guidance: 1.0}}
profile: {{start_samples: {every}, num_steps: 2}}
"""


@pytest.fixture(scope="module")
def recipe(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything on, on two ranks, resumed once."""
    path = write_tiny_recipe(tmp_path_factory.mktemp("life"), digits)
    path.write_text(path.read_text() + EXTRAS.format(digits=digits, every=10 * GLOBAL_BATCH))
    overrides = ["schedule={}", "monitoring.wandb.mode=offline", "faults.preflight=true"]
    train(path, *overrides, f"training.total_samples={STEPS // 2 * GLOBAL_BATCH}", num_processes=2)
    train(path, *overrides, f"training.total_samples={STEPS * GLOBAL_BATCH}", num_processes=2)
    return path


@pytest.fixture(scope="module")
def folder(recipe: Path) -> Path:
    return recipe.parent / "runs" / "tiny"


def test_the_run_folder_tells_the_whole_story(folder: Path, recipe: Path) -> None:
    assert json.loads((folder / "outcome.json").read_text())["samples"] == STEPS * GLOBAL_BATCH
    assert load_train_recipe(folder / "recipe.yaml").training.total_samples == STEPS * GLOBAL_BATCH
    assert "git_commit" in json.loads((folder / "code.json").read_text())
    starts = [json.loads(line)["start_samples"] for line in (folder / "incarnations.jsonl").read_text().splitlines()]
    assert starts == [0, STEPS // 2 * GLOBAL_BATCH]
    names = {name for row in rows(folder) for name in row}
    assert names >= {
        "train/loss", "train/grad_norm", "train/learning_rate", "speed/samples_per_s", "speed/step_time_s",
        "speed/data_wait_share", "memory/peak_gib", "host/cpu_percent", "host/memory_gib", "validation/loss",
        "validation/loss_bin_00", "validation/loss_bin_03", "preflight/matmul_tflops", "preflight/write_gb_per_s",
        "preflight/all_reduce_gb_per_s",
    }  # fmt: skip
    grids = sorted((folder / "samples").glob("*.png"))
    assert [grid.name for grid in grids] == [f"samples-{n * GLOBAL_BATCH:012d}.png" for n in (STEPS // 2, STEPS)]
    assert len(list((folder / "profile").glob("rank-*-trace.json.gz"))) == 2


def test_a_resumed_run_is_one_wandb_run(folder: Path) -> None:
    identity = (folder / "wandb_id.txt").read_text().strip()
    files = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert {file.stem for file in files} == {f"run-{identity}"}


def test_checkpoints_are_kept_as_the_recipe_says(folder: Path) -> None:
    kept = [path.name for path in complete_checkpoints(folder / "checkpoints")]
    assert kept == [f"samples-{n * GLOBAL_BATCH:012d}" for n in (STEPS // 2, STEPS)]


def test_grid_does_not_depend_on_batch_size_or_number_of_classes(folder: Path, tmp_path: Path) -> None:
    common = ["--num", "3", "--steps", "5", "--guidance", "0.5", "--guidance-interval", "0,0.8", "--sampler", "sde"]
    pomscale("sample", folder, "--classes", "0,2", *common, "--npz", tmp_path / "a.npz", "--out", tmp_path / "a.png")
    pomscale(
        "sample", folder, "--classes", "0", *common, "--batch", "1",
        "--npz", tmp_path / "b.npz", "--out", tmp_path / "b.png",
    )  # fmt: skip
    ours, theirs = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert ours["classes"].tolist() == [0, 0, 0, 2, 2, 2]
    assert ours["images"].shape == (6, 8, 8, 1)
    # One batch or many: matrix products of other shapes may round the last bit of a pixel differently.
    assert np.abs(ours["images"][:3].astype(int) - theirs["images"]).max() <= 1
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.width > grid.height


def test_training_grid_is_what_sample_draws(folder: Path, tmp_path: Path) -> None:
    """The grid drawn by two sharded ranks in training, again by one process from the checkpoint."""
    out = tmp_path / "grid.png"
    pomscale("sample", folder, "--classes", "0-2", "--num", "2", "--out", out)
    with Image.open(out) as ours, Image.open(max((folder / "samples").glob("*.png"))) as theirs:
        difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 1


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun"])
def test_public_functions(folder: Path, objective: str, sampler: str) -> None:
    model = public.load_pretrained(folder, device="cpu")
    diffusion = DiffusionConfig.model_validate({"objective": objective})
    model.card = model.card.model_copy(update={"diffusion": diffusion})
    latents = public.sample(model, [1, 10], seeds=range(2), sampler=sampler, num_steps=3, guidance=1.0)
    pictures = public.decode(model, latents)
    assert latents.shape == (2, 4, 4, 4)
    assert pictures.shape == (2, 1, 8, 8)
    assert torch.isfinite(pictures).all()
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_averaged_and_trained_weights_differ(folder: Path) -> None:
    average, trained = (public.load_pretrained(folder, weights=weights, device="cpu") for weights in ("ema", "model"))
    assert not average.head.weight.equal(trained.head.weight)


def test_heldout_loss_from_the_command_line_is_the_one_logged(folder: Path) -> None:
    logged = [row for row in rows(folder) if "validation/loss" in row][-1]
    measured = json.loads(pomscale("evaluate", "heldout", folder).stdout)
    assert measured["mean"] == pytest.approx(logged["validation/loss"], rel=1e-5)
    assert measured["by_bin"] == pytest.approx([logged[f"validation/loss_bin_{i:02d}"] for i in range(4)], rel=1e-5)
    assert (measured["space"], len(measured["v_by_bin"])) == ("v", 4)
    assert measured["v_mean"] == pytest.approx(logged["validation/v_loss"], rel=1e-5)
    other = json.loads(pomscale("evaluate", "heldout", folder, "--weights", "model").stdout)
    assert other["mean"] != measured["mean"]


def test_heldout_set_is_normalised_as_the_training_set(folder: Path, digits: Path) -> None:
    """Its own mean and std differ a little; with them the network would be judged in a space it never saw."""
    card = public.load_pretrained(folder, device="cpu").card
    heldout = open_heldout(str(digits / "latents" / "heldout"), card)
    assert heldout.normalization == LatentDataset.open(digits / "latents" / "train", "dataset").normalization
    assert heldout.normalization != LatentDataset.open(digits / "latents" / "heldout", "dataset").normalization


def test_a_network_without_a_card_cannot_be_sampled() -> None:
    model = public.build_model("dipom-s-2", num_classes=3, latent_shape=(4, 4, 4), depth=1)
    with pytest.raises(InputError, match="load_pretrained"):
        public.sample(model, [0], seeds=[0])


def test_report(folder: Path, tmp_path: Path) -> None:
    pomscale("report", folder, "--out", tmp_path)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 500
    page = (tmp_path / "report.html").read_text()
    assert "tiny" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")


def test_data_commands(digits: Path, tmp_path: Path) -> None:
    dataset = digits / "latents" / "train"
    assert "901" in pomscale("data", "info", dataset).stdout
    pomscale("data", "verify", dataset)
    pomscale("data", "show", dataset, "--num", "9", "--out", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width == grid.height


def test_an_unreadable_picture_among_good_ones(digits: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(digits / "digits" / "heldout", pictures)
    (pictures / "3" / "0000-broken.png").write_bytes(b"not a picture")
    command = ["data", "encode", RECIPES / "data" / "digits.yaml", f"source.path={pictures}", f"output={tmp_path}/out"]
    done = pomscale(*command, expect=3)
    assert "896 samples" in done.stdout
    (failure,) = (json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines())
    assert "0000-broken" in json.dumps(failure)
    pomscale("data", "verify", tmp_path / "out", expect=3)
    # Who puts up with one says so: nothing is made again, and both commands succeed.
    assert "896 samples" in pomscale(*command, "max_skipped=1").stdout
    pomscale("data", "verify", tmp_path / "out")


def test_an_empty_class_folder_is_named(digits: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(digits / "digits" / "heldout", pictures)
    (pictures / "unicorn").mkdir()
    command = ["data", "encode", RECIPES / "data" / "digits.yaml", f"source.path={pictures}", f"output={tmp_path}/out"]
    assert "unicorn" in pomscale(*command, expect=2).stderr
    # Nothing stands in the way of the same command on a source that is in order.
    (pictures / "unicorn").rmdir()
    pomscale(*command)


def test_dry_run_writes_nothing(digits: Path, tmp_path: Path) -> None:
    overrides = [f"source.path={digits}/digits/train", f"output={tmp_path}/out"]
    done = pomscale("data", "encode", RECIPES / "data" / "digits.yaml", overrides[0], "--dry-run", overrides[1])
    assert "901" in done.stdout
    assert not (tmp_path / "out").exists()


# A third of the steps at three times the rate, with fewer and cruder pictures on the way; the same commands.
SHORT_TOUR = """
from pomscale.quickstart import images as tour
words = tour.train_command
tour.train_command = lambda *known: words(*known, *{overrides})
tour.KILL_AFTER_SAMPLES = {kill_after}
tour.main(["PoM"])
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_short_quickstart_reaches_its_figures(tmp_path: Path) -> None:
    """The tour of `make quickstart` with a third of the training, in a folder of its own."""
    every, total = 2_560, 12_800
    few = [f"training.total_samples={total}", "schedule={warmup_samples: 640, cooldown_samples: 6400}"]
    few += ["optimizer.lr=3e-3", "ema.halflives_samples=[640]", f"checkpoint.every_samples={every}"]
    few += ["sampling={every_samples: 6400, num_classes: 10, num_each: 1, num_steps: 10, guidance: 1.0}"]
    code = SHORT_TOUR.format(overrides=few, kill_after=6_400)
    assert_toured(tmp_path, code, ["quickstart"], every, first=2 * every, total=total)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_quickstart_reaches_its_figures(tmp_path: Path) -> None:
    code = "from pomscale.quickstart.images import RUNS, main\nmain(list(RUNS))"
    assert_toured(tmp_path, code, ["quickstart", "quickstart-attention"], every=6_400, first=12_800, total=38_400)


def assert_toured(folder: Path, code: str, names: list[str], every: int, first: int, total: int) -> None:
    """Take a tour whose run is saved so often; `first`: the last save before it is killed."""
    done = run_tour(code, cwd=folder, timeout=1750)
    killed = re.search(r"killed \d+ processes with SIGKILL at ([\d,]+) samples", done.stdout)
    resumed = re.search(r"resuming from runs/quickstart/checkpoints/samples-(\d{12})", done.stdout)
    assert killed is not None
    assert resumed is not None
    # By a tour that stood still for seconds it is killed late, and in a save it resumes from the one before that.
    killed_at, resumed_at = int(killed[1].replace(",", "")), int(resumed[1])
    assert resumed_at % every == 0
    assert first <= resumed_at <= killed_at <= resumed_at + 2 * every
    for run in (folder / "runs" / name for name in names):
        figures = json.loads((run / "digits.json").read_text())
        assert figures["accuracy_generated"] >= 0.95
        assert figures["accuracy_real"] >= 0.97
        # No copies: generated digits are as far from the training half as real ones that were never seen.
        assert figures["nearest_generated_mean"] >= 0.9 * figures["nearest_heldout_mean"]
        assert checkpoint_samples(run) == total
        assert (run / "grid.png").is_file()
        assert (run / "report.html").is_file()
