"""The networks of `pomscale.models`, line by line, on tensors that have sizes but no values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

from pomscale.config.block import AlignmentConfig, BlockConfig
from pomscale.config.mixer import Mixer
from pomscale.config.model import ImageModelConfig, ModelConfig, VideoModelConfig
from pomscale.plan.model_cost import TEXT_LENGTH, time_widths
from pomscale.plan.shadow import operators as op
from pomscale.plan.shadow.mixers import PADDING, Attention, Linear, Mask, PoM, build_mixer
from pomscale.plan.shadow.operators import FP32, INT64, Weight
from pomscale.plan.shadow.tensor import Tape, Tensor


class FeedForward:
    """Feed-forwards of layers/mlp.py; is_layered: whether SwiGLU cannot compute its hidden features again."""

    is_layered = False

    def __init__(self, config: BlockConfig) -> None:
        width, self.is_gated, self.has_dropout = config.ffn_width, config.ffn == "swiglu", config.dropout > 0
        num_maps = 2 if self.is_gated else 1
        self.expand = Linear(config.dim, num_maps * width, stacked=num_maps)
        self.contract = Linear(width, config.dim)

    def __call__(self, x: Tensor) -> Tensor:
        expanded = self.expand(x)
        if self.is_gated and not self.is_layered and not self.has_dropout:
            assert self.contract.bias is not None
            return op.contracted(expanded, self.contract.weight, self.contract.bias)
        if self.is_gated:
            gate, value = op.chunk(expanded, 2)
            hidden = op.activation(gate) * value
        else:
            hidden = op.activation(expanded)
        return self.contract(op.dropout(hidden) if self.has_dropout else hidden)

    def weights(self) -> list[Weight]:
        return [*self.expand.weights(), *self.contract.weights()]


class Norm:
    """Norms of layers: one without weights, or an RMS norm."""

    def __init__(self, config: BlockConfig) -> None:
        self.weight = Weight((config.dim,)) if config.norm == "rms" else None

    def __call__(self, x: Tensor) -> Tensor:
        return op.layer_norm(x) if self.weight is None else op.rms_norm(x, self.weight)

    def weights(self) -> list[Weight]:
        return [] if self.weight is None else [self.weight]


class Block:
    """Mirror of the same name in models/block.py."""

    def __init__(self, config: BlockConfig, mixer: Mixer, mask: Mask) -> None:
        dim, self.mask = config.dim, mask
        self.mixer, self.has_rope = build_mixer(dim, mixer), mixer.rope is not None
        self.feed_forward = FeedForward(config)
        self.norms = [Norm(config) for _ in range(2)]
        self.has_dropout = config.dropout > 0 and isinstance(self.mixer, Attention)
        self.modulation, self.gates = Linear(dim, 4 * dim, stacked=4), Linear(dim, 2 * dim, stacked=2)

    def __call__(self, x: Tensor, c: Tensor, positions: Tensor | None = None) -> Tensor:
        c = op.activation(c)
        positions = positions if self.has_rope else None
        scale1, shift1, scale2, shift2 = op.chunk(self.modulation(c), 4)
        gate1, gate2 = op.chunk(1 + self.gates(c), 2)
        norm1, norm2 = self.norms
        mixed = self.mixer(modulate(norm1(x), shift1, scale1), mask=self.mask, positions=positions)
        x = x + gate1 * (op.dropout(mixed) if self.has_dropout else mixed)
        del mixed
        return x + gate2 * self.feed_forward(modulate(norm2(x), shift2, scale2))

    def weights(self) -> list[Weight]:
        parts = (self.mixer, self.feed_forward, self.modulation, self.gates, *self.norms)
        return [weight for part in parts for weight in part.weights()]


class VideoBlock:
    """Block of models/video.py, with a cross mixer; the condition is (b g 1 d), with one g for every t."""

    def __init__(self, block: BlockConfig, mixer: Mixer, mask: Mask) -> None:
        dim, self.mask = block.dim, mask
        self.cross, self.mixer = build_mixer(dim, mixer.without_rope()), build_mixer(dim, mixer)
        self.has_rope = mixer.rope is not None
        self.feed_forward = FeedForward(block)
        self.norms = [Norm(block) for _ in range(4)]
        self.has_dropout = block.dropout > 0 and isinstance(self.mixer, Attention)
        self.modulation, self.gates = Linear(dim, 8 * dim, stacked=8), Linear(dim, 3 * dim, stacked=3)

    def __call__(self, x: Tensor, c: Tensor, text: Tensor, positions: Tensor | None = None) -> Tensor:
        c = op.activation(c)
        positions = positions if self.has_rope else None
        modulation, gates = op.chunk(self.modulation(c), 8), op.chunk(1 + self.gates(c), 3)
        x = self.read_text(x, text, modulation, gates[0])
        mixed = self.mixer(modulated(self.norms[2](x), *modulation[4:6]), mask=self.mask, positions=positions)
        x = x + gated(gates[1], op.dropout(mixed) if self.has_dropout else mixed)
        del mixed
        return x + gated(gates[2], self.feed_forward(modulated(self.norms[3](x), *modulation[6:])))

    def read_text(self, x: Tensor, text: Tensor, modulation: list[Tensor], gate: Tensor) -> Tensor:
        scale, shift = modulation[2:4]
        batch, num_times = scale.shape[:2]
        num_tokens, dim = x.shape[1:]
        queries = modulated(self.norms[0](x), *modulation[:2])
        context = modulate(op.view(self.norms[1](text), batch, 1, *text.shape[1:]), shift, scale)
        context = op.view(context, batch * num_times, *text.shape[1:])
        queries = op.view(queries, batch * num_times, num_tokens // num_times, dim)
        read = op.view(self.cross(queries, context, PADDING), *x.shape)
        return x + gated(gate, op.dropout(read) if self.has_dropout else read)

    def weights(self) -> list[Weight]:
        parts = (self.cross, self.mixer, self.feed_forward, self.modulation, self.gates, *self.norms)
        return [weight for part in parts for weight in part.weights()]


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Modulate x (b n d) by scale and shift (b g 1 d)."""
    return op.view(modulate(by_time(x, scale.shape[1]), shift, scale), *x.shape)


def gated(gate: Tensor, x: Tensor) -> Tensor:
    """Multiply x (b n d) by gate (b g 1 d)."""
    return op.view(gate * by_time(x, gate.shape[1]), *x.shape)


def by_time(x: Tensor, num_times: int) -> Tensor:
    """Reshape x (b n d) -> (b g n/g d)."""
    batch, num_tokens, dim = x.shape
    return op.view(x, batch, num_times, num_tokens // num_times, dim)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


AnyBlock: TypeAlias = Block | VideoBlock

BlockCall: TypeAlias = Callable[..., Tensor]
"""Call of a block with its inputs, by which an engine adds its work before and after, and checkpointing."""


class PatchEmbedding:
    """Patch embeddings of layers/patchify.py: a convolution, or two linear maps."""

    def __init__(self, config: ModelConfig, values: int) -> None:
        bottleneck = config.patch_embedding.bottleneck
        self.values, self.num_tokens = values, config.num_tokens
        self.reduce = None if bottleneck is None else Linear(values, bottleneck, bias=False)
        self.projection = Linear(values if bottleneck is None else bottleneck, config.dim)

    def __call__(self, latents: Tensor) -> Tensor:
        tape, projection = latents.tape, self.projection
        if self.reduce is not None:
            patches = op.scaled(latents)
            patches.shape = (latents.shape[0], self.num_tokens, self.values)
            return projection(self.reduce(op.cast(patches, tape.itemsize)))
        assert projection.bias is not None
        return op.convolution(op.cast(latents, tape.itemsize), projection.weight, projection.bias, self.num_tokens)

    def weights(self) -> list[Weight]:
        return [*([] if self.reduce is None else self.reduce.weights()), *self.projection.weights()]


class Alignment:
    """Projection of layers/alignment.py, after `block` blocks."""

    def __init__(self, dim: int, config: AlignmentConfig) -> None:
        self.block, hidden, self.dim = config.block, config.hidden, config.dim
        self.maps = [Linear(dim, hidden), Linear(hidden, hidden), Linear(hidden, config.dim)]

    def __call__(self, x: Tensor) -> Tensor:
        first, second, third = self.maps
        return op.scaled(third(op.activation(second(op.activation(first(x))))))

    def weights(self) -> list[Weight]:
        return [weight for map_ in self.maps for weight in map_.weights()]


class Network(ABC):
    """Base of the networks of pictures and of clips. `values` is the count of latent values in a token."""

    blocks: Sequence[AnyBlock]

    def __init__(self, config: ModelConfig, values: int) -> None:
        dim = config.dim
        self.latent_shape: tuple[int, ...] = config.latent_shape
        self.dim, self.num_tokens, self.has_rope = dim, config.num_tokens, config.has_rope
        self.patch_embedding = PatchEmbedding(config, values)
        self.num_features, hidden = time_widths(config)
        self.time_expand, self.time_contract = Linear(self.num_features, hidden), Linear(hidden, dim)
        self.has_positions, self.norm = config.positions != "none", Norm(config.block)
        self.modulation, self.head = Linear(dim, 2 * dim), Linear(dim, values)
        self.alignment = None if config.alignment is None else Alignment(dim, config.alignment)

    @abstractmethod
    def __call__(self, latents: Tensor, call: BlockCall) -> tuple[Tensor, Tensor | None]:
        """Map latents (b ..) fp32 to as many values in the precision of compute, and to projections, if it has any."""

    def is_aligned_after(self, number: int) -> bool:
        """Return whether the tokens after a block are projected."""
        return self.alignment is not None and self.alignment.block == number + 1

    def project(self, hidden: Tensor | None) -> Tensor | None:
        return None if self.alignment is None or hidden is None else self.alignment(hidden)

    def features(self, tape: Tape, batch: int) -> Tensor | None:
        """Return a teacher's features as they come with a batch of so many samples."""
        return None if self.alignment is None else tape.new((batch, self.num_tokens, self.alignment.dim), op.FP16)

    def time(self, features: Tensor) -> Tensor:
        return self.time_contract(op.activation(self.time_expand(features)))

    def use_whole_mixers(self, memory: Literal["fast", "lean"], block_rows: int, *, split: bool) -> None:
        """Let mixers keep what compute.mixer_memory says; block_rows is as of `op.whole_mixer`.

        split: whether ranks share the tokens, which leaves self mixers layered.
        """
        for block in self.blocks:
            for mixer in (None if split else block.mixer, getattr(block, "cross", None)):
                if isinstance(mixer, PoM):
                    mixer.memory, mixer.block_rows = memory, block_rows

    def layer_feed_forwards(self) -> None:
        """Let feed-forwards call the layers of their maps, as where these are float8 or an engine gathers each map."""
        for block in self.blocks:
            block.feed_forward.is_layered = True

    def root_weights(self) -> list[Weight]:
        """Return the weights that are in no block."""
        parts = (self.patch_embedding, self.time_expand, self.time_contract, self.modulation, self.head, self.norm)
        of_alignment = [] if self.alignment is None else self.alignment.weights()
        return [*(weight for part in parts for weight in part.weights()), *of_alignment]

    def matrices(self) -> list[Weight]:
        """Return the weights that Muon steps."""
        return [weight for block in self.blocks for weight in block.weights() if weight.num_matrices]

    def weights(self) -> Iterator[Weight]:
        yield from self.root_weights()
        for block in self.blocks:
            yield from block.weights()


class ImageNetwork(Network):
    """Network of models/image.py."""

    def __init__(self, config: ImageModelConfig) -> None:
        super().__init__(config, config.patch_size**2 * config.latent_shape[0])
        self.class_embedding = None if config.num_classes is None else Weight((config.num_classes + 1, config.dim))
        self.text_dim = config.text_dim
        self.text_embedding = None if config.text_dim is None else Linear(config.text_dim, config.dim)
        in_context = config.in_context
        self.in_context = None if in_context is None else Weight((in_context.tokens, config.dim))
        self.start, self.has_cross_mixers = config.context_start, config.has_cross_mixers
        self.blocks = [
            VideoBlock(block, mixer, None) if config.has_cross_mixers else Block(block, mixer, _mask(config, number))
            for number, (block, mixer) in enumerate(zip(config.blocks, config.mixers, strict=True))
        ]

    def __call__(self, latents: Tensor, call: BlockCall) -> tuple[Tensor, Tensor | None]:
        tape, batch, hidden = latents.tape, latents.shape[0], None
        embeddings = None if self.text_dim is None else tape.new((batch, TEXT_LENGTH, self.text_dim), op.FP16)
        x = self.patch_embedding(latents)
        if self.has_positions:
            x = x + tape.new((self.num_tokens, self.dim))
        c, of_condition = self.embedded(tape, batch, embeddings)
        positions = [tape.new((self.num_tokens, 2), INT64)] if self.has_rope else []
        for number, block in enumerate(self.blocks):
            if number == self.start:
                tokens = of_condition
                if self.in_context is not None:
                    tokens = op.view(of_condition, batch, 1, self.dim) + self.in_context.read()
                x = op.concatenate_tokens([tokens, x])
                positions = [tape.new((x.shape[1], 2), INT64) for _ in positions]
                del tokens
            x = call(block, x, c, *([of_condition] if self.has_cross_mixers else []), *positions)
            if self.is_aligned_after(number):
                hidden = x if x.shape[1] == self.num_tokens else op.last_tokens(x, self.num_tokens)
        if self.start is not None:
            x = op.last_tokens(x, self.num_tokens)
        scale, shift = op.chunk(self.modulation(op.activation(c)), 2)
        normed = self.norm(x)
        moved = modulated(normed, scale, shift) if self.has_cross_mixers else modulate(normed, shift, scale)
        del normed
        prediction = op.scaled(self.head(moved))
        prediction.shape = latents.shape
        return prediction, self.project(hidden)

    def embedded(self, tape: Tape, batch: int, embeddings: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what modulates, and the embedded classes or texts."""
        c = self.time(tape.new((batch, self.num_features)))
        if embeddings is None:
            assert self.class_embedding is not None
            of_class = op.embedding(self.class_embedding, batch)
            c = c + of_class
            c.shape = (batch, 1, self.dim)
            return c, of_class
        assert self.text_embedding is not None
        c.shape = (batch, 1, 1, self.dim) if self.has_cross_mixers else (batch, 1, self.dim)
        return c, self.text_embedding(tape.new(embeddings.shape))  # cast

    def root_weights(self) -> list[Weight]:
        own = [weight for weight in (self.class_embedding, self.in_context) if weight is not None]
        of_text = [] if self.text_embedding is None else self.text_embedding.weights()
        return [*own, *super().root_weights(), *of_text]


def _mask(config: ImageModelConfig, number: int) -> Mask:
    """Return the mask of the self mixer of a block: tokens of a text in context have padding."""
    has_text = config.text_dim is not None and config.context_start is not None and number >= config.context_start
    return PADDING if has_text else None


class VideoNetwork(Network):
    """Network of models/video.py, with num_times values of t per clip and texts of `model_cost.TEXT_LENGTH`."""

    def __init__(self, config: VideoModelConfig, num_times: int) -> None:
        super().__init__(config, config.patch_frames * config.patch_size**2 * config.latent_shape[0])
        self.num_times, self.text_dim = num_times, config.text_dim
        self.text_embedding = Linear(config.text_dim, config.dim)
        mask: Mask = config.num_groups if config.temporal == "block_causal" else None
        self.blocks = [
            VideoBlock(block, mixer, mask) for block, mixer in zip(config.blocks, config.mixers, strict=True)
        ]

    def __call__(self, latents: Tensor, call: BlockCall) -> tuple[Tensor, Tensor | None]:
        tape, batch, hidden = latents.tape, latents.shape[0], None
        embeddings = tape.new((batch, TEXT_LENGTH, self.text_dim), op.FP16)
        x = self.patch_embedding(latents)
        if self.has_positions:
            x = x + op.cast(tape.new((batch, self.num_tokens, self.dim), FP32), tape.itemsize)
        c = self.time(tape.new((batch, self.num_times, 1, self.num_features)))
        text = self.text_embedding(tape.new(embeddings.shape))  # cast
        positions = [tape.new((batch, self.num_tokens, 3), INT64)] if self.has_rope else []
        for number, block in enumerate(self.blocks):
            x = call(block, x, c, text, *positions)
            hidden = x if self.is_aligned_after(number) else hidden
        scale, shift = op.chunk(self.modulation(op.activation(c)), 2)
        prediction = op.scaled(self.head(modulated(self.norm(x), scale, shift)))
        prediction.shape = latents.shape
        return prediction, self.project(hidden)

    def root_weights(self) -> list[Weight]:
        return [*super().root_weights(), *self.text_embedding.weights()]


def build_network(config: ModelConfig, num_times: int) -> Network:
    """Build the network of a config. num_times is the number of values of t per sample (`batch.num_times`)."""
    return VideoNetwork(config, num_times) if isinstance(config, VideoModelConfig) else ImageNetwork(config)


def loss(predict: Callable[[Tensor], tuple[Tensor, Tensor | None]], latents: Tensor, features: Tensor | None) -> Tensor:
    """Mirror diffusion/objectives.py, diffusion/alignment.py and training/loss.py; latents (b ..) and noise are fp32.

    features (b n d) in fp16, None for a network without projections.
    """
    noise = latents.tape.new(latents.shape, FP32)
    prediction, projected = predict(op.scaled(latents))
    diffusion = op.mean_squared(op.cast(prediction, FP32) - (noise - latents))
    if projected is None or features is None:
        return diffusion
    del prediction
    return diffusion + op.mean_cosine(op.cast(projected, FP32), features)
