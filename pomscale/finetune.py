"""The initial weights of a fine-tuning run: those of a trained model, where the networks agree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pomscale.config.schema import InitFromConfig, ModelConfig
from pomscale.engine.protocol import Assign
from pomscale.errors import InputError
from pomscale.models import initial_value
from pomscale.weights import TrainedWeights, open_weights, parameter_shapes

# The class embedding has a row per class, and other classes have other meanings.
_OF_THE_CLASSES = "class_embedding.weight"


@dataclass(frozen=True)
class FineTuning:
    """Callable as engine.protocol.InitWeights. `note` is for people: what is taken from where, and what is not."""

    source: TrainedWeights
    weights: str
    model: ModelConfig
    seed: int

    @property
    def keeps_classes(self) -> bool:
        return self.source.card.model.num_classes == self.model.num_classes

    @property
    def note(self) -> str:
        taken = f"initial weights: {self.weights} of {self.source.folder}"
        if self.keeps_classes:
            return taken
        there = self.source.card.model.num_classes
        return f"{taken}; the class embedding begins anew, for {there} classes there are {self.model.num_classes} here"

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


def fine_tuning(config: InitFromConfig, model: ModelConfig, seed: int) -> FineTuning:
    """Initial weights for a network `model` from those at `config.path`. seed: of what has to begin anew.

    Latents may have another height and width, positions being computed; with another number of classes the class
    embedding begins anew. Raises InputError, listing all differences, if the networks differ in anything else.
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


def _architecture(model: ModelConfig) -> dict[str, object]:
    """What decides the shape and meaning of every tensor, but for the number of classes."""
    fields: dict[str, object] = {
        "latent_shape[0]": model.latent_shape[0],
        "dim": model.dim,
        "depth": model.depth,
        "patch_size": model.patch_size,
        "ffn_expansion": model.ffn_expansion,
        "mixer": model.mixers if len(set(model.mixers)) > 1 else model.mixers[0],
    }
    if "pom" in model.mixers:
        fields |= {"degree": model.degree, "expand": model.expand}
    if "attention" in model.mixers:
        fields["num_heads"] = model.num_heads
    return fields
