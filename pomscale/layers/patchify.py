"""Pictures and clips to tokens and back."""

from __future__ import annotations

import math

from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Map pictures (b c H W) -> (b n d), one token per patch_size x patch_size square, row-major.

    This is a convolution, so that its weight has the layout of the authors' checkpoints. Pictures are cast to its
    dtype. Raises ValueError for sides that are no multiple of patch_size.
    """

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pictures: Tensor, tokens: slice | None = None) -> Tensor:
        """Embed all tokens, or some of them."""
        height, width = pictures.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"latents of {height}x{width} cannot be cut into patches of {self.patch_size}")
        if tokens is not None:
            patches = patchify(pictures, self.patch_size)[:, tokens]
            pictures = unpatchify(patches, 1, patches.shape[1], self.patch_size)  # one row of patches
        return _tokens_of(self.projection(pictures.to(self.projection.weight.dtype)))


def _tokens_of(features: Tensor) -> Tensor:
    """Turn the output of a convolution (b d ..) to tokens (b n d), with the channels of a token side by side.

    Sums keep the memory order of their first term: as a view, the tokens would leave the states after every block in
    the order (b d n), which each norm and each map would copy.
    """
    return features.flatten(2).transpose(1, 2).contiguous()


class BottleneckPatchEmbedding(nn.Module):
    """Map pictures (b c H W) or clips (b c F H W) -> (b n d) by two linear maps, the first without bias (JiT).

    The tokens are those of `PatchEmbedding` and `ClipPatchEmbedding`. Inputs are cast to the dtype of the weights.

    Args:
        channels: Channels c of the input.
        dim: Width d of the tokens.
        bottleneck: Width between the maps.
        patch: Lengths of a patch: frames (1 for pictures), height, width.

    Raises:
        ValueError: The patches do not fill an input.
    """

    def __init__(self, channels: int, dim: int, bottleneck: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.reduce = nn.Linear(channels * math.prod(patch), bottleneck, bias=False)
        self.expand = nn.Linear(bottleneck, dim)

    def forward(self, latents: Tensor, tokens: slice | None = None) -> Tensor:
        """Embed all tokens, or some of them."""
        clips = latents if latents.ndim == 5 else latents[:, :, None]
        sides = tuple(clips.shape[2:])
        if any(side % length for side, length in zip(sides, self.patch, strict=True)):
            raise ValueError(f"latents of {sides} cannot be cut into patches of {self.patch}")
        patches = patchify_clips(clips, self.patch)
        patches = patches if tokens is None else patches[:, tokens]
        return self.expand(self.reduce(patches.to(self.reduce.weight.dtype)))


def patchify(pictures: Tensor, patch_size: int) -> Tensor:
    """Cut pictures (b c H W) into tokens (b n p * p * c): the inverse of `unpatchify`."""
    rows, columns = (length // patch_size for length in pictures.shape[2:])
    grid = pictures.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))  # (b c h p w q)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Turn tokens (b, height * width, p * p * c), channels (patch row, patch column, c), to (b, c, height p, width p).

    height and width count tokens. The order of the channels is that of the authors' head.
    """
    grid = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (height, width))  # (b h w p q c)
    pixels = grid.permute(0, 5, 1, 3, 2, 4)  # (b c h p w q)
    pictures = pixels.reshape(pixels.shape[0], pixels.shape[1], height * patch_size, width * patch_size)
    # With patch_size 1 the reshape is a view of `tokens`, on which FSDP could not hang its backward hooks.
    return pictures.contiguous()


class ClipPatchEmbedding(nn.Module):
    """Map (b c F H W) -> (b n d), a token per patch_frames x patch_size x patch_size: frame groups, then row-major.

    ValueError where the patches do not fill the clip. Clips are cast to the dtype of the weight.
    """

    def __init__(self, channels: int, dim: int, patch_frames: int, patch_size: int) -> None:
        super().__init__()
        self.patch = (patch_frames, patch_size, patch_size)
        self.projection = nn.Conv3d(channels, dim, kernel_size=self.patch, stride=self.patch)

    def forward(self, clips: Tensor, tokens: slice | None = None) -> Tensor:
        """Embed all tokens, or some of them."""
        frames, height, width = clips.shape[-3:]
        patch_frames, patch_size, _ = self.patch
        if frames % patch_frames:
            raise ValueError(f"clips of {frames} latent frames cannot be cut into groups of {patch_frames}")
        if height % patch_size or width % patch_size:
            raise ValueError(f"latents of {height}x{width} cannot be cut into patches of {patch_size}")
        if tokens is not None:
            patches = patchify_clips(clips, self.patch)[:, tokens]
            clips = unpatchify_clips(patches, (1, 1, patches.shape[1]), self.patch)  # one row of patches
        return _tokens_of(self.projection(clips.to(self.projection.weight.dtype)))


def patchify_clips(clips: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cut clips (b c F H W) into tokens (b n f * p * q * c), patch (f, p, q): the inverse of `unpatchify_clips`."""
    cells = clips
    for axis in (4, 3, 2):
        cells = cells.unflatten(axis, (-1, patch[axis - 2]))  # (b c G f H p W q)
    return cells.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)


def unpatchify_clips(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Turn tokens (b, G * H * W, f * p * q * c), channels (frame, row, column, c), to (b, c, G f, H p, W q).

    grid (G, H, W) counts tokens, patch is (f, p, q).
    """
    cells = tokens.unflatten(2, (*patch, -1)).unflatten(1, grid)  # (b G H W f p q c)
    values = cells.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (b c G f H p W q)
    size = (length * patch_length for length, patch_length in zip(grid, patch, strict=True))
    return values.reshape(*values.shape[:2], *size).contiguous()  # no view of `tokens`: as in `unpatchify`
