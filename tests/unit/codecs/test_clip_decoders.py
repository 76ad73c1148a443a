"""Clips decoded chunk by chunk are those decoded at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.codecs.base import ClipDecoder
from pomscale.codecs.clip_decoders import FramewiseDecoder
from pomscale.codecs.vae import ClipVae, open_vae
from pomscale.config.codecs import VaeCodecConfig
from support.tiny_models import save_video_vae
from support.tiny_vaes import save_tiny_vae

# Of the network that `folder` holds: one tile, and 2 x 2 of them (tiles are 6 x 10 latent pixels).
ONE_TILE, TILES = (3, 4), (8, 13)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_video_vae(tmp_path_factory.mktemp("vae"), seed=0)


def open_codec(folder: Path, *, tiling: bool = False) -> ClipVae:
    codec = open_vae(VaeCodecConfig(name="vae", path=str(folder), tiling=tiling))
    assert isinstance(codec, ClipVae)
    return codec


def random_latents(frames: int, size: tuple[int, int], clips: int = 2) -> Tensor:
    return torch.randn(clips, 4, frames, *size, generator=torch.Generator().manual_seed(frames))


def decode_chunks(decoder: ClipDecoder, latents: Tensor, chunk: int) -> Tensor:
    return torch.cat([decoder.decode(part) for part in latents.split(chunk, dim=2)], dim=2)


@pytest.mark.parametrize(
    ("frames", "chunk"), [(8, 2), (8, 4), (8, 1), (7, 1), (7, 2), (9, 3), (8, 3), (1, 1), (3, 3), (2, 2)]
)
def test_chunks_of_any_length_give_what_the_network_gives_for_the_whole(folder: Path, frames: int, chunk: int) -> None:
    codec = open_codec(folder)
    latents = random_latents(frames, ONE_TILE)
    decoded = decode_chunks(codec.decoder(frames), latents, chunk)
    assert decoded.shape[2] == codec.num_pixel_frames(frames)
    assert torch.equal(decoded, codec.decode(latents))


@pytest.mark.parametrize("size", [TILES, (3, 13), (8, 4), (6, 10)])
@pytest.mark.parametrize("frames", [6, 5])
def test_chunks_in_tiles_give_what_the_network_gives_in_tiles(folder: Path, size: tuple[int, int], frames: int) -> None:
    tiled = open_codec(folder, tiling=True)
    latents = random_latents(frames, size)
    decoded = decode_chunks(tiled.decoder(frames), latents, 2)
    assert torch.equal(decoded, tiled.decode(latents))
    if size == TILES:
        assert not torch.equal(decoded, open_codec(folder).decode(latents)), "these are no tiles"


@pytest.mark.parametrize(("frames", "chunk", "size", "tiling"), [(8, 2, TILES, True), (9, 1, ONE_TILE, False)])
def test_a_saved_clip_goes_on_exactly(
    folder: Path, frames: int, chunk: int, size: tuple[int, int], tiling: bool, tmp_path: Path
) -> None:
    codec = open_codec(folder, tiling=tiling)
    latents = random_latents(frames, size)
    begun = codec.decoder(frames)
    # Chunks of one leave a latent frame that waits for its partner, and that has to be saved too.
    first = decode_chunks(begun, latents[:, :, :4], chunk)
    torch.save(begun.state_dict(), tmp_path / "state.pt")

    resumed = open_codec(folder, tiling=tiling).decoder(2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    rest = decode_chunks(resumed, latents[:, :, 4:], chunk)
    assert torch.equal(torch.cat([first, rest], dim=2), codec.decode(latents))


def test_what_is_carried_does_not_grow(folder: Path) -> None:
    codec = open_codec(folder)
    decoder = codec.decoder(2)
    sizes = []
    for _ in range(4):
        decoder.decode(random_latents(2, ONE_TILE))
        sizes.append(sum(tensor.numel() for tensor in decoder.state_dict().values()))
    assert len(set(sizes)) == 1


def test_state_of_another_codec_is_refused(folder: Path) -> None:
    def decode(latents: Tensor) -> Tensor:
        return latents

    decoder = open_codec(folder).decoder(2)
    decoder.decode(random_latents(2, ONE_TILE))
    with pytest.raises(InputError, match="by another codec"):
        FramewiseDecoder(decode).load_state_dict(decoder.state_dict())
    with pytest.raises(InputError, match="by another codec"):
        decoder.load_state_dict(FramewiseDecoder(decode).state_dict())
    with pytest.raises(InputError, match=r"in other tiles.*codec\.tiling"):
        open_codec(folder, tiling=True).decoder(2).load_state_dict(decoder.state_dict())


def test_pixel_frames_are_those_of_the_network(folder: Path) -> None:
    codec = open_codec(folder)
    for frames in (1, 8, 9, 16, 17, 80, 81):
        assert codec.num_pixel_frames(codec.latent_shape(frames, 8, 8)[1]) == frames


@pytest.mark.parametrize("name", ["wan21", "wan22"])
@pytest.mark.parametrize(("frames", "chunk"), [(1, 1), (4, 1), (5, 2), (3, 3)])
def test_wan_in_chunks_of_any_length_gives_what_the_codec_gives_for_the_whole(
    name: str, frames: int, chunk: int, tmp_path: Path
) -> None:
    codec = open_codec(save_tiny_vae(tmp_path, name))
    latents = random_latents(frames, (2, 3))
    decoded = decode_chunks(codec.decoder(frames), latents, chunk)
    assert decoded.shape[2] == codec.num_pixel_frames(frames)
    assert torch.equal(decoded, codec.decode(latents))


@pytest.mark.parametrize("begun_frames", [1, 2, 3])
def test_a_saved_clip_of_wan_goes_on_exactly(begun_frames: int, tmp_path: Path) -> None:
    codec = open_codec(save_tiny_vae(tmp_path, "wan22"))
    assert codec.continues
    latents = random_latents(5, (2, 3))
    begun = codec.decoder(begun_frames)
    first = begun.decode(latents[:, :, :begun_frames])
    torch.save(begun.state_dict(), tmp_path / "state.pt")
    resumed = open_codec(tmp_path).decoder(begun_frames)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    rest = decode_chunks(resumed, latents[:, :, begun_frames:], 1)
    assert torch.equal(torch.cat([first, rest], dim=2), codec.decode(latents))
    with pytest.raises(InputError, match="by another codec"):
        resumed.load_state_dict({"due": torch.tensor(2)})


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video_15", "ltx", "mochi"])
def test_other_networks_wait_for_the_whole_clip_and_continue_none(name: str, tmp_path: Path) -> None:
    codec = open_codec(save_tiny_vae(tmp_path, name))
    assert not codec.continues
    latents = torch.randn(2, codec.num_channels, 3, 1, 2, generator=torch.Generator().manual_seed(0))
    decoder = codec.decoder(3)
    parts = [decoder.decode(part) for part in latents.split(1, dim=2)]
    assert [part.shape[2] for part in parts] == [0, 0, codec.num_pixel_frames(3)]
    assert torch.equal(torch.cat(parts, dim=2), codec.decode(latents))
    for use in (decoder.state_dict, lambda: decoder.load_state_dict({}), lambda: decoder.decode(latents[:, :, :1])):
        with pytest.raises(InputError, match=r"decodes a clip as a whole, so none can be continued"):
            use()
