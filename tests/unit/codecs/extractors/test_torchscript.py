from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pomscale.base.errors import InputError
from pomscale.codecs.extractors import Extractor, build_extractor
from support.generated_clips import I3dLike


class Bytes(nn.Module):
    """Pictures of one channel and one size, without arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(28 * 28, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1).float() / 255)


class Floats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean([2, 3])


class Flat(nn.Module):
    """Features that grow with the picture."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1].flatten(1).float()


class Squeezed(nn.Module):
    """Features of which a batch of one loses its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean([2, 3]).squeeze()


def saved(module: nn.Module, folder: Path) -> Extractor:
    torch.jit.script(module).save(str(folder / "module.pt"))
    return build_extractor(f"torchscript:{folder / 'module.pt'}")


def test_clips_are_passed_as_stylegan_v_passes_them(tmp_path: Path) -> None:
    module = I3dLike().eval()
    extractor = saved(module, tmp_path)
    assert (extractor.takes_clips, extractor.num_channels, extractor.dims) == (True, 3, {"pooled": 6})
    clips = torch.randint(256, (2, 3, 9, 12, 14), dtype=torch.uint8)
    extractor.check_size(9, 12, 14)
    with torch.no_grad():
        expected = module(clips, rescale=True, resize=True, return_features=True)
    torch.testing.assert_close(extractor.extract(clips)["pooled"], expected)
    with pytest.raises(InputError, match=r"does not take media of 2x12x14: .*Kernel size can't be greater"):
        extractor.check_size(2, 12, 14)


def test_traced_pictures_of_one_size(tmp_path: Path) -> None:
    module = Bytes().eval()
    traced = torch.jit.trace(module, torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    torch.jit.save(traced, str(tmp_path / "module.pt"))
    extractor = build_extractor(f"torchscript:{tmp_path / 'module.pt'}")
    assert (extractor.takes_clips, extractor.num_channels, extractor.dims) == (False, 1, {"pooled": 5})
    media = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(extractor.extract(media)["pooled"], module(media))
    with pytest.raises(InputError, match="does not take media of 32x32"):
        extractor.extract(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


def test_what_does_not_take_bytes_is_refused_and_can_be_wrapped(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"takes neither uint8 pictures \(.*\) nor uint8 clips .* Wrap it"):
        saved(Floats(), tmp_path)

    class FromBytes(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x.float() / 127.5 - 1)

    network = torch.jit.load(str(tmp_path / "module.pt"))
    extractor = saved(FromBytes(network), tmp_path)
    media = torch.randint(256, (2, 3, 10, 10), dtype=torch.uint8)
    torch.testing.assert_close(extractor.extract(media)["pooled"], network(media.float() / 127.5 - 1).detach())


def test_features_that_follow_the_size_are_refused(tmp_path: Path) -> None:
    extractor = saved(Flat(), tmp_path)
    with pytest.raises(InputError, match="gives 100 features for media of 10x10, and 4096 for others"):
        extractor.check_size(10, 10)


def test_a_module_that_fails_for_the_last_batch_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"takes neither uint8 pictures \(it returns \(3,\) for a batch of 1, "):
        saved(Squeezed(), tmp_path)


def test_identity_is_that_of_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = I3dLike()
    first = saved(module, tmp_path).identity
    assert saved(module, tmp_path).identity == first
    module.layer.bias.data += 1  # type: ignore[union-attr]  # a bias may be None
    assert saved(module, tmp_path).identity != first


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "state.pt")
    (tmp_path / "page.pt").write_text("<html>")
    for name in ("state.pt", "page.pt"):
        with pytest.raises(InputError, match="is no TorchScript file"):
            build_extractor(f"torchscript:{tmp_path / name}")
