"""Text-to-video diffusion: V-DiPoM, and attention and hybrids as other mixers in the same trunk.

Shapes: b clips, c latent channels, F H W latent frames, height and width, g frame groups of `patch_frames` latent
frames, n tokens (n / g per frame group), m text tokens, d width of the trunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomscale.base.condition import Text
from pomscale.config.model import VideoModelConfig
from pomscale.layers import (
    Attention,
    AttentionState,
    ClipPatchEmbedding,
    FeedForward,
    PoM,
    TimestepEmbedding,
    grid_positions,
    modulate,
    sincos_positions_3d,
    unpatchify_clips,
)
from pomscale.models.block import build_mixer, mix
from pomscale.ops.pom import BlockCausal, Mask, PomState

MixerState = PomState | AttentionState
"""State that a self mixer carries from one frame group to the next."""


class VideoBlock(nn.Module):
    """Block that maps x (b n d) with condition c and text (b m d) -> (b n d); c is (b 1 d), or (b g d) by frame group.

        x <- x + (1 + g1) cross(modulate(norm(x), 1), modulate(norm(text), 2))
        x <- x + (1 + g2) mixer(modulate(norm(x), 3))
        x <- x + (1 + g3) ffn(modulate(norm(x), 4))

    The four scales and shifts and the three gates are linear in SiLU(c), which knows the time alone; the text
    comes in by the cross mixer. The block starts as the identity, as `Block` does.
    """

    def __init__(self, dim: int, cross: PoM | Attention, mixer: PoM | Attention, ffn_expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.cross = cross
        self.mixer: PoM | Attention = mixer
        self.ffn = FeedForward(dim, ffn_expansion)
        self.modulation = nn.Linear(dim, 8 * dim)
        self.gates = nn.Linear(dim, 3 * dim)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        text: Tensor,
        text_mask: Tensor,
        mask: Mask = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Apply the block.

        text_mask (b m) bool is True where a token takes part; mask is that of the self mixer. positions (n 3) or
        (b n 3) are integers, frame group, row and column, which only self mixers with rope read: a text has none.
        """
        modulation, gates = self._of_time(c)
        x = self._read_text(x, text, text_mask, modulation, gates[0])
        x = x + _gated(gates[1], mix(self.mixer, self._modulated(x, *modulation[4:6]), positions, mask))
        return x + _gated(gates[2], self.ffn(self._modulated(x, *modulation[6:])))

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
        x = self._read_text(x, text, text_mask, modulation, gates[0])
        mixed, new_state = _step(self.mixer, self._modulated(x, *modulation[4:6]), state, positions)
        x = x + _gated(gates[1], mixed)
        return x + _gated(gates[2], self.ffn(self._modulated(x, *modulation[6:]))), new_state

    def _of_time(self, c: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return eight scales and shifts, and three gates, each like c."""
        c = F.silu(c)
        return self.modulation(c).chunk(8, dim=-1), self.gates(c).chunk(3, dim=-1)

    def _read_text(
        self, x: Tensor, text: Tensor, text_mask: Tensor, modulation: tuple[Tensor, ...], gate: Tensor
    ) -> Tensor:
        scale, shift = modulation[2:4]
        num_times = scale.shape[1]
        queries = self._modulated(x, *modulation[:2])
        context = modulate(self.norm(text)[:, None], shift[:, :, None], scale[:, :, None]).flatten(0, 1)  # (b g) m d
        if num_times == 1:
            return x + _gated(gate, self.cross(queries, context, text_mask))
        # The text is modulated differently at each time, so frame groups become samples.
        queries = queries.unflatten(1, (num_times, -1)).flatten(0, 1)
        text_mask = text_mask[:, None].expand(-1, num_times, -1).flatten(0, 1)
        return x + _gated(gate, self.cross(queries, context, text_mask).view_as(x))

    def _modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        of_time = self.norm(x).unflatten(1, (scale.shape[1], -1))
        return modulate(of_time, shift[:, :, None], scale[:, :, None]).flatten(1, 2)


def _step(
    mixer: PoM | Attention, x: Tensor, state: MixerState | None, positions: Tensor | None
) -> tuple[Tensor, MixerState]:
    """Let the next chunk x (b n d) read the past and itself. Raises ValueError for the state of another mixer."""
    if isinstance(mixer, PoM) and (state is None or isinstance(state, PomState)):
        return mixer.step(x, state, positions=None if mixer.form.rope is None else positions)
    if isinstance(mixer, Attention) and (state is None or isinstance(state, AttentionState)):
        return mixer.step(x, state)
    raise ValueError(f"step: a mixer of type {type(mixer).__name__} got the state {type(state).__name__} of another")


def _gated(gate: Tensor, x: Tensor) -> Tensor:
    """Multiply x (b n d) by 1 + gate (b g d)."""
    return ((1 + gate)[:, :, None] * x.unflatten(1, (gate.shape[1], -1))).flatten(1, 2)


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
        self.patch_embedding = ClipPatchEmbedding(channels, dim, config.patch_frames, config.patch_size)
        self.time_embedding = TimestepEmbedding(dim)
        self.text_embedding = nn.Linear(config.text_dim, dim)
        self.trunk = nn.ModuleList(
            VideoBlock(dim, build_mixer(dim, mixer.without_rope()), build_mixer(dim, mixer), config.ffn_expansion)
            for mixer in config.mixers
        )
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, config.patch_frames * config.patch_size**2 * channels)

    def blocks(self) -> nn.ModuleList:
        """Return the repeated blocks, in order, which an engine shards, checkpoints and compiles one by one."""
        return self.trunk

    def forward(self, latents: Tensor, t: Tensor, condition: Text, start: Tensor | None = None) -> Tensor:
        """Predict from latents (b c F H W), or pictures (b c H W), and t (b,) or (b g) in [0, 1] with 1 = noise.

        The result is like the latents. start (b,) int64 is the number of a clip's first frame group, by default 0.
        ValueError if the patches do not fill the clips, or if there are neither one t nor g of them.
        """
        clips = latents if latents.ndim == 5 else latents[:, :, None]
        if clips.shape[2] > 1:
            return self._predict(clips, t, condition, start)
        repeated = clips.expand(-1, -1, self.config.patch_frames, -1, -1)
        return self._predict(repeated, t, condition, start).mean(2, keepdim=latents.ndim == 5)

    def _predict(self, clips: Tensor, t: Tensor, condition: Text, start: Tensor | None) -> Tensor:
        x = self.patch_embedding(clips)
        grid = self._grid(clips)
        if t.ndim == 2 and t.shape[1] != grid[0]:
            raise ValueError(f"t: {t.shape[1]} times for {grid[0]} frame groups")
        groups = torch.arange(grid[0], device=x.device)
        groups = groups if start is None else groups + start[:, None]
        x = x + self._embedded_positions(groups, grid, x)
        positions = self._positions(groups, grid)
        c = self._embedded_time(t)
        text = self._embedded_text(condition)
        mask = BlockCausal(grid[1] * grid[2]) if self.config.temporal == "block_causal" else None
        for block in self.trunk:
            x = block(x, c, text, condition.mask, mask, positions)
        return self._unembed(x, c, grid)

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
        x = x + self._embedded_positions(groups, grid, x)
        positions = self._positions(groups, grid)
        c = self._embedded_time(t)
        text = self._embedded_text(condition)
        new_states = []
        past: Sequence[MixerState | None] = states or [None] * len(self.trunk)
        for block, state in zip(self.trunk, past, strict=True):
            assert isinstance(block, VideoBlock)
            x, new_state = block.step(x, c, text, condition.mask, state, positions)
            new_states.append(new_state)
        return self._unembed(x, c, grid), new_states

    def _grid(self, clips: Tensor) -> tuple[int, int, int]:
        """Return the number of tokens by frame group, height and width."""
        frames, height, width = clips.shape[-3:]
        size = self.config.patch_size
        return frames // self.config.patch_frames, height // size, width // size

    def _embedded_positions(self, groups: Tensor, grid: tuple[int, int, int], x: Tensor) -> Tensor:
        """Embed the grid of frame groups numbered (g,) or (b g), to be added to x."""
        numbers = groups.view(-1, grid[0])
        return sincos_positions_3d(numbers, grid[1], grid[2], self.config.dim, x.device, x.dtype)

    def _positions(self, groups: Tensor, grid: tuple[int, int, int]) -> Tensor | None:
        """Return the positions that mixers with rope read, (n 3) or (b n 3), or None if there are none."""
        return grid_positions(grid[1], grid[2], groups) if self.config.has_rope else None

    def _embedded_time(self, t: Tensor) -> Tensor:
        """Embed t as (b 1 d), or (b g d) by frame group."""
        return self.time_embedding(t if t.ndim == 2 else t[:, None])

    def _embedded_text(self, condition: Text) -> Tensor:
        return self.text_embedding(condition.embeddings.to(self.text_embedding.weight.dtype))

    def _unembed(self, x: Tensor, c: Tensor, grid: tuple[int, int, int]) -> Tensor:
        scale, shift = self.modulation(F.silu(c)).chunk(2, dim=-1)
        x = modulate(self.norm(x).unflatten(1, (c.shape[1], -1)), shift[:, :, None], scale[:, :, None]).flatten(1, 2)
        size = self.config.patch_size
        return unpatchify_clips(self.head(x), grid, (self.config.patch_frames, size, size))
