"""What a dataset looks like."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.derive.derived import open_index
from data_pipelines.shards.records import TarRecord, read_records, stored_array, text_length
from pomscale.base.errors import InputError
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.codecs import Codec
from pomscale.media.sheets import save_grid
from pomscale.shards.schema import ARRAY_MEMBERS, CAPTION_MEMBER, Manifest, read_manifest

# Subindex of Stream.DATASET; 1 is the encoder's item order.
_SHOWN = 2

_NUM_FRAMES = 8
_DECODED_AT_ONCE = 8
_GAP = 4
_FONT_SIZE = 14
_CAPTION_LINES = 2
_MAX_CAPTION = 200  # characters, where captions are printed


def show(folder: str | Path, codec: Codec | None, num_samples: int, path: Path, seed: int = 0) -> str:
    """Draws `num_samples` records without repetition and writes a PNG to `path`: pictures as a grid, clips as rows.

    Returns a text for people. A set of text alone needs no codec and writes nothing: its captions are the text.
    InputError if `codec` is not the one that made the latents.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    index = open_index(folder, manifest)
    count = min(num_samples, len(index))
    chosen = keyed_generator(seed, Stream.DATASET, 0, _SHOWN).choice(len(index), count, replace=False)
    # By class, then as they lie.
    rows = index[np.sort(chosen)]
    rows = rows[np.argsort(rows["label"], kind="stable")]
    records = list(read_records(folder, manifest, rows))
    if manifest.codec is None:
        return "\n".join(_caption_line(manifest, record) for record in records)
    if codec is None or codec.identity() != manifest.codec.identity:
        name = codec.name if codec else "none"
        raise InputError(f"dataset {folder}: this codec ({name}) is not the one that made the latents")
    groups = [manifest.shards[number].group for number in rows["shard"]]
    media = _decode(manifest, codec, records, groups)
    if manifest.modality == "video":
        _save_sheet(media, [_caption(record) for record in records], path)
        return f"{path}: {count} clips, {_NUM_FRAMES} frames of each"
    save_grid(_padded(media), path, num_columns=math.ceil(math.sqrt(count)))
    return f"{path}: {count} samples{_class_counts(manifest, rows['label'])}"


def _class_counts(manifest: Manifest, labels: np.ndarray) -> str:
    if not manifest.num_classes:
        return ""
    shown = ", ".join(f"{manifest.class_names[label]}: {count}" for label, count in Counter(labels.tolist()).items())
    return f", sorted by class ({shown})"


def _caption(record: TarRecord) -> str:
    """The caption, or the key where there is none."""
    if CAPTION_MEMBER not in record.members:
        return record.key
    return str(record.payload(CAPTION_MEMBER), "utf-8")


def _caption_line(manifest: Manifest, record: TarRecord) -> str:
    assert manifest.text is not None
    num_tokens = text_length(len(record.payload(ARRAY_MEMBERS["text"])), manifest.text.dim)
    return f"{record.key}  {num_tokens:>4} tokens  {textwrap.shorten(_caption(record), _MAX_CAPTION)}"


def _decode(manifest: Manifest, codec: Codec, records: list[TarRecord], groups: list[int]) -> list[np.ndarray]:
    """Pictures (c, h, w) or clips (c, f, h, w) of the records, in [0, 1]; of moments the mean is decoded."""
    channels = manifest.latents.num_channels
    media: list[np.ndarray] = [np.empty(0)] * len(records)
    for group in sorted(set(groups)):
        mine = [i for i, other in enumerate(groups) if other == group]
        for begin in range(0, len(mine), _DECODED_AT_ONCE):
            batch = mine[begin : begin + _DECODED_AT_ONCE]
            arrays = [
                stored_array(manifest, group, "latent", records[i].payload(ARRAY_MEMBERS["latent"])) for i in batch
            ]
            latents = np.stack([array[:channels] for array in arrays]).astype(np.float32)
            with torch.inference_mode():
                decoded = codec.decode(torch.from_numpy(latents).to(codec.device)).cpu().numpy()
            for i, one in zip(batch, decoded, strict=True):
                media[i] = one
    return media


def _padded(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures (c, h, w) of several sizes in the middle of white ones (b, c, H, W) of the largest."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    padded = np.ones((len(pictures), pictures[0].shape[0], height, width), np.float32)
    for place, picture in zip(padded, pictures, strict=True):
        top, left = (height - picture.shape[1]) // 2, (width - picture.shape[2]) // 2
        place[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return padded


def _save_sheet(clips: list[np.ndarray], captions: list[str], path: Path) -> None:
    """One row per clip (3, f, h, w): evenly spaced frames, first and last among them, and the caption below."""
    # Pillow's own font has ASCII only; matplotlib's has the letters of most of Europe.
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", _FONT_SIZE)
    line_height = math.ceil(1.3 * _FONT_SIZE)
    row_heights = [clip.shape[2] + _CAPTION_LINES * line_height + 2 * _GAP for clip in clips]
    width = max(_NUM_FRAMES * (clip.shape[3] + _GAP) + _GAP for clip in clips)
    sheet = Image.new("RGB", (width, sum(row_heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for clip, caption, height in zip(clips, captions, row_heights, strict=True):
        frames = np.linspace(0, clip.shape[1] - 1, min(_NUM_FRAMES, clip.shape[1])).round().astype(int)
        for column, frame in enumerate(frames):
            pixels = np.rint(clip[:, frame].clip(0.0, 1.0) * 255.0).astype(np.uint8).transpose(1, 2, 0)
            sheet.paste(Image.fromarray(pixels), (_GAP + column * (clip.shape[3] + _GAP), top + _GAP))
        for number, line in enumerate(_wrapped(caption, font, width - 2 * _GAP)):
            draw.text((_GAP, top + clip.shape[2] + 1.5 * _GAP + number * line_height), line, "black", font)
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _wrapped(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """As many characters per line as the widest letters leave room for."""
    num_characters = max(8, int(width / font.getlength("n")))
    return textwrap.wrap(caption, num_characters, max_lines=_CAPTION_LINES, placeholder=" ...")
