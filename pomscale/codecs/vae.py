"""Codec `vae`: an autoencoder of diffusers, of whichever class its folder names."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pomscale.base.errors import InputError
from pomscale.codecs.base import ClipDecoder
from pomscale.codecs.clip_decoders import CogVideoXDecoder, WanDecoder, WholeClipDecoder
from pomscale.codecs.encode_slices import SLICED_ENCODERS
from pomscale.codecs.loading import brief, check_fits, place
from pomscale.codecs.vae_conventions import CONVENTIONS, Conventions, Network
from pomscale.config.codecs import VaeCodecConfig

try:
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
except (ImportError, RuntimeError) as error:  # RuntimeError: diffusers is there, but something that it imports is not
    raise InputError(f"codec.name: a VAE needs the package diffusers: {error}. Run: pip install -e '.[vae]'") from error

# Errors of diffusers for folders that hold no weights, or a config.json with wrong values.
_LOAD_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError)


def open_vae(config: VaeCodecConfig) -> PictureVae | ClipVae:
    """Load the network that `config` names, on the CPU, as a codec of what it takes.

    Raises InputError if there is no network, one of an unknown class, weights that do not fit it, or settings that it
    does not have.
    """
    class_name = _class_name(config)
    conventions = CONVENTIONS[class_name]
    network = _load(config, class_name)
    codec_class = ClipVae if conventions.takes == "clips" else PictureVae
    try:
        return codec_class(config, network, class_name, conventions)
    except _LOAD_ERRORS as error:
        raise _cannot_load(config, class_name, error) from error


class PictureVae:
    """An autoencoder of pictures (b, 3, H, W), and latents (b, c, H / factor, W / factor), without gradients.

    The network encodes in `config.precision`, and decodes in float32. A deterministic one draws nothing.
    """

    name = "vae"
    num_channels_in = 3
    stored_dtype: Literal["float16"] = "float16"

    def __init__(self, config: VaeCodecConfig, network: Network, class_name: str, conventions: Conventions) -> None:
        self.vae = network
        self.class_name = class_name
        self.conventions = conventions
        store = _store(config, class_name, conventions)
        self.config = config.model_copy(update={"store": store})
        self.stores_moments = store == "moments"
        self.needs_noise = store == "sample" and conventions.has_posterior
        self.factor = conventions.factor(network)
        self.num_channels = conventions.channels(network)
        self.shift, self.scaling_factor = conventions.scaling(network)
        self.device = torch.device("cpu")
        self._side = None if conventions.side is None else conventions.side(network)
        self._check_constants()
        self._set_tiles()

    def latent_shape(self, *size: int) -> tuple[int, ...]:
        if len(size) != 2:
            raise InputError(
                f"codec.path: the {self.class_name} in {self.config.path!r} takes pictures, and no clips; set "
                "transform.kind: image, or name an autoencoder of clips"
            )
        height, width = size
        if self._side is not None and (height, width) != (self._side, self._side):
            raise InputError(
                f"codec vae: the {self.class_name} decodes to {self._side}x{self._side} pixels alone, not to "
                f"{height}x{width}; set transform.size: {self._side}"
            )
        if height % self.factor or width % self.factor:
            raise InputError(
                f"codec vae: {height}x{width} pixels are not a multiple of {self.factor}, the downsampling of the "
                f"{self.class_name}; change transform.size, sizes or buckets"
            )
        return self.num_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        shape = self.latent_shape(*images.shape[2:])
        pixels = images.to(self.device, torch.float32)
        pixels = pixels if self.conventions.unit_pixels else 2.0 * pixels - 1.0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            encoded = self._encode(pixels)
        if not self.conventions.has_posterior:
            return self._checked(self._from_network(encoded.float()), shape)
        mean, logvar = (
            self._checked(self._from_network(part.float()), shape) for part in (encoded.mean, encoded.logvar)
        )
        if self.stores_moments:
            return torch.cat([mean, logvar], dim=1)
        assert noise is not None, "store: sample needs the caller's noise"
        return mean + torch.exp(0.5 * logvar) * noise.to(mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        self._check_latents(latents)
        chunks = latents.to(self.device, torch.float32).split(self.conventions.decode_batch)
        return torch.cat([self._decode(chunk) for chunk in chunks])

    def identity(self) -> str:
        keys = [*self.conventions.arithmetic_keys]
        keys += [key for key in self.conventions.keys_if_set if self.vae.config.get(key) is not None]
        architecture = {key: self.vae.config[key] for key in keys}
        label = self.conventions.label or self.class_name
        digest = hashlib.sha256(f"{label} {json.dumps(architecture, sort_keys=True)}".encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        place(self.vae, self.device)
        return self

    def _encode(self, pixels: Tensor) -> Any:
        """Return the network's posterior, or its latents."""
        return self.vae.encode(pixels[:, :, None] if self.conventions.is_of_frames else pixels, return_dict=False)[0]

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents as they are stored, to pixels in [0, 1]."""
        pixels = self.conventions.decode(self.vae, self._to_network(latents))
        pixels = pixels[:, :, 0] if self.conventions.is_of_frames else pixels
        return (pixels if self.conventions.unit_pixels else (pixels + 1.0) / 2.0).clamp(0.0, 1.0)

    def _from_network(self, latents: Tensor) -> Tensor:
        """Return latents of the network as they are stored."""
        latents = latents[:, :, 0] if self.conventions.is_of_frames else latents
        return latents if self.conventions.patch == 1 else pixel_unshuffle(latents, self.conventions.patch)

    def _to_network(self, latents: Tensor) -> Tensor:
        latents = latents if self.conventions.patch == 1 else pixel_shuffle(latents, self.conventions.patch)
        return latents[:, :, None] if self.conventions.is_of_frames else latents

    def _checked(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return `latents`. InputError if they are not of the shape that was promised: their config.json lies."""
        if tuple(latents.shape[1:]) != shape:
            raise InputError(
                f"codec.path: the {self.class_name} in {self.config.path!r} gives latents of shape "
                f"{tuple(latents.shape[1:])}, and by its config.json they are {shape}; get it again, or set "
                "codec.tiling=false"
            )
        return latents

    def _check_latents(self, latents: Tensor) -> None:
        """Raise InputError for latents that the network does not decode."""
        self._check_num_latent_axes(latents)
        if latents.shape[1] != self.num_channels:
            raise InputError(
                f"codec vae: the {self.class_name} decodes latents of {self.num_channels} channels, and these have "
                f"{latents.shape[1]}; give the codec that made them"
            )
        if self._side is not None and tuple(latents.shape[2:]) != (self._side // self.factor,) * 2:
            raise InputError(
                f"codec vae: the {self.class_name} decodes {self._side // self.factor} rows and columns of latents, "
                f"and these have the shape {tuple(latents.shape)}"
            )

    def _check_num_latent_axes(self, latents: Tensor) -> None:
        if latents.ndim != 4:
            raise InputError(
                f"codec vae: the {self.class_name} decodes pictures (b, c, h, w), and these latents have the shape "
                f"{tuple(latents.shape)}; give the codec that made them"
            )

    def _check_constants(self) -> None:
        """Raise ValueError for a network of other pictures, or constants that are no scaling of its latents."""
        if self.conventions.pixel_channels(self.vae) != self.num_channels_in:
            raise ValueError("the network takes pictures of other than 3 channels")
        for name, value in (("shift", self.shift), ("scaling factor", self.scaling_factor)):
            values = value if isinstance(value, tuple) else (value,) * self.num_channels
            if len(values) != self.num_channels:
                raise ValueError(f"the {name} has {len(values)} values for {self.num_channels} channels")
            if not all(math.isfinite(number) and (name == "shift" or number > 0) for number in values):
                raise ValueError(f"the {name} is {value}; it must be finite, and a factor positive")

    def _set_tiles(self) -> None:
        """Switch tiles of pixels and of time to what the recipe says; diffusers switches some on by itself."""
        tiling = self.config.tiling
        for name in ("use_framewise_encoding", "use_framewise_decoding"):
            if hasattr(self.vae, name):
                setattr(self.vae, name, tiling and getattr(self.vae, name))
        if not tiling:
            return
        if not self.conventions.tiles:
            raise InputError(f"codec.tiling: an {self.class_name} has no tiles that meet; set codec.tiling=false")
        self.vae.enable_tiling()
        _check_tiles(self.vae, self.factor // self.conventions.patch, self.config.path)


class ClipVae(PictureVae):
    """An autoencoder of clips (b, 3, f, H, W), and latents (b, c, f', H / factor, W / factor).

    Pictures (b, 3, H, W) go through it as clips of one frame, to latents (b, c, H / factor, W / factor). A clip is
    encoded by itself, with no past, so its latent depends neither on the batch it is in nor on earlier calls.
    """

    def __init__(self, config: VaeCodecConfig, network: Network, class_name: str, conventions: Conventions) -> None:
        super().__init__(config, network, class_name, conventions)
        assert conventions.frames is not None
        self.frames = conventions.frames(network)
        # Activations of one clip at a time: those of a batch would not fit.
        self.vae.enable_slicing()

    @property
    def latent_batch(self) -> int:
        return 1 if self.frames.batch is None else self.frames.batch // self.frames.compression

    @property
    def continues(self) -> bool:
        return self.class_name == "AutoencoderKLCogVideoX" or self._decodes_by_frame

    def latent_shape(self, *size: int) -> tuple[int, ...]:
        if len(size) == 2:
            channels, _, height, width = self.latent_shape(1, *size)
            return channels, height, width
        frames, height, width = size
        fitting = (self.frames.fitting(frames), _multiples(height, self.factor), _multiples(width, self.factor))
        if fitting != ([frames], [height], [width]):
            nearest = " x ".join(" or ".join(map(str, numbers)) for numbers in fitting)
            raise InputError(
                f"codec vae: clips of {frames} x {height} x {width} (frames, height, width) do not fit the "
                f"{self.class_name}; it takes {self.frames} and multiples of {self.factor} pixels, the nearest are "
                f"{nearest}; change transform.buckets"
            )
        return self.num_channels, self.frames.latent_frames(frames), height // self.factor, width // self.factor

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        if images.ndim == 5:
            return super().encode(images, noise)
        return super().encode(images[:, :, None], None if noise is None else noise[:, :, None])[:, :, 0]

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents) if latents.ndim == 5 else super().decode(latents[:, :, None])[:, :, 0]

    def num_pixel_frames(self, latent_frames: int) -> int:
        return self.frames.pixel_frames(latent_frames)

    def decoder(self, latent_frames: int) -> ClipDecoder:
        if self.class_name == "AutoencoderKLCogVideoX":
            return CogVideoXDecoder(self.vae, latent_frames)
        if self._decodes_by_frame:
            return WanDecoder(self.vae)
        return WholeClipDecoder(self.decode, latent_frames, self.factor, self.class_name)

    def _encode(self, pixels: Tensor) -> Any:
        if self.config.tiling or self.class_name not in SLICED_ENCODERS:
            return super()._encode(pixels)
        encode = SLICED_ENCODERS[self.class_name]
        return DiagonalGaussianDistribution(torch.cat([encode(self.vae, clip) for clip in pixels.split(1)]))

    def _decode(self, latents: Tensor) -> Tensor:
        # As in chunks, for the same bits: a convolution of other lengths rounds otherwise.
        return WanDecoder(self.vae).decode(latents) if self._decodes_by_frame else super()._decode(latents)

    @property
    def _decodes_by_frame(self) -> bool:
        """Whether diffusers decodes one latent frame after the other, with what the convolutions have seen before."""
        return self.class_name == "AutoencoderKLWan" and not self.config.tiling

    def _check_num_latent_axes(self, latents: Tensor) -> None:
        if latents.ndim != 5 or not latents.shape[2]:
            raise InputError(
                f"codec vae: the {self.class_name} decodes clips (b, c, f, h, w), and these latents have the shape "
                f"{tuple(latents.shape)}; give the codec that made them"
            )


def _store(config: VaeCodecConfig, class_name: str, conventions: Conventions) -> Literal["moments", "sample"]:
    if conventions.has_posterior:
        return config.store or ("moments" if conventions.takes == "pictures" else "sample")
    if config.store == "moments":
        raise InputError(
            f"codec.store: an {class_name} is deterministic, its latents have no moments; set codec.store=null"
        )
    return "sample"


def _class_name(config: VaeCodecConfig) -> str:
    """Return the class that config.json names. InputError if there is none, or one that no record is of."""
    try:
        found = diffusers.AutoencoderKL.load_config(config.path, subfolder=config.subfolder or None)
    except _LOAD_ERRORS as error:
        raise _cannot_load(config, "autoencoder", error) from error
    name = found.get("_class_name")
    if name not in CONVENTIONS:
        held = f"an {name}, which this codec does not know" if name else "a config.json without _class_name"
        raise InputError(
            f"codec.path: {_folder(config)!r} holds {held}; it knows {', '.join(CONVENTIONS)}. Give another folder, or "
            "set codec.subfolder"
        )
    return str(name)


def _load(config: VaeCodecConfig, class_name: str) -> Network:
    """Load the network in float32, for inference only."""
    try:
        vae, loading = getattr(diffusers, class_name).from_pretrained(
            config.path,
            subfolder=config.subfolder or None,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # the other way needs a package more, accelerate
            output_loading_info=True,
        )
    except _LOAD_ERRORS as error:
        raise _cannot_load(config, class_name, error) from error
    # diffusers only warns of these, and gives missing tensors random values.
    check_fits("codec.path", _folder(config), loading)
    return vae.eval().requires_grad_(False)


def _folder(config: VaeCodecConfig) -> str:
    return f"{config.path}/{config.subfolder}" if config.subfolder else config.path


def _cannot_load(config: VaeCodecConfig, what: str, error: Exception) -> InputError:
    return InputError(
        f"codec.path: cannot load an {what} from {_folder(config)!r}: {brief(error)}. Give a folder with config.json "
        "and weights, or a hub id that this machine can reach; in a whole pipeline, set codec.subfolder"
    )


def _check_tiles(vae: Network, factor: int, path: str) -> None:
    """Raise InputError where diffusers would round the positions of tiles differently in pixels and latents."""
    for side in ("height", "width", "size"):
        pixels = getattr(vae, f"tile_sample_min_{side}", None)
        if pixels is None:
            continue
        stride = getattr(vae, f"tile_sample_stride_{side}", None)
        if stride is not None:
            meets = pixels % factor == stride % factor == 0
        else:
            latents = getattr(vae, f"tile_latent_min_{side}")
            overlap = getattr(vae, f"tile_overlap_factor_{side}", None) or vae.tile_overlap_factor
            strides = [int(pixels * (1 - overlap)), int(latents * (1 - overlap)) * factor]
            kept = [pixels - int(pixels * overlap), (latents - int(latents * overlap)) * factor]
            meets = len({*strides, *kept}) == 1
        if not meets:
            raise InputError(
                f"codec.tiling: tiles of {side} {pixels}, from sample_{side} in the config.json of {path!r}, do not "
                "meet; set codec.tiling=false"
            )


def _multiples(pixels: int, factor: int) -> list[int]:
    """Return `pixels` if it is a multiple of `factor`, else the nearest below, unless that is 0, and above."""
    extra = pixels % factor
    return [pixels] if extra == 0 else [side for side in (pixels - extra, pixels - extra + factor) if side]
