"""Speed of a run at a given share of the GPUs' peak arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from pomscale.config.hardware import Gpu
from pomscale.config.train import TrainRecipe
from pomscale.plan.batch import num_times
from pomscale.plan.model_cost import recomputed_flops, training_flops
from pomscale.plan.optimizer import step_flops
from pomscale.plan.shadow.network import build_network


@dataclass(frozen=True)
class Speed:
    """Speed of a run.

    `mfu` is what monitoring would show: it counts the model's arithmetic alone, so recomputation lowers it.
    """

    samples_per_s: float
    step_time_s: float
    mfu: float
    recomputed_share: float
    """Arithmetic repeated by activation checkpointing and lean mixers, as a share of the model's own."""
    optimizer_share: float
    """Share of a step that Muon's matrix products take on the GPU that has most of them; 0 with AdamW."""

    def days(self, num_samples: int) -> float:
        return num_samples / self.samples_per_s / 86400


def speed(recipe: TrainRecipe, num_gpus: int, gpu: Gpu, attained: float) -> Speed:
    """Return the speed of a run on `num_gpus` GPUs that attain a share of their peak, recomputation included."""
    times = num_times(recipe)
    model = training_flops(recipe.model, num_times=times)
    compute = recipe.compute
    # As layers/pom.py decides; of clips whose tokens are split, the mixers that read the text are left out.
    lean = compute.mixer_memory == "lean" and not compute.float8 and recipe.mesh.sp == 1
    again = recomputed_flops(recipe.model, compute.activation_checkpointing, lean=lean, num_times=times)
    without_optimizer = attained * gpu.peak(compute.precision) * num_gpus / (model + again)
    optimizer_s = step_flops(recipe.optimizer, build_network(recipe.model, times), num_gpus) / (
        attained * gpu.peak(recipe.optimizer.muon.precision)
    )
    optimizer_share = optimizer_s / (recipe.samples_per_step / without_optimizer + optimizer_s)
    samples_per_s = without_optimizer * (1 - optimizer_share)
    return Speed(
        samples_per_s=samples_per_s,
        step_time_s=recipe.samples_per_step / samples_per_s,
        mfu=attained * model / (model + again) * (1 - optimizer_share),
        recomputed_share=again / model,
        optimizer_share=optimizer_share,
    )
