"""`pomscale plan`: memory, traffic, time and storage of a run before it starts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomscale.cli.arguments import add_recipe, positive
from pomscale.config.hardware import GPUS

if TYPE_CHECKING:
    from pomscale.config.train import TrainRecipe
    from pomscale.plan.report import DatasetSize


def add(verbs: Any) -> None:
    """Add the verb."""
    plan = verbs.add_parser("plan", help="Compute memory, traffic, time and storage of a run, without a GPU")
    add_recipe(plan)
    plan.add_argument("--nodes", type=positive, default=1, help="Number of nodes (default: %(default)s)")
    plan.add_argument("--gpus-per-node", type=positive, default=8, help="GPUs of each node (default: %(default)s)")
    plan.add_argument("--gpu", choices=list(GPUS), default="h100", help="Kind of GPU (default: %(default)s)")
    plan.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="Share of the FLOP/s in the GPU's data sheet that training reaches (default: %(default)s)",
    )
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from pomscale.config.load import load_train_recipe
    from pomscale.plan.report import plan, render
    from pomscale.shards.alignment import check_local_features

    recipe = load_train_recipe(arguments.recipe, arguments.overrides)
    check_local_features(recipe)
    made = plan(
        recipe,
        num_nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        gpu=arguments.gpu,
        utilization=arguments.mfu,
        dataset=_dataset_size(recipe),
    )
    print(render(made), end="")
    return 0


def _dataset_size(recipe: TrainRecipe) -> DatasetSize | None:
    """Sum up the manifests; None if one is missing, or lies behind a URL, which a plan does not wait for."""
    from pomscale.plan.report import DatasetSize
    from pomscale.shards.schema import MANIFEST_NAME, read_manifest

    folders = [Path(component.path) for component in recipe.data.components]
    if not all((folder / MANIFEST_NAME).is_file() for folder in folders):
        return None
    manifests = [read_manifest(folder) for folder in folders]
    num_bytes = sum(shard.num_bytes for manifest in manifests for shard in manifest.shards)
    return DatasetSize(sum(manifest.num_samples for manifest in manifests), num_bytes)
