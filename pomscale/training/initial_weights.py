"""Initial weights of a run: drawn by its seed, or, for fine-tuning, those of a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pomscale.base.errors import InputError
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.train import InitFromConfig, TrainRecipe
from pomscale.distributed.world import World
from pomscale.engine.protocol import Assign, InitWeights
from pomscale.models import init_weights, initial_value
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.weights import TrainedWeights, open_weights, parameter_shapes

# The class embedding has a row per class, and other classes have other meanings.
_CLASS_EMBEDDING = "class_embedding.weight"


@dataclass(frozen=True)
class FineTuning:
    """Weights of a trained model as the initial weights of another one; an engine.protocol.InitWeights.

    weights: which of the weights of `source`. model: of the new run. seed: for what is drawn instead of taken.
    """

    source: TrainedWeights
    weights: str
    model: ImageModelConfig | VideoModelConfig
    seed: int

    @property
    def keeps_classes(self) -> bool:
        """True if both models have the same number of classes."""
        return _num_classes(self.source.card.model) == _num_classes(self.model)

    @property
    def note(self) -> str:
        """A line for people: what is taken from where, and what is not."""
        taken = f"initial weights: {self.weights} of {self.source.folder}"
        if self.keeps_classes:
            return taken
        there, here = _num_classes(self.source.card.model), _num_classes(self.model)
        return f"{taken}; the class embedding is new: there it is for {there} classes, here for {here}"

    def __call__(self, model: nn.Module, assign: Assign) -> None:
        """Assign every parameter. Every rank reads all weights, a group of tensors at a time, and keeps its shard only.

        One rank has checked them before: `source.check(weights)`.
        """
        parameters = dict(model.named_parameters())
        shapes = parameter_shapes(self.model)
        if not self.keeps_classes:
            del shapes[_CLASS_EMBEDDING]
            assign(parameters[_CLASS_EMBEDDING], initial_value(model, _CLASS_EMBEDDING, self.seed))
        for name, value in self.source.stream(self.weights, shapes):
            assign(parameters[name], value)


def _num_classes(model: ImageModelConfig | VideoModelConfig) -> int:
    """Number of classes of a network; 0 if its condition is a text."""
    return model.num_classes if isinstance(model, ImageModelConfig) else 0


def fine_tuning(config: InitFromConfig, model: ImageModelConfig | VideoModelConfig, seed: int) -> FineTuning:
    """Initial weights for a network `model` from those at `config.path`. seed: for what is drawn instead.

    Latents may have another height, width and number of frames, since positions are computed, and clips another mask:
    no weight belongs to those. With another number of classes the class embedding is drawn. Raises InputError, listing
    all differences, if the networks differ in anything else.
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
    """Fields that decide the shape and meaning of every tensor, except the number of classes."""
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


def seeded(recipe: TrainRecipe) -> InitWeights:
    """Initial weights drawn by the recipe's seed."""
    return lambda model, assign: init_weights(model, recipe.seed, assign)


def fine_tuned(recipe: TrainRecipe, card: ModelCard, world: World) -> FineTuning:
    """Initial weights from `init_from` of the recipe, checked by rank 0. card: of the new run. A collective.

    Raises InputError if the networks or their text encoders differ, or if the weights are damaged.
    """
    assert recipe.init_from is not None
    initial = fine_tuning(recipe.init_from, recipe.model, recipe.seed)
    texts_then = initial.source.card.text
    if texts_then is not None and texts_then.identity != card.texts.identity:
        raise InputError(
            f"init_from: the network in {recipe.init_from.path} was trained on texts of another text encoder, that of "
            f"{texts_then.config.path}; encode the captions with it, e.g. into a companion set (data.text)"
        )
    world.on_main(lambda: initial.source.check(initial.weights))  # once, and not every byte on every rank
    return initial
