from __future__ import annotations

from pathlib import Path

import pytest

from pomscale.base.errors import InputError
from pomscale.codecs.extractors import build_extractor


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("inceptoin:x.pth", "there is no 'inceptoin'; choose from inception:FILE, .*digits, pixels"),
        ("inception", "write inception:FILE. Nothing is downloaded by itself; get .*weights-inception-2015-12-05"),
        ("inception:missing.pth", "missing.pth is no file here. .*github.com/toshas/torch-fidelity/releases"),
        ("torchscript:missing.pt", "missing.pt is no file here.*i3d_torchscript.pt"),
        ("dinov2:facebook/dinov2-large", "facebook/dinov2-large is no folder here.*hf download"),
        ("clip:", "write clip:FOLDER.*hf download openai/clip-vit-large-patch14-336"),
        ("digits:weights", "digits takes no file; write digits"),
        ("pixels:32", "pixels takes no file; write pixels"),
    ],
)
def test_what_cannot_be_built_is_named_with_its_remedy(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_extractor(spec)


def test_folders_of_other_models_are_refused(tmp_path: Path) -> None:
    for spec in ("dinov2", "clip"):
        with pytest.raises(InputError, match=r"has no config.json of transformers"):
            build_extractor(f"{spec}:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for spec in ("dinov2", "clip"):
        with pytest.raises(InputError, match=f"extractor {spec}: .* holds a model of type 'vit', and not {spec}"):
            build_extractor(f"{spec}:{tmp_path}")
