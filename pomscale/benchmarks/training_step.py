"""`pomscale bench step`: a training step of a JiT beside that of the authors' own modules.

A step is forward, backward, optimiser and both averages, in fp32, with the pictures in memory. The authors' is that of
davidpicard/JiTpp: its `Denoiser`, torch's AdamW as it is by default, and its loop over the tensors of the averages.
Ours has the same weights, the recipe's optimiser and our averages. Both networks must give equal pictures first.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pomscale.base.errors import InputError
from pomscale.benchmarks.memory import kept_bytes
from pomscale.benchmarks.operators.timing import measured
from pomscale.benchmarks.report import BenchReport
from pomscale.config.mixer import PomMixer
from pomscale.config.model import ImageModelConfig
from pomscale.config.train import TrainRecipe
from pomscale.diffusion.objectives import build_objective, per_sample_loss
from pomscale.engine.averages import Ema, ema_weights
from pomscale.engine.optimizers import build_optimizer
from pomscale.models import make_model
from pomscale.pretrained.jit_weights import translate

_EQUAL = 1e-4
"""Largest difference of the predictions, relative to the largest value."""
_STEPS_WANTED = {"pom": 1.3, "attention": 1.05}
_ACTIVATIONS_WANTED = 0.6
_SIZES = {768: "B", 1024: "L", 1280: "H"}
_CHECKOUTS = (("--jitpp", "davidpicard/JiTpp", "denoiser.py"), ("--pom", "davidpicard/pom", "pom/__init__.py"))


class _Contender(ABC):
    """A network with what a training step needs: `forward`, `backward` and `update`, called in this order."""

    name: str
    model: nn.Module
    loss: Tensor

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """Return pictures (b 3 h w) of noisy ones, t (b,) with 1 = noise and classes (b,) int64."""

    @abstractmethod
    def forward(self, x: Tensor, classes: Tensor) -> None:
        """Set `loss` to the mean loss of pictures x (b 3 h w); noise and times are drawn."""

    def backward(self) -> None:
        """Compute the gradients of `loss`."""
        self.loss.backward()
        del self.loss

    @abstractmethod
    def update(self) -> None:
        """Step the optimiser, clear the gradients and update the averages."""


class _Authors(_Contender):
    name = "the authors'"

    def __init__(self, recipe: TrainRecipe, config: ImageModelConfig, denoiser: type[nn.Module]) -> None:
        diffusion = recipe.diffusion
        arch, side = f"JiT-{_SIZES[config.dim]}/{config.patch_size}", config.latent_shape[1]
        mixer = config.mixers[0]
        pom = {"pom_degree": mixer.degree, "pom_expand": mixer.expand} if isinstance(mixer, PomMixer) else {}
        self.model = denoiser(
            arch,
            img_size=side,
            num_classes=config.num_classes,
            mixer=mixer.kind,
            label_drop_prob=diffusion.condition_dropout,
            t_eps=diffusion.clamp,
            noise_scale=diffusion.noise_scale,
            **pom,
        )
        with torch.no_grad():  # zeros, as theirs are at the start, would hide that two networks differ
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02).add_(1.0 if "norm" in name else 0.0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
        self.averages = [[p.detach().clone() for p in self.model.parameters()] for _ in range(2)]

    def predict(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        predicted: Tensor = self.model.net(x, 1 - t, classes)  # type: ignore[operator]
        return predicted

    def forward(self, x: Tensor, classes: Tensor) -> None:
        self.loss = self.model(x, classes)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average, decay in zip(self.averages, (0.9999, 0.9996), strict=True):
            for held, new in zip(average, self.model.parameters(), strict=True):
                held.mul_(decay).add_(new.detach(), alpha=1.0 - decay)


class _Ours(_Contender):
    name = "pomscale"

    def __init__(self, recipe: TrainRecipe, config: ImageModelConfig, theirs: nn.Module) -> None:
        self.model = make_model(config)
        weights = {name: tensor.clone() for name, tensor in translate(theirs.state_dict(), config).items()}
        self.model.load_state_dict(weights)
        self._objective = build_objective(recipe.diffusion)
        assert config.num_classes is not None, "networks of JiTpp"
        self._dropped, self._num_classes = recipe.diffusion.condition_dropout, config.num_classes
        self._time = recipe.diffusion.time
        self._optimizer = build_optimizer(self.model, recipe.optimizer.model_copy(update={"lr": 1e-6}))
        self._ema = Ema(recipe.ema.averages, [p.detach() for p in self.model.parameters()])
        self._weights = ema_weights(recipe.ema, recipe.training.total_samples, recipe.samples_per_step)

    def predict(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        predicted: Tensor = self.model(x, t, classes)
        return predicted

    def forward(self, x: Tensor, classes: Tensor) -> None:
        t = torch.sigmoid(torch.randn(len(x), device=x.device) * self._time.std + self._time.mean)
        is_dropped = torch.rand(len(x), device=x.device) < self._dropped
        classes = torch.where(is_dropped, self._num_classes, classes)
        self.loss = per_sample_loss(self._objective, self.model, x, torch.randn_like(x), t, classes).mean()

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._ema.update(self._weights)


def bench_step(
    recipe: TrainRecipe, device: torch.device, *, jitpp: Path, pom: Path, batch: int, num_turns: int
) -> BenchReport:
    """Measure steps of the two in turns, and what a forward pass keeps for the backward pass.

    Args:
        recipe: A recipe of the presets jit-*: its network, objective, optimiser and averages.
        device: Device to compute on.
        jitpp: A checkout of davidpicard/JiTpp.
        pom: A checkout of davidpicard/pom, which the other imports.
        batch: Pictures of a step.
        num_turns: Turns of the two, after one that warms up; the fastest counts.

    Raises:
        InputError: The recipe's network is none of theirs, or a folder is no such checkout.
    """
    config = recipe.model
    if not isinstance(config, ImageModelConfig) or config.dim not in _SIZES or recipe.diffusion.objective != "x":
        raise InputError(f"{recipe.name}: JiTpp has no such network; take a recipe of recipes/image/jit-*")
    if config.num_classes is None:
        raise InputError(f"{recipe.name}: its pictures are of a text, and JiTpp's of a class")
    denoiser = _denoiser(jitpp, pom)
    report = BenchReport("step")
    torch.manual_seed(0)
    with torch.device(device):
        theirs = _Authors(recipe, config, denoiser)
        net = theirs.model.net
        assert isinstance(net, nn.Module)
        ours = _Ours(recipe, config, net)
        x = torch.rand(batch, *config.latent_shape) * 2 - 1
        classes = torch.arange(batch) % config.num_classes
    _check_equal(report, ours, theirs, x, classes)
    fastest: dict[str, dict[str, float]] = {}
    kept: dict[str, int] = {}
    for turn in range(num_turns + 1):
        for contender in (ours, theirs):
            seconds = {
                "forward": measured(lambda: contender.forward(x, classes), device).wall_s,  # noqa: B023
                "backward": measured(contender.backward, device).wall_s,
                "update": measured(contender.update, device).wall_s,
            }
            least = fastest.get(contender.name)
            if turn and (least is None or sum(seconds.values()) < sum(least.values())):
                fastest[contender.name] = seconds
    for contender in (ours, theirs):
        kept[contender.name] = kept_bytes(lambda: contender.forward(x, classes), device)  # noqa: B023
        del contender.loss
        phases = fastest[contender.name]
        report.add(
            f"{recipe.name}, batch {batch}, {contender.name}",
            step_s=sum(phases.values()),
            **{f"{phase}_s": s for phase, s in phases.items()},
            activations_mib=kept[contender.name] / 2**20,
        )
    gain = sum(fastest[theirs.name].values()) / sum(fastest[ours.name].values())
    report.compare("steps/s over the authors'", gain, _STEPS_WANTED[config.mixers[0].kind])
    report.compare("activations over the authors'", kept[ours.name] / kept[theirs.name], _ACTIVATIONS_WANTED, False)
    return report


def _check_equal(report: BenchReport, ours: _Ours, theirs: _Authors, x: Tensor, classes: Tensor) -> None:
    """Note a failure of the report if the networks give other pictures."""
    t = torch.linspace(0.1, 0.9, len(x), device=x.device)
    with torch.no_grad():
        found, expected = (contender.predict(x, t, classes) for contender in (ours, theirs))
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    report.add("difference of the pictures, relative to the largest value", difference=difference)
    if not difference <= _EQUAL:
        report.failures.append(f"the networks differ by {difference:.2g}, more than {_EQUAL:g}")


def _denoiser(jitpp: Path, pom: Path) -> Any:
    """Return the class `Denoiser` of the authors' checkouts, whose modules import each other by bare names."""
    for (option, repository, file), folder in zip(_CHECKOUTS, (jitpp, pom), strict=True):
        if not (folder / file).is_file():
            raise InputError(f"{option} {folder}: expected a checkout of {repository}, with {file}")
    before = sys.path
    sys.path = [str(jitpp), str(pom), *before]
    try:
        return importlib.import_module("denoiser").Denoiser
    except ImportError as error:
        raise InputError(f"--jitpp {jitpp}: cannot be imported: {error}; install what it needs") from error
    finally:
        sys.path = before
