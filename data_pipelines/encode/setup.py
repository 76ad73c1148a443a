"""The setup of an encode: the listed source, the networks on their device, the outputs, the order of the items."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.encode.items import ItemTable
from data_pipelines.shards.parts import PARTS_FOLDER, EncodeSpec, PartStore
from data_pipelines.sources.protocol import Item, Source, SourceChangedError
from pomscale.base.errors import InputError
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.codecs import Codec, TextEncoder, build_codec, build_text_encoder
from pomscale.config.schema import EncodeRecipe, ImageTransformConfig, TableSourceConfig, TransformConfig
from pomscale.distributed.world import resolve_device
from pomscale.shards.schema import ArrayName

# Number of listed items, spread over the list, that are looked for to tell whether a source is still where it was.
_NUM_TRIED = 16

# Subindex of Stream.DATASET; `show` uses 2.
_ITEM_ORDER = 1

_NUM_ROUNDS = 8
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Variant:
    """One dataset that an encode writes; a transform with several `sizes` has several.

    Group g of its shards has media of targets[g] and latents of latent_shapes[g]; text alone has one group, ().
    """

    output: Path
    transform: TransformConfig | None
    targets: tuple[tuple[int, ...], ...]
    latent_shapes: tuple[tuple[int, ...], ...]


class Encoders:
    """The networks of a recipe, on this process's device, and the names of the arrays that they give a record."""

    def __init__(self, recipe: EncodeRecipe) -> None:
        device = resolve_device(recipe.device)
        self.codec: Codec | None = None if recipe.codec is None else build_codec(recipe.codec).to(device)
        self.text: TextEncoder | None = None if recipe.text is None else build_text_encoder(recipe.text).to(device)
        flip = recipe.transform is not None and recipe.transform.flip
        names: list[ArrayName] = ["latent"] if self.codec is not None else []
        names += ["flip"] if flip else []
        names += ["text"] if self.text is not None else []
        self.arrays = tuple(names)
        # Hashes of the weights: seconds for the largest.
        self.codec_identity = None if self.codec is None else self.codec.identity()
        self.text_identity = None if self.text is None else self.text.identity()


def variants_of(recipe: EncodeRecipe, encoders: Encoders) -> tuple[Variant, ...]:
    """Return the datasets that a recipe makes. Raises InputError where its codec does not take its sizes."""
    return tuple(_variant(output, transform, encoders.codec) for output, transform in _outputs(recipe))


def _variant(output: Path, transform: TransformConfig | None, codec: Codec | None) -> Variant:
    if codec is None or transform is None:
        return Variant(output, None, ((),), ((),))
    targets = tuple(transform.targets)
    return Variant(output, transform, targets, tuple(codec.latent_shape(*target) for target in targets))


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
        self.stores = tuple(PartStore(v.output, encoders.arrays, len(v.targets)) for v in self.variants)
        self.num_parts = -(-len(table) // recipe.shard_samples)
        self._order = ItemOrder(len(table), recipe.seed, table.shuffled)

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
            source=recipe.source.model_dump(mode="json", exclude={"path", "root"}),
            source_fingerprint=self.table.fingerprint,
            num_items=len(self.table),
            shard_samples=recipe.shard_samples,
            seed=recipe.seed,
            codec=None if recipe.codec is None else recipe.codec.model_dump(exclude=location),
            codec_identity=self.encoders.codec_identity,
            transform=variant.transform,
            text=None if recipe.text is None else recipe.text.model_dump(exclude=location),
            text_identity=self.encoders.text_identity,
        )

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


class ItemOrder:
    """A permutation of range(num_items) that depends on the seed alone; the identity if not `shuffled`.

    Nobody has to store it: memory and time per call do not grow with the number of items. It is a Feistel network over
    pairs (left, right) in Z_a x Z_b with a b just above num_items, and cycle walking for the few numbers beyond it
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5).
    """

    def __init__(self, num_items: int, seed: int, shuffled: bool) -> None:
        self._num_items = num_items
        self._shuffled = shuffled
        self._a = math.isqrt(max(num_items - 1, 0)) + 1
        self._b = -(-num_items // self._a)
        generator = keyed_generator(seed, Stream.DATASET, 0, _ITEM_ORDER)
        self._keys = [int(key) for key in generator.integers(0, _MASK, _NUM_ROUNDS, dtype="u8", endpoint=True)]

    def item(self, position: int) -> int:
        """Return the number of the item at a position. IndexError outside range(num_items)."""
        if not 0 <= position < self._num_items:
            raise IndexError(f"position {position} of {self._num_items} items")
        if not self._shuffled:
            return position
        item = self._encipher(position)
        while item >= self._num_items:  # a bijection of the larger domain comes back below num_items in the end
            item = self._encipher(item)
        return item

    def _encipher(self, number: int) -> int:
        """Apply a bijection of range(a b): each half in turn is shifted by a function of the other half only."""
        left, right = divmod(number, self._b)
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = (right + _mix(key, left)) % self._b
            else:
                left = (left + _mix(key, right)) % self._a
        return left * self._b + right


def _mix(key: int, value: int) -> int:
    """Return 64 bits that each depend on every bit of both: the finaliser of SplitMix64 (Steele et al. 2014)."""
    z = (key + value * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def check_items_in_place(recipe: EncodeRecipe, source: Source, table: ItemTable) -> None:
    """Raise InputError if the items that were listed are no longer at the path that the recipe names.

    To the encoder an item that is gone is a failure, so without this check a source that was moved or unmounted would
    turn all items into failures.
    """
    if recipe.codec is None:  # captions are in the list; no item is opened
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
