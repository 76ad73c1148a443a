"""Labels of another set: as many classes, but others or in another order, are refused wherever two datasets meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.derive.join import join
from data_pipelines.derive.merge import merge
from launch.submission.checks import check_training_data
from pomscale.base.errors import InputError
from pomscale.config.cluster import ClusterProfile
from pomscale.config.train import TrainRecipe
from pomscale.data.mixture import Mixture
from pomscale.evaluation.heldout import open_heldout
from pomscale.pretrained.card import ModelCard
from pomscale.shards.join import open_join
from pomscale.shards.schema import read_manifest
from pomscale.training.build import open_inputs
from pomscale.training.resume import CHECKPOINT_FORMAT, check_same_run
from support.synthetic_dataset import LATENT_SHAPE, change_manifest, write_dataset

OTHER = list("abdce")
DIFFERENCE = "class 2 is 'd' here and 'c' there"
OF_TRAIN = rf"dataset \S+other: its classes are not those of dataset \S+train: {DIFFERENCE}"
PROFILE = ClusterProfile.model_validate(
    {"kind": "cluster", "scheduler": "debug", "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1}
)


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Two sets of the same classes, "train" and "same", and "other" with as many in another order."""
    for number, name in enumerate(("train", "same", "other")):
        write_dataset(tmp_path / name, [8], text=True, first_record=100 * number)
    change_manifest(tmp_path / "other", "class_names", value=OTHER)
    return tmp_path


def recipe(root: Path, *, data: tuple[str, ...] = ("train",), validation: str = "same") -> TrainRecipe:
    return TrainRecipe.model_validate(
        {
            "kind": "train",
            "name": "classes",
            "output": str(root / "runs"),
            "codec": {"name": "pixel", "block": 2, "channels": 1},
            "data": {"mixture": [{"path": str(root / name)} for name in data]},
            "model": {"latent_shape": LATENT_SHAPE, "num_classes": 5, "patch_size": 1, "dim": 16, "depth": 1},
            "training": {"total_samples": 64, "global_batch": 8},
            "checkpoint": {"every_samples": 64},
            "validation": {"path": str(root / validation), "every_samples": 64},
        }
    )


def card(sets: Path) -> ModelCard:
    return open_inputs(recipe(sets), sets / "run").card


def test_a_heldout_set(sets: Path) -> None:
    of_model = card(sets)
    open_heldout(str(sets / "same"), of_model)
    message = rf"dataset \S+other: its classes are not those of the set that the model was trained on: {DIFFERENCE}"
    with pytest.raises(InputError, match=message):
        open_heldout(str(sets / "other"), of_model)
    change_manifest(sets / "other", "class_names", value=list("abde"))
    with pytest.raises(InputError, match=DIFFERENCE):
        open_heldout(str(sets / "other"), of_model)
    change_manifest(sets / "other", "class_names", value=OTHER)
    open_heldout(str(sets / "other"), of_model.model_copy(update={"class_names": ()}))  # an imported model


def test_a_mixture(sets: Path) -> None:
    open_inputs(recipe(sets, data=("train", "same")), sets / "run")
    with pytest.raises(InputError, match=OF_TRAIN):
        open_inputs(recipe(sets, data=("train", "same", "other")), sets / "run")


@pytest.mark.parametrize("changes", [{"data": ("train", "other")}, {"validation": "other"}])
def test_a_launch(sets: Path, changes: dict[str, object]) -> None:
    assert check_training_data(recipe(sets), PROFILE) is not None
    with pytest.raises(InputError, match=DIFFERENCE):
        check_training_data(recipe(sets, **changes), PROFILE)  # type: ignore[arg-type]


def test_a_companion_of_texts(sets: Path) -> None:
    main, other = sets / "train", sets / "other"
    write_dataset(other, [8], text=True)  # the same keys in the same order, so no table is needed
    manifests = [read_manifest(folder) for folder in (main, other)]
    assert open_join(str(main), manifests[0], str(other), manifests[1]) is None
    change_manifest(other, "class_names", value=OTHER)
    with pytest.raises(InputError, match=OF_TRAIN):
        open_join(str(main), manifests[0], str(other), read_manifest(other))
    with pytest.raises(InputError, match=OF_TRAIN):
        join(main, other)
    config = recipe(sets).data.model_validate({"path": str(main), "text": str(other)})
    with pytest.raises(InputError, match=OF_TRAIN):
        Mixture.open(config, seed=0, global_batch=8, read_text=True)


def test_a_merge(sets: Path) -> None:
    merge([sets / "train", sets / "same"], sets / "both", progress=False)
    with pytest.raises(InputError, match=OF_TRAIN):
        merge([sets / "train", sets / "other"], sets / "all", progress=False)
    assert not (sets / "all").exists()


def test_a_run_whose_dataset_has_other_names_now(sets: Path) -> None:
    then = open_inputs(recipe(sets), sets / "run")
    meta = {"format": CHECKPOINT_FORMAT, "card": then.card.model_dump(mode="json"), **then.identity}
    check_same_run(sets / "run", sets / "checkpoint", then.identity, then.card, meta)
    change_manifest(sets / "train", "class_names", value=OTHER)
    now = open_inputs(recipe(sets), sets / "run")
    with pytest.raises(InputError, match=f"the names of the dataset's classes: {DIFFERENCE}"):
        check_same_run(sets / "run", sets / "checkpoint", now.identity, now.card, meta)
