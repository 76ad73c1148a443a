"""Encode long clips in the memory of a few frames, with the network's own results but for rounding.

diffusers gives the encoders of CogVideoX and Wan a few frames at a time. Four others see all frames of a clip at once,
and hold several copies of their largest activations. `SLICED_ENCODERS` does without these:

- LTX, HunyuanVideo 1.5: convolutions look back only and norms are by pixel, so a few frames after the other go through
  the encoder, or through its blocks of high resolution, and each convolution goes on from what it has seen.
- Mochi, HunyuanVideo: attention and norms over all frames stand between the convolutions. So the layers are taken one
  after the other, each in slices of time, into the memory of its input where that is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Network = Any

# Frames that go through a layer together: multiples of every stride in time. A layer holds about six copies of them.
_STREAM_FRAMES = 8
_LAYER_FRAMES = 4
_MOCHI_FRAMES = 6

# Parts of the positions of a picture whose frames attend together, in Mochi.
_ATTENTION_PARTS = 16


def _encode_ltx(vae: Network, clip: Tensor) -> Tensor:
    """Return the moments of a clip: the encoder of LTX in slices, where it is causal."""
    if not vae.config.encoder_causal:
        return vae.encoder(clip)
    return _stream(vae.encoder, "LTXVideoDownsampler3d", _downsample_ltx, vae.encoder, clip)


def _encode_hunyuan15(vae: Network, clip: Tensor) -> Tensor:
    """Return the moments of a clip: all before the attention in slices, as `HunyuanVideo15Encoder3D.forward`."""
    encoder = vae.encoder
    early = nn.Sequential(encoder.conv_in, *encoder.down_blocks)
    hidden = _stream(early, "HunyuanVideo15Downsample", _downsample_hunyuan15, early, clip)
    hidden = encoder.mid_block(hidden)
    shortcut = hidden.unflatten(1, (-1, encoder.group_size)).mean(dim=2)
    return encoder.conv_out(encoder.conv_act(encoder.norm_out(hidden))) + shortcut


def _encode_mochi(vae: Network, clip: Tensor) -> Tensor:
    """Return the moments of a clip: convolutions in slices of time, attention in slices of positions."""
    with ExitStack() as stack:
        for module in vae.encoder.modules():
            kind = type(module).__name__
            if kind == "MochiResnetBlock3D":
                stack.enter_context(_replaced(module, partial(_resnet_mochi, module, module.forward)))
            elif kind == "MochiDownBlock3D":
                convolution = partial(_convolve_mochi, module.conv_in, module.conv_in.forward)
                stack.enter_context(_replaced(module.conv_in, convolution))
            elif kind == "MochiChunkedGroupNorm3D":
                stack.enter_context(_replaced(module, partial(_norm_mochi, module.forward)))
            elif kind == "Attention":
                stack.enter_context(_replaced(module, partial(_attend_mochi, module.forward)))
        return vae.encoder(clip)[0]


def _encode_hunyuan(vae: Network, clip: Tensor) -> Tensor:
    """Return the moments of a clip: blocks of convolutions in slices of time, with the statistics of the whole clip."""
    entry = vae.encoder.conv_in
    with ExitStack() as stack:
        stack.enter_context(_replaced(entry, partial(_in_slices, entry, entry.forward, _LAYER_FRAMES)))
        for module in vae.encoder.modules():
            kind = type(module).__name__
            if kind == "HunyuanVideoResnetBlockCausal3D":
                stack.enter_context(_replaced(module, partial(_resnet_hunyuan, module)))
            elif kind == "HunyuanVideoMidBlock3D":
                stack.enter_context(_replaced(module, partial(_middle_hunyuan, module)))
            elif kind == "HunyuanVideoDownsampleCausal3D":
                stack.enter_context(_replaced(module, partial(_in_slices, module, module.forward, _LAYER_FRAMES)))
        return vae.quant_conv(vae.encoder(clip))


SLICED_ENCODERS: dict[str, Callable[[Network, Tensor], Tensor]] = {
    "AutoencoderKLHunyuanVideo": _encode_hunyuan,
    "AutoencoderKLHunyuanVideo15": _encode_hunyuan15,
    "AutoencoderKLLTXVideo": _encode_ltx,
    "AutoencoderKLMochi": _encode_mochi,
}
"""Class -> function from a network and one clip (1 3 f H W) in [-1, 1] to moments (1 2c f' h w). Call without grad."""


# --- slices of time --------------------------------------------------------------------------------------------------


@contextmanager
def _going_on(module: nn.Module) -> Iterator[None]:
    """Let each convolution inside begin with the frames that it has seen in the call before, in place of padding.

    Causal modules of diffusers pad a clip in front by the kernel's length less one, and then call an `nn.Conv3d`.
    """
    pasts: dict[nn.Module, Tensor] = {}

    def begin_with_past(convolution: nn.Conv3d, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (frames,), size, stride = inputs, convolution.kernel_size[0], convolution.stride[0]
        if convolution in pasts:
            frames = torch.cat([pasts[convolution], frames[:, :, size - 1 :]], dim=2)
        num_windows = (frames.shape[2] - size) // stride + 1
        pasts[convolution] = frames[:, :, num_windows * stride :].clone()
        return (frames,)

    with ExitStack() as stack:
        for inner in module.modules():
            if isinstance(inner, nn.Conv3d) and inner.kernel_size[0] > 1:
                stack.callback(inner.register_forward_pre_hook(begin_with_past).remove)
        yield


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call `forward` in place of the module's own."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _stream(
    module: nn.Module,
    downsampler: str,
    downsample: Callable[..., Tensor],
    run: Callable[[Tensor], Tensor],
    clip: Tensor,
) -> Tensor:
    """Return run(clip) of a causal module: the first frame with the next ones, then as many at a time.

    Downsamplers in time, of the class of that name, treat the first frame in a way of their own; `downsample` is for
    those that follow.
    """
    first = clip[:, :, : 1 + _STREAM_FRAMES]
    with _going_on(module), ExitStack() as stack:
        parts = [run(first)]
        for inner in module.modules():
            if type(inner).__name__ == downsampler:
                stack.enter_context(_replaced(inner, partial(downsample, inner)))
        parts += [run(part) for part in clip[:, :, first.shape[2] :].split(_STREAM_FRAMES, dim=2) if part.shape[2]]
    return torch.cat(parts, dim=2)


def _in_slices(module: nn.Module, run: Callable[[Tensor], Tensor], size: int, frames: Tensor) -> Tensor:
    """Return run(frames) of a causal module whose convolutions are the only layers that see more than one frame."""
    result, end = frames, 0
    with _going_on(module):
        for part in frames.split(size, dim=2):
            done = run(part)
            if end == 0:
                # Padded by the kernel's length less one in front, a clip of f frames has so many windows.
                strides = [inner.stride[0] for inner in module.modules() if isinstance(inner, nn.Conv3d)]
                num_windows = (frames.shape[2] - 1) // max(strides) + 1
                result = done.new_empty(*done.shape[:2], num_windows, *done.shape[3:])
            result[:, :, end : end + done.shape[2]] = done
            end += done.shape[2]
    assert end == result.shape[2]
    return result


# --- layers of the four networks -------------------------------------------------------------------------------------


def _downsample_ltx(module: Network, frames: Tensor) -> Tensor:
    """`LTXVideoDownsampler3d.forward` of frames that are not the first: none is repeated."""

    def fold(x: Tensor) -> Tensor:
        time, height, width = module.stride
        x = x.unflatten(4, (-1, width)).unflatten(3, (-1, height)).unflatten(2, (-1, time))
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)

    residual = fold(frames).unflatten(1, (-1, module.group_size)).mean(dim=2)
    return fold(module.conv(frames)) + residual


def _downsample_hunyuan15(module: Network, frames: Tensor) -> Tensor:
    """`HunyuanVideo15Downsample.forward` of frames that are not the first: all are folded in time."""
    fold = partial(module._dcae_downsample_rearrange, r1=2 if module.add_temporal_downsample else 1)
    hidden, shortcut = fold(module.conv(frames)), fold(frames)
    return hidden + shortcut.unflatten(1, (hidden.shape[1], module.group_size)).mean(dim=2)


def _resnet_mochi(
    module: nn.Module, run: Callable[..., tuple[Tensor, Any]], frames: Tensor, conv_cache: None = None
) -> tuple[Tensor, None]:
    """`MochiResnetBlock3D.forward` into the memory of its input, which nothing else reads."""
    with _going_on(module):
        for part in frames.split(_MOCHI_FRAMES, dim=2):
            part.copy_(run(part)[0])
    return frames, None


def _convolve_mochi(module: nn.Module, run: Callable[..., tuple[Tensor, Any]], frames: Tensor) -> tuple[Tensor, None]:
    result = _in_slices(module, lambda part: run(part)[0], _MOCHI_FRAMES, frames)
    _release(frames)
    return result, None


def _attend_mochi(run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Attention of (positions, frames, channels) over frames, into the memory of its input, a copy of the block's."""
    for part in hidden.split(-(-len(hidden) // _ATTENTION_PARTS)):
        part.copy_(run(part))
    return hidden


def _norm_mochi(run: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    """`MochiChunkedGroupNorm3D.forward`, which is by frame, without its copies of all frames."""
    result = torch.empty_like(frames)
    for given, part in zip(frames.split(_MOCHI_FRAMES, dim=2), result.split(_MOCHI_FRAMES, dim=2), strict=True):
        part.copy_(run(given))
    return result


def _resnet_hunyuan(module: Network, frames: Tensor) -> Tensor:
    """`HunyuanVideoResnetBlockCausal3D.forward`, whose norms are over the whole clip."""
    frames = frames.contiguous()
    norm = _whole_clip_norm(module.norm1, frames)
    hidden = _in_slices(module.conv1, lambda part: module.conv1(module.nonlinearity(norm(part))), _LAYER_FRAMES, frames)
    norm = _whole_clip_norm(module.norm2, hidden)
    with _going_on(module.conv2):
        for part, given in zip(hidden.split(_LAYER_FRAMES, dim=2), frames.split(_LAYER_FRAMES, dim=2), strict=True):
            residual = given if module.conv_shortcut is None else module.conv_shortcut(given)
            part.copy_(module.conv2(module.nonlinearity(norm(part))) + residual)
    _release(frames)
    return hidden


def _middle_hunyuan(module: Network, frames: Tensor) -> Tensor:
    """`HunyuanVideoMidBlock3D.forward`, whose mask of all tokens by all tokens is not made."""
    hidden = module.resnets[0](frames)
    for attention, resnet in zip(module.attentions, module.resnets[1:], strict=True):
        hidden = resnet(hidden if attention is None else _attend_hunyuan(attention, hidden))
    return hidden


def _attend_hunyuan(module: Network, frames: Tensor) -> Tensor:
    """Attention of each frame to itself and those before, as diffusers' `AttnProcessor2_0` under its causal mask."""
    num_frames, height, width = frames.shape[2:]
    tokens = frames.permute(0, 2, 3, 4, 1).flatten(1, 3)
    normed = module.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    query, key, value = (
        project(normed).unflatten(2, (module.heads, -1)).transpose(1, 2)
        for project in (module.to_q, module.to_k, module.to_v)
    )
    ends = [(number + 1) * height * width for number in range(num_frames)]
    attended = [
        scaled_dot_product_attention(of_frame, key[:, :, :end], value[:, :, :end])
        for of_frame, end in zip(query.split(height * width, dim=2), ends, strict=True)
    ]
    hidden = module.to_out[0](torch.cat(attended, dim=2).transpose(1, 2).flatten(2)) + tokens
    return hidden.unflatten(1, (num_frames, height, width)).permute(0, 4, 1, 2, 3)


def _release(frames: Tensor) -> None:
    """Free the memory of a layer's input. Callers hold it until their next line, and read it no more."""
    frames.set_()  # type: ignore[call-overload]  # the form that empties


def _whole_clip_norm(norm: nn.GroupNorm, frames: Tensor) -> Callable[[Tensor], Tensor]:
    """Return `norm` as a function of some frames of (1 c f h w), with the statistics of all."""
    counts, means, variances = [], [], []
    dtype = torch.promote_types(frames.dtype, torch.float32)
    for part in frames.split(_LAYER_FRAMES, dim=2):
        grouped = part.to(dtype).reshape(norm.num_groups, -1)
        variance, mean = torch.var_mean(grouped, dim=1, correction=0)
        counts.append(grouped.shape[1])
        means.append(mean.double())
        variances.append(variance.double())
    shares = torch.tensor(counts, dtype=torch.float64, device=frames.device)[:, None] / sum(counts)
    mean = (shares * torch.stack(means)).sum(0)
    variance = (shares * (torch.stack(variances) + (torch.stack(means) - mean) ** 2)).sum(0)
    per_group = norm.num_channels // norm.num_groups
    scale = norm.weight * (variance + norm.eps).rsqrt().repeat_interleave(per_group)
    shift = norm.bias - mean.repeat_interleave(per_group) * scale
    scale, shift = (value.to(dtype).view(1, -1, 1, 1, 1) for value in (scale, shift))
    return lambda part: part * scale + shift
