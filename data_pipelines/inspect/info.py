"""Describe a dataset as a table for people, from its manifest alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pomscale.shards.schema import FAILURES_NAME, Manifest, read_manifest


def info(folder: str | Path) -> str:
    """Return the manifest as a table for people."""
    manifest = read_manifest(folder)
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    per_sample = num_bytes // max(manifest.num_samples, 1)
    failures = f"{manifest.num_failures:,}" + (f", see {FAILURES_NAME}" if manifest.num_failures else "")
    rows = [
        ("dataset", str(folder)),
        ("samples", _samples(manifest)),
        ("shards", f"{len(manifest.shards):,}, {num_bytes / 1e9:.3f} GB, {per_sample:,} B/sample"),
        ("failures", failures),
        *([("incomplete", f"{manifest.num_incomplete:,} clips end early")] if manifest.num_incomplete else []),
        *_media_rows(manifest),
        *_feature_rows(manifest),
        *_text_rows(manifest),
        ("source", _source(manifest)),
        ("made by", _origin(manifest)),
        ("keys", manifest.keys_sha256[:12]),
        ("written by", f"pomscale {manifest.pomscale_version}, schema version {manifest.schema_version}"),
    ]
    return "\n".join(f"{name:<12}{value}" for name, value in rows)


def _source(manifest: Manifest) -> str:
    source = manifest.source
    filtered = f" ({source.num_filtered:,} more left out by source.where)" if source.num_filtered else ""
    return f"{source.num_items:,} items{filtered}, fingerprint {source.fingerprint[:12]}"


def _samples(manifest: Manifest) -> str:
    kind = {"image": "pictures", "video": "clips", "text": "captions"}[manifest.modality]
    classes = f" in {manifest.num_classes:,} classes" if manifest.num_classes else ""
    captions = ", with captions" if manifest.has_captions and manifest.modality != "text" else ""
    return f"{manifest.num_samples:,} {kind}{classes}{captions}"


def _media_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    if manifest.transform is None or manifest.latent is None or manifest.codec is None:
        return
    transform, latent, codec = manifest.transform, manifest.latent, manifest.codec
    settings = transform.model_dump(include={"fps", "filter", "flip"})
    yield "transform", ", ".join(f"{name} {value}" for name, value in settings.items())
    yield "codec", f"{codec.config.model_dump()}, identity {codec.identity[:12]}"
    if latent.dtype == "uint8":
        flips = "flipped as they are read" if latent.has_flip else "never flipped"
        yield "pixels", f"{latent.dtype}, {latent.coding}, {flips}"
    else:
        kind = "moments" if latent.stores_moments else "samples"
        flips = ", flipped copies" if latent.has_flip else ""
        yield "latents", f"{latent.dtype}, {kind}, unscaled{flips}"
    for number, group in enumerate(manifest.groups):
        shards = [shard for shard in manifest.shards if shard.group == number]
        count = sum(shard.num_samples for shard in shards)
        size = "x".join(map(str, group.target))
        yield f"group {number}", f"{size} pixels -> {group.shape}: {count:,} samples in {len(shards):,} shards"
    yield "mean", _numbers(latent.mean)
    yield "std", _numbers(latent.std)
    yield "scaling", f"(latent - {_constant(codec.shift)}) * {_constant(codec.scaling_factor)}"


def _feature_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    if manifest.features is None or manifest.transform is None:
        return
    info, settings = manifest.features, manifest.transform.model_dump(include={"fps", "filter", "flip"})
    yield "transform", ", ".join(f"{name} {value}" for name, value in settings.items())
    sizes = ", ".join("x".join(map(str, group.target)) for group in manifest.groups)
    grid = "x".join(map(str, info.grid))
    yield "teacher", f"{info.teacher}, identity {info.identity[:12]}"
    flips = ", also of the mirrored pictures" if info.has_flip else ""
    yield "features", f"{sizes} pixels -> {grid} tokens of {info.dim}, {info.dtype}{flips}"


def _text_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for text in () if manifest.text is None else manifest.text.encoders:
        several = f"; up to {text.num_captions} captions of a record, one drawn per sample"
        yield "text", f"{text.config.model_dump()}, identity {text.identity[:12]}"
        yield (
            "embeddings",
            f"(1 to {text.config.stored_length}, {text.dim}) {text.dtype}; empty caption {text.null_length} long"
            + (several if text.num_captions > 1 else ""),
        )
    if manifest.text is not None and manifest.text.beside:
        yield "together", f"(1 to {manifest.text.max_length}, {manifest.text.width}) as a network sees them"


def _origin(manifest: Manifest) -> str:
    recipe = manifest.recipe
    if recipe.get("kind") == "merge":
        return f"merge of {', '.join(one['path'] for one in recipe['of'])}"
    if recipe.get("kind") == "split":
        return f"split of {recipe['of'][0]['path']}, share {recipe['share']:g}, seed {recipe['seed']}"
    source = recipe.get("source", {})
    return f"encode of {source.get('path')} ({source.get('kind')})"


def _constant(value: float | tuple[float, ...]) -> str:
    """One number, or those of the channels."""
    return f"[{_numbers(value)}]" if isinstance(value, tuple) else f"{value:g}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
