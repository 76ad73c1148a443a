"""Codecs and teachers: how media become latents or features."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, PositiveInt

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


class SdVaeCodecConfig(Section):
    """Stable Diffusion's AutoencoderKL, from a local folder or a hub id."""

    name: Literal["sd_vae"]
    path: str = Field("stabilityai/sd-vae-ft-ema", description="Local folder or hub id for from_pretrained.")
    subfolder: str = Field("", description="Folder inside `path` that holds config.json, e.g. vae; '' = path itself.")
    store: Literal["moments", "sample"] = Field(
        "moments", description="moments = mean and log-variance stacked on channels; sample = one posterior draw."
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Arithmetic of the encoder.")


class CogVideoXVaeCodecConfig(Section):
    """CogVideoX's 3-D causal AutoencoderKL for clips, from a local folder or a hub id."""

    name: Literal["cogvideox_vae"]
    path: str = Field("THUDM/CogVideoX-5b", description="Local folder or hub id for from_pretrained.")
    subfolder: str = Field("vae", description="Folder inside `path` that holds config.json; '' = path itself.")
    store: Literal["moments", "sample"] = Field(
        "sample", description="sample = one posterior draw; moments = mean and log-variance, twice the bytes."
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="Arithmetic of the encoder.")
    tiling: bool = Field(False, description="Encode and decode in overlapping tiles: less memory, not the same bits.")


CodecConfig = Annotated[
    Union[PixelCodecConfig, Uint8CodecConfig, SdVaeCodecConfig, CogVideoXVaeCodecConfig], Field(discriminator="name")
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
