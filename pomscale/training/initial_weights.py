"""Initial weights of a run: drawn by its seed, or, for fine-tuning, those of a trained model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pomscale.base.errors import InputError
from pomscale.config.mixer import AttentionMixer, PomMixer
from pomscale.config.model import ImageModelConfig, VideoModelConfig
from pomscale.config.train import InitFromConfig, TrainRecipe
from pomscale.distributed.world import World
from pomscale.engine.protocol import Assign, InitWeights
from pomscale.models import init_weights, initial_value
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.weights import TrainedWeights, open_weights, parameter_shapes

# The class embedding has a row per class, and a last one for "no class", which guidance uses.
_CLASS_EMBEDDING = "class_embedding.weight"

# Parameters of the projection for the alignment loss, which serve training alone.
_PROJECTION = "alignment."

# Names of new classes in a message.
_MAX_NAMED = 8


@dataclass(frozen=True)
class FineTuning:
    """Weights of a trained model as the initial weights of another one; an engine.protocol.InitWeights.

    Attributes:
        source: The trained model.
        weights: Name of the set of its weights that is taken.
        model: The network of the new run.
        class_names: Names of the new run's classes; () where they are not known.
        seed: Seed of the values that are drawn instead.
    """

    source: TrainedWeights
    weights: str
    model: ImageModelConfig | VideoModelConfig
    class_names: tuple[str, ...]
    seed: int

    @property
    def note(self) -> str:
        """A line for people: what is taken from where, and what is not."""
        taken = f"initial weights: {self.weights} of {self.source.folder}"
        if self.model.alignment is not None and not self._has_projection:
            taken += "; the projection for the alignment loss is new"
        rows = self._class_rows
        new = [number for number, row in enumerate(rows) if row is None]
        if not new:
            return taken
        names = [self.class_names[number] if self.class_names else str(number) for number in new[:_MAX_NAMED]]
        more = ", ..." if len(new) > _MAX_NAMED else ""
        return (
            f"{taken}; {len(new):,} of {len(rows) - 1:,} classes are not among its {self._num_classes_there:,} and "
            f"start with new rows in the class embedding: {', '.join(names)}{more}"
        )

    @cached_property
    def _class_rows(self) -> list[int | None]:
        """Row of the source's class embedding for each row of the new one; None for a class that it does not know.

        Classes are the same where their names are, whatever their ids. Where names are not known, equal numbers of
        classes are taken for equal classes. Empty for networks without classes.
        """
        here, there = _num_classes(self.model), self._num_classes_there
        if here is None or there is None:  # of texts, as `fine_tuning` has checked
            return []
        names_there = self.source.card.class_names
        if self.class_names and names_there:
            ids = {name: number for number, name in enumerate(_distinct(names_there))}
            rows = [ids.get(name) for name in _distinct(self.class_names)]
        else:
            rows = [number if here == there else None for number in range(here)]
        return [*rows, there]

    @property
    def _has_projection(self) -> bool:
        """Whether the source has the same projection for the alignment loss; exported models have none."""
        return self.source.card.model.alignment == self.model.alignment

    @property
    def _num_classes_there(self) -> int | None:
        return _num_classes(self.source.card.model)

    def __call__(self, model: nn.Module, assign: Assign) -> None:
        """Assign every parameter. Every rank reads all weights, a group of tensors at a time, and keeps its shard only.

        One rank has checked them before: `source.check(weights)`.
        """
        parameters = dict(model.named_parameters())
        shapes = parameter_shapes(self.model)
        if not self._has_projection:
            for name in [name for name in shapes if name.startswith(_PROJECTION)]:
                assign(parameters[name], initial_value(model, name, self.seed))
                del shapes[name]
        if self._num_classes_there is not None:
            shapes[_CLASS_EMBEDDING] = torch.Size([self._num_classes_there + 1, *shapes[_CLASS_EMBEDDING][1:]])
        for name, value in self.source.stream(self.weights, shapes):
            assign(parameters[name], self._by_class(model, value) if name == _CLASS_EMBEDDING else value)

    def _by_class(self, model: nn.Module, there: Tensor) -> Tensor:
        """Return the new class embedding, with the rows of the source's that belong to the same classes."""
        embedding = initial_value(model, _CLASS_EMBEDDING, self.seed)
        known = [(number, row) for number, row in enumerate(self._class_rows) if row is not None]
        here, rows = zip(*known, strict=True)
        embedding[list(here)] = there[list(rows)]
        return embedding


def _num_classes(model: ImageModelConfig | VideoModelConfig) -> int | None:
    return model.num_classes if isinstance(model, ImageModelConfig) else None


def _distinct(names: Sequence[str]) -> list[tuple[str, int]]:
    """Number the classes of one name: ImageNet has two cranes."""
    counts = Counter[str]()
    found = []
    for name in names:
        found.append((name, counts[name]))
        counts[name] += 1
    return found


def fine_tuning(
    config: InitFromConfig, model: ImageModelConfig | VideoModelConfig, class_names: tuple[str, ...], seed: int
) -> FineTuning:
    """Return initial weights for a network from those of a trained one.

    Latents may have another height, width and number of frames, since positions are computed, and clips another mask:
    no weight belongs to those. Classes that the trained network does not know begin with rows that are drawn. Either
    may have a projection for the alignment loss: it is taken where both have the same, else it is drawn or left out.

    Args:
        config: The trained network.
        model: The new one.
        class_names: Names of the new run's classes; () where they are not known.
        seed: Seed of the values that are drawn instead.

    Raises:
        InputError: The networks differ in anything else; all differences are listed.
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
    return FineTuning(source, source.resolve(config.weights), model, class_names, seed)


# Choices of the trunk that no shape tells, or that change it.
_CHOICES = ("norm", "gates", "ffn", "ffn_expansion", "positions", "time_embedding")


def _architecture(model: ImageModelConfig | VideoModelConfig) -> dict[str, object]:
    """Fields that decide the shape and meaning of every tensor, except the number of classes."""
    fields: dict[str, object] = {
        "kind": model.kind,
        "latent_shape[0]": model.latent_shape[0],
        "dim": model.dim,
        "depth": model.depth,
        "patch_size": model.patch_size,
        **{key: getattr(model, key) for key in _CHOICES},
        "patch_embedding.bottleneck": model.patch_embedding.bottleneck,
        "in_context": None if model.in_context is None else model.in_context.model_dump(),
        "mixer": _one_or_all([mixer.kind for mixer in model.mixers]),
    }
    if model.text_dim is not None:
        fields["text_dim"] = model.text_dim
    if isinstance(model, VideoModelConfig):
        fields["patch_frames"] = model.patch_frames
    elif model.text_dim is not None:
        fields |= {"text": model.text, "text_start": model.text_start}
    of_pom = [mixer for mixer in model.mixers if isinstance(mixer, PomMixer)]
    for key in ("degree", "expand", "form", "heads", "groups", "rope") if of_pom else ():
        name = key if key in ("degree", "expand") else f"mixer.{key}"
        fields[name] = _one_or_all([getattr(mixer, key) for mixer in of_pom])
    of_attention = [mixer for mixer in model.mixers if isinstance(mixer, AttentionMixer)]
    for key in ("heads", "qk_norm", "rope") if of_attention else ():
        name = "num_heads" if key == "heads" else f"mixer.{key} of attention"
        fields[name] = _one_or_all([getattr(mixer, key) for mixer in of_attention])
    return fields


def _one_or_all(values: list[Any]) -> Any:
    """Return the value that all blocks have, or else the values of all."""
    return values[0] if values.count(values[0]) == len(values) else values


def seeded(recipe: TrainRecipe) -> InitWeights:
    """Initial weights drawn by the recipe's seed."""
    return lambda model, assign: init_weights(model, recipe.seed, assign)


def fine_tuned(recipe: TrainRecipe, card: ModelCard, world: World) -> FineTuning:
    """Initial weights from `init_from` of the recipe, checked by rank 0. card: of the new run. A collective.

    Raises InputError if the networks or their text encoders differ, or if the weights are damaged.
    """
    assert recipe.init_from is not None
    initial = fine_tuning(recipe.init_from, recipe.model, card.class_names, recipe.seed)
    texts_then = initial.source.card.text
    if texts_then is not None and texts_then.joint_identity != card.texts.joint_identity:
        paths = " and ".join(encoder.config.path for encoder in texts_then.encoders)
        raise InputError(
            f"init_from: the network in {recipe.init_from.path} was trained on texts of another text encoder, that of "
            f"{paths}; encode the captions with it, e.g. into a companion set (data.text)"
        )
    world.on_main(lambda: initial.source.check(initial.weights))  # once, and not every byte on every rank
    return initial
