"""Forward pass of networks on packed samples: pictures and clips of any shapes in one sequence, without padding.

Samples come by shape: a list of latents (b c ...), one for each shape at hand. Everything else is in the order of the
samples in that list: b of all shapes one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.base.condition import Condition, PackedText
from pomscale.layers import Units, grid_positions, modulate_units, sincos_positions_2d, unpatchify
from pomscale.models.packing import Packing, of_shapes, packed_tokens

if TYPE_CHECKING:  # they call the functions here
    from pomscale.models.image import DiPoM
    from pomscale.models.video import VDiPoM


def predict_pictures(
    model: DiPoM, latents: Sequence[Tensor], t: Tensor, condition: Condition | PackedText, seeds: Tensor | None
) -> list[Tensor]:
    """Predict as `DiPoM.forward` for pictures of several sizes.

    Args:
        model: The network.
        latents: Pictures (b c h w) of each size.
        t: Times of all samples, (samples,).
        condition: Classes of all samples, (samples,) int64, or their texts.
        seeds: Seeds of their dropout, (samples,) int64, or None.

    Raises:
        ValueError: The network takes texts, and these are classes, or the other way round.
    """
    config, size = model.config, model.config.patch_size
    grids = [(pictures.shape[2] // size, pictures.shape[3] // size) for pictures in latents]
    embedded, positions = [], []
    for pictures, grid in zip(latents, grids, strict=True):
        x = model.patch_embedding(pictures)
        if config.positions != "none":
            integer = config.positions == "sincos_integer"
            x = x + sincos_positions_2d(*grid, config.dim, x.device, x.dtype, integer=integer)
        embedded.append(x)
        positions.append(grid_positions(*grid, device=x.device).expand(len(pictures), -1, -1))
    shapes = [(len(x), x.shape[1]) for x in embedded]
    samples = Units(tuple(length for batch, length in shapes for _ in range(batch)))
    c, beside, lengths = _conditions(model, t, condition)
    where = packed_tokens(positions)[0] if config.has_rope else None
    x = _through_blocks(model, packed_tokens(embedded), c, beside, lengths, where, samples, seeds)
    scale, shift = model.modulation(F.silu(c)).chunk(2, dim=-1)
    values = of_shapes(model.head(modulate_units(model.norm(x), shift, scale, samples)), shapes)
    return [unpatchify(part, *grid, size) for part, grid in zip(values, grids, strict=True)]


def _conditions(model: DiPoM, t: Tensor, condition: Condition | PackedText) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return what modulates (1 samples d), and the tokens of class or text (1 M d) with their number of each sample."""
    if model.text_embedding is not None:
        if not isinstance(condition, PackedText):
            raise ValueError("condition: this network takes packed texts, and not class ids")
        text: Tensor = model.text_embedding(condition.embeddings.to(model.text_embedding.weight.dtype))
        return model.time_embedding(t)[None], text[None], condition.lengths
    if model.class_embedding is None or not isinstance(condition, Tensor):
        raise ValueError("condition: this network takes class ids, and not texts")
    of_class = model.class_embedding(condition)
    c = (model.time_embedding(t) + of_class)[None]
    if model.in_context is None:
        return c, of_class[None, :0], (0,) * len(t)
    tokens = model.in_context(of_class)
    return c, packed_tokens([tokens]), (tokens.shape[1],) * len(t)


def _through_blocks(
    model: DiPoM,
    x: Tensor,
    c: Tensor,
    beside: Tensor,
    lengths: tuple[int, ...],
    positions: Tensor | None,
    samples: Units,
    seeds: Tensor | None,
) -> Tensor:
    """Apply the blocks to the tokens of the pictures, and to those in context, `beside`, from their block on."""
    config = model.config
    packing = Packing(samples, samples, Units(lengths) if config.has_cross_mixers else None)
    for number, block in enumerate(model.trunk):
        if number == config.context_start:
            x = _before_each(beside, lengths, x, samples)
            if positions is not None:  # (0, 0) turns nothing
                origin = positions.new_zeros(1, sum(lengths), positions.shape[1])
                positions = _before_each(origin, lengths, positions[None], samples)[0]
            longer = Units(tuple(more + length for more, length in zip(lengths, samples.lengths, strict=True)))
            packing = Packing(longer, longer)
        if config.has_cross_mixers:
            x = block(x, c, beside, None, None, positions, packing, seeds)
        else:
            x = block(x, c, positions, packing, seeds)
    if packing.samples is samples:
        return x
    both = [length for pair in zip(lengths, samples.lengths, strict=True) for length in pair]
    return torch.cat(x[0].split(both)[1::2])[None]


def _before_each(tokens: Tensor, lengths: tuple[int, ...], x: Tensor, samples: Units) -> Tensor:
    """Put tokens (1 M d), so many of each sample, before those of the sample in x (1 N d)."""
    pairs = zip(tokens[0].split(list(lengths)), x[0].split(list(samples.lengths)), strict=True)
    return torch.cat([part for pair in pairs for part in pair])[None]


def predict_clips(
    model: VDiPoM,
    latents: Sequence[Tensor],
    t: Tensor,
    condition: PackedText,
    start: Tensor | None,
    seeds: Tensor | None,
) -> list[Tensor]:
    """Predict as `VDiPoM.forward` for clips and pictures of several shapes.

    Args:
        model: The network.
        latents: Clips (b c F H W), or pictures (b c H W), of each shape.
        t: Times of all samples, (samples,), or of all frame groups, one sample's after another's.
        condition: Texts of all samples.
        start: Number of the first frame group of each sample, (samples,) int64; None = 0.
        seeds: Seeds of their dropout, (samples,) int64, or None.
    """
    starts = [None] * len(latents) if start is None else start.split([len(part) for part in latents])
    parts = [model.embed(part, first) for part, first in zip(latents, starts, strict=True)]
    shapes = [(len(x), x.shape[1]) for x, _, _ in parts]
    grids = [grid for (batch, _), (_, _, grid) in zip(shapes, parts, strict=True) for _ in range(batch)]
    packing, text = _packing(model, grids, len(t), condition)
    where = (
        packed_tokens([positions for _, positions, _ in parts if positions is not None])[0]
        if (model.config.has_rope)
        else None
    )
    x, c = packed_tokens([x for x, _, _ in parts]), model.time_embedding(t)[None]
    for block in model.trunk:
        x = block(x, c, text, None, None, where, packing, seeds)
    scale, shift = model.modulation(F.silu(c)).chunk(2, dim=-1)
    values = of_shapes(model.head(modulate_units(model.norm(x), shift, scale, packing.times)), shapes)
    return [
        model.unpatchified(value, grid, like) for value, (_, _, grid), like in zip(values, parts, latents, strict=True)
    ]


def _packing(
    model: VDiPoM, grids: Sequence[tuple[int, int, int]], num_times: int, texts: PackedText
) -> tuple[Packing, Tensor]:
    """Return the places of the tokens of samples with these grids, and the texts (1 M d) that their units read."""
    lengths = tuple(groups * height * width for groups, height, width in grids)
    frames = tuple(height * width for _, height, width in grids)
    embedded = model.text_embedding(texts.embeddings.to(model.text_embedding.weight.dtype))
    samples = times = Units(lengths)
    text_lengths = texts.lengths
    if num_times != len(grids):  # every frame group has a time, and reads the text of its sample at it
        counts = [groups for groups, _, _ in grids]
        if num_times != sum(counts):
            raise ValueError(f"t: {num_times} times for {len(grids)} samples of {sum(counts)} frame groups")
        times = Units(tuple(frame for frame, count in zip(frames, counts, strict=True) for _ in range(count)))
        each = embedded.split(list(texts.lengths))
        embedded = torch.cat([text.repeat(count, 1) for text, count in zip(each, counts, strict=True)])
        text_lengths = tuple(n for n, count in zip(texts.lengths, counts, strict=True) for _ in range(count))
    is_causal = model.config.temporal == "block_causal"
    return Packing(samples, times, Units(text_lengths), frames if is_causal else None), embedded[None]
