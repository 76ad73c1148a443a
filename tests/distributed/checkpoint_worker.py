"""One of two ranks of test_checkpoint_store.py: sharded state, agreement on damage, failures and a newer start."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pomscale.base.errors import InputError, PomscaleError
from pomscale.checkpoint.store import CheckpointStore, read_tensors
from pomscale.config.engine import CheckpointConfig
from pomscale.distributed.flat_shard import FlatShard
from pomscale.distributed.world import World, join_world
from pomscale.runs.checkpoint_folder import complete_checkpoints
from pomscale.runs.starts import Start, Superseded

CONFIG = CheckpointConfig(every_samples=10, keep_last=3)


def whole(value: float) -> dict[str, dict[str, Tensor]]:
    """Every number differs; the sizes do not divide by two."""
    return {
        "model": {
            "rows": torch.arange(3003.0).view(1001, 3) + value,
            "flat": torch.arange(28.0).view(7, 4) + value,
            "one row": torch.arange(5.0).view(1, 5).bfloat16() + value,
            "copies": torch.arange(6.0) + value,
        },
        "optimizer": {"step": torch.tensor(value)},
    }


def sharded(world: World, value: float) -> dict[str, dict[str, Tensor]]:
    """The same state in the form that each engine has it, all of it live tensors."""
    model = whole(value)["model"]
    cut = (0, 11) if world.is_main else (11, 28)
    mesh = init_device_mesh("cpu", (world.size,))
    return {
        "model": {
            "rows": distribute_tensor(model["rows"], mesh, [Shard(0)]),
            "flat": FlatShard((7, 4), cut[0], model["flat"].flatten()[slice(*cut)].clone()),
            "one row": distribute_tensor(model["one row"], mesh, [Shard(0)]),  # rank 1 has nothing of it
            "copies": distribute_tensor(model["copies"], mesh, [Replicate()]),
        },
        "optimizer": {"step": torch.tensor(value)},
    }


def fill(state: dict[str, dict[str, Tensor]], value: float) -> None:
    for tensors in state.values():
        for tensor in tensors.values():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            (local.values if isinstance(local, FlatShard) else local).fill_(value)


def assert_holds(folder: Path, value: float) -> None:
    loaded = whole(0.0)
    read_tensors(folder, loaded)  # whole tensors, from what two ranks have saved in parts
    assert all(
        loaded[part][name].equal(tensor) for part, tensors in whole(value).items() for name, tensor in tensors.items()
    )


def exercise(world: World, run_folder: Path) -> None:
    number = Start.claim(run_folder).number if world.is_main else 0
    number = int(world.sum([float(number)])[0])
    store = CheckpointStore(run_folder / "checkpoints", CONFIG, Start(run_folder, number))
    assert store.newest() is None

    state = sharded(world, 1.0)
    store.save(10, state, {"samples": 10})
    fill(state, -1.0)  # training goes on at once
    store.wait()
    for tensor, fresh in zip(state["model"].values(), sharded(world, 2.0)["model"].values(), strict=True):
        (tensor.values if isinstance(tensor, FlatShard) else tensor).copy_(
            fresh.values if isinstance(fresh, FlatShard) else fresh
        )
    state["optimizer"]["step"].fill_(2.0)
    store.save(20, state, {"samples": 20})  # in the memory of the save before
    saved = store.wait()
    assert saved is not None
    assert saved.num_bytes > 4000
    first, second = complete_checkpoints(store.root)
    assert_holds(first, 1.0)
    assert_holds(second, 2.0)

    check_damage(world, store, first, second)
    check_failed_write(world, store)
    check_newer_start(world, store, run_folder)
    print("ranks agree", flush=True)


def check_damage(world: World, store: CheckpointStore, first: Path, second: Path) -> None:
    """Whichever rank finds the damage, all set the checkpoint aside and use the one before it."""
    world.barrier()  # the other one may still be reading
    if world.is_main:
        shard = second / "__1_0.distcp"
        content = bytearray(shard.read_bytes())
        content[1234] ^= 4
        shard.write_bytes(content)
    world.barrier()
    with pytest.raises(InputError, match=r"__1_0\.distcp is not what was written"):
        store.check(second)
    assert store.newest() == first
    assert [(damaged.folder.name, damaged.folder.is_dir()) for damaged in store.damaged] == [
        (f"{second.name}.damaged", True)
    ]
    loaded = sharded(world, 0.0)
    store.load(first, loaded)
    expected = sharded(world, 1.0)
    assert loaded["model"]["rows"].to_local().equal(expected["model"]["rows"].to_local())  # type: ignore[attr-defined]
    assert loaded["model"]["flat"].values.equal(expected["model"]["flat"].values)  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"model\.copies has shape \(6,\) in it, not \(7,\)"):
        store.load(first, {"model": {"copies": torch.zeros(7)}})


def check_failed_write(world: World, store: CheckpointStore) -> None:
    """One rank's disk refuses: no rank takes the save for done, and nothing of it is left."""
    before = sorted(store.root.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not world.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    store.save(30, sharded(world, 3.0), {"samples": 30})
    with pytest.raises(PomscaleError, match=r"samples-000000000030: the checkpoint could not be written.*rank 1"):
        store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    world.barrier()
    assert sorted(store.root.iterdir()) == before


def check_newer_start(world: World, store: CheckpointStore, run_folder: Path) -> None:
    before = sorted(store.root.iterdir())
    world.barrier()
    if world.is_main:
        Start.claim(run_folder)
    store.save(40, sharded(world, 4.0), {"samples": 40})
    with pytest.raises(Superseded, match="this process stops without writing"):
        store.wait()
    world.barrier()
    assert sorted(store.root.iterdir()) == before


if __name__ == "__main__":
    with join_world("cpu") as this_world:
        exercise(this_world, Path(sys.argv[1]))
