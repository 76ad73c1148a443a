"""`pomscale bench network`: time of a recipe's network, forward, forward and backward, and generating frame groups."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from pomscale.base.condition import Condition, Text
from pomscale.base.errors import InputError
from pomscale.benchmarks.operators.timing import measured
from pomscale.benchmarks.report import BenchReport
from pomscale.config.model import VideoModelConfig
from pomscale.config.train import TrainRecipe
from pomscale.diffusion.alignment import alignment_loss
from pomscale.diffusion.objectives import FlowMatching
from pomscale.diffusion.options import SamplingOptions
from pomscale.diffusion.sequential import SequentialSampler
from pomscale.models import DiPoM, VDiPoM, init_weights, make_model
from pomscale.plan.model_cost import projection_flops, training_flops

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TEXT_LENGTH = 120


def bench_network(
    recipe: TrainRecipe, device: torch.device, *, batch: int, num_turns: int, num_groups: int | None
) -> BenchReport:
    """Measure the network of a recipe, its weights as at the start of a run; the median of the turns counts.

    Args:
        recipe: A training recipe; its model and its compute.precision count.
        device: Device to compute on.
        batch: Samples of a forward pass.
        num_turns: Turns of each measurement, after one that warms up.
        num_groups: Frame groups of a clip to generate, with 2 steps each; None = do not generate.

    Raises:
        InputError: There is nothing to generate, since the network makes no clips frame group by frame group.
    """
    model = make_model(recipe.model)
    clips = model if isinstance(model, VDiPoM) and model.config.temporal == "block_causal" else None
    if num_groups is not None and clips is None:
        raise InputError("--generate: only clips with model.temporal: block_causal are made group by group")
    init_weights(model, recipe.seed)
    model.to(device, _DTYPES[recipe.compute.precision])
    report = BenchReport("network")
    latents, t, condition = _inputs(recipe, device, batch)

    def forward() -> None:
        with torch.no_grad():
            model(latents, t, condition)

    def forward_backward() -> None:
        model(latents, t, condition).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    report.add(
        f"{recipe.name}, {recipe.model.num_tokens} tokens, batch {batch}",
        num_tokens=recipe.model.num_tokens,
        forward_s_per_sample=_median_s(forward, device, num_turns) / batch,
        training_s_per_sample=_median_s(forward_backward, device, num_turns) / batch,
    )
    if recipe.model.alignment is not None:
        _alignment(report, model, (latents, t, condition), device, num_turns)
    if num_groups is not None and clips is not None:
        _generation(report, clips, num_groups, device)
    return report


def _alignment(
    report: BenchReport,
    model: DiPoM | VDiPoM,
    inputs: tuple[Tensor, Tensor, Condition],
    device: torch.device,
    num_turns: int,
) -> None:
    """Measure in turns a pass with and without alignment, the projection alone, and the loss alone.

    The projection's FLOPs are known. What alignment costs beyond them is the loss, measured by itself, since it is less
    than the differences between equal passes; the difference of the passes is reported beside it.
    """
    config, batch, projection = model.config, len(inputs[0]), model.alignment
    assert config.alignment is not None
    assert projection is not None
    shape = (batch, config.num_tokens, config.alignment.dim)
    features = torch.randn(shape, device=device).half()
    hidden = torch.randn(batch, config.num_tokens, config.dim, device=device, dtype=projection.first.weight.dtype)
    hidden.requires_grad_()
    output = torch.randn(shape, device=device, dtype=hidden.dtype, requires_grad=True)

    def plain() -> None:
        model(*inputs).float().square().mean().backward()

    def aligned() -> None:
        prediction, projected = model(*inputs, num_aligned=batch)
        (prediction.float().square().mean() + 0.5 * alignment_loss(projected, features).mean()).backward()

    def projected_alone() -> None:
        projection(hidden).backward(hidden.new_ones(shape))

    def loss_alone() -> None:
        (0.5 * alignment_loss(output, features).mean()).backward()

    steps = {"plain": plain, "aligned": aligned, "projection": projected_alone, "loss": loss_alone}
    least: dict[str, float] = {}
    for turn in range(num_turns + 1):
        for name, step in steps.items():
            seconds = measured(step, device).busy_s
            model.zero_grad(set_to_none=True)
            hidden.grad = output.grad = None
            if turn:  # the first warms up
                least[name] = min(seconds, least.get(name, seconds))
    report.add(
        f"the same, aligned after block {config.alignment.block}",
        projection_flops_share=3 * projection_flops(config) / training_flops(config),
        **{f"{name}_s_per_sample": seconds / batch for name, seconds in least.items()},
        passes_beyond_the_projection=(least["aligned"] - least["projection"] - least["plain"]) / least["aligned"],
    )
    report.compare("alignment beyond its projection, of a pass", least["loss"] / least["aligned"], 0.01, False)


def _inputs(recipe: TrainRecipe, device: torch.device, batch: int) -> tuple[Tensor, Tensor, Condition]:
    latents = torch.randn(batch, *recipe.model.latent_shape, device=device)
    t = torch.rand(batch, device=device)
    if isinstance(recipe.model, VideoModelConfig):
        return latents, t, _text(recipe.model, batch, device)
    return latents, t, torch.zeros(batch, dtype=torch.int64, device=device)


def _text(config: VideoModelConfig, batch: int, device: torch.device) -> Text:
    embeddings = torch.randn(batch, _TEXT_LENGTH, config.text_dim, device=device)
    return Text(embeddings, torch.ones(batch, _TEXT_LENGTH, dtype=torch.bool, device=device))


def _generation(report: BenchReport, model: VDiPoM, num_groups: int, device: torch.device) -> None:
    config = model.config
    text = _text(config, 1, device)
    shape = (config.latent_shape[0], config.patch_frames, *config.latent_shape[2:])
    options = SamplingOptions(num_steps=2)
    clip = SequentialSampler(
        FlowMatching(), model.requires_grad_(False).step, shape, text, text, [0], options, time_per_group=False
    )
    seconds = [measured(clip.advance, device).wall_s for _ in range(num_groups)]
    tenth = max(1, num_groups // 10)
    report.add(
        f"generating {num_groups} frame groups",
        num_groups=num_groups,
        total_s=sum(seconds),
        last_group_s=statistics.median(seconds[-tenth:]),
    )


def _median_s(step: Callable[[], object], device: torch.device, num_turns: int) -> float:
    step()
    return statistics.median(measured(step, device).wall_s for _ in range(num_turns))
