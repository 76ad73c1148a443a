from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.derive.join import join
from data_pipelines.shards import equal_keys
from pomscale.base.errors import InputError, PomscaleError
from pomscale.shards.join import NO_ROW, open_join
from pomscale.shards.schema import INDEX_NAME, read_manifest
from support.synthetic_dataset import replace_index, write_dataset


def opened(main: Path, companion: Path) -> np.ndarray | None:
    return open_join(str(main), read_manifest(main), str(companion), read_manifest(companion))


@pytest.mark.parametrize("rows_at_once", [4, 1 << 22])
def test_every_record_finds_its_companion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr(equal_keys.sorted_buckets, "__defaults__", (rows_at_once,))
    main, companion = tmp_path / "main", tmp_path / "text"
    write_dataset(main, [4, 3, 6], first_record=5, flip=True)
    write_dataset(companion, [10, 6], text=True, latents=False)
    with pytest.raises(InputError, match="run `pomscale data join"):
        opened(main, companion)
    report = join(main, companion)
    assert (report.num_samples, report.num_missing, report.exit_code) == (13, 2, 3)
    table = opened(main, companion)
    assert table is not None
    assert table.tolist() == [*range(5, 16), NO_ROW, NO_ROW]
    assert "11 of 13 records have a companion, 2 have none" in str(report)


def test_sets_in_the_same_order_need_no_table(tmp_path: Path) -> None:
    write_dataset(tmp_path / "main", [4, 3])
    write_dataset(tmp_path / "text", [7], text=True, latents=False)
    assert join(tmp_path / "main", tmp_path / "text").table is None
    assert opened(tmp_path / "main", tmp_path / "text") is None


def test_ambiguous_and_damaged_keys_are_refused(tmp_path: Path) -> None:
    main, companion = tmp_path / "main", tmp_path / "text"
    write_dataset(main, [4], first_record=2)
    write_dataset(companion, [5], text=True, latents=False)
    index = np.load(companion / INDEX_NAME)
    index["key"][3] = index["key"][1]
    replace_index(companion, index)
    # The record of row 3 has another key than the index says.
    with pytest.raises(PomscaleError, match=r"text/shard-000000.tar: c/00003 is not as the index says"):
        join(main, companion)
    index[3] = index[1]
    replace_index(companion, index)
    with pytest.raises(InputError, match="two records have keys of the same hash, c/00001 and c/00001"):
        join(main, companion)
    assert not list(companion.glob("join-*"))
