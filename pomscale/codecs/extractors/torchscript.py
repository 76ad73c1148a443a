"""Features from a TorchScript file, for FVD's I3D and whatever else there is.

A module is called as the metrics of StyleGAN-V and StyleGAN3 call theirs: with uint8 pictures (b, c, h, w) or clips
(b, c, f, h, w), and with those of the arguments rescale=True, resize=True, return_features=True that its forward has.
It returns (b, d). One that wants values in [0, 1] or [-1, 1], or another size, is wrapped once and saved:

    class FromBytes(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x.float() / 127.5 - 1)

    torch.jit.script(FromBytes(torch.jit.load("network.pt"))).save("from_bytes.pt")

What it takes is found out by trial, pictures before clips, colour before grey. A teacher's module is called alike and
returns a map (b, d, h, w), or tokens (b, n, d) in the order of rows and columns, without others such as a class token.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.codecs.extractors.base import FeatureName, check_media, inference
from pomscale.codecs.extractors.teachers import grid_of_tokens
from pomscale.codecs.loading import brief

_ARGUMENTS = ("rescale", "resize", "return_features")
_VERSION = "torchscript 1"
_FAILURES = (RuntimeError, torch.jit.Error)  # of operators, and of `raise` in the module: neither includes the other
# Shapes without the batch, cheap ones first; those of 224 and 299 are for modules of one size.
_TRIALS = [
    (channels, *frames, size, size)
    for frames in ((), (16,))
    for channels in (3, 1)
    for size in (64, 224, *(() if frames else (299, 32, 28)))
]


class _Module:
    """A module of another's making that is called with uint8."""

    name = "torchscript"

    def __init__(self, file: Path) -> None:
        self.file = file
        self.device = torch.device("cpu")
        self.identity = hashlib.sha256(_VERSION.encode() + file.read_bytes()).hexdigest()
        try:
            self._module: Any = torch.jit.load(str(file), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"extractor torchscript: {file} is no TorchScript file ({brief(error)})") from error
        names = {argument.name for argument in self._module.forward.schema.arguments}
        self._arguments = {name: True for name in _ARGUMENTS if name in names}

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        self._module.to(self.device)
        return self

    def _called(self, media: Tensor, axes: tuple[int, ...], wanted: str) -> Tensor:
        """Return the module's result. Raises RuntimeError, naming what is wanted, for one of other axes or batch."""
        with inference(self.device):
            features = self._module(media.to(self.device), **self._arguments)
        if not isinstance(features, Tensor) or features.ndim not in axes or len(features) != len(media):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise RuntimeError(f"it returns {found} for a batch of {len(media)}, and not a tensor {wanted}")
        return features


class TorchScript(_Module):
    """Extractor that calls a module of another's making with uint8."""

    def __init__(self, file: Path) -> None:
        """Load a module and try what it takes. Raises InputError if it takes neither pictures nor clips of uint8."""
        super().__init__(file)
        shape, dim = self._try()
        self.num_channels: Literal[1, 3] = 3 if shape[0] == 3 else 1
        self.takes_clips = len(shape) == 4
        self.dims: dict[FeatureName, int | None] = {"pooled": dim}
        self._sizes_that_work = {shape[1:]}

    def check_size(self, *size: int) -> None:
        """Raise InputError if the module fails for media of a size; each size is tried once."""
        if size in self._sizes_that_work:
            return
        try:
            width = self._width_of((self.num_channels, *size))
        except _FAILURES as error:
            raise InputError(
                f"extractor torchscript: {self.file} does not take media of {'x'.join(map(str, size))}: {_cause(error)}"
            ) from error
        if width != self.dims["pooled"]:
            raise InputError(
                f"extractor torchscript: {self.file} gives {width} features for media of "
                f"{'x'.join(map(str, size))}, and {self.dims['pooled']} for others; wrap it so that it resizes"
            )
        self._sizes_that_work.add(size)

    def extract(self, media: Tensor, names: tuple[FeatureName, ...] = ("pooled",)) -> dict[FeatureName, Tensor]:
        check_media(self, media, names)
        return {"pooled": self._call(media).float()}

    def _call(self, media: Tensor) -> Tensor:
        return self._called(media, (2,), "(b, d)")

    def _width_of(self, shape: tuple[int, ...]) -> int:
        """Return the width of the features of media of a shape, without the batch.

        Raises RuntimeError if the module does not take them, in batches of two or of one, as the last batch may be: a
        module that squeezes its result fails there, at the end of the work.
        """
        width, of_one = (self._call(torch.zeros(num, *shape, dtype=torch.uint8)).shape[1] for num in (2, 1))
        if width != of_one:
            raise RuntimeError(f"it gives {width} features for each of two inputs, and {of_one} for one alone")
        return width

    def _try(self) -> tuple[tuple[int, ...], int]:
        """Return the first shape, without the batch, that the module takes, and the width of its features."""
        causes = {}
        for shape in _TRIALS:
            try:
                return shape, self._width_of(shape)
            except _FAILURES as error:
                causes[shape] = _cause(error)
        first, clips = _TRIALS[0], next(shape for shape in _TRIALS if len(shape) == 4)
        raise InputError(
            f"extractor torchscript: {self.file} takes neither uint8 pictures ({causes[first]}) nor uint8 clips "
            f"({causes[clips]}). Wrap it as pomscale/codecs/extractors/torchscript.py shows"
        )


class TorchScriptTeacher(_Module):
    """Teacher that calls a module of another's making with uint8 pictures."""

    def __init__(self, file: Path, size: tuple[int, int]) -> None:
        """Load a module and try whether it takes pictures of a (height, width), in colour or grey.

        Raises InputError if it takes neither.
        """
        super().__init__(file)
        self.num_channels: Literal[1, 3] = 3
        self._shapes: dict[tuple[int, int], tuple[int, int, int]] = {}
        try:
            self.map_shape(*size)
        except InputError:
            colour, self.num_channels = self.num_channels, 1
            try:
                self.map_shape(*size)
            except InputError:
                self.num_channels = colour
                self.map_shape(*size)  # the error of colour pictures tells more

    def map_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Try the module with pictures of a size, once, in batches of two and of one, as the last one may be."""
        if (height, width) not in self._shapes:
            try:
                of_two, of_one = (self._try(num, height, width) for num in (2, 1))
            except _FAILURES as error:
                raise InputError(
                    f"features.teacher: {self.file} gives no features of uint8 pictures of {height}x{width}: "
                    f"{_cause(error)}. Wrap it as pomscale/codecs/extractors/torchscript.py shows"
                ) from error
            if of_two != of_one:
                raise InputError(
                    f"features.teacher: {self.file} gives maps of {of_two} for two pictures and of {of_one} for one"
                )
            self._shapes[height, width] = of_two
        return self._shapes[height, width]

    def feature_map(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[2:]
        features = self._called(pictures, (3, 4), "(b, d, h, w) or (b, n, d)").float()
        if features.ndim == 4:
            return features
        grid = grid_of_tokens(features.shape[1], height, width)
        if grid is None:
            raise RuntimeError(
                f"its {features.shape[1]} tokens fill no grid of square patches of {height}x{width} pixels; return the "
                "tokens of patches alone, or a map (b, d, h, w)"
            )
        return features.transpose(1, 2).unflatten(2, grid)

    def _try(self, num: int, height: int, width: int) -> tuple[int, int, int]:
        pictures = torch.zeros(num, self.num_channels, height, width, dtype=torch.uint8)
        dim, rows, columns = self.feature_map(pictures).shape[1:]
        return dim, rows, columns


def _cause(error: Exception) -> str:
    """Return the last line of a TorchScript error, which says what went wrong; the others say where."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return brief(Exception(lines[-1] if lines else type(error).__name__))
