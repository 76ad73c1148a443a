from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.encode import array_files, duplicate_keys
from data_pipelines.encode import items as items_module
from data_pipelines.encode.items import ItemTable, share_table
from pomscale.base.errors import InputError, PomscaleError
from pomscale.shards.index import key_hash
from pomscale.sources.protocol import Item
from support.paths import TESTS


@dataclass
class ListedSource:
    """A source whose items are given."""

    items: list[Item]
    shuffled: bool = True
    class_names: tuple[str, ...] = ("a", "b")
    num_ignored: int = 3
    num_filtered: int = 0
    cuts_files: bool = False

    def check_exists(self) -> None:
        pass

    def scan(self) -> Iterator[Item]:
        yield from self.items

    def fingerprint_line(self, item: Item) -> str:
        return f"{item.key} {item.location}"

    def open(self, item: Item) -> BinaryIO:
        raise AssertionError("a table opens no item")


def some_items(keys: list[str]) -> list[Item]:
    return [Item(key, f"file {i}", [f"d\udcff/{i}", i], i % 2, f"héllo {i}\n") for i, key in enumerate(keys)]


def test_items_come_back_as_the_source_told_them(tmp_path: Path) -> None:
    items = [*some_items([f"k/{i}" for i in range(100)]), Item("bad", "file x", problem="has no caption")]
    source = ListedSource(items)
    built = ItemTable.build(source, tmp_path / "table")
    opened = ItemTable.open(tmp_path / "table")
    assert opened is not None
    for table in (built, opened):
        assert [table[i] for i in range(len(table))] == items
        assert (table.class_names, table.num_ignored, table.num_problems, table.shuffled) == (("a", "b"), 3, 1, True)
        assert table.key_hashes().tolist() == [key_hash(item.key) for item in items]
    assert built.fingerprint == opened.fingerprint
    with pytest.raises(IndexError):
        built[101]
    with pytest.raises(IndexError):
        built[-1]


def test_the_fingerprint_follows_every_line_and_their_order(tmp_path: Path) -> None:
    items = some_items(["a", "b"])
    changed = [items[0], replace(items[1], location=["d/1", 7])]
    prints = [ItemTable.build(ListedSource(x), tmp_path).fingerprint for x in (items, items[::-1], changed, items)]
    assert len(set(prints)) == 3
    assert prints[0] == prints[3]


def test_many_threads_read_one_table(tmp_path: Path) -> None:
    items = some_items([str(i) for i in range(2000)])
    table = ItemTable.build(ListedSource(items), tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(table.__getitem__, range(2000))) == items


def test_every_later_item_of_a_key_has_a_problem(tmp_path: Path) -> None:
    items = some_items(["a", "b", "a", "c", "a", "b"])
    items[5] = replace(items[5], problem="has no caption")
    table = ItemTable.build(ListedSource(items), tmp_path)
    assert [table[i].problem for i in range(6)] == [
        None,
        None,
        "its key a is also that of file 0",
        None,
        "its key a is also that of file 0",
        "has no caption",
    ]
    assert table.num_problems == 3


@settings(max_examples=60)
@given(keys=st.lists(st.integers(0, 30), min_size=1, max_size=80), block=st.integers(1, 9), bits=st.integers(0, 64))
def test_duplicates_are_exact_also_where_hashes_collide_and_blocks_end(
    tmp_path_factory: pytest.TempPathFactory, keys: list[int], block: int, bits: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (array_files, duplicate_keys):
            patch.setattr(module, "BLOCK", block)
        patch.setattr(items_module, "key_hash", lambda key: key_hash(key) >> bits)  # the fewer bits, the more collide
        items = some_items(list(map(str, keys)))
        table = ItemTable.build(ListedSource(items), tmp_path_factory.mktemp("table"))
    first: dict[int, int] = {}
    for i, key in enumerate(keys):
        other = first.setdefault(key, i)
        assert table[i].problem == (None if other == i else f"its key {key} is also that of file {other}")
    assert table.num_problems == len(keys) - len(first)


def test_what_cannot_be_encoded_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no items"):
        ItemTable.build(ListedSource([]), tmp_path)
    with pytest.raises(InputError, match=r"none of its 2 items.*file 0: has no caption"):
        ItemTable.build(ListedSource([replace(x, problem="has no caption") for x in some_items(["a", "b"])]), tmp_path)
    assert ItemTable.open(tmp_path) is None


def test_an_incomplete_table_is_none_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    class FailingSource(ListedSource):
        def scan(self) -> Iterator[Item]:
            yield from self.items
            raise InputError("the tenth tar is missing")

    assert ItemTable.open(tmp_path / "nowhere") is None
    items = some_items(["a", "b"])
    ItemTable.build(ListedSource(items), tmp_path)
    with pytest.raises(InputError, match="tenth"):
        ItemTable.build(FailingSource(items), tmp_path)
    assert ItemTable.open(tmp_path) is None
    ItemTable.build(ListedSource(items), tmp_path)
    for name in ("items.jsonl", "items.npy", "keys.npy", "duplicates.npy"):
        content = (tmp_path / name).read_bytes()
        # NumPy's own parser of headers has an error of its own for each of these, or takes the numbers for others.
        damaged = (content.replace(b"fortran", b"('((((("), content.replace(b"8'", b"4'"), content.replace(b"}", b"\0"))
        for cut in (content[:-1], b"", *(damaged if name.endswith(".npy") else ())):
            (tmp_path / name).write_bytes(cut)
            with pytest.raises(PomscaleError, match=rf"items\.json: the list of items .*{name}.* delete this file"):
                ItemTable.open(tmp_path)
        (tmp_path / name).write_bytes(content)
    table = json.loads((tmp_path / "items.json").read_text())
    (tmp_path / "items.json").write_text(json.dumps({**table, "format": 0}))
    with pytest.raises(PomscaleError, match=r"items\.json: the list of items cannot be read: format: .* delete this"):
        ItemTable.open(tmp_path)


def test_a_disk_that_fails_is_no_reason_to_list_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ItemTable.build(ListedSource(some_items(["a"])), tmp_path)

    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        with pytest.raises(PomscaleError, match=r"items\.json: .*Stale file handle.*run the same command again"):
            ItemTable.open(tmp_path)
    (tmp_path / "keys.npy").unlink()
    with pytest.raises(PomscaleError, match=r"No such file.*keys\.npy"):
        ItemTable.open(tmp_path)


def test_what_a_killed_listing_left_is_removed(tmp_path: Path) -> None:
    script = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent), str(TESTS)]!r}
from pathlib import Path
from test_items import ListedSource, some_items
from data_pipelines.encode.items import ItemTable

class Killed(ListedSource):
    def scan(self):
        yield from self.items
        os._exit(9)

ItemTable.build(Killed(some_items(["a", "b"])), Path({str(tmp_path)!r}))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert len(list(tmp_path.glob("*.tmp"))) == 3
    others = tmp_path / "part-000000.json.7-00000000.tmp"
    others.touch()
    ItemTable.build(ListedSource(some_items(["a", "a"])), tmp_path)
    names = {"items.jsonl", "items.npy", "keys.npy", "duplicates.npy", "items.json"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, others.name}


@pytest.mark.parametrize("no_links", [None, errno.ENOSYS, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_table_is_shared_also_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_links: int | None
) -> None:
    items = some_items(["a", "b", "a"])
    ItemTable.build(ListedSource(items), tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "items.jsonl").write_text("of an earlier table, never finished")

    def refused(*arguments: object) -> None:
        raise OSError(no_links, os.strerror(no_links or 0))

    if no_links is not None:
        monkeypatch.setattr(os, "link", refused)
    for _ in range(2):
        share_table(tmp_path / "one", tmp_path / "two")
        share_table(tmp_path / "one", tmp_path / "one")
    table = ItemTable.open(tmp_path / "two")
    assert table is not None
    assert [table[i].key for i in range(3)] == ["a", "b", "a"]
    assert (tmp_path / "two" / "keys.npy").samefile(tmp_path / "one" / "keys.npy") == (no_links is None)


_MEASURE = """
import sys, threading
from pathlib import Path
from data_pipelines.encode.item_order import ItemOrder
from data_pipelines.encode.items import ItemTable
from data_pipelines.encode.latents_source import build_encode_source
from pomscale.config.encode import TableSourceConfig

def anonymous_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.01):
        peaks.append(max(peaks.pop(), anonymous_kib()))

path, folder = sys.argv[1:]
config = TableSourceConfig(kind="table", path=path, media="{page_dir}/{videoid}.mp4", key="videoid", caption="name")
before = anonymous_kib()
peaks, done = [before], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
table = ItemTable.build(build_encode_source(config), Path(folder))
order = ItemOrder(len(table), 0, True)
for position in range(0, len(table), 97):
    table[order.item(position)]
done.set()
watcher.join()
print(len(table), table.num_problems, peaks[0] - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_items(tmp_path: Path) -> None:
    """Anonymous memory; what is mapped from files is the kernel's to drop. Every 50th key is there twice."""
    grown = {}
    for num_items in (10_000, 100_000):
        path = tmp_path / f"{num_items}.jsonl"
        with path.open("w") as stream:
            for i in range(num_items):
                key = i - 1 if i % 50 == 49 else i
                stream.write(f'{{"videoid": {key}, "page_dir": "0001_0050", "name": "a man walks a dog, {i}"}}\n')
        command = [sys.executable, "-c", _MEASURE, str(path), str(tmp_path / "table")]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found, num_problems, grown[num_items] = map(int, out.split())
        assert (found, num_problems) == (num_items, num_items // 50)
    print(f"KiB of anonymous memory by number of items: {grown}")
    assert grown[100_000] < grown[10_000] + 8 * 1024
