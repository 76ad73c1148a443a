"""Image diffusion by class or text: DiPoM, and DiT, JiT and hybrids as other choices in the same trunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomscale.base.condition import Condition, PackedText, Text
from pomscale.config.model import ImageModelConfig
from pomscale.layers import (
    InContextTokens,
    PatchEmbedding,
    grid_positions,
    modulate,
    sincos_positions_2d,
    unpatchify,
)
from pomscale.models.alignment import build_alignment, project
from pomscale.models.block import Block, build_mixer, build_norm
from pomscale.models.embeddings import build_bottleneck, build_time_embedding
from pomscale.models.packed import predict_pictures
from pomscale.models.texts import embed_text, put_before
from pomscale.models.video import VideoBlock
from pomscale.ops.pom import SplitTokens, TokenSplit


class DiPoM(nn.Module):
    """Network that predicts noise or velocity from noisy latents.

    It is that of arXiv 2411.12663, section 4, with the trunk of Peebles & Xie 2023; with other choices in the config it
    is JiT (arXiv 2511.13720), with attention or the mixer of arXiv 2604.06129.

    A class comes in by the modulation of all blocks, and, in JiT, by tokens in context too. A text comes in by a cross
    mixer in every block, as in V-DiPoM, or by its tokens in context; the modulation then knows the time alone.

    Inputs may be of any floating dtype; activations and the output have the dtype of the weights.
    """

    def __init__(self, config: ImageModelConfig) -> None:
        super().__init__()
        self.config = config
        channels, dim = config.latent_shape[0], config.dim
        self.patch_embedding = build_bottleneck(config) or PatchEmbedding(channels, dim, config.patch_size)
        self.time_embedding = build_time_embedding(config)
        self.class_embedding: nn.Embedding | None = None
        if config.num_classes is not None:
            # The last row stands for no class. Given weights, it does not draw its own, which takes half a second on
            # meta.
            weights = torch.empty(config.num_classes + 1, dim)
            self.class_embedding = nn.Embedding.from_pretrained(weights, freeze=False)
        self.text_embedding = None if config.text_dim is None else nn.Linear(config.text_dim, dim)
        self.in_context = None if config.in_context is None else InContextTokens(config.in_context.tokens, dim)
        self.trunk = nn.ModuleList(
            VideoBlock(block, build_mixer(dim, mixer.without_rope()), build_mixer(dim, mixer))
            if config.has_cross_mixers
            else Block(block, build_mixer(dim, mixer))
            for block, mixer in zip(config.blocks, config.mixers, strict=True)
        )
        self.norm = build_norm(config.norm, dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, config.patch_size**2 * channels)
        self.alignment = build_alignment(config)

    def blocks(self) -> nn.ModuleList:
        """Return the repeated blocks, in order, which an engine shards, checkpoints and compiles one by one."""
        return self.trunk

    def null_condition(self, batch_size: int, device: torch.device | str) -> Tensor:
        """Return the condition that stands for no class, (batch_size,) int64.

        For no text it is the embedding of the empty caption, which the card of a trained model has and no network:
        `data.texts.null_text`. ValueError for a network of texts.
        """
        if self.config.num_classes is None:
            raise ValueError("null_condition: this network takes texts; give it the embedding of the empty caption")
        return torch.full((batch_size,), self.config.num_classes, dtype=torch.int64, device=device)

    def forward(
        self,
        latents: Tensor | Sequence[Tensor],
        t: Tensor,
        condition: Condition | PackedText,
        split_tokens: SplitTokens | None = None,
        dropout_seeds: Tensor | None = None,
        num_aligned: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | list[Tensor]:
        """Predict from latents (b c h w), t (b,) in [0, 1] with 1 = noise, and condition -> (b c h w).

        condition: class ids (b,) int64, or texts of b samples for a network that has text_dim.
        With split_tokens the result is that of this rank's tokens alone, (b n patch_size^2 c) as `latent_tokens` cuts
        them. dropout_seeds (b,) int64 in training; without them there is no dropout. h and w may differ from the
        config's; ValueError if the patch size does not divide them. With num_aligned the result is a pair of that and
        the projections of the picture's tokens in the first so many samples, see `models.alignment.project`.
        Packed samples are a list of latents by size, and the result is like it; see `models.packed`.
        """
        if not isinstance(latents, Tensor):
            return predict_pictures(self, latents, t, condition, dropout_seeds)
        if isinstance(condition, PackedText):
            raise ValueError("condition: packed texts are for packed pictures, a list of latents by size")
        patch_size = self.config.patch_size
        height, width = latents.shape[2] // patch_size, latents.shape[3] // patch_size
        split = None if split_tokens is None else split_tokens(height * width)
        tokens = slice(None) if split is None else split.tokens
        x = self.patch_embedding(latents, None if split is None else tokens)
        if self.config.positions != "none":
            integer = self.config.positions == "sincos_integer"
            x = x + sincos_positions_2d(height, width, self.config.dim, x.device, x.dtype, integer=integer)[tokens]
        c, of_condition, text_mask = self._embedded(t, condition)
        positions = grid_positions(height, width, device=x.device)[tokens] if self.config.has_rope else None
        x, hidden = self._through_blocks(x, c, of_condition, text_mask, positions, split, dropout_seeds)
        scale, shift = self.modulation(F.silu(c)).chunk(2, dim=-1)
        values = self.head(modulate(self.norm(x), shift, scale))
        # No view of what the head gives, for the reason in `unpatchify`.
        prediction = unpatchify(values, height, width, patch_size) if split is None else values.clone()
        return prediction if num_aligned is None else (prediction, project(self.alignment, hidden, num_aligned))

    def _embedded(self, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what modulates (b 1 d), the embedded classes (b d) or texts (b m d), and the mask of texts (b m)."""
        if self.text_embedding is not None:
            if not isinstance(condition, Text):
                raise ValueError("condition: this network takes texts, and not class ids")
            return self.time_embedding(t)[:, None], embed_text(self.text_embedding, condition), condition.mask
        if self.class_embedding is None or isinstance(condition, Text):
            raise ValueError("condition: this network takes class ids, and not texts")
        of_class = self.class_embedding(condition)
        return (self.time_embedding(t) + of_class)[:, None], of_class, None

    def _through_blocks(
        self,
        x: Tensor,
        c: Tensor,
        of_condition: Tensor,
        text_mask: Tensor | None,
        positions: Tensor | None,
        split: TokenSplit | None,
        seeds: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the blocks to the picture's tokens x (b n d), and to those in context from their block on.

        Returns:
            The picture's tokens after the last block, and after that of the alignment, if the config has one.
        """
        config, num_tokens = self.config, x.shape[1]
        hidden, mask = None, None
        for number, block in enumerate(self.trunk):
            if number == config.context_start:
                context = of_condition if self.in_context is None else self.in_context(of_condition)
                x, positions, split, mask = put_before(context, text_mask, x, positions, split)
            if config.has_cross_mixers:
                x = block(x, c, of_condition, text_mask, None, positions, split, seeds)
            else:
                x = block(x, c, positions, split, seeds, mask)
            if config.alignment is not None and number + 1 == config.alignment.block:
                hidden = x if x.shape[1] == num_tokens else x[:, -num_tokens:]
        return x[:, -num_tokens:], hidden
