"""Block of an image network: a mixer and a feed-forward, both modulated and gated by the condition; its parts."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from pomscale.config.block import BlockConfig, NormName
from pomscale.config.mixer import AttentionMixer, Mixer
from pomscale.layers import Attention, Dropout, FeedForward, PoM, RMSNorm, SwiGLU, modulate
from pomscale.layers.mlp import Drop
from pomscale.models.packed_blocks import packed_block
from pomscale.models.packing import Packing
from pomscale.ops.pom import Mask, TokenSplit

_FEED_FORWARDS: dict[str, type[FeedForward | SwiGLU]] = {"gelu": FeedForward, "swiglu": SwiGLU}
_GATE_OFFSETS = {"1+g": 1.0, "g": 0.0}


class Block(nn.Module):
    """Block that maps x (b n d) with condition c (b 1 d) -> (b n d).

        x <- x + (o + g1) mixer(modulate(norm1(x), shift1, scale1))
        x <- x + (o + g2) ffn(modulate(norm2(x), shift2, scale2))

    Scales, shifts and gates are linear in SiLU(c); o is `gate_offset`, 1 or 0 by the config. With gate biases of -o
    and zero weights, as `init_weights` sets them, a block starts as the identity. In training dropout may act on what
    attention gives and on the hidden features of the feed-forward.
    """

    def __init__(self, config: BlockConfig, mixer: PoM | Attention) -> None:
        super().__init__()
        dim = config.dim
        self.norm1, self.norm2 = build_norm(config.norm, dim), build_norm(config.norm, dim)
        self.mixer: PoM | Attention = mixer
        self.ffn = build_feed_forward(config)
        self.modulation = nn.Linear(dim, 4 * dim)
        self.gates = nn.Linear(dim, 2 * dim)
        self.gate_offset = gate_offset(config)
        self.dropout = BlockDropout(config)
        self.stacked_maps = {"modulation": 4, "gates": 2}

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        positions: Tensor | None = None,
        split: TokenSplit | Packing | None = None,
        seeds: Tensor | None = None,
        mask: Mask = None,
    ) -> Tensor:
        """Apply the block.

        positions (n axes) are integers, which only mixers with rope read. split: where the tokens lie, if x has only
        some of them, or those of several samples (1 n d) with conditions c (1 samples d). seeds (b,) int64 of the
        dropout; None = none. mask is that of the mixer; packed samples have their own.
        """
        if isinstance(split, Packing):
            return packed_block(self, x, c, positions, split, seeds)
        c = F.silu(c)
        scale1, shift1, scale2, shift2 = self.modulation(c).chunk(4, dim=-1)
        gate1, gate2 = (self.gate_offset + self.gates(c)).chunk(2, dim=-1)
        mixed = mix(self.mixer, modulate(self.norm1(x), shift1, scale1), positions, mask, split)
        x = x + gate1 * self.dropout.of_mixer(self.mixer, mixed, seeds, split)
        del mixed  # the feed-forward, which takes the most memory of a block, would run beside it
        return x + gate2 * self.ffn(modulate(self.norm2(x), shift2, scale2), self.dropout.of_hidden(seeds, split))


class BlockDropout(nn.Module):
    """Dropout layers of a block, whose numbers differ from those of other blocks."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.cross, self.mixer, self.hidden = (Dropout(config.dropout, 3 * config.number + n) for n in range(3))

    def of_mixer(self, mixer: PoM | Attention, mixed: Tensor, seeds: Tensor | None, split: TokenSplit | None) -> Tensor:
        """Drop from what a self mixer gives, if it is attention, as JiT does."""
        return self.mixer(mixed, seeds, first_token(split)) if isinstance(mixer, Attention) else mixed

    def of_cross(self, mixer: PoM | Attention, mixed: Tensor, seeds: Tensor | None, split: TokenSplit | None) -> Tensor:
        """Drop from what a cross mixer gives, likewise."""
        return self.cross(mixed, seeds, first_token(split)) if isinstance(mixer, Attention) else mixed

    def of_hidden(self, seeds: Tensor | None, split: TokenSplit | None) -> Drop | None:
        """Return what drops from the hidden features of the feed-forward; None = nothing."""
        if seeds is None or self.hidden.rate == 0:
            return None
        return partial(self.hidden, seeds=seeds, first_token=first_token(split))


def first_token(split: TokenSplit | None) -> int:
    """Return the number of the first token at hand."""
    return 0 if split is None else split.start


def build_norm(name: NormName, dim: int) -> nn.LayerNorm | RMSNorm:
    """Build a norm of tokens: one without weights, whose part the modulation has, or an RMS norm with weights."""
    return RMSNorm(dim) if name == "rms" else nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def build_feed_forward(config: BlockConfig) -> FeedForward | SwiGLU:
    """Build the feed-forward of a block."""
    return _FEED_FORWARDS[config.ffn](config.dim, config.ffn_width)


def gate_offset(config: BlockConfig) -> float:
    """Return what is added to the gates that are linear in the condition."""
    return _GATE_OFFSETS[config.gates]


def build_mixer(dim: int, mixer: Mixer) -> PoM | Attention:
    """Build a mixer of a config, for use as a self mixer or as a cross mixer, which reads another sequence."""
    if isinstance(mixer, AttentionMixer):
        return Attention(dim, mixer.heads, mixer.qk_norm, mixer.rope)
    return PoM(
        dim,
        mixer.degree,
        mixer.expand,
        form=mixer.form,
        heads=mixer.heads,
        groups=mixer.groups,
        rope=mixer.rope,
    )


def mix(
    mixer: PoM | Attention,
    x: Tensor,
    positions: Tensor | None,
    mask: Mask = None,
    split: TokenSplit | None = None,
) -> Tensor:
    """Let x (b n d) read itself; the mixer gets the positions (n axes) or (b n axes) if it has rope."""
    return mixer(x, mask=mask, positions=None if mixer.rope is None else positions, split=split)
