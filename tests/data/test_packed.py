"""Packed steps of clips of several shapes, pictures and texts: their order, their ranks and their loss."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.submission.checks import check_training_data
from pomscale.base.condition import PackedText
from pomscale.base.errors import InputError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.model import of_shape
from pomscale.config.train import TrainRecipe
from pomscale.data.loader import Loader, ReadAhead
from pomscale.data.mixture import Mixture
from pomscale.data.packed_loader import PackedLoader, packed_pieces
from pomscale.data.packed_order import PackedOrder, deal
from pomscale.diffusion.objectives import FlowMatching
from pomscale.models import make_model
from pomscale.plan.checks import check_packing
from pomscale.training.build import open_inputs
from pomscale.training.loss import draw_batch, share_of_loss
from pomscale.training.packed import PackedBatch, draw_packed, share_of_packed_loss
from pomscale.training.step import packed_steps
from support.damage import flip_bit
from support.synthetic_dataset import TEXT_DIM, write_dataset

LONG, WIDE, TALL = (4, 6, 2, 2), (4, 4, 2, 4), (4, 4, 4, 2)
PICTURE, ONE_FRAME = (4, 2, 4), (4, 1, 2, 2)
TOKENS = {LONG: 3, WIDE: 4, TALL: 4, PICTURE: 2, ONE_FRAME: 1}
BUDGET = 13


def make_recipe(root: Path, **training: Any) -> TrainRecipe:
    pictures = {"path": str(root / "pictures"), "text": str(root / "texts")}
    return TrainRecipe.model_validate(
        {
            "kind": "train",
            "name": "packed",
            "codec": {"name": "pixel", "block": 2, "channels": 1},
            "data": {"mixture": [{"path": str(root / "clips"), "weight": 2}, pictures], "shuffle_window": 8},
            "model": {
                "kind": "video", "latent_shape": (4, 6, 2, 4), "text_dim": TEXT_DIM, "dim": 16, "depth": 2,
                "temporal": "block_causal",
            },
            "diffusion": {
                "time": {"per_frame_group": True, "shift_base_tokens": 2}, "max_start_group": 3,
                "condition_dropout": 0.3,
            },
            "training": {"total_samples": 600, "global_tokens": BUDGET, **training},
            "checkpoint": {"every_samples": 600},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips in three buckets with their own texts, pictures and clips of one frame with a companion set of texts."""
    root = tmp_path_factory.mktemp("data")
    write_dataset(root / "clips", [9, 7, 5, 6], shapes=[LONG, WIDE, TALL], shard_groups=[0, 0, 1, 2], text=True)
    write_dataset(root / "pictures", [8, 5], shapes=[PICTURE, ONE_FRAME], shard_groups=[0, 1], first_record=1000)
    write_dataset(root / "texts", [13], latents=False, text=True, first_record=1000)
    return root


@pytest.fixture(scope="module")
def recipe(root: Path) -> TrainRecipe:
    return make_recipe(root)


@pytest.fixture(scope="module")
def mixture(recipe: TrainRecipe) -> Mixture:
    return Mixture.open(recipe.data, seed=recipe.seed, global_batch=1, read_text=True)


def packed_order(mixture: Mixture, budget: int = BUDGET, micro_tokens: int | None = None) -> PackedOrder:
    return PackedOrder(mixture.order, lambda shape: TOKENS[shape], budget, micro_tokens)


def open_loader(
    recipe: TrainRecipe, mixture: Mixture, order: PackedOrder, *, start: int = 0, rank: int = 0, num_ranks: int = 1
) -> PackedLoader[PackedBatch]:
    assert mixture.text is not None
    return PackedLoader(
        mixture,
        order,
        rank=rank,
        world_size=num_ranks,
        start_position=start,
        ahead=ReadAhead(2, 3),
        finish=partial(draw_packed, recipe, texts=mixture.text.info),
    )


def test_steps_take_positions_while_the_budget_holds(mixture: Mixture) -> None:
    order, position = packed_order(mixture), 0
    shapes = mixture.order.shape_numbers(np.arange(2000))
    tokens = [TOKENS[mixture.order.shapes[number]] for number in shapes]
    for step in itertools.islice(order.steps(0), 200):
        end = position
        while sum(tokens[position : end + 1]) <= BUDGET:
            end += 1
        assert (step.first, step.num_samples) == (position, end - position)
        assert step.tokens.tolist() == tokens[position:end]
        position = end
    firsts = [step.first for step in itertools.islice(order.steps(0), 50)]
    assert [step.first for step in itertools.islice(order.steps(firsts[7]), 43)] == firsts[7:], "resumed at a boundary"


def test_the_order_of_packed_samples_keeps_weights_and_epochs(mixture: Mixture) -> None:
    positions = np.arange(3 * 27 * 8)
    drawn: Counter[tuple[int, int]] = Counter()
    for part in mixture.order.parts(positions):
        dataset = mixture.order.components[part.component].dataset
        drawn.update((dataset, record) for record in part.records.tolist())
    of_dataset = [sum(count for (number, _), count in drawn.items() if number == n) for n in (0, 1)]
    assert of_dataset[0] == pytest.approx(2 * of_dataset[1], abs=5)
    for dataset, size in ((0, 27), (1, 13)):
        counts = [drawn[dataset, record] for record in range(size)]
        assert max(counts) - min(counts) <= 1, "every record as often as any other"


@pytest.mark.parametrize(("num_ranks", "micro_tokens"), [(1, None), (2, None), (3, 4), (2, 5), (1, 4)])
def test_ranks_share_the_samples_of_the_same_steps(mixture: Mixture, num_ranks: int, micro_tokens: int | None) -> None:
    order, whole = packed_order(mixture, micro_tokens=micro_tokens), packed_order(mixture)
    ranks = [packed_pieces(order, 0, rank, num_ranks) for rank in range(num_ranks)]
    for step in itertools.islice(whole.steps(0), 100):
        seen: list[int] = []
        num_micro_batches = set()
        for pieces in ranks:
            for number in itertools.count(1):
                piece = next(pieces)
                assert (piece.step.first, piece.step.num_samples) == (step.first, step.num_samples)
                positions = np.concatenate(piece.positions)
                shapes = [set(mixture.order.shape_numbers(part)) for part in piece.positions]
                assert [len(of_part) for of_part in shapes] == [1] * len(shapes)
                tokens = step.tokens[positions - step.first].sum()
                assert micro_tokens is None or tokens <= micro_tokens
                if piece.weight:
                    seen += positions.tolist()
                else:
                    assert number > 1, "only a later micro-batch may be empty"
                    assert len(positions) == 1
                if piece.step.is_last:
                    num_micro_batches.add(number)
                    break
        assert sorted(seen) == list(range(step.first, step.first + step.num_samples))
        assert len(num_micro_batches) == 1, "collectives would not meet"


def test_samples_are_dealt_evenly() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(16, 1024, 500)
    (first,) = deal(tokens, 8, None)
    loads = [int(tokens[rows].sum()) for rows in first]
    assert max(loads) - min(loads) < tokens.max() / 10
    bins = deal(tokens, 8, 4096)
    assert max(int(tokens[rows].sum()) for of_ranks in bins for rows in of_ranks) <= 4096
    assert len(bins) == -(-int(tokens.sum()) // (8 * 4096))


def batches(loader: PackedLoader[PackedBatch], num_steps: int) -> list[PackedBatch]:
    with loader:
        steps = list(itertools.islice(packed_steps(loader), num_steps))
    return [batch for step in steps for batch in step.micro_batches]


def by_position(batches: list[PackedBatch]) -> dict[int, list[torch.Tensor]]:
    """Everything that was read and drawn for a sample."""
    found = {}
    for batch in batches:
        latents = [x for part in batch.x0 for x in part]
        eps = [x for part in batch.eps for x in part]
        times = [x for part in batch.t for x in part]
        assert isinstance(batch.condition, PackedText)
        texts = batch.condition.embeddings.split(list(batch.condition.lengths))
        assert batch.start is not None
        rows = zip(latents, eps, times, texts, batch.start, batch.weights, strict=True)
        for position, row in zip(batch.positions.tolist(), rows, strict=True):
            if row[-1]:
                found[position] = list(row)
    return found


def test_what_is_drawn_for_a_sample_depends_on_its_position_alone(recipe: TrainRecipe, mixture: Mixture) -> None:
    wanted = by_position(batches(open_loader(recipe, mixture, packed_order(mixture)), 30))
    found: dict[int, list[torch.Tensor]] = {}
    order = packed_order(mixture, micro_tokens=4)
    for rank in range(2):
        found |= by_position(batches(open_loader(recipe, mixture, order, rank=rank, num_ranks=2), 30))
    assert found.keys() == wanted.keys() == set(range(len(wanted)))
    for position, row in wanted.items():
        assert all(one.equal(other) for one, other in zip(found[position], row, strict=True))
    start = next(step.first for number, step in enumerate(packed_order(mixture).steps(0)) if number == 11)
    resumed = by_position(batches(open_loader(recipe, mixture, packed_order(mixture), start=start), 5))
    for position, row in resumed.items():
        assert position >= start
        assert all(one.equal(other) for one, other in zip(wanted[position], row, strict=True))


def test_the_loss_is_the_mean_over_the_samples_of_a_step(recipe: TrainRecipe, mixture: Mixture) -> None:
    """Against batches of single samples, by the code of unpacked runs."""
    torch.manual_seed(0)
    model = make_model(recipe.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    assert mixture.text is not None
    alone = Loader(
        mixture,
        micro_batch=None,
        rank=0,
        world_size=1,
        start_position=0,
        ahead=ReadAhead(1, 2),
        finish=partial(draw_batch, recipe, texts=mixture.text.info),
    )
    loader, device = open_loader(recipe, mixture, packed_order(mixture, micro_tokens=5)), torch.device("cpu")
    with alone, loader:
        for step in itertools.islice(packed_steps(loader), 5):
            packed = sum(
                share_of_packed_loss(FlowMatching(), mixture.normalization, device, model, batch)
                for batch in step.micro_batches
            )
            assert isinstance(packed, torch.Tensor)
            packed.backward()
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            losses = []
            for _ in range(step.num_samples):
                share = share_of_loss(FlowMatching(), mixture.normalization, 1, device, None, model, next(alone))
                (share / step.num_samples).backward()
                losses.append(share.item())
            assert packed.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
            model.zero_grad()


def test_a_step_that_is_cut_is_the_mean_over_its_first_samples(recipe: TrainRecipe, mixture: Mixture) -> None:
    model, device = make_model(recipe.model), torch.device("cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)

    def loss(step: Any) -> float:
        shares = [
            share_of_packed_loss(FlowMatching(), mixture.normalization, device, model, batch).item()
            for batch in step.micro_batches
        ]
        return sum(shares)

    with open_loader(recipe, mixture, packed_order(mixture, micro_tokens=5)) as loader:
        step = next(packed_steps(loader))
    num_samples = step.num_samples - 2
    tokens = int(packed_order(mixture).step_at(0).tokens[:num_samples].sum())
    with open_loader(recipe, mixture, packed_order(mixture, budget=tokens)) as loader:
        wanted = next(packed_steps(loader))
    assert wanted.num_samples == num_samples
    assert loss(step.first(num_samples)) == pytest.approx(loss(wanted), rel=1e-5)
    assert step.first(100) is step


def test_bad_samples_are_listed_once_and_have_no_weight(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "clips", [9, 7, 5, 6], shapes=[LONG, WIDE, TALL], shard_groups=[0, 0, 1, 2], text=True)
    for name in ("pictures", "texts"):
        (tmp_path / name).symlink_to(root / name)
    recipe = make_recipe(tmp_path)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"bad_samples": "skip"})})
    flip_bit(tmp_path / "clips", 18)
    mixture = Mixture.open(recipe.data, seed=0, global_batch=1, read_text=True)
    found = batches(open_loader(recipe, mixture, packed_order(mixture)), 30)
    bad = [sample for batch in found for sample in batch.bad]
    assert bad
    num_without = sum(int((batch.weights == 0).sum()) for batch in found)
    assert num_without == len(bad)
    assert {sample.record for sample in bad} == {18}


def test_budgets_that_hold_no_sample_or_too_few_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training.global_tokens: 3 tokens cannot hold a sample of shape 4x4x\d+x\d+"):
        check_packing(make_recipe(root, global_tokens=3), TOKENS)
    with pytest.raises(InputError, match=r"training.micro_tokens: 3 tokens cannot hold .*, which has 4; use at least"):
        check_packing(make_recipe(root, micro_tokens=3), TOKENS)
    check_packing(make_recipe(root), TOKENS, 3)
    with pytest.raises(InputError, match=r"13 tokens may be 3 samples .* which 4 ranks .* use at least 16 tokens"):
        check_packing(make_recipe(root), TOKENS, 4)
    cluster = {"kind": "cluster", "scheduler": "debug", "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1}
    profile = ClusterProfile.model_validate(cluster)
    assert check_training_data(make_recipe(root), profile) is not None
    with pytest.raises(InputError, match=r"training.global_tokens: 3 tokens cannot hold"):
        check_training_data(make_recipe(root, global_tokens=3), profile)
    inputs = open_inputs(make_recipe(root), tmp_path)
    assert inputs.packed_order is not None
    assert {shape: of_shape(inputs.recipe.model, shape).num_tokens for shape in TOKENS} == TOKENS
