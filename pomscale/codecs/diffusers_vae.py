"""Base class of the codecs on diffusers' KL autoencoders: loading, moments or a sample, decode, identity."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.codecs.loading import brief, check_fits, place
from pomscale.config.codecs import CogVideoXVaeCodecConfig, SdVaeCodecConfig

try:
    from diffusers import AutoencoderKL, AutoencoderKLCogVideoX
except (ImportError, RuntimeError) as error:  # RuntimeError: diffusers is there, but something that it imports is not
    raise InputError(f"codec.name: a VAE needs the package diffusers: {error}. Run: pip install -e '.[vae]'") from error

# Errors of diffusers for folders that hold no weights, or a config.json with wrong values.
_LOAD_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)

# Remedies by the class that a config.json names.
_OTHER_CODECS = {
    "AutoencoderKL": "set codec.name=sd_vae",
    "AutoencoderKLCogVideoX": "set codec.name=cogvideox_vae",
}

# The keys of config.json that change the arithmetic. Listed, since every version of diffusers adds keys of its own.
_ARITHMETIC_KEYS = (
    "act_fn",
    "block_out_channels",
    "down_block_types",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "norm_num_groups",
    "out_channels",
    "scaling_factor",
    "shift_factor",
    "up_block_types",
    "use_post_quant_conv",
    "use_quant_conv",
)


class DiffusersVae(ABC):
    """An autoencoder in evaluation mode, without gradients. Encodes in `config.precision`, decodes in float32."""

    name: ClassVar[str]
    num_channels_in = 3
    stored_dtype: ClassVar[Literal["float16"]] = "float16"

    # Further keys of this kind that only this network has.
    own_arithmetic_keys: ClassVar[tuple[str, ...]]

    # Pictures or clips decoded at once: decoding takes many times the memory of its result.
    decode_batch: ClassVar[int]

    def __init__(
        self,
        config: SdVaeCodecConfig | CogVideoXVaeCodecConfig,
        vae_class: type[AutoencoderKL] | type[AutoencoderKLCogVideoX],
    ) -> None:
        """Load the network. Raises InputError if `config.path` holds no such network, or weights that do not fit it."""
        self.vae = _load(config.path, config.subfolder, vae_class)
        self.scaling_factor = float(self.vae.config.scaling_factor)
        self.shift = float(self.vae.config.shift_factor or 0.0)
        self.stores_moments = config.store == "moments"
        self.needs_noise = config.store == "sample"
        self.device = torch.device("cpu")
        self._autocast = config.precision == "bf16"

    @abstractmethod
    def latent_shape(self, *size: int) -> tuple[int, ...]:
        """Return the shape of a latent, see `Codec.latent_shape`."""

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        self.latent_shape(*images.shape[2:])
        pixels = 2.0 * images.to(self.device, torch.float32) - 1.0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            posterior = self.vae.encode(pixels).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        if self.stores_moments:
            return torch.cat([mean, logvar], dim=1)
        assert noise is not None, "store: sample needs the caller's noise"
        return mean + torch.exp(0.5 * logvar) * noise.to(mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        chunks = latents.to(self.device, torch.float32).split(self.decode_batch)
        images = torch.cat([self.vae.decode(chunk).sample for chunk in chunks])
        return ((images + 1.0) / 2.0).clamp(0.0, 1.0)

    def identity(self) -> str:
        architecture = {key: self.vae.config[key] for key in (*_ARITHMETIC_KEYS, *self.own_arithmetic_keys)}
        digest = hashlib.sha256(f"{self.name} {json.dumps(architecture, sort_keys=True)}".encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        place(self.vae, self.device)
        return self


def _load(path: str, subfolder: str, vae_class: Any) -> Any:
    """Load the network in float32, for inference only."""
    folder = f"{path}/{subfolder}" if subfolder else path
    try:
        found = vae_class.load_config(path, subfolder=subfolder or None).get("_class_name", vae_class.__name__)
        if found != vae_class.__name__:
            raise InputError(
                f"codec.path: {folder!r} holds an {found}, and this codec needs an {vae_class.__name__}; "
                f"{_OTHER_CODECS.get(found, 'give another folder, or set codec.subfolder')}"
            )
        vae, loading = vae_class.from_pretrained(
            path,
            subfolder=subfolder or None,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # the other way needs a package more, accelerate
            output_loading_info=True,
        )
        float(vae.config.scaling_factor)
    except _LOAD_ERRORS as error:
        raise InputError(
            f"codec.path: cannot load an {vae_class.__name__} from {folder!r}: {brief(error)}. "
            f"Give a folder with config.json and weights, or a hub id that this machine can reach"
        ) from error
    # diffusers only warns of these, and gives missing tensors random values.
    check_fits("codec.path", folder, loading)
    return vae.eval().requires_grad_(False)
