from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pomscale.base.errors import InputError
from pomscale.codecs.extractors import Extractor, build_extractor
from pomscale.codecs.extractors.inception import resize_like_tensorflow1
from pomscale.codecs.extractors.inception_network import Convolution, InceptionNetwork
from support.seeded_inception import seeded_weights


def file_tensors() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = InceptionNetwork().file_shapes()
    return {name: torch.from_numpy(array) for name, array in seeded_weights(shapes).items()}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return file_tensors()


@pytest.fixture(scope="module")
def extractor(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(tensors, file)
    return build_extractor(f"inception:{file}")


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 11), (23, 17, 9), (1, 40, 6), (8, 8, 8), (32, 64, 61)])
def test_resize_is_that_of_tensorflow1(height: int, width: int, size: int) -> None:
    """Against the definition, in float64: the output i takes the input at i * length / size."""
    x = pictures(2, height, width)
    found = resize_like_tensorflow1(x, size)
    rows, columns = np.arange(size) * height / size, np.arange(size) * width / size
    expected = np.empty((2, 3, size, size))
    source = x.double().numpy()
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            # Positions are fp32: at a whole number they may fall on either side, and the value is the same.
            top, left = int(row + 1e-9), int(column + 1e-9)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            down, across = row - top, column - left
            upper = source[:, :, top, left] * (1 - across) + source[:, :, top, right] * across
            lower = source[:, :, below, left] * (1 - across) + source[:, :, below, right] * across
            expected[:, :, i, j] = upper * (1 - down) + lower * down
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)
    if size == height == width:
        assert torch.equal(found, x.float())


def test_batch_normalisation_is_folded() -> None:
    torch.manual_seed(0)
    layer = Convolution(3, 5, (1, 7)).double()
    norm = nn.BatchNorm2d(5, eps=1e-3).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.5, 1.5)  # type: ignore[union-attr]  # the running moments may be None
    kernel = torch.randn(5, 3, 1, 7, dtype=torch.float64)
    layer.fold(kernel, dict(norm.state_dict()))
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    expected = norm(torch.conv2d(x, kernel, padding=(0, 3))).relu()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_features_do_not_depend_on_the_batch(extractor: Extractor) -> None:
    media = pictures(3, 40, 30)
    names = ("pooled", "spatial", "logits")
    together = extractor.extract(media, names)
    assert {name: (*values.shape,) for name, values in together.items()} == {
        "pooled": (3, 2048),
        "spatial": (3, 2023),
        "logits": (3, 1008),
    }
    assert {name: values.shape[1] for name, values in together.items()} == extractor.dims
    with torch.autocast("cpu", torch.bfloat16):  # of a caller, it changes nothing
        alone = [extractor.extract(picture[None], names) for picture in media]
    for name in names:
        scale = float(together[name].abs().max())
        torch.testing.assert_close(
            torch.cat([values[name] for values in alone]), together[name], rtol=1e-4, atol=1e-5 * scale
        )
        assert together[name].dtype == torch.float32
        assert not together[name].requires_grad


def test_logits_have_no_bias_and_spatial_features_are_in_adms_order(
    extractor: Extractor, tensors: dict[str, torch.Tensor]
) -> None:
    media = pictures(1, 299, 299)  # no resize
    found = extractor.extract(media, ("pooled", "spatial", "logits"))
    torch.testing.assert_close(found["logits"], found["pooled"] @ tensors["fc.weight"].T, rtol=1e-4, atol=1e-3)
    network = InceptionNetwork()
    network.read(tensors)
    inputs = []
    network.Mixed_6d.register_forward_hook(lambda _layer, given, _output: inputs.append(given[0]))
    with torch.no_grad():
        network((media.float() - 128) / 128)
        kernel = {key: tensors[f"Mixed_6d.branch1x1.{key}"] for key in ("conv.weight", "bn.weight", "bn.bias")}
        mean, variance = (tensors[f"Mixed_6d.branch1x1.bn.running_{key}"] for key in ("mean", "var"))
        branch = torch.conv2d(inputs[0], kernel["conv.weight"])
        gain = kernel["bn.weight"] / (variance + 1e-3).sqrt()
        branch = ((branch - mean[:, None, None]) * gain[:, None, None] + kernel["bn.bias"][:, None, None]).relu()
    adm = branch.permute(0, 2, 3, 1)[..., :7].reshape(1, -1)  # NHWC, as TensorFlow's
    assert adm.count_nonzero() > 200
    torch.testing.assert_close(found["spatial"], adm, rtol=1e-3, atol=1e-3)


def test_media_of_another_kind_are_refused(extractor: Extractor) -> None:
    with pytest.raises(
        InputError, match=r"extractor inception: it takes colour pictures \(3 channels\), and these have 1"
    ):
        extractor.extract(pictures(2, 16, 16)[:, :1])
    with pytest.raises(InputError, match=r"it takes pictures, uint8 of 4 axes, and not torch\.float32"):
        extractor.extract(pictures(2, 16, 16).float())
    with pytest.raises(InputError, match="it takes pictures, uint8 of 4 axes"):
        extractor.extract(pictures(2, 16, 16)[:, :, None])


def test_identity_follows_weights_and_not_the_file(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    found = {}
    for name, changes in {
        "plain": {},
        "counted": {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(7)},  # of training, and unused
        "other": {"fc.weight": tensors["fc.weight"] + 1e-3},
    }.items():
        torch.save(tensors | changes, tmp_path / f"{name}.pth")
        found[name] = build_extractor(f"inception:{tmp_path / name}.pth").identity
    assert found["plain"] == found["counted"] != found["other"]
    assert len(found["plain"]) == 64


def test_other_files_are_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    fewer = {name: tensor for name, tensor in tensors.items() if not name.startswith("Mixed_7c.branch1x1")}
    torchvision = tensors | {"fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(1000)}
    for content, message in [
        (fewer, r"Mixed_7c.branch1x1.bn.bias is missing, .* and 2 more"),
        (torchvision, r"AuxLogits.fc.bias is unexpected, fc.weight is \(1000, 2048\) and not \(1008, 2048\)"),
        ([1, 2], "holds no state_dict"),
    ]:
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(InputError, match=message):
            build_extractor(f"inception:{tmp_path / 'weights.pth'}")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(InputError, match="is no weights file of PyTorch"):
        build_extractor(f"inception:{tmp_path / 'page.pth'}")
