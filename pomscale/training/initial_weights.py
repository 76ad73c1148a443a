"""The initial weights of a fine-tuning run: those of a trained model, where the networks agree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pomscale.base.errors import InputError
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.train import InitFromConfig
from pomscale.engine.protocol import Assign
from pomscale.models import initial_value
from pomscale.pretrained.weights import TrainedWeights, open_weights, parameter_shapes

# The class embedding has a row per class, and other classes have other meanings.
_OF_THE_CLASSES = "class_embedding.weight"


@dataclass(frozen=True)
class FineTuning:
    """Callable as engine.protocol.InitWeights. `note` is for people: what is taken from where, and what is not."""

    source: TrainedWeights
    weights: str
    model: ImageModelConfig | VideoModelConfig
    seed: int

    @property
    def keeps_classes(self) -> bool:
        return _num_classes(self.source.card.model) == _num_classes(self.model)

    @property
    def note(self) -> str:
        taken = f"initial weights: {self.weights} of {self.source.folder}"
        if self.keeps_classes:
            return taken
        there, here = _num_classes(self.source.card.model), _num_classes(self.model)
        return f"{taken}; the class embedding begins anew, for {there} classes there are {here} here"

    def __call__(self, model: nn.Module, assign: Assign) -> None:
        """Every rank reads all weights, a group of tensors at a time, and holds no more of them than its shard.

        They have been checked before, by one rank: `source.check(weights)`.
        """
        parameters = dict(model.named_parameters())
        shapes = parameter_shapes(self.model)
        if not self.keeps_classes:
            del shapes[_OF_THE_CLASSES]
            assign(parameters[_OF_THE_CLASSES], initial_value(model, _OF_THE_CLASSES, self.seed))
        for name, value in self.source.stream(self.weights, shapes):
            assign(parameters[name], value)


def _num_classes(model: ImageModelConfig | VideoModelConfig) -> int:
    """0 of a network that is told texts."""
    return model.num_classes if isinstance(model, ImageModelConfig) else 0


def fine_tuning(config: InitFromConfig, model: ImageModelConfig | VideoModelConfig, seed: int) -> FineTuning:
    """Initial weights for a network `model` from those at `config.path`. seed: of what has to begin anew.

    Latents may have another height, width and number of frames, positions being computed, and clips another mask: no
    weight belongs to it. With another number of classes the class embedding begins anew. Raises InputError, listing all
    differences, if the networks differ in anything else.
    """
    source = open_weights(Path(config.path))
    there, here = _architecture(source.card.model), _architecture(model)
    differences = [
        f"model.{key}: {there.get(key, 'none')} there, {here.get(key, 'none')} here"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise InputError(f"init_from: the network in {config.path} is another one: {'; '.join(differences)}")
    return FineTuning(source, source.resolve(config.weights), model, seed)


def _architecture(model: ImageModelConfig | VideoModelConfig) -> dict[str, object]:
    """What decides the shape and meaning of every tensor, but for the number of classes."""
    fields: dict[str, object] = {
        "kind": model.kind,
        "latent_shape[0]": model.latent_shape[0],
        "dim": model.dim,
        "depth": model.depth,
        "patch_size": model.patch_size,
        "ffn_expansion": model.ffn_expansion,
        "mixer": model.mixers if len(set(model.mixers)) > 1 else model.mixers[0],
    }
    if isinstance(model, VideoModelConfig):
        fields |= {"text_dim": model.text_dim, "patch_frames": model.patch_frames}
    if "pom" in model.mixers:
        fields |= {"degree": model.degree, "expand": model.expand}
    if "attention" in model.mixers:
        fields["num_heads"] = model.num_heads
    return fields
