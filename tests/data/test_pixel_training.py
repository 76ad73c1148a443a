"""Training on pixels differs from training on latents in nothing but where they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.encode.encode import encode
from pomscale.base.errors import InputError
from pomscale.config.encode import EncodeRecipe
from pomscale.config.train import TrainRecipe
from pomscale.diffusion.objectives import build_objective
from pomscale.distributed.world import World
from pomscale.evaluation.generated.shard_pictures import ShardPictures
from pomscale.models import make_model
from pomscale.training.build import open_inputs, open_loader
from pomscale.training.loss import share_of_loss
from pomscale.training.step import steps
from support.tiny_clips import awaken

ALONE = World(0, 1, torch.device("cpu"))
NUM_STEPS = 3


def recipe(folder: Path, codec: dict[str, object], **model: object) -> TrainRecipe:
    values = {"latent_shape": [3, 16, 16], "num_classes": 3, "patch_size": 4, "dim": 16, "depth": 1, "num_heads": 2}
    return TrainRecipe.model_validate(
        {
            "kind": "train",
            "name": "pixels",
            "codec": codec,
            "data": {"path": str(folder)},
            "model": values | model,
            "training": {"total_samples": 80, "global_batch": 8},
            "checkpoint": {"every_samples": 80},
        }
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One source, encoded by three codecs."""
    root, rng = tmp_path_factory.mktemp("pixels"), np.random.default_rng(0)
    for number in range(21):
        target = root / "pictures" / f"class-{number % 3}" / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(target)
    codecs = {
        "raw": {"name": "uint8", "coding": "raw"},
        "png": {"name": "uint8", "coding": "png"},
        "latents": {"name": "pixel", "block": 1},
    }
    for name, codec in codecs.items():
        values = {"kind": "encode", "name": name, "output": str(root / name), "codec": codec}
        values |= {"source": {"kind": "image_folder", "path": str(root / "pictures")}}
        values |= {"transform": {"size": 16, "flip": True}}
        encode(EncodeRecipe.model_validate(values), progress=False)
    return {name: root / name for name in codecs}


def losses(train: TrainRecipe, folder: Path) -> list[float]:
    """Losses of the first steps of a network that does not learn, with the loader's and the trainer's own parts."""
    inputs = open_inputs(train, folder / "run")
    model = make_model(train.model)
    awaken(model)
    objective = build_objective(train.diffusion)
    found = []
    with open_loader(inputs, ALONE, 0) as loader:
        for step, _ in zip(steps(loader), range(NUM_STEPS), strict=False):
            (batch,) = step.micro_batches
            share = share_of_loss(objective, inputs.card.normalization, 8, ALONE.device, None, model, batch)
            found.append(share.item())
    return found


def test_pixels_give_the_losses_of_latents(folders: dict[str, Path]) -> None:
    """Codec `pixel` stores 2x - 1 in float16; samples, flips, noise and times are the same."""
    raw = losses(recipe(folders["raw"], {"name": "uint8"}), folders["raw"])
    assert raw == losses(recipe(folders["png"], {"name": "uint8"}), folders["png"])
    latents = losses(recipe(folders["latents"], {"name": "pixel", "block": 1}), folders["latents"])
    np.testing.assert_allclose(raw, latents, rtol=1e-3)
    assert len(set(raw)) == NUM_STEPS


def test_a_recipe_of_another_codec_or_shape_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"made with codec .*uint8.*, but the recipe's codec is .*pixel"):
        open_inputs(recipe(folders["raw"], {"name": "pixel", "block": 1}), folders["raw"])
    with pytest.raises(InputError, match="made with codec"):
        open_inputs(recipe(folders["raw"], {"name": "uint8", "channels": 1}), folders["raw"])
    with pytest.raises(InputError, match=r"has latents of shape \(3, 16, 16\)"):
        open_inputs(recipe(folders["raw"], {"name": "uint8"}, latent_shape=[3, 32, 32]), folders["raw"])


def test_pictures_of_a_model_on_pixels_come_out_right(folders: dict[str, Path]) -> None:
    """What is normalised for the network, and comes out of it unchanged, is decoded to the very bytes."""
    inputs = open_inputs(recipe(folders["png"], {"name": "uint8"}), folders["png"])
    card, codec = inputs.card, inputs.card.load_codec(torch.device("cpu"))
    with open_loader(inputs, ALONE, 0) as loader:
        (batch,) = next(steps(loader)).micro_batches
    seen = (batch.x0.float() - 127.5) / 127.5
    shown = codec.decode(card.denormalize(seen))
    assert torch.equal((shown * 255.0).round().byte(), batch.x0)


def test_a_set_of_pixels_is_measured_as_it_is(folders: dict[str, Path]) -> None:
    shards = ShardPictures(str(folders["png"]))
    (batch,) = shards.batches(0, 21, 32)
    stored = ShardPictures(str(folders["raw"]))
    (raw,) = stored.batches(0, 21, 32)
    assert torch.equal(batch.pixels, raw.pixels)
    assert batch.pixels.shape == (21, 3, 16, 16)
    assert shards.crop == {"kind": "image", "targets": [[16, 16]], "filter": "lanczos", "version": 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_pixels_are_read_into_the_memory_from_which_a_gpu_copies(folders: dict[str, Path]) -> None:
    world = World(0, 1, torch.device("cuda"))
    inputs = open_inputs(recipe(folders["png"], {"name": "uint8"}), folders["png"] / "run", pin_memory=True)
    samples = inputs.mixture.read(np.arange(8))
    assert samples.latents.is_pinned()
    with open_loader(inputs, world, 0) as loader:
        (batch,) = next(steps(loader)).micro_batches
    assert batch.x0.is_pinned()
    assert batch.pin_memory().x0.data_ptr() == batch.x0.data_ptr()
    assert torch.equal(batch.to(world.device).x0.cpu(), samples.latents)
