"""The authors' JiT (davidpicard/JiTpp) restated in plain formulas, with the names and the order of their parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pomscale.config.model import ImageModelConfig


@dataclass(frozen=True)
class JitSizes:
    """A small network; `mixer` is "attention" or "pom", of degree 3 and expansion 2."""

    mixer: str
    dim: int = 48
    depth: int = 4
    heads: int = 4
    side: int = 3
    patch: int = 4
    bottleneck: int = 10
    classes: int = 7
    tokens: int = 5
    start: int = 2

    @property
    def config(self) -> ImageModelConfig:
        """Our network of these sizes."""
        table: dict[str, Any] = {"kind": "attention", "qk_norm": True, "rope": True}
        if self.mixer == "pom":
            table = {"kind": "pom", "form": "coefficients", "degree": 3, "expand": 2, "heads": self.heads, "rope": True}
        return ImageModelConfig.model_validate(
            {
                "preset": "jit-b-16",
                "latent_shape": (3, self.side * self.patch, self.side * self.patch),
                "num_classes": self.classes,
                "dim": self.dim,
                "depth": self.depth,
                "num_heads": self.heads,
                "patch_size": self.patch,
                "mixer": table,
                "patch_embedding": {"bottleneck": self.bottleneck},
                "in_context": {"tokens": self.tokens, "start": self.start},
            }
        )


def jit_shapes(sizes: JitSizes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of their parameters, in the order of `parameters()`; one, `pos_embed`, is not trained."""
    d, b, hidden = sizes.dim, sizes.bottleneck, int(int(4 * sizes.dim) * 2 / 3)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, sizes.side**2, d),
        "in_context_posemb": (1, sizes.tokens, d),
        **_linear("t_embedder.mlp.0", 256, d),
        **_linear("t_embedder.mlp.2", d, d),
        "y_embedder.embedding_table.weight": (sizes.classes + 1, d),
        "x_embedder.proj1.weight": (b, 3, sizes.patch, sizes.patch),
        "x_embedder.proj2.weight": (d, b, 1, 1),
        "x_embedder.proj2.bias": (d,),
    }
    for n in range(sizes.depth):
        block: dict[str, tuple[int, ...]] = {"norm1.weight": (d,)}
        if sizes.mixer == "pom":
            block |= {"attn.se_bias": (sizes.heads,), "attn.po_coeff": (2 * d, 3)}
            block |= {"attn.qc_proj.weight": (2 * d + sizes.heads, d), "attn.ag_proj.weight": (d, 2 * d)}
        else:
            block |= {f"attn.{name}_norm.weight": (d // sizes.heads,) for name in "qk"}
            block |= {**_linear("attn.qkv", d, 3 * d), **_linear("attn.proj", d, d)}
        block |= {"norm2.weight": (d,), **_linear("mlp.w12", d, 2 * hidden), **_linear("mlp.w3", hidden, d)}
        block |= _linear("adaLN_modulation.1", d, 6 * d)
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    shapes |= {"final_layer.norm_final.weight": (d,), **_linear("final_layer.linear", d, 3 * sizes.patch**2)}
    return shapes | _linear("final_layer.adaLN_modulation.1", d, 2 * d)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def jit_weights(sizes: JitSizes, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Draw weights of which none is idle; `pos_embed` has its fixed values."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in jit_shapes(sizes).items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 and shape[0] > 1 else 0.3
        weights[name] = (value * scale + (1.0 if "norm" in name else 0.0)).to(dtype)
    weights["pos_embed"] = sincos(sizes)[None].to(dtype)
    return weights


def sincos(sizes: JitSizes) -> Tensor:
    """Fixed positions (n, d): of the column, then of the row, each sines and then cosines."""
    quarter = sizes.dim // 4
    rates = [10000 ** (-i / quarter) for i in range(quarter)]
    rows = []
    for row in range(sizes.side):
        for column in range(sizes.side):
            rows.append([wave(n * rate) for n in (column, row) for wave in (math.sin, math.cos) for rate in rates])
    return torch.tensor(rows, dtype=torch.float64)


def jit_forward(
    weights: Mapping[str, Tensor], sizes: JitSizes, pictures: Tensor, time: Tensor, classes: Tensor
) -> Tensor:
    """Predict from pictures (b 3 H W), their time (b,), 1 = data, and classes (b,) -> (b 3 H W)."""
    dtype = pictures.dtype
    rates = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = time.double()[:, None] * rates
    features = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)
    of_class = weights["y_embedder.embedding_table.weight"][classes]
    c = linear(weights, "t_embedder.mlp.2", F.silu(linear(weights, "t_embedder.mlp.0", features))) + of_class
    x = F.conv2d(pictures, weights["x_embedder.proj1.weight"], stride=sizes.patch)
    x = F.conv2d(x, weights["x_embedder.proj2.weight"], weights["x_embedder.proj2.bias"])
    x = x.flatten(2).transpose(1, 2) + weights["pos_embed"]
    places = [(row, column) for row in range(sizes.side) for column in range(sizes.side)]
    for n in range(sizes.depth):
        if n == sizes.start:
            x = torch.cat([of_class[:, None] + weights["in_context_posemb"], x], dim=1)
            places = [(0, 0)] * sizes.tokens + places
        block = {k.removeprefix(f"blocks.{n}."): v for k, v in weights.items() if k.startswith(f"blocks.{n}.")}
        x = _block(block, sizes, x, c, torch.tensor(places, dtype=torch.float64))
    shift, scale = linear(weights, "final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, dim=-1)
    normed = rms(x[:, sizes.tokens :], weights["final_layer.norm_final.weight"])
    values = linear(weights, "final_layer.linear", normed * (1 + scale) + shift)
    side, patch = sizes.side, sizes.patch
    out = torch.empty_like(pictures)
    for token, (row, column) in enumerate(places[sizes.tokens :]):
        of_patch = values[:, token].view(-1, patch, patch, 3).permute(0, 3, 1, 2)
        out[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = of_patch
    assert len(places) == sizes.tokens + side**2
    return out


def _block(weights: Mapping[str, Tensor], sizes: JitSizes, x: Tensor, c: Tensor, places: Tensor) -> Tensor:
    parts = linear(weights, "adaLN_modulation.1", F.silu(c))[:, None].chunk(6, dim=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    mixer = _pom if sizes.mixer == "pom" else _attention
    x = x + gate1 * mixer(weights, sizes, rms(x, weights["norm1.weight"]) * (1 + scale1) + shift1, places)
    hidden = linear(weights, "mlp.w12", rms(x, weights["norm2.weight"]) * (1 + scale2) + shift2)
    width = hidden.shape[-1] // 2
    gated = F.silu(hidden[..., :width]) * hidden[..., width:]
    return x + gate2 * linear(weights, "mlp.w3", gated)


def _attention(weights: Mapping[str, Tensor], sizes: JitSizes, x: Tensor, places: Tensor) -> Tensor:
    width = sizes.dim // sizes.heads
    query, key, value = linear(weights, "attn.qkv", x).chunk(3, dim=-1)
    heads = []
    for h in range(sizes.heads):
        q, k, v = (part[..., h * width : (h + 1) * width] for part in (query, key, value))
        q = _turned_neighbours(rms(q, weights["attn.q_norm.weight"]), places)
        k = _turned_neighbours(rms(k, weights["attn.k_norm.weight"]), places)
        heads.append((q @ k.transpose(1, 2) / math.sqrt(width)).softmax(-1) @ v)
    return linear(weights, "attn.proj", torch.cat(heads, dim=-1))


def _turned_neighbours(x: Tensor, places: Tensor) -> Tensor:
    """Turn channels 2c and 2c + 1 of the first half by the row, and of the second half by the column."""
    half = x.shape[-1] // 2
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    rates = torch.tensor([10000 ** (-2 * i / half) for i in range(half // 2)], dtype=torch.float64)
    angles = torch.cat([places[:, :1] * rates, places[:, 1:] * rates], dim=1)
    turned = pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)
    return torch.view_as_real(turned).flatten(-2)


def _pom(weights: Mapping[str, Tensor], sizes: JitSizes, x: Tensor, places: Tensor) -> Tensor:
    width, heads = 2 * sizes.dim, sizes.heads
    maps = weights["attn.qc_proj.weight"]
    u = F.leaky_relu(x @ maps[:width].T, 0.01).clamp(-0.1, 6)
    features = torch.stack([weights["attn.po_coeff"][:, m] * u ** (m + 1) for m in range(3)]).sum(0)
    rates = torch.tensor([10000 ** (-i / (width // 4)) for i in range(width // 4)], dtype=torch.float64)
    state = _turned_quarters(features, places, rates).mean(1, keepdim=True)
    gates = F.hardsigmoid(x @ maps[width:].T + weights["attn.se_bias"])
    gates = _turned_quarters(gates, places, rates[:: width // heads][: heads // 4])
    return gates.repeat_interleave(width // heads, dim=-1) * state @ weights["attn.ag_proj.weight"].T


def _turned_quarters(x: Tensor, places: Tensor, rates: Tensor) -> Tensor:
    """Turn quarter 0 with 1 by the row, and quarter 2 with 3 by the column."""
    quarters = x.chunk(4, dim=-1)
    turned: list[Tensor] = []
    for axis in range(2):
        angles = places[:, axis : axis + 1] * rates
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = quarters[2 * axis : 2 * axis + 2]
        turned += [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(turned, dim=-1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """Return x over its root mean square, times weight."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Apply a linear map with bias."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
