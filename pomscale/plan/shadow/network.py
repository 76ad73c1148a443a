"""The networks of `pomscale.models`, line by line, on tensors without numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pomscale.config.schema import MixerName, ModelConfig
from pomscale.plan.shadow import operators as op
from pomscale.plan.shadow.operators import FP32, Weight
from pomscale.plan.shadow.tensor import Tensor


class Linear:
    def __init__(self, inputs: int, outputs: int) -> None:
        self.weight, self.bias = Weight((outputs, inputs)), Weight((outputs,))

    def __call__(self, x: Tensor) -> Tensor:
        return op.linear(x, self.weight, self.bias)

    def weights(self) -> list[Weight]:
        return [self.weight, self.bias]


class PoM:
    """layers/pom.py and ops/pom/torch_path.py, without a mask."""

    def __init__(self, dim: int, degree: int, expand: int) -> None:
        width = degree * expand * dim
        self.degree = degree
        self.projection, self.gate, self.output = Linear(dim, width), Linear(dim, width), Linear(width, dim)

    def __call__(self, x: Tensor) -> Tensor:
        u = self.projection(x)
        return self.output(self.read(u, self.gate(x)))

    def read(self, u: Tensor, gate: Tensor) -> Tensor:
        mean = op.scaled(op.concatenate([op.sum_tokens(product) for product in self.products(u)]))
        return op.sigmoid(gate) * op.cast(mean, gate.itemsize)

    def products(self, u: Tensor) -> list[Tensor]:
        pieces = op.chunk(op.activation(u), self.degree)
        products = [pieces[0]]
        for piece in pieces[1:]:
            products.append(products[-1] * piece)
        return products

    def linears(self) -> list[Linear]:
        return [self.projection, self.gate, self.output]


class Attention:
    """layers/attention.py, without a mask."""

    def __init__(self, dim: int, num_heads: int) -> None:
        self.num_heads = num_heads
        self.query, self.key_value, self.output = Linear(dim, dim), Linear(dim, 2 * dim), Linear(dim, dim)

    def __call__(self, x: Tensor) -> Tensor:
        query = self.query(x)
        key, value = op.chunk(self.key_value(x), 2)
        return self.output(op.attention(query, key, value, self.num_heads))

    def linears(self) -> list[Linear]:
        return [self.query, self.key_value, self.output]


class Block:
    """models/block.py."""

    def __init__(self, config: ModelConfig, mixer: MixerName) -> None:
        dim = config.dim
        self.mixer: PoM | Attention = (
            Attention(dim, config.num_heads) if mixer == "attention" else PoM(dim, config.degree, config.expand)
        )
        self.expand, self.contract = Linear(dim, config.ffn_expansion * dim), Linear(config.ffn_expansion * dim, dim)
        self.modulation, self.gates = Linear(dim, 4 * dim), Linear(dim, 2 * dim)

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        c = op.activation(c)
        scale1, shift1, scale2, shift2 = op.chunk(self.modulation(c), 4)
        gate1, gate2 = op.chunk(self.gates(c), 2)
        x = x + (1 + gate1) * self.mixer(modulate(op.layer_norm(x), shift1, scale1))
        return x + (1 + gate2) * self.feed_forward(modulate(op.layer_norm(x), shift2, scale2))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.contract(op.activation(self.expand(x)))

    def weights(self) -> list[Weight]:
        linears = [*self.mixer.linears(), self.expand, self.contract, self.modulation, self.gates]
        return [weight for linear in linears for weight in linear.weights()]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


BlockCall = Callable[[Block, Tensor, Tensor], Tensor]
"""How a block is called: with what an engine does before and after, and checkpointed or not."""


class Network:
    """models/image.py."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        channels, dim = config.latent_shape[0], config.dim
        pixels = config.patch_size**2 * channels
        self.patch_embedding = Linear(pixels, dim)
        self.time_expand, self.time_contract = Linear(dim, 4 * dim), Linear(4 * dim, dim)
        self.class_embedding = Weight((config.num_classes + 1, dim))
        self.blocks = [Block(config, mixer) for mixer in config.mixers]
        self.modulation, self.head = Linear(dim, 2 * dim), Linear(dim, pixels)

    def __call__(self, latents: Tensor, call: BlockCall) -> Tensor:
        batch, dim, itemsize = latents.shape[0], self.config.dim, latents.tape.itemsize
        tokens = self.config.num_tokens
        x = op.convolution(op.cast(latents, itemsize), self.patch_embedding.weight, self.patch_embedding.bias, tokens)
        x = x + x.tape.new((tokens, dim))
        c = self.time(latents, batch) + op.embedding(self.class_embedding, batch)
        c.shape = (batch, 1, dim)
        for block in self.blocks:
            x = call(block, x, c)
        scale, shift = op.chunk(self.modulation(op.activation(c)), 2)
        prediction = op.scaled(self.head(modulate(op.layer_norm(x), shift, scale)))
        prediction.shape = latents.shape
        return prediction

    def time(self, latents: Tensor, batch: int) -> Tensor:
        features = latents.tape.new((batch, self.config.dim))
        return self.time_contract(op.activation(self.time_expand(features)))

    def root_weights(self) -> list[Weight]:
        """What is in no block."""
        linears = [self.patch_embedding, self.time_expand, self.time_contract, self.modulation, self.head]
        return [self.class_embedding, *(weight for linear in linears for weight in linear.weights())]

    def weights(self) -> Iterator[Weight]:
        yield from self.root_weights()
        for block in self.blocks:
            yield from block.weights()


def loss(predict: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """diffusion/loss.py and the loss of train.py; latents (b ..) fp32, noise of the same size."""
    noise = latents.tape.new(latents.shape, FP32)
    prediction = predict(op.scaled(latents))
    return op.mean_squared(op.cast(prediction, FP32) - (noise - latents))
