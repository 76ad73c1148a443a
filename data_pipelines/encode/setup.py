"""The setup of an encode: the listed source, the networks on their device, the outputs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.encode.items import ItemTable
from data_pipelines.encode.latents_source import build_encode_source
from data_pipelines.shards.parts import PARTS_FOLDER, SOURCE_LOCATION, EncodeSpec, PartStore, unlisted
from pomscale.base.errors import InputError
from pomscale.codecs import Codec, build_codec, build_text_encoder
from pomscale.codecs.base import SingleTextEncoder
from pomscale.codecs.extractors import FeatureEncoder, build_feature_encoder
from pomscale.config.codecs import Uint8CodecConfig
from pomscale.config.encode import (
    EncodeRecipe,
    ImageTransformConfig,
    TableSourceConfig,
    TransformConfig,
    text_version,
    transform_version,
)
from pomscale.distributed.world import resolve_device
from pomscale.shards.pictures import Coding
from pomscale.shards.schema import ArrayName, text_arrays
from pomscale.sources.protocol import Item, Source, SourceChangedError

# Number of listed items, spread over the list, that are looked for to tell whether a source is still where it was.
_NUM_TRIED = 16


@dataclass(frozen=True)
class Variant:
    """One dataset that an encode writes; a transform with several `sizes` has several.

    Group g of its shards has media of targets[g] and latents of latent_shapes[g], () where there are none; text alone
    has one group, ().
    """

    output: Path
    transform: TransformConfig | None
    targets: tuple[tuple[int, ...], ...]
    latent_shapes: tuple[tuple[int, ...], ...]


class Encoders:
    """The networks of a recipe, on this process's device, and the names of the arrays that they give every record."""

    def __init__(self, recipe: EncodeRecipe) -> None:
        device = resolve_device(recipe.device)
        self.codec: Codec | None = None if recipe.codec is None else build_codec(recipe.codec).to(device)
        self.texts: tuple[SingleTextEncoder, ...] = (
            tuple(build_text_encoder(*recipe.texts).to(device).parts) if recipe.texts else ()
        )
        """The text encoders; a record has an array of each for every caption."""
        self.has_flip = recipe.transform is not None and recipe.transform.flip
        stores_flip = self.has_flip and self.codec is not None and self.codec.stored_dtype != "uint8"
        names: list[ArrayName] = ["latent"] if self.codec is not None else []
        names += ["flip"] if stores_flip else []
        self.features = _feature_encoder(recipe, device)
        if self.features is not None:
            names += ["features", "features_flip"] if self.has_flip else ["features"]
        self.arrays = tuple(names)
        # Hashes of the weights: seconds for the largest.
        self.codec_identity = None if self.codec is None else self.codec.identity()
        self.null_embeddings = [_null_embedding(encoder) for encoder in self.texts]
        """Embeddings (n, dim) of an empty caption, float32."""
        self.text_identities = [encoder.identity() for encoder in self.texts]
        self.features_identity = None if self.features is None else self.features.identity()

    @property
    def num_channels_in(self) -> int:
        """Channels of the pictures that are decoded; 0 where none are."""
        if self.codec is not None:
            return self.codec.num_channels_in
        return 0 if self.features is None else self.features.teacher.num_channels


def _null_embedding(encoder: SingleTextEncoder) -> np.ndarray:
    """Return the embedding of an empty caption. Raises InputError if it cannot be stored: then none could."""
    (embedding,) = encoder.encode([""])
    largest = float(np.abs(embedding).max())
    if not largest <= np.finfo(np.float16).max:
        raise InputError(
            f"text: the hidden states of {encoder.config.path} reach {largest:g} with an empty caption, and embeddings "
            f"are stored as float16, which ends at 65,504; choose other layers (text.layers), or text.final_norm=true"
        )
    return embedding


def _feature_encoder(recipe: EncodeRecipe, device: torch.device) -> FeatureEncoder | None:
    if recipe.features is None:
        return None
    _, transform = _outputs(recipe)[0]
    assert transform is not None
    height, width = transform.targets[0][-2:]
    return build_feature_encoder(recipe.features, (height, width), device)


def variants_of(recipe: EncodeRecipe, encoders: Encoders) -> tuple[Variant, ...]:
    """Return the datasets that a recipe makes. Raises InputError where its codec does not take its sizes."""
    return tuple(_variant(output, transform, encoders) for output, transform in _outputs(recipe))


def _variant(output: Path, transform: TransformConfig | None, encoders: Encoders) -> Variant:
    if transform is None:
        return Variant(output, None, ((),), ((),))
    targets, codec = tuple(transform.targets), encoders.codec
    if encoders.features is not None:
        encoders.features.grid(*targets[0])  # raises where the teacher does not take the size
    shapes = tuple(() if codec is None else codec.latent_shape(*target) for target in targets)
    return Variant(output, transform, targets, shapes)


def _outputs(recipe: EncodeRecipe) -> list[tuple[Path, TransformConfig | None]]:
    output, transform = Path(recipe.output), recipe.transform
    if isinstance(transform, ImageTransformConfig) and transform.sizes:
        return [
            (output / str(size), ImageTransformConfig(size=size, filter=transform.filter, flip=transform.flip))
            for size in transform.sizes
        ]
    return [(output, transform)]


class EncodeSetup:
    """Everything that an encode knows before it starts. Items are dealt to fixed parts; a part is a range of positions.

    Sources are sorted by class or by upload. Dealt in a keyed random order, every shard holds a fair draw, and so does
    the loader's shuffle window, which spans only a few shards.
    """

    def __init__(self, recipe: EncodeRecipe, source: Source, table: ItemTable, encoders: Encoders) -> None:
        self.recipe = recipe
        self.source = source
        self.table = table
        self.encoders = encoders
        self.variants = variants_of(recipe, encoders)
        self.num_captions = table.num_captions if encoders.texts and recipe.captions == "random" else 1
        """Largest number of embeddings of a record."""
        self.texts = [text_arrays(number)[: self.num_captions] for number in range(len(encoders.texts))]
        """Names of the text arrays of each encoder, by caption."""
        self.arrays = (*encoders.arrays, *itertools.chain(*self.texts))
        self.coding: Coding = recipe.codec.coding if isinstance(recipe.codec, Uint8CodecConfig) else "raw"
        self.stores = tuple(PartStore(v.output, self.arrays, len(v.targets)) for v in self.variants)
        self.num_parts = -(-len(table) // recipe.shard_samples)
        self._order = table.order(recipe.seed)

    def positions(self, part: int) -> range:
        """Return the positions of a part's items in the order in which they are dealt."""
        size = self.recipe.shard_samples
        return range(part * size, min((part + 1) * size, len(self.table)))

    def item(self, position: int) -> Item:
        """Return the item at a position of the order."""
        return self.table[self._order.item(position)]

    def spec(self, variant: Variant) -> EncodeSpec:
        """Return the specification of a variant's bytes."""
        recipe, location = self.recipe, {"path", "subfolder"}
        return EncodeSpec(
            source=recipe.source.model_dump(mode="json", exclude=SOURCE_LOCATION),
            source_fingerprint=self.table.fingerprint,
            num_items=len(self.table),
            shard_samples=recipe.shard_samples,
            seed=recipe.seed,
            codec=None if self.encoders.codec is None else self.encoders.codec.config.model_dump(exclude=location),
            codec_identity=self.encoders.codec_identity,
            transform=variant.transform,
            transform_version=transform_version(variant.transform),
            text=unlisted([one.config.model_dump(mode="json", exclude=location) for one in self.encoders.texts]),
            text_version=text_version(recipe.texts),
            text_identity=unlisted(self.encoders.text_identities),
            captions=recipe.captions,
            features=self._features_spec(variant),
            features_identity=self.encoders.features_identity,
        )

    def _features_spec(self, variant: Variant) -> dict[str, Any] | None:
        """Return what a variant's features are besides the teacher's identity; None if there are none."""
        config, encoder = self.recipe.features, self.encoders.features
        if config is None or encoder is None:
            return None
        return {"teacher": config.teacher_name, "grid": list(encoder.grid(*variant.targets[0]))}

    def missing(self, part: int, only_failed: bool) -> list[int]:
        """Return the numbers of the variants that lack a part, or, with only_failed, list failures in it."""
        missing = []
        for number, store in enumerate(self.stores):
            record = store.read(part)
            if record is None or (only_failed and record.failures):
                missing.append(number)
        return missing

    def num_unrecorded(self) -> int:
        """Return how many parts some variant has no record of, by one listing of each folder."""
        return self.num_parts - len(set.intersection(*(store.recorded() for store in self.stores)))


def find_source(recipe: EncodeRecipe, rescan: bool = False) -> Source:
    """Return the source; InputError if it will be listed and is not there.

    Call it before `Encoders` are made: they may try for half a minute to fetch a network, or read many gigabytes.
    """
    source = build_encode_source(recipe.source)
    if rescan or ItemTable.open(table_folder(recipe)) is None:
        source.check_exists()
    return source


def check_items_in_place(recipe: EncodeRecipe, source: Source, table: ItemTable) -> None:
    """Raise InputError if the items that were listed are no longer at the path that the recipe names.

    To the encoder an item that is gone is a failure, so without this check a source that was moved or unmounted would
    turn all items into failures.
    """
    if not recipe.opens_media:  # captions are in the list; no item is opened
        return
    tried = 0
    for number in range(0, len(table), max(1, len(table) // _NUM_TRIED)):
        item = table[number]
        if item.problem is not None:
            continue
        tried += 1
        try:
            source.open(item).close()
        except (FileNotFoundError, SourceChangedError):
            continue
        return
    if tried:
        key = "root" if isinstance(recipe.source, TableSourceConfig) and recipe.source.root else "path"
        raise InputError(
            f"source: none of {tried} listed items that were looked for is in {getattr(recipe.source, key)} as it was; "
            f"if they have moved, say where they are: source.{key}=..."
        )


def table_folder(recipe: EncodeRecipe) -> Path:
    """Return the folder of the list of a source's items."""
    return Path(recipe.output) / PARTS_FOLDER
