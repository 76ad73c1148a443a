"""Codecs and teachers: how media become latents or features."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field, PositiveInt

from pomscale.config.section import Section


class PixelCodecConfig(Section):
    """Space-to-depth of the pixels themselves: no weights, exact decode."""

    name: Literal["pixel"]
    block: PositiveInt = Field(2, description="Pixels per side folded into channels.")
    channels: Literal[1, 3] = Field(3, description="1 = grey, 3 = RGB.")


class Uint8CodecConfig(Section):
    """Pictures as they are, a byte per value, which networks on raw pixels see in [-1, 1]: no weights, exact decode."""

    name: Literal["uint8"]
    channels: Literal[1, 3] = Field(3, description="1 = grey, 3 = RGB.")
    coding: Literal["raw", "png"] = Field(
        "raw",
        description="Coding in the shards. raw: arrays, which load fastest; png: PNG files, 0.61 to 0.65 of the bytes "
        "of photographs, which the reader threads decode.",
    )


class VaeCodecConfig(Section):
    """An autoencoder of diffusers, of the class that its config.json names, from a local folder or a hub id.

    docs/how-to/encode.md lists the classes, of pictures and of clips.
    """

    name: Literal["vae"]
    path: str = Field(description="Local folder or hub id for from_pretrained, of the autoencoder or a whole pipeline.")
    subfolder: str = Field("", description="Folder inside `path` that holds config.json, e.g. vae; '' = path itself.")
    store: Literal["moments", "sample"] | None = Field(
        None,
        description="moments = mean and log-variance stacked on channels; sample = one posterior draw, half the bytes; "
        "null = moments of pictures, a sample of clips. Latents of a deterministic autoencoder are stored as they are.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Arithmetic of the encoder; decoding is in fp32. Keep fp32 for Wan and Qwen-Image."
    )
    tiling: bool = Field(
        False,
        description="Encode and decode in overlapping tiles, of pixels and, where diffusers has them, of time: less "
        "memory, not the same latents.",
    )


# Codecs of earlier versions, which `vae` replaces: their defaults.
_FORMER_VAES: dict[str, dict[str, Any]] = {
    "sd_vae": {"path": "stabilityai/sd-vae-ft-ema", "store": "moments"},
    "cogvideox_vae": {
        "path": "THUDM/CogVideoX-5b",
        "subfolder": "vae",
        "store": "sample",
        "precision": "bf16",
    },
}


def current_codec(value: Any) -> Any:
    """Return the codec section that a section of an earlier version means; any other value as it is.

    Recipes, manifests, cards and checkpoints of earlier versions name codecs `sd_vae` and `cogvideox_vae`.
    """
    if not isinstance(value, dict) or value.get("name") not in _FORMER_VAES:
        return value
    return {**_FORMER_VAES[value["name"]], **value, "name": "vae"}


CodecConfig = Annotated[
    Annotated[Union[PixelCodecConfig, Uint8CodecConfig, VaeCodecConfig], Field(discriminator="name")],
    BeforeValidator(current_codec),
]


class FeaturesConfig(Section):
    """Features of a frozen teacher, for representation alignment: a set of their own, beside that of the pictures."""

    teacher: str = Field(
        description="dinov2:FOLDER of transformers (patch tokens), torchscript:FILE (a module from uint8 pictures to a "
        "map (b, d, h, w) or tokens (b, n, d)), or digits (the demo's network)."
    )
    grid: tuple[PositiveInt, ...] | None = Field(
        None,
        description="[rows, columns] of the stored features, those of the network's tokens; clips: [frame groups, "
        "rows, columns]. null: the teacher's own.",
    )
    input_size: PositiveInt | None = Field(
        None, description="dinov2: side in pixels that pictures are resized to; null = 224, 16x16 patches of 14."
    )

    @property
    def teacher_name(self) -> str:
        """The teacher without its path."""
        return self.teacher.partition(":")[0]
