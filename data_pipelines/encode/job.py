"""A recipe with everything it names: the listed source, the networks on their device, and the datasets it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipelines.encode.dealing import Dealing
from data_pipelines.encode.items import ItemTable
from data_pipelines.shards.parts import PARTS_FOLDER, PartStore, Plan
from data_pipelines.sources.source import Item, Source, SourceChangedError
from pomscale.base.errors import InputError
from pomscale.codecs import Codec, TextEncoder, build_codec, build_text_encoder
from pomscale.config.encode import EncodeRecipe, ImageTransformConfig, TableSourceConfig, TransformConfig
from pomscale.distributed.world import resolve_device
from pomscale.shards.schema import ArrayName

# Items that are looked for, all over the list, to tell whether a source is still in its place.
_NUM_TRIED = 16


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
    """The networks of a recipe, on this process's device, and the arrays that they give a record."""

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
    """The datasets that a recipe makes. InputError where its codec does not take its sizes."""
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


class EncodeJob:
    """What an encode knows before it starts. Items are dealt to fixed parts; a part is a range of places.

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
        self._dealing = Dealing(len(table), recipe.seed, table.shuffled)

    def places(self, part: int) -> range:
        """Places of a part's items in the order in which they are dealt."""
        size = self.recipe.shard_samples
        return range(part * size, min((part + 1) * size, len(self.table)))

    def item(self, place: int) -> Item:
        return self.table[self._dealing.item(place)]

    def plan(self, variant: Variant) -> Plan:
        recipe, elsewhere = self.recipe, {"path", "subfolder"}
        return Plan(
            source=recipe.source.model_dump(mode="json", exclude={"path", "root"}),
            source_fingerprint=self.table.fingerprint,
            num_items=len(self.table),
            shard_samples=recipe.shard_samples,
            seed=recipe.seed,
            codec=None if recipe.codec is None else recipe.codec.model_dump(exclude=elsewhere),
            codec_identity=self.encoders.codec_identity,
            transform=variant.transform,
            text=None if recipe.text is None else recipe.text.model_dump(exclude=elsewhere),
            text_identity=self.encoders.text_identity,
        )

    def missing(self, part: int, only_failed: bool) -> list[int]:
        """Variants (their numbers) that lack a part; with only_failed also those that list failures in it."""
        missing = []
        for number, store in enumerate(self.stores):
            record = store.read(part)
            if record is None or (only_failed and record.failures):
                missing.append(number)
        return missing

    def num_unrecorded(self) -> int:
        """Parts that some variant has no record of, by one look at each folder."""
        return self.num_parts - len(set.intersection(*(store.recorded() for store in self.stores)))


def check_in_place(recipe: EncodeRecipe, source: Source, table: ItemTable) -> None:
    """InputError if the items that were listed are no longer where the recipe says.

    To the encoder an item that is gone is a failure: a source that was moved or unmounted would make failures of them
    all.
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
    """Where the list of a source's items is kept."""
    return Path(recipe.output) / PARTS_FOLDER
