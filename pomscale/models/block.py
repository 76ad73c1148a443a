"""Block of an image network: a mixer and a feed-forward, both modulated and gated by the condition; its mixer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pomscale.config.mixer import AttentionMixer, Mixer
from pomscale.layers import Attention, FeedForward, PoM, modulate
from pomscale.ops.pom import Mask, TokenSplit


class Block(nn.Module):
    """Block that maps x (b n d) with condition c (b 1 d) -> (b n d).

        x <- x + (1 + g1) mixer(modulate(norm(x), shift1, scale1))
        x <- x + (1 + g2) ffn(modulate(norm(x), shift2, scale2))

    Scales, shifts and gates are linear in SiLU(c). With gate biases of -1 and zero weights, as `init_weights` sets
    them, a block starts as the identity.
    """

    def __init__(self, dim: int, mixer: PoM | Attention, ffn_expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mixer: PoM | Attention = mixer
        self.ffn = FeedForward(dim, ffn_expansion)
        self.modulation = nn.Linear(dim, 4 * dim)
        self.gates = nn.Linear(dim, 2 * dim)
        self.stacked_maps = {"modulation": 4, "gates": 2}

    def forward(self, x: Tensor, c: Tensor, positions: Tensor | None = None, split: TokenSplit | None = None) -> Tensor:
        """Apply the block.

        positions (n axes) are integers, which only mixers with rope read. split: where the tokens lie, if x has only
        some of them.
        """
        c = F.silu(c)
        scale1, shift1, scale2, shift2 = self.modulation(c).chunk(4, dim=-1)
        gate1, gate2 = self.gates(c).chunk(2, dim=-1)
        x = x + (1 + gate1) * mix(self.mixer, modulate(self.norm(x), shift1, scale1), positions, split=split)
        return x + (1 + gate2) * self.ffn(modulate(self.norm(x), shift2, scale2))


def build_mixer(dim: int, mixer: Mixer) -> PoM | Attention:
    """Build a mixer of a config, for use as a self mixer or as a cross mixer, which reads another sequence."""
    if isinstance(mixer, AttentionMixer):
        return Attention(dim, mixer.heads)
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
    if isinstance(mixer, PoM) and mixer.form.rope is not None:
        return mixer(x, mask=mask, positions=positions, split=split)
    return mixer(x, mask=mask, split=split)
