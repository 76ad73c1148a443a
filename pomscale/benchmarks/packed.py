"""`pomscale bench packed`: a packed training step of samples of several shapes beside steps of one shape.

A step is forward and backward of the loss, in fp32, with the samples in memory and about as many tokens in each step.
Times are those of the device, on a CPU of all threads. The best bucket is the shape whose steps take the least time per
token. The packed loss must first be the mean of those of
the same samples in batches of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pomscale.base.condition import PackedText, Text
from pomscale.benchmarks.memory import kept_bytes
from pomscale.benchmarks.operators.timing import take_turns
from pomscale.benchmarks.report import BenchReport
from pomscale.config.model import ImageModelConfig, VideoModelConfig, of_shape
from pomscale.diffusion.objectives import FlowMatching, interpolate, per_sample_loss, prediction_loss
from pomscale.models import make_model
from pomscale.models.video import VideoBlock

_WANTED = 1.05
"""Most time per token of a packed step, relative to that of the best bucket."""
_EQUAL = 1e-5
_TEXT_DIM, _MOST_TEXT = 64, 64
_POM = {"kind": "pom", "form": "coefficients", "heads": 16, "degree": 3, "rope": True}
_PICTURES = ((4, 32, 32), (4, 24, 40), (4, 40, 24), (4, 16, 48), (4, 24, 24))
_CLIPS = ((4, 8, 16, 24), (4, 4, 16, 24), (4, 8, 24, 16), (4, 24, 24), (4, 32, 24))

_OBJECTIVE = FlowMatching()


@dataclass(frozen=True)
class _Contender:
    """A step: its loss by sample, its tokens, and those of its texts, none of padding."""

    loss: Callable[[nn.Module], Tensor]
    tokens: int
    text_tokens: int


@dataclass(frozen=True)
class _Bucket:
    """Samples of one shape: x0 and eps (b ..), t (b,), classes (b,) int64 or texts, and the tokens of each."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    condition: Tensor | Text
    length: int

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of each sample, (b,)."""
        return per_sample_loss(_OBJECTIVE, model, self.x0, self.eps, self.t, self.condition)

    @property
    def contender(self) -> _Contender:
        """A step of these samples."""
        num_text = int(self.condition.mask.sum()) if isinstance(self.condition, Text) else 0
        return _Contender(self.loss, len(self.x0) * self.length, num_text)

    def part(self, size: int) -> _Bucket:
        """Return its first samples."""
        condition = self.condition
        condition = Text(*(each[:size] for each in condition)) if isinstance(condition, Text) else condition[:size]
        return _Bucket(self.x0[:size], self.eps[:size], self.t[:size], condition, self.length)


def bench_packed(device: torch.device, *, dim: int, depth: int, tokens: int, num_turns: int) -> BenchReport:
    """Measure packed steps of DiPoM and of V-DiPoM beside those of each of their shapes, in turns.

    Args:
        device: Device to compute on.
        dim: Width of the networks.
        depth: Their number of blocks.
        tokens: Tokens of a step, at most.
        num_turns: Turns, after one that warms up; the fastest of each counts.
    """
    report = BenchReport("packed")
    shared: dict[str, Any] = {"dim": dim, "depth": depth, "patch_size": 2}
    image = {"latent_shape": _PICTURES[0], "num_classes": 1000, **shared}
    video = {"kind": "video", "latent_shape": _CLIPS[0], "text_dim": _TEXT_DIM, **shared}
    for name, config, shapes in (
        ("DiPoM v1", ImageModelConfig.model_validate(image), _PICTURES),
        ("DiPoM v2", ImageModelConfig.model_validate(image | {"mixer": _POM, "norm": "rms"}), _PICTURES),
        ("V-DiPoM", VideoModelConfig.model_validate(video), _CLIPS),
        ("V-DiPoM block-causal", VideoModelConfig.model_validate(video | {"temporal": "block_causal"}), _CLIPS),
    ):
        torch.manual_seed(0)
        with torch.device(device):
            model = make_model(config)
            buckets = {"x".join(map(str, shape)): _bucket(config, shape, tokens) for shape in shapes}
        with torch.no_grad():  # zeros, as gates have them at the start, would hide what blocks compute
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        _bench(report, name, model, buckets, device, num_turns)
    return report


def _bench(
    report: BenchReport,
    name: str,
    model: nn.Module,
    buckets: Mapping[str, _Bucket],
    device: torch.device,
    num_turns: int,
) -> None:
    contenders = {shape: bucket.contender for shape, bucket in buckets.items()}
    lengths = [bucket.length for bucket in buckets.values()]
    mixed = _mixed(lengths, max(contender.tokens for contender in contenders.values()))
    parts = [bucket.part(n) for bucket, n in zip(buckets.values(), mixed, strict=True) if n]
    packed = _Contender(
        _packed(parts), sum(part.contender.tokens for part in parts), sum(part.contender.text_tokens for part in parts)
    )
    contenders["packed"] = packed
    alone = torch.cat([part.loss(model) for part in parts]).mean().item()
    difference = abs(packed.loss(model).mean().item() - alone) / abs(alone)
    report.add(f"{name}: loss of a packed step, relative to batches of one shape", difference=difference)
    if not difference <= _EQUAL:
        report.failures.append(f"{name}: the losses differ by {difference:.2g}, more than {_EQUAL:g}")
    steps = {key: _step(model, contender.loss) for key, contender in contenders.items()}
    for step in steps.values():
        step()
    per_token = {}
    for key, times in take_turns(steps, device, num_turns).items():
        contender, kept = contenders[key], []
        num_bytes = kept_bytes(lambda: kept.append(contender.loss(model)), device)  # noqa: B023
        per_token[key] = times.busy_s / contender.tokens
        report.add(
            f"{name}, {key}",
            tokens=contender.tokens,
            padding=_tokens_computed(model, contender.loss) - contender.tokens - contender.text_tokens,
            step_s=times.busy_s,
            us_per_token=per_token[key] * 1e6,
            kept_kib_per_token=num_bytes / contender.tokens / 2**10,
        )
    ratio = per_token.pop("packed") / min(per_token.values())
    report.compare(f"{name}: time per token of a packed step over the best bucket's", ratio, _WANTED, at_least=False)


def _tokens_computed(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Return the tokens, of texts too, that the first block of a network gets in a forward pass, padding included."""
    found = []

    def count(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        sequences = [arguments[0], arguments[2]] if isinstance(block, VideoBlock) else [arguments[0]]
        found.append(sum(x.shape[0] * x.shape[1] for x in sequences))

    handle = model.blocks()[0].register_forward_pre_hook(count)  # type: ignore[operator]
    with torch.no_grad():
        loss(model)
    handle.remove()
    return found[0]


def _mixed(lengths: Sequence[int], tokens: int) -> list[int]:
    """Return about equally many samples of each length, together of at most so many tokens."""
    counts = [0] * len(lengths)
    while True:
        found = [n for n, length in enumerate(lengths) if length <= tokens]
        if not found:
            return counts
        next_one = min(found, key=lambda n: counts[n])
        counts[next_one] += 1
        tokens -= lengths[next_one]


def _bucket(config: ImageModelConfig | VideoModelConfig, shape: tuple[int, ...], tokens: int) -> _Bucket:
    """Draw samples of a shape, of at most so many tokens in all, on the default device."""
    length = of_shape(config, shape).num_tokens
    size = tokens // length
    x0, eps, t = torch.randn(size, *shape), torch.randn(size, *shape), torch.rand(size)
    if isinstance(config, ImageModelConfig):
        assert config.num_classes is not None
        return _Bucket(x0, eps, t, torch.randint(config.num_classes, (size,)), length)
    lengths = torch.randint(1, _MOST_TEXT + 1, (size,))
    mask = torch.arange(_MOST_TEXT) < lengths[:, None]
    return _Bucket(x0, eps, t, Text(torch.randn(size, _MOST_TEXT, _TEXT_DIM), mask), length)


def _packed(parts: Sequence[_Bucket]) -> Callable[[nn.Module], Tensor]:
    """Return the loss of each of these samples in one packed pass."""
    x0, eps, times = ([getattr(part, name) for part in parts] for name in ("x0", "eps", "t"))
    texts = [part.condition for part in parts if isinstance(part.condition, Text)]
    condition: Tensor | PackedText
    if texts:
        embeddings = torch.cat([text.embeddings[text.mask] for text in texts])
        condition = PackedText(embeddings, tuple(int(n) for text in texts for n in text.mask.sum(1)))
    else:
        condition = torch.cat([part.condition for part in parts if isinstance(part.condition, Tensor)])

    def loss(model: nn.Module) -> Tensor:
        noisy = [interpolate(_OBJECTIVE, *each) for each in zip(x0, eps, times, strict=True)]
        predictions = model(noisy, torch.cat(times), condition)
        return torch.cat([prediction_loss(_OBJECTIVE, *each) for each in zip(predictions, x0, eps, times, strict=True)])

    return loss


def _step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        loss(model).mean().backward()

    return step
