"""Text-to-video diffusion: V-DiPoM, and attention and hybrids as other mixers in the same trunk.

Shapes: b clips, c latent channels, F H W latent frames, height and width, g frame groups of `patch_frames` latent
frames, n tokens (n / g per frame group), m text tokens, d width of the trunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomscale.base.condition import PackedText, Text
from pomscale.config.block import BlockConfig
from pomscale.config.model import VideoModelConfig
from pomscale.layers import (
    Attention,
    AttentionState,
    ClipPatchEmbedding,
    PoM,
    grid_positions,
    modulate,
    sincos_positions_3d,
    unpatchify_clips,
)
from pomscale.models.alignment import build_alignment, project
from pomscale.models.block import BlockDropout, build_feed_forward, build_mixer, build_norm, gate_offset, mix
from pomscale.models.embeddings import build_bottleneck, build_time_embedding
from pomscale.models.packed import predict_clips
from pomscale.models.packed_blocks import packed_video_block
from pomscale.models.packing import Packing
from pomscale.models.texts import embed_text
from pomscale.ops.pom import BlockCausal, Mask, PomState, SplitTokens, TokenSplit, runs_of_frames

MixerState = PomState | AttentionState
"""State that a self mixer carries from one frame group to the next."""


class VideoBlock(nn.Module):
    """Block that maps x (b n d) with condition c and text (b m d) -> (b n d); c is (b 1 d), or (b g d) by frame group.

        x <- x + (o + g1) cross(modulate(norm1(x), 1), modulate(norm2(text), 2))
        x <- x + (o + g2) mixer(modulate(norm3(x), 3))
        x <- x + (o + g3) ffn(modulate(norm4(x), 4))

    The four scales and shifts and the three gates are linear in SiLU(c), which knows the time alone; the text
    comes in by the cross mixer. The block starts as the identity, as `Block` does.
    """

    def __init__(self, config: BlockConfig, cross: PoM | Attention, mixer: PoM | Attention) -> None:
        super().__init__()
        dim = config.dim
        self.norm1, self.norm2, self.norm3, self.norm4 = (build_norm(config.norm, dim) for _ in range(4))
        self.cross = cross
        self.mixer: PoM | Attention = mixer
        self.ffn = build_feed_forward(config)
        self.modulation = nn.Linear(dim, 8 * dim)
        self.gates = nn.Linear(dim, 3 * dim)
        self.gate_offset = gate_offset(config)
        self.dropout = BlockDropout(config)
        self.stacked_maps = {"modulation": 8, "gates": 3}

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        mask: Mask = None,
        positions: Tensor | None = None,
        split: TokenSplit | Packing | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Apply the block.

        text_mask (b m) bool is True where a token takes part; mask is that of the self mixer. positions (n 3) or
        (b n 3) are integers, frame group, row and column, which only self mixers with rope read: a text has none.
        split: where the tokens lie, if x has only some of them, or those of several samples (1 n d), which says also
        what they read. seeds (b,) int64 of the dropout; None = none.
        """
        if isinstance(split, Packing):
            return packed_video_block(self, x, c, text, positions, split, seeds)
        assert text_mask is not None
        modulation, gates = self._of_time(c)
        read = self._read_text(x, text, text_mask, modulation, split)
        x = x + _gated(gates[0], self.dropout.of_cross(self.cross, read, seeds, split), split)
        mixed = mix(self.mixer, _modulated(self.norm3(x), modulation[4:6], split), positions, mask, split)
        x = x + _gated(gates[1], self.dropout.of_mixer(self.mixer, mixed, seeds, split), split)
        del read, mixed  # as in `Block`
        fed = self.ffn(_modulated(self.norm4(x), modulation[6:], split), self.dropout.of_hidden(seeds, split))
        return x + _gated(gates[2], fed, split)

    def step(
        self,
        x: Tensor,
        c: Tensor,
        text: Tensor,
        text_mask: Tensor,
        state: MixerState | None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, MixerState]:
        """Map the next frame group of a clip as `forward` under the block-causal mask, with the past as a state."""
        modulation, gates = self._of_time(c)
        x = x + _gated(gates[0], self._read_text(x, text, text_mask, modulation))
        mixed, new_state = _step(self.mixer, _modulated(self.norm3(x), modulation[4:6]), state, positions)
        x = x + _gated(gates[1], mixed)
        return x + _gated(gates[2], self.ffn(_modulated(self.norm4(x), modulation[6:]))), new_state

    def _of_time(self, c: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return eight scales and shifts, and three factors of what is added to x, each like c."""
        c = F.silu(c)
        return self.modulation(c).chunk(8, dim=-1), (self.gate_offset + self.gates(c)).chunk(3, dim=-1)

    def _read_text(
        self,
        x: Tensor,
        text: Tensor,
        text_mask: Tensor,
        modulation: tuple[Tensor, ...],
        split: TokenSplit | None = None,
    ) -> Tensor:
        """Return what the tokens read in the text, (b n d)."""
        scale, shift = modulation[2:4]
        queries, text = _modulated(self.norm1(x), modulation[:2], split), self.norm2(text)[:, None]
        read = []
        for tokens, times in _runs(scale.shape[1], x.shape[1], split):
            # The text is modulated differently at each time, so frame groups become samples.
            context = modulate(text, shift[:, times, None], scale[:, times, None])  # (b g m d)
            num_times = context.shape[1]
            of_times = queries[:, tokens].unflatten(1, (num_times, -1)).flatten(0, 1)
            mask = text_mask[:, None].expand(-1, num_times, -1).flatten(0, 1)
            read.append(self.cross(of_times, context.flatten(0, 1), mask).unflatten(0, (-1, num_times)).flatten(1, 2))
        return _joined(read)


def _step(
    mixer: PoM | Attention, x: Tensor, state: MixerState | None, positions: Tensor | None
) -> tuple[Tensor, MixerState]:
    """Let the next chunk x (b n d) read the past and itself. Raises ValueError for the state of another mixer."""
    positions = None if mixer.rope is None else positions
    if isinstance(mixer, PoM) and (state is None or isinstance(state, PomState)):
        return mixer.step(x, state, positions=positions)
    if isinstance(mixer, Attention) and (state is None or isinstance(state, AttentionState)):
        return mixer.step(x, state, positions=positions)
    raise ValueError(f"step: a mixer of type {type(mixer).__name__} got the state {type(state).__name__} of another")


def _runs(num_times: int, num_tokens: int, split: TokenSplit | None) -> list[tuple[slice, slice]]:
    """Cut the tokens at hand into runs of whole frame groups, or of parts of one -> (tokens, times) of each.

    times are those of the run's frame groups, of which there are `num_times`; 1 = the clip has one time.
    """
    if split is None or num_times == 1:
        return [(slice(0, num_tokens), slice(0, num_times))]
    frame_length = split.num_tokens // num_times
    runs, time = [], split.start // frame_length
    for begin, end, num_frames in runs_of_frames(split.start, num_tokens, frame_length):
        runs.append((slice(begin, end), slice(time, time + num_frames)))
        time += num_frames
    return runs


def _modulated(x: Tensor, modulation: tuple[Tensor, ...], split: TokenSplit | None = None) -> Tensor:
    """Return x (1 + scale) + shift for x (b n d) and the two of `modulation`, each (b g d) by frame group."""
    (scale, shift), parts = modulation, []
    for tokens, times in _runs(scale.shape[1], x.shape[1], split):
        of_time = x[:, tokens].unflatten(1, (times.stop - times.start, -1))
        parts.append(modulate(of_time, shift[:, times, None], scale[:, times, None]).flatten(1, 2))
    return _joined(parts)


def _gated(gate: Tensor, x: Tensor, split: TokenSplit | None = None) -> Tensor:
    """Multiply x (b n d) by gate (b g d) by frame group."""
    parts = []
    for tokens, times in _runs(gate.shape[1], x.shape[1], split):
        of_time = x[:, tokens].unflatten(1, (times.stop - times.start, -1))
        parts.append((gate[:, times, None] * of_time).flatten(1, 2))
    return _joined(parts)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class VDiPoM(nn.Module):
    """Network that predicts noise or velocity from noisy latents of clips (arXiv 2411.12663, section 4.3).

    Clips may have other frames, heights and widths than the config's. A picture is a clip of one latent frame: that
    frame is repeated to fill a frame group, and the predictions for its copies are averaged. Inputs may be of any
    floating dtype; activations and the output have the dtype of the weights.
    """

    def __init__(self, config: VideoModelConfig) -> None:
        super().__init__()
        self.config = config
        channels, dim = config.latent_shape[0], config.dim
        self.patch_embedding = build_bottleneck(config) or ClipPatchEmbedding(
            channels, dim, config.patch_frames, config.patch_size
        )
        self.time_embedding = build_time_embedding(config)
        self.text_embedding = nn.Linear(config.text_dim, dim)
        self.trunk = nn.ModuleList(
            VideoBlock(block, build_mixer(dim, mixer.without_rope()), build_mixer(dim, mixer))
            for block, mixer in zip(config.blocks, config.mixers, strict=True)
        )
        self.norm = build_norm(config.norm, dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, config.patch_frames * config.patch_size**2 * channels)
        self.alignment = build_alignment(config)

    def blocks(self) -> nn.ModuleList:
        """Return the repeated blocks, in order, which an engine shards, checkpoints and compiles one by one."""
        return self.trunk

    def forward(
        self,
        latents: Tensor | Sequence[Tensor],
        t: Tensor,
        condition: Text | PackedText,
        start: Tensor | None = None,
        split_tokens: SplitTokens | None = None,
        dropout_seeds: Tensor | None = None,
        num_aligned: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | list[Tensor]:
        """Predict from latents (b c F H W), or pictures (b c H W), and t (b,) or (b g) in [0, 1] with 1 = noise.

        The result is like the latents; with split_tokens, that of this rank's tokens alone, (b n values) as
        `latent_tokens` cuts them. start (b,) int64 is the number of a clip's first frame group, by default 0.
        dropout_seeds (b,) int64 in training; without them there is no dropout.
        With num_aligned the result is a pair of that and the projections of the clip's tokens in the first so many
        samples, see `models.alignment.project`.
        Packed samples are a list of latents by shape, and the result is like it; see `models.packed`.
        ValueError if the patches do not fill the clips, or if there are neither one t nor g of them.
        """
        if isinstance(condition, PackedText):
            assert not isinstance(latents, Tensor)
            return predict_clips(self, latents, t, condition, start, dropout_seeds)
        assert isinstance(latents, Tensor)
        clips, is_picture = self._whole_groups(latents)
        prediction, hidden = self._predict(clips, t, condition, start, split_tokens, dropout_seeds)
        if is_picture and split_tokens is not None:
            prediction = prediction.unflatten(2, (self.config.patch_frames, -1)).mean(2)
        elif is_picture:
            prediction = prediction.mean(2, keepdim=latents.ndim == 5)
        return prediction if num_aligned is None else (prediction, project(self.alignment, hidden, num_aligned))

    def _predict(
        self,
        clips: Tensor,
        t: Tensor,
        condition: Text,
        start: Tensor | None,
        split_tokens: SplitTokens | None,
        seeds: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the prediction for clips, and the tokens after the block of the alignment, if the config has one."""
        grid, alignment, hidden = self._grid(clips), self.config.alignment, None
        split = None if split_tokens is None else split_tokens(math.prod(grid))
        x = self.patch_embedding(clips, None if split is None else split.tokens)
        if t.ndim == 2 and t.shape[1] != grid[0]:
            raise ValueError(f"t: {t.shape[1]} times for {grid[0]} frame groups")
        groups = torch.arange(grid[0], device=x.device)
        groups = groups if start is None else groups + start[:, None]
        x = self._with_positions(x, groups, grid, split)
        positions = self._positions(groups, grid, split)
        c = self._embedded_time(t)
        text = embed_text(self.text_embedding, condition)
        mask = BlockCausal(grid[1] * grid[2]) if self.config.temporal == "block_causal" else None
        for number, block in enumerate(self.trunk):
            x = block(x, c, text, condition.mask, mask, positions, split, seeds)
            if alignment is not None and number + 1 == alignment.block:
                hidden = x
        values = self._values(x, c, split)
        # No view of what the head gives, for the reason in `unpatchify`.
        return (self._unpatchified(values, grid) if split is None else values.clone()), hidden

    def step(
        self, latents: Tensor, t: Tensor, condition: Text, states: Sequence[MixerState] | None, group: int
    ) -> tuple[Tensor, list[MixerState]]:
        """Predict frame group number `group` of clips as `forward` does, from the states that earlier groups left.

        latents (b c patch_frames H W), t (b,), states: None, or one per block as returned by the call for the group
        before -> prediction like latents, and the states. The past costs nothing, however long it is. ValueError for a
        model without the block-causal mask, whose earlier groups read later ones.
        """
        if self.config.temporal != "block_causal":
            raise ValueError("step: this model reads all frames at once; only model.temporal: block_causal has a past")
        x = self.patch_embedding(latents)
        grid = self._grid(latents)
        if grid[0] != 1:
            raise ValueError(f"step: takes one frame group of {self.config.patch_frames} frames, got {grid[0]}")
        groups = torch.full((1,), group, device=x.device)
        x = self._with_positions(x, groups, grid)
        positions = self._positions(groups, grid)
        c = self._embedded_time(t)
        text = embed_text(self.text_embedding, condition)
        new_states = []
        past: Sequence[MixerState | None] = states or [None] * len(self.trunk)
        for block, state in zip(self.trunk, past, strict=True):
            assert isinstance(block, VideoBlock)
            x, new_state = block.step(x, c, text, condition.mask, state, positions)
            new_states.append(new_state)
        return self._unpatchified(self._values(x, c), grid), new_states

    def embed(self, latents: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[int, int, int]]:
        """Map clips (b c F H W) or pictures (b c H W) to tokens (b n d), their positions (b n 3) and their grid.

        start (b,) int64: see `forward`. There are positions only where mixers have rope.
        """
        clips, _ = self._whole_groups(latents)
        x, grid = self.patch_embedding(clips), self._grid(clips)
        groups = torch.arange(grid[0], device=x.device)
        groups = groups if start is None else groups + start[:, None]
        positions = self._positions(groups, grid)
        if positions is not None:
            positions = positions.expand(len(x), -1, -1)
        return self._with_positions(x, groups, grid), positions, grid

    def unpatchified(self, values: Tensor, grid: tuple[int, int, int], like: Tensor) -> Tensor:
        """Turn values (b n f * p * q * c) of a grid into a prediction like the latents `like`."""
        prediction = self._unpatchified(values, grid)
        is_picture = like.ndim == 4 or like.shape[2] == 1
        return prediction.mean(2, keepdim=like.ndim == 5) if is_picture else prediction

    def _whole_groups(self, latents: Tensor) -> tuple[Tensor, bool]:
        """Return clips (b c F H W) of whole frame groups, and whether the latents are pictures, which are repeated."""
        clips = latents if latents.ndim == 5 else latents[:, :, None]
        is_picture = clips.shape[2] == 1
        return (clips.expand(-1, -1, self.config.patch_frames, -1, -1) if is_picture else clips), is_picture

    def _grid(self, clips: Tensor) -> tuple[int, int, int]:
        """Return the number of tokens by frame group, height and width."""
        frames, height, width = clips.shape[-3:]
        size = self.config.patch_size
        return frames // self.config.patch_frames, height // size, width // size

    def _with_positions(
        self, x: Tensor, groups: Tensor, grid: tuple[int, int, int], split: TokenSplit | None = None
    ) -> Tensor:
        """Add the fixed positions of the grid of frame groups numbered (g,) or (b g), if the config has them."""
        if self.config.positions == "none":
            return x
        integer = self.config.positions == "sincos_integer"
        embed = partial(sincos_positions_3d, height=grid[1], width=grid[2], dim=self.config.dim, integer=integer)
        numbers = groups.view(-1, grid[0])
        if split is None:
            return x + embed(numbers, device=x.device, dtype=x.dtype)
        frame_length = grid[1] * grid[2]
        first, end = split.start // frame_length, -(-split.stop // frame_length)
        begin = split.start - first * frame_length
        return x + embed(numbers[:, first:end], device=x.device, dtype=x.dtype)[:, begin : begin + x.shape[1]]

    def _positions(self, groups: Tensor, grid: tuple[int, int, int], split: TokenSplit | None = None) -> Tensor | None:
        """Return the positions that mixers with rope read, (n 3) or (b n 3), or None if there are none."""
        if not self.config.has_rope:
            return None
        positions = grid_positions(grid[1], grid[2], groups)
        return positions if split is None else positions[..., split.tokens, :]

    def _embedded_time(self, t: Tensor) -> Tensor:
        """Embed t as (b 1 d), or (b g d) by frame group."""
        return self.time_embedding(t if t.ndim == 2 else t[:, None])

    def _values(self, x: Tensor, c: Tensor, split: TokenSplit | None = None) -> Tensor:
        """Map tokens (b n d) to the values of their patches, (b n f * p * q * c)."""
        scale, shift = self.modulation(F.silu(c)).chunk(2, dim=-1)
        return self.head(_modulated(self.norm(x), (scale, shift), split))

    def _unpatchified(self, values: Tensor, grid: tuple[int, int, int]) -> Tensor:
        size = self.config.patch_size
        return unpatchify_clips(values, grid, (self.config.patch_frames, size, size))
