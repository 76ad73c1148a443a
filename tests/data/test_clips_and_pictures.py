"""Clips of several durations and aspects, and pictures, in one run: from shards on a disk to the network's loss."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial

import pytest
import torch

from launch.submission.checks import check_training_data
from pomscale.base.condition import Condition, Text
from pomscale.base.errors import InputError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.model import VideoModelConfig
from pomscale.config.train import TrainRecipe, ValidationConfig
from pomscale.data.loader import Loader, ReadAhead
from pomscale.data.mixture import Mixture
from pomscale.diffusion.objectives import FlowMatching
from pomscale.distributed.world import join_world
from pomscale.evaluation.heldout import heldout_loss, read_in_order, shape_sizes
from pomscale.models import VDiPoM, init_weights
from pomscale.shards.schema import check_compatible, check_text
from pomscale.training.loss import TrainBatch, draw_batch, share_of_loss
from support.synthetic_dataset import TEXT_DIM, write_dataset

GLOBAL_BATCH = 6
LONG, WIDE, TALL = (4, 6, 2, 2), (4, 4, 2, 4), (4, 4, 4, 2)
PICTURE, ONE_FRAME = (4, 2, 4), (4, 1, 2, 2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> TrainRecipe:
    """Clips in three buckets with their own texts, pictures and clips of one frame with a companion set of texts."""
    root = tmp_path_factory.mktemp("data")
    write_dataset(root / "clips", [9, 7, 5, 6], shapes=[LONG, WIDE, TALL], shard_groups=[0, 0, 1, 2], text=True)
    sizes = [8, 5]
    write_dataset(root / "pictures", sizes, shapes=[PICTURE, ONE_FRAME], shard_groups=[0, 1], first_record=1000)
    write_dataset(root / "texts", [13], latents=False, text=True, first_record=1000)
    pictures = {"path": str(root / "pictures"), "text": str(root / "texts")}
    return TrainRecipe.model_validate(
        {
            "kind": "train",
            "name": "mixed",
            "codec": {"name": "pixel", "block": 2, "channels": 1},
            "data": {"mixture": [{"path": str(root / "clips"), "weight": 2}, pictures], "shuffle_window": 8},
            "model": {
                "kind": "video", "latent_shape": (4, 6, 2, 4), "text_dim": TEXT_DIM, "dim": 16, "depth": 1,
                "temporal": "block_causal",
            },
            "diffusion": {"time": {"per_frame_group": True}, "max_start_group": 3},
            "training": {"total_samples": 600, "global_batch": GLOBAL_BATCH},
            "checkpoint": {"every_samples": 600},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def mixture(recipe: TrainRecipe) -> Mixture:
    return Mixture.open(recipe.data, seed=recipe.seed, global_batch=GLOBAL_BATCH, read_text=True)


def batches(
    recipe: TrainRecipe, mixture: Mixture, num_steps: int, *, start: int = 0, rank: int = 0, num_ranks: int = 1
) -> list[TrainBatch]:
    assert mixture.text is not None
    loader = Loader(
        mixture,
        micro_batch=None,
        rank=rank,
        world_size=num_ranks,
        start_position=start,
        ahead=ReadAhead(2, 3),
        finish=partial(draw_batch, recipe, texts=mixture.text.info),
    )
    with loader:
        return list(itertools.islice(loader, num_steps))


def tensors(batch: TrainBatch) -> list[torch.Tensor]:
    assert isinstance(batch.condition, Text)
    assert batch.start is not None
    return [batch.x0, batch.eps, batch.t, *batch.condition, batch.start, batch.weights]


def test_the_datasets_fit_the_model(recipe: TrainRecipe, mixture: Mixture) -> None:
    assert isinstance(recipe.model, VideoModelConfig)
    for dataset in mixture.datasets:
        check_compatible(dataset.location, dataset.manifest, recipe.codec, recipe.model)
        assert dataset.text is not None
        check_text(dataset.text.source.location, dataset.text.source.manifest, recipe.model)
    assert mixture.text is mixture.datasets[0].text
    assert mixture.text is not None
    assert mixture.text.null.equal(torch.full((1, TEXT_DIM), -1, dtype=torch.float16))


def test_a_launch_looks_at_latents_and_texts(recipe: TrainRecipe) -> None:
    cluster = {"kind": "cluster", "scheduler": "debug", "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1}
    profile = ClusterProfile.model_validate(cluster)
    assert check_training_data(recipe, profile) is not None
    first, second = recipe.data.components
    without = recipe.data.model_copy(update={"mixture": [first, second.model_copy(update={"text": None})]})
    with pytest.raises(InputError, match=r"dataset \S+pictures: has no text embeddings"):
        check_training_data(recipe.model_copy(update={"data": without}), profile)
    validation = ValidationConfig(path=second.path, text=second.text, every_samples=6)
    check_training_data(recipe.model_copy(update={"validation": validation}), profile)
    mute = validation.model_copy(update={"text": None})
    with pytest.raises(InputError, match=r"dataset \S+pictures: has no text embeddings.*: `text`, beside its `path`"):
        check_training_data(recipe.model_copy(update={"validation": mute}), profile)
    wider = recipe.model.model_copy(update={"text_dim": 16})
    with pytest.raises(InputError, match=rf"dataset \S+clips: .* {TEXT_DIM} values per token, but .* is 16"):
        check_training_data(recipe.model_copy(update={"model": wider}), profile)


def test_a_step_has_one_shape_and_epochs_are_counted(recipe: TrainRecipe, mixture: Mixture) -> None:
    num_steps = 60
    shapes: Counter[tuple[int, ...]] = Counter()
    is_picture = 0
    for batch in batches(recipe, mixture, num_steps):
        shapes[tuple(batch.x0.shape[1:])] += len(batch.x0)
        is_picture += int((batch.x0.flatten(1)[:, 0] >= 1000).sum())
        num_groups = max(1, batch.x0.shape[2] // 2) if batch.x0.ndim == 5 else 1
        assert batch.t.shape == (GLOBAL_BATCH, num_groups)
    assert set(shapes) == {LONG, WIDE, TALL, PICTURE, ONE_FRAME}
    epochs = mixture.epochs(num_steps * GLOBAL_BATCH)
    assert epochs["clips"].mean == pytest.approx((num_steps * GLOBAL_BATCH - is_picture) / 27)
    assert epochs["pictures"].mean == pytest.approx(is_picture / 13)
    assert is_picture == pytest.approx(num_steps * GLOBAL_BATCH / 3, abs=2 * GLOBAL_BATCH)
    by_bucket = [shapes[LONG] / 16, shapes[WIDE] / 5, shapes[TALL] / 6]
    assert (epochs["clips"].lowest, epochs["clips"].highest) == (min(by_bucket), max(by_bucket))


def test_the_times_of_every_shape_are_shifted_by_its_own_tokens(recipe: TrainRecipe, mixture: Mixture) -> None:
    """Tokens are 2x2 of 2 frames; pictures and clips of one frame have one group of them."""
    base, num_tokens = 2, {LONG: 3, WIDE: 4, TALL: 4, PICTURE: 2, ONE_FRAME: 1}
    time = recipe.diffusion.time.model_copy(update={"shift_base_tokens": base})
    shifting = recipe.model_copy(update={"diffusion": recipe.diffusion.model_copy(update={"time": time})})
    seen = set()
    for plain, shifted in zip(batches(recipe, mixture, 30), batches(shifting, mixture, 30), strict=True):
        shape = tuple(plain.x0.shape[1:])
        ratio, shifted_ratio = (batch.t.double() / (1 - batch.t.double()) for batch in (plain, shifted))
        factor = (num_tokens[shape] / base) ** 0.5
        torch.testing.assert_close(shifted_ratio, factor * ratio, rtol=1e-4, atol=0)
        assert shifted.eps.equal(plain.eps)
        seen.add(shape)
    assert seen == set(num_tokens)


def test_batches_do_not_depend_on_ranks_or_on_where_a_run_was_resumed(recipe: TrainRecipe, mixture: Mixture) -> None:
    num_steps, done = 20, 7
    alone = batches(recipe, mixture, num_steps)
    resumed = batches(recipe, mixture, num_steps - done, start=done * GLOBAL_BATCH)
    rank_findings = [batches(recipe, mixture, num_steps, rank=rank, num_ranks=3) for rank in range(3)]
    for step, batch in enumerate(alone):
        shares = [tensors(rank[step]) for rank in rank_findings]
        together = [torch.cat(parts) for parts in zip(*shares, strict=True)]
        later = tensors(resumed[step - done]) if step >= done else tensors(batch)
        for whole, joined, again in zip(tensors(batch), together, later, strict=True):
            assert whole.equal(joined)
            assert whole.equal(again)


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [
        (9, [[0, 1, 2], [3, 4], [16, 17], [21, 22]]),
        (1, [[21]]),
        (
            1000,
            [*([n, n + 1, n + 2] for n in range(0, 15, 3)), [15], [16, 17, 18], [19, 20], [21, 22, 23], [24, 25, 26]],
        ),
    ],
)
def test_every_shape_has_its_share_of_a_validation(
    recipe: TrainRecipe, mixture: Mixture, num_samples: int, expected: list[list[int]]
) -> None:
    assert isinstance(recipe.model, VideoModelConfig)
    model = VDiPoM(recipe.model)
    init_weights(model, seed=0)
    clips = mixture.datasets[0]
    in_order, read = read_in_order(clips), []

    def reading(indices: list[int]) -> tuple[torch.Tensor, Condition, torch.Tensor]:
        read.append(indices)
        return in_order(indices)

    config = ValidationConfig(path="x", every_samples=6, num_samples=num_samples, batch=3, num_time_bins=4)
    sizes = list(shape_sizes(clips).values())
    assert sizes == [16, 5, 6]
    with join_world("cpu") as world:
        loss = heldout_loss(FlowMatching(), model, reading, sizes, config, world)
    assert read == expected
    measured = {place % 4 for batch in expected for place in batch}
    assert {number for number, of_bin in enumerate(loss.by_bin) if of_bin is not None} == measured
    assert loss.num_bad == 0


def test_every_shape_trains(recipe: TrainRecipe, mixture: Mixture) -> None:
    assert isinstance(recipe.model, VideoModelConfig)
    model = VDiPoM(recipe.model)
    init_weights(model, seed=0)
    for batch in {tuple(batch.x0.shape): batch for batch in batches(recipe, mixture, 60)}.values():
        device = torch.device("cpu")
        loss = share_of_loss(FlowMatching(), mixture.normalization, GLOBAL_BATCH, device, None, model, batch)
        loss.backward()
        assert loss.isfinite()
