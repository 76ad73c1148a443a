"""The extractors `dinov2` and `clip`: real networks of transformers with small random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pomscale.base.errors import InputError
from pomscale.codecs.extractors import build_extractor
from pomscale.codecs.extractors.base import Extractor
from support.tiny_models import save_clip, save_dinov2

transformers = pytest.importorskip("transformers")


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(picture: Image.Image, mean: list[float], std: list[float]) -> torch.Tensor:
    values = np.asarray(picture) / 255.0
    return torch.from_numpy(((values - mean) / std).transpose(2, 0, 1)[None]).float()


def cubic(distance: float) -> float:
    """Bicubic kernel with a = -0.75, PyTorch's."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def interpolated(grid: np.ndarray, size: int, factor: float) -> np.ndarray:
    """Return a grid (m, m, d) at (i + 0.5) / factor - 0.5 for i below `size`, with edges repeated."""
    weights = np.zeros((size, len(grid)))
    for i in range(size):
        position = (i + 0.5) / factor - 0.5
        for j in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
            weights[i, np.clip(j, 0, len(grid) - 1)] += cubic(position - j)
    return np.einsum("im,jn,mnd->ijd", weights, weights, grid)


@pytest.mark.parametrize(("image_size", "registers"), [(224, 0), (98, 0), (518, 0), (98, 3)])
def test_dinov2_is_that_of_dgm_eval(tmp_path: Path, image_size: int, registers: int) -> None:
    """Squashed to 224x224 by Pillow, ImageNet's normalisation, and positions interpolated as Meta's code does."""
    extractor = build_extractor(f"dinov2:{save_dinov2(tmp_path, 0, image_size=image_size, registers=registers)}")
    media = pictures(2, 50, 80)
    found = extractor.extract(media)["pooled"]
    network = transformers.AutoModel.from_pretrained(tmp_path).eval()
    if image_size != 224 and not registers:
        side = image_size // 14
        old = network.embeddings.position_embeddings.detach()
        grid = interpolated(old[0, 1:].reshape(side, side, -1).double().numpy(), 16, 16.1 / side)
        new = torch.cat([old[:, :1], torch.from_numpy(grid).float().reshape(1, 256, -1)], 1)
        network.embeddings.position_embeddings = torch.nn.Parameter(new)
    for picture, feature in zip(media, found, strict=True):
        resized = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        with torch.no_grad():
            output = network(normalised(resized, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        torch.testing.assert_close(feature, output.last_hidden_state[0, 0], rtol=1e-4, atol=1e-4)
    assert extractor.dims == {"pooled": 16}


def test_clip_is_that_of_cmmd(tmp_path: Path) -> None:
    extractor = build_extractor(f"clip:{save_clip(tmp_path, 0)}")
    media = pictures(2, 45, 70)
    found = extractor.extract(media)["pooled"]
    network = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    for picture, feature in zip(media, found, strict=True):
        square = Image.fromarray(picture[:, :, 12:57].permute(1, 2, 0).numpy())
        with torch.no_grad():
            embedding = network(normalised(square.resize((32, 32), Image.Resampling.BICUBIC), mean, std)).image_embeds[
                0
            ]
        torch.testing.assert_close(feature, embedding / embedding.norm(), rtol=1e-4, atol=1e-5)
    assert extractor.dims == {"pooled": 8}


def test_texts_are_embedded_each_as_alone(tmp_path: Path) -> None:
    from pomscale.codecs.extractors.clip import Clip  # noqa: PLC0415  after importorskip

    extractor = build_extractor(f"clip:{save_clip(tmp_path, 0)}")
    assert isinstance(extractor, Clip)
    texts = ["a dog", "", "one more text, which is longer than twelve tokens"]
    found = extractor.embed_texts(texts)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    network = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, embedding in zip(texts, found, strict=True):
        ids = tokenizer(text, truncation=True, max_length=12).input_ids
        with torch.no_grad():
            alone = network(torch.tensor([ids])).text_embeds[0]
        torch.testing.assert_close(embedding, alone / alone.norm(), rtol=1e-4, atol=1e-5)
    assert (found[0] - found[2]).norm() > 1e-2


def test_identity_follows_weights_and_settings(tmp_path: Path) -> None:
    def identity(kind: str, name: str, seed: int) -> str:
        save = save_clip if kind == "clip" else save_dinov2
        return build_extractor(f"{kind}:{save(tmp_path / name, seed)}").identity

    for kind in ("clip", "dinov2"):
        first = identity(kind, f"{kind}-a", 0)
        assert identity(kind, f"{kind}-b", 0) == first
        assert identity(kind, f"{kind}-c", 1) != first


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip", 0)
    preprocessor = folder / "preprocessor_config.json"
    preprocessor.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(InputError, match=r"preprocessor_config.json has image_mean \[0.5, 0.5, 0.5\]"):
        build_extractor(f"clip:{folder}")
    preprocessor.unlink()
    for file in folder.glob("*token*"):
        file.unlink()
    extractor: Extractor = build_extractor(f"clip:{folder}")  # pictures need no tokenizer
    with pytest.raises(InputError, match=r"tokenizer in .* has 2 tokens, and the network 514"):
        extractor.embed_texts(["a"])  # type: ignore[attr-defined]
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"extractor clip: cannot load a CLIPModel"):
        build_extractor(f"clip:{folder}")
    other = save_dinov2(tmp_path / "dinov2", 0)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"extractor dinov2: .* do not fit its config.json: missing encoder.layer.2"):
        build_extractor(f"dinov2:{other}")
