from __future__ import annotations

import pytest

from pomscale.base.errors import InputError
from pomscale.config.encode import ImageTransformConfig
from pomscale.evaluation.generated.crops import check_crops, crop_of


def test_the_crop_of_adm_is_another_than_ours() -> None:
    ours, adm = (crop_of(ImageTransformConfig(size=256, filter=filter)) for filter in ("lanczos", "adm"))
    check_crops("x.npz", adm, adm)
    with pytest.raises(InputError, match=r"x\.npz: .*cropped otherwise .*filter adm there, lanczos here"):
        check_crops("x.npz", adm, ours)
