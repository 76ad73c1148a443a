"""Tables of paths, of bytes and of captions: Parquet, CSV and JSONL."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile

from data_pipelines.encode.items import ItemTable
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.encode import TableSourceConfig
from pomscale.sources import build_source
from pomscale.sources.protocol import Item, Source, SourceChangedError

Rows = Sequence[dict[str, Any]]


def table(path: Path | str | list[str], **options: Any) -> Source:
    paths = path if isinstance(path, list) else str(path)
    return build_source(TableSourceConfig(kind="table", path=paths, **options))


def scan(source: Source) -> list[Item]:
    return list(source.scan())


def content(source: Source, item: Item) -> bytes:
    with source.open(item) as stream:
        return stream.read()


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_parquet(path: Path, rows: Rows, row_group_size: int = 3) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}

WEBVID = [
    {
        "videoid": 1021,
        "page_dir": "000001_000050",
        "name": 'A man, walking his "dog".\nSlowly',
        "duration": "PT00H00M05S",
    },
    {"videoid": 7, "page_dir": "000051_000100", "name": " Über die Brücke ", "duration": None},
    {"videoid": 8, "page_dir": "000051_000100", "name": None, "duration": None},
    {"videoid": 9, "page_dir": None, "name": "no folder", "duration": None},
    {"videoid": None, "page_dir": "000051_000100", "name": "no id", "duration": None},
]


@pytest.mark.parametrize("kind", list(WRITERS))
def test_webvid(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / f"results.{kind}", WEBVID)
    (tmp_path / "videos" / "000001_000050").mkdir(parents=True)
    (tmp_path / "videos" / "000001_000050" / "1021.mp4").write_bytes(b"clip")
    source = table(
        tmp_path / f"results.{kind}",
        media="{page_dir}/{videoid}.mp4",
        root=f"{tmp_path}/videos",
        key="videoid",
        caption="name",
    )
    items = scan(source)
    missing = "its caption is empty" if kind == "csv" else "its caption is missing"
    assert [(item.key, item.location, item.caption, item.problem) for item in items] == [
        ("1021", "000001_000050/1021.mp4", 'A man, walking his "dog".\nSlowly', None),
        ("7", "000051_000100/7.mp4", "Über die Brücke", None),
        ("8", "000051_000100/8.mp4", None, missing),
        ("9", None, "no folder", "its page_dir is missing"),
        ("000000000004", None, "no id", "its key is missing"),
    ]
    assert items[1].where == f"results.{kind} row 1: 000051_000100/7.mp4"
    assert items[3].where == f"results.{kind} row 3"
    assert (source.shuffled, source.class_names, source.num_ignored) == (True, (), 0)
    assert content(source, items[0]) == b"clip"
    with pytest.raises(FileNotFoundError):
        source.open(items[1])


@pytest.mark.parametrize("kind", list(WRITERS))
def test_several_tables_are_one_in_the_order_of_their_paths(tmp_path: Path, kind: str) -> None:
    for i in (1, 0, 2):
        WRITERS[kind](tmp_path / f"part-{i}.{kind}", [{"path": f"{i}{k}.jpg", "label": k} for k in range(5)])
    source = table(f"{tmp_path}/part-{{0..1}}.{kind}", media="{path}", label="label")
    items = scan(source)
    assert [item.key for item in items] == [f"{i:012d}" for i in range(10)]
    assert [item.location for item in items] == [f"{i}{k}.jpg" for i in range(2) for k in range(5)]
    assert items[7].where == f"part-1.{kind} row 2: 12.jpg"
    assert source.class_names == ("0", "1", "2", "3", "4")
    assert [item.label for item in items] == [0, 1, 2, 3, 4] * 2


def test_all_kinds_of_a_table_have_one_fingerprint_and_every_value_counts(tmp_path: Path) -> None:
    rows = [{"path": "a.jpg", "text": "one", "label": 0}, {"path": "b.jpg", "text": "two", "label": 1}]

    def fingerprint(kind: str, rows: Rows) -> str:
        WRITERS[kind](tmp_path / f"t.{kind}", rows)
        source = table(tmp_path / f"t.{kind}", media="{path}", caption="text", label="label")
        return ItemTable.build(source, tmp_path / "table").fingerprint

    changed = [[rows[0], rows[1] | change] for change in ({"path": "c.jpg"}, {"text": "three"}, {"label": 2})]
    assert len({fingerprint(kind, rows) for kind in WRITERS}) == 1
    assert len({fingerprint("csv", more) for more in (rows, *changed, rows[::-1])}) == 5


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("with_nulls", [False, True])
def test_files_in_parquet(tmp_path: Path, nested: bool, with_nulls: bool) -> None:
    """Also as Hugging Face lays pictures out: a struct of bytes and path."""
    pictures = [None if with_nulls and i % 5 == 2 else f"picture {i}".encode() for i in range(20)]
    column: list[Any] = [None if p is None else {"bytes": p, "path": "x.jpg"} for p in pictures] if nested else pictures
    for name, part in (("a", slice(0, 11)), ("b", slice(11, 20))):
        rows = [{"image": image, "label": 1.0} for image in column[part]]
        write_parquet(tmp_path / f"{name}.parquet", rows, row_group_size=4)
    source = table(tmp_path / "*.parquet", bytes_column="image.bytes" if nested else "image", label="label")
    items = scan(source)
    name = "image.bytes" if nested else "image"
    assert [item.problem for item in items] == [None if p else f"its {name} is missing" for p in pictures]
    assert not source.shuffled
    assert source.class_names == ("0", "1")
    good = [(item, picture) for item, picture in zip(items, pictures, strict=True) if picture]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda pair: content(source, pair[0]), good * 5)) == [p for _, p in good] * 5
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    again = table(tmp_path / "*.parquet", bytes_column=name)
    with pytest.raises(SourceChangedError, match="changed since it was listed"):
        again.open(good[-1][0])


def test_a_row_group_behind_a_url_is_read_once_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.bytes(50_000) for _ in range(400)]
    write_parquet(tmp_path / "a.parquet", [{"jpg": picture} for picture in pictures], row_group_size=100)
    storage = fsspec.filesystem("memory")
    storage.put(str(tmp_path / "a.parquet"), "/set/a.parquet")
    source = table("memory://set/a.parquet", bytes_column="jpg")
    items = scan(source)
    num_read = 0
    read = MemoryFile.read

    def counted(self: MemoryFile, size: int = -1) -> bytes:
        nonlocal num_read
        found = read(self, size)
        num_read += len(found)
        return found

    monkeypatch.setattr(MemoryFile, "read", counted, raising=False)
    monkeypatch.setattr(type(storage), "cat_file", None)  # the whole file at once
    barrier = Barrier(8)

    def first_of(i: int) -> bytes:
        barrier.wait()
        return content(source, items[100 + i])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(first_of, range(8))) == pictures[100:108]
    assert 100 * 50_000 < num_read < 1.2 * 100 * 50_000
    storage.rm("/set", recursive=True)
    with pytest.raises(FileNotFoundError):
        content(source, items[300])
    assert content(source, items[199]) == pictures[199]  # a group that failed leaves the others
    storage.put(str(tmp_path / "a.parquet"), "/set/a.parquet")
    assert content(source, items[300]) == pictures[300]
    storage.pipe("/set/a.parquet", b"short")
    with pytest.raises(SourceChangedError, match="changed since it was listed"):
        content(source, items[0])
    storage.rm("/set", recursive=True)


def test_tables_of_files_that_moved(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / "old" / str(i)).mkdir(parents=True)
        write_parquet(tmp_path / "old" / str(i) / "t.parquet", [{"jpg": f"{i}".encode()}])
    items = scan(table(f"{tmp_path}/old/*/*.parquet", bytes_column="jpg"))
    (tmp_path / "old").rename(tmp_path / "moved")
    moved = table(f"{tmp_path}/moved/*/*.parquet", bytes_column="jpg")
    assert [content(moved, item) for item in items] == [b"0", b"1"]


def test_a_row_group_that_is_damaged_after_the_scan(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"jpg": bytes([i]) * 999} for i in range(6)])
    source = table(tmp_path / "a.parquet", bytes_column="jpg")
    items = scan(source)
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    damaged[4:40] = b"\xff" * 36
    (tmp_path / "a.parquet").write_bytes(damaged)
    with pytest.raises(SourceChangedError, match="its row group 0 is damaged"):
        source.open(items[0])
    assert content(source, items[3]) == bytes([3]) * 999


def test_tables_of_captions_only(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [{"id": "a.b", "text": "one"}, {"id": "/abs", "text": "two"}])
    source = table(tmp_path / "t.parquet", key="id", caption="text")
    items = scan(source)
    assert [(item.key, item.caption, item.location) for item in items] == [("a_b", "one", None), ("/abs", "two", None)]
    assert "empty part" in (items[1].problem or "")
    with pytest.raises(InputError, match=r"captions only.*source\.media"):
        source.open(items[0])


def test_bad_lines_of_jsonl_are_problems_of_their_own(tmp_path: Path) -> None:
    lines = [
        b'{"path": "a.jpg", "text": "good"}',
        b"",
        b'{"path": "b.jpg", "te',
        b'["b.jpg"]',
        b'{"path": "b.jpg", "text": "latin \xe9"}',
        b'{"path": "c.jpg"}',
        b'{"path": "d.jpg", "text": "lone surrogate \\ud800"}',
    ]
    (tmp_path / "t.jsonl").write_bytes(b"\r\n".join(lines))
    items = scan(table(tmp_path / "t.jsonl", media="{path}", caption="text"))
    assert [(item.key[-1], item.problem) for item in items] == [
        ("0", None),
        ("1", "the line is no JSON"),
        ("2", "the line is no JSON object"),
        ("3", "the line is no JSON"),
        ("4", "its caption is missing"),
        ("5", "its caption is not UTF-8"),
    ]


CUT_OFF = "if a line break in the row before is not quoted, that one is cut off, too"


def test_bad_lines_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfpath,text\r\na.jpg,good\r\nb.jpg\r\nc.jpg,latin \xe9\r\n\xff.jpg,d\r\n")
    items = scan(table(path, media="{path}", caption="text", key="path"))
    assert [(item.key, item.problem) for item in items] == [
        ("a_jpg", None),
        (
            "000000000001",
            f"it has 1 of 2 cells: {CUT_OFF}",
        ),
        ("c_jpg", "its caption is not UTF-8"),
        (r"\xff_jpg", r"the name \xff_jpg is not UTF-8; rename it"),
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("b.png,a red fox, in the snow", "it has 3 cells in 2 columns: a cell with commas must be quoted"),
        ("b.png", f"it has 1 of 2 cells: {CUT_OFF}"),
        ('b.png,"a "red" fox"', "a quote inside a quoted cell is written twice"),
        ('b.png,"a \\"red\\" fox"', "a quote inside a quoted cell is written twice"),
        (f"b.png,{'word' * 2**22}+", "field larger than field limit"),
        ('b.png,a "red" fox', None),
        ('b.png,"a ""red"" fox,\nin the snow"', None),
        (f"b.png,{'word ' * 30_000}", None),
    ],
)
def test_a_csv_row_that_cannot_be_told_is_a_problem_of_its_own(tmp_path: Path, row: str, problem: str | None) -> None:
    (tmp_path / "t.csv").write_text(f"path,text\na.png,first\n{row}\n\nc.png,last\n")
    before, found, after = scan(table(tmp_path / "t.csv", media="{path}", caption="text"))
    assert (before.caption, after.caption, after.problem) == ("first", "last", None)
    assert (problem in (found.problem or "")) if problem else (found.problem is None)
    captions = {'b.png,a "red" fox': 'a "red" fox', 'b.png,"a ""red"" fox,\nin the snow"': 'a "red" fox,\nin the snow'}
    assert problem or found.caption == captions.get(row, row.removeprefix("b.png,").strip())


def test_a_long_cell_that_is_not_used_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"path,text,other\na.png,one,{'x' * 200_000}\nb.png,two,{'x,x' * 9}\n")
    items = scan(table(tmp_path / "t.csv", media="{path}", caption="text"))
    assert [(item.caption, item.problem is None) for item in items] == [("one", True), (None, False)]


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ('a.png,"never closed\nb.png,b\nc.png,c\n', "2 to 4"),
        ('a.png,a\nb.png,"never closed\nc.png,"c"\nd.png,d\n', "3 to 4"),
        (f'a.png,a\nb.png,"{"never closed" * 2**17}\n{"c.png,c" * 2**17}', "3 to 4"),
    ],
)
def test_a_quote_that_takes_in_other_rows_is_refused(tmp_path: Path, rows: str, lines: str) -> None:
    (tmp_path / "t.csv").write_text(f"path,text\n{rows}")
    with pytest.raises(InputError, match=rf"t\.csv lines {lines}: a quote is not closed.*mend line {lines[0]}"):
        scan(table(tmp_path / "t.csv", media="{path}", caption="text"))


@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_column_named_twice_is_refused_where_it_is_used(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        path.write_text("path,text,text\na.png,one,two\n")
    elif kind == "jsonl":
        path.write_text('{"path": "a.png", "text": "one", "text": "two"}\n{"path": "b.png", "text": "b"}\n')
    else:
        pq.write_table(pa.table([["a.png"], ["one"], ["two"]], names=["path", "text", "text"]), path)
    if kind == "jsonl":  # no column, but the fault of one line
        assert [item.problem for item in scan(table(path, media="{path}"))] == ["the line names 'text' twice", None]
        return
    with pytest.raises(InputError, match=r"has 2 columns 'text'; rename all but one"):
        scan(table(path, media="{path}", caption="text"))
    assert [item.location for item in scan(table(path, media="{path}"))] == ["a.png"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_compressed_tables_are_named(tmp_path: Path, kind: str) -> None:
    rows = [{"path": "a.png"}]
    WRITERS[kind](tmp_path / f"good.{kind}", rows * 9)
    (tmp_path / f"t.{kind}").write_bytes(gzip.compress((tmp_path / f"good.{kind}").read_bytes()))
    with pytest.raises(InputError, match=rf"t\.{kind}: is compressed \(gzip\); decompress it first"):
        scan(table(tmp_path / f"*.{kind}", media="{path}"))
    (tmp_path / f"t.{kind}").rename(tmp_path / f"t.{kind}.gz")
    with pytest.raises(InputError, match=rf"t\.{kind}\.gz: tables are .parquet, .csv or .jsonl, not compressed"):
        scan(table(tmp_path / f"t.{kind}.gz", media="{path}"))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_tables_in_utf16_are_named(tmp_path: Path, kind: str, encoding: str) -> None:
    """Every other row of a JSONL would be read, and of a CSV no column."""
    WRITERS[kind](tmp_path / f"t.{kind}", [{"path": "a.png"}] * 4)
    text = (tmp_path / f"t.{kind}").read_text()
    (tmp_path / f"t.{kind}").write_bytes(f"\ufeff{text}".encode(encoding))
    with pytest.raises(InputError, match=rf"t\.{kind}: is UTF-16; write it as UTF-8: iconv"):
        scan(table(tmp_path / f"t.{kind}", media="{path}"))


@pytest.mark.parametrize("text", ['[{"path": "a.png"}]', '\ufeff[\n{"path": "a.png"},\n{"path": "b.png"}\n]\n'])
def test_one_json_array_is_no_table_of_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"t\.jsonl: is one JSON array; write one object per line: jq"):
        scan(table(tmp_path / "t.jsonl", media="{path}"))


TEXT = "Über die Brücke"
LAYOUTS = {
    "string": pa.string(), "large_string": pa.large_string(), "string_view": pa.string_view(),
    "binary": pa.binary(), "large_binary": pa.large_binary(), "binary_view": pa.binary_view(),
    "fixed_size_binary": pa.binary(20),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of binary": pa.dictionary(pa.int8(), pa.large_binary()),
}  # fmt: skip


def column(values: Sequence[bytes | None], layout: str) -> pa.Array:
    """A column of bytes or of texts as pyarrow writes it, also where they are no UTF-8, as other writers may."""
    kind = LAYOUTS[layout]
    if layout == "fixed_size_binary":
        return pa.array([None if value is None else value.ljust(20, b"\0") for value in values], kind)
    if layout.startswith("dictionary"):
        return pa.array(values, pa.binary()).cast(pa.binary()).dictionary_encode().cast(kind)
    made = pa.array(values, pa.large_binary() if "large" in layout else pa.binary())
    return made.view(kind) if layout in ("string", "large_string") else made.cast(kind)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_texts_in_parquet_are_texts_in_every_layout(tmp_path: Path, layout: str) -> None:
    texts = [TEXT.encode(), None, b"", b"short"]
    columns = {"id": column([b"a", b"b", b"c", b"d"], layout), "text": column(texts, layout)}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    items = scan(table(tmp_path / "t.parquet", media="{id}.png", key="id", caption="text"))
    assert [(item.key, item.location, item.caption, item.problem) for item in items] == [
        ("a", "a.png", TEXT, None),
        ("b", "b.png", None, "its caption is missing"),
        ("c", "c.png", None, "its caption is empty"),
        ("d", "d.png", "short", None),
    ]


@pytest.mark.parametrize("layout", ["string", "large_string", "binary", "binary_view"])
def test_texts_in_parquet_that_are_no_utf_8_are_problems_of_their_own(tmp_path: Path, layout: str) -> None:
    columns = {"id": column([b"a", b"b"], layout), "text": column([b"latin \xe9", b"good"], layout)}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    items = scan(table(tmp_path / "t.parquet", media="{id}.png", caption="text"))
    assert [item.problem for item in items] == ["its caption is not UTF-8", None]


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "binary" in layout])
@pytest.mark.parametrize("nested", [False, True])
def test_files_in_parquet_are_read_in_every_layout(tmp_path: Path, layout: str, nested: bool) -> None:
    """binary_view is what pa.table makes of a polars frame."""
    files = [f"picture {i:012d}".encode() if i != 3 else None for i in range(7)]

    def group(begin: int) -> pa.Table:
        part = column(files[begin : begin + 3], layout)
        return pa.table({"image": pa.StructArray.from_arrays([part], ["bytes"]) if nested else part})

    with pq.ParquetWriter(tmp_path / "t.parquet", group(0).schema) as writer:
        for begin in (0, 3, 6):
            writer.write_table(group(begin))
    name = "image.bytes" if nested else "image"
    source = table(tmp_path / "t.parquet", bytes_column=name)
    items = scan(source)
    assert [item.problem for item in items] == [f"its {name} is missing" if i == 3 else None for i in range(7)]
    assert [content(source, items[i]) for i in (6, 2, 0, 4)] == [files[i] for i in (6, 2, 0, 4)]


def test_lists_are_no_keys_and_no_paths(tmp_path: Path) -> None:
    for kind in ("jsonl", "parquet"):
        WRITERS[kind](tmp_path / f"t.{kind}", [{"id": ["a"], "path": "a.png"}, {"id": ["b"], "path": "b.png"}])
        keyed = scan(table(tmp_path / f"t.{kind}", media="{path}", key="id"))
        assert [item.problem for item in keyed] == [f"its key is not one value but ['{key}']" for key in "ab"]
        named = scan(table(tmp_path / f"t.{kind}", media="{id}.png"))
        assert [item.problem for item in named] == [f"its id is not one value but ['{key}']" for key in "ab"]


@pytest.mark.parametrize("kind", list(WRITERS))
def test_missing_columns_are_named_with_those_there_are(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"t.{kind}"
    WRITERS[kind](path, [{"path": "a.jpg", "text": "one"}])
    with pytest.raises(InputError, match=rf"t\.{kind} has no column 'caption'; its columns are path, text"):
        scan(table(path, media="{path}", caption="caption"))


def test_wrong_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").write_bytes(b"x")
    with pytest.raises(InputError, match=r"t\.xlsx: tables are \.parquet, \.csv or \.jsonl"):
        scan(table(tmp_path / "t.xlsx"))
    (tmp_path / "t.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(InputError, match=r"t\.parquet cannot be read: .*mend or remove it"):
        scan(table(tmp_path / "t.parquet"))
    write_parquet(tmp_path / "t.parquet", [{"jpg": "text"}])
    with pytest.raises(InputError, match=r"column 'jpg' of .* is string, not binary"):
        scan(table(tmp_path / "t.parquet", bytes_column="jpg"))
    write_csv(tmp_path / "t.csv", [{"jpg": "x"}])
    with pytest.raises(InputError, match="only Parquet can"):
        scan(table(tmp_path / "t.csv", bytes_column="jpg"))
    (tmp_path / "t.csv").write_bytes(b"")
    with pytest.raises(InputError, match="its columns are none"):
        scan(table(tmp_path / "t.csv", caption="text"))
    with pytest.raises(InputError, match=r"source\.media: .*a brace has no partner"):
        table(tmp_path / "t.csv", media="{page_dir/{videoid}.mp4")


def test_tables_and_files_behind_urls(tmp_path: Path) -> None:
    storage = fsspec.filesystem("memory")
    rows = [{"path": f"{i}.jpg"} for i in range(10)]
    for kind, write in WRITERS.items():
        write(tmp_path / f"t.{kind}", rows)
        storage.put(str(tmp_path / f"t.{kind}"), f"/set/t.{kind}")
        storage.pipe("/pictures/3.jpg", b"picture")
        source = table(f"memory://set/*.{kind}", media="{path}", root="memory://pictures/")
        items = scan(source)
        assert [item.location for item in items] == [row["path"] for row in rows]
        assert content(source, items[3]) == b"picture"
        with pytest.raises(FileNotFoundError):
            source.open(items[4])
    write_parquet(tmp_path / "bytes.parquet", [{"jpg": b"in the row"}])
    storage.put(str(tmp_path / "bytes.parquet"), "/set/bytes.parquet")
    source = table("memory://set/bytes.parquet", bytes_column="jpg")
    assert content(source, next(iter(source.scan()))) == b"in the row"
    storage.rm("/", recursive=True)


def test_one_dead_link_is_told_from_a_server_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pomscale.shards.location.RETRY_DELAYS_S", (0.01, 0.01, 0.01))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = int(self.path.removeprefix("/").removesuffix(".jpg"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"picture")

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        root = f"http://127.0.0.1:{server.server_port}"
        write_jsonl(tmp_path / "t.jsonl", [{"url": f"{root}/{s}.jpg"} for s in (200, 404, 403, 410, 429, 503)])
        source = table(tmp_path / "t.jsonl", media="{url}")
        items = scan(source)
        assert content(source, items[0]) == b"picture"
        errors: list[type[Exception]] = []
        for item in items[1:]:
            with pytest.raises((FileNotFoundError, SourceChangedError, PomscaleError)) as caught:
                source.open(item)
            errors.append(caught.type)
        assert errors == [FileNotFoundError, SourceChangedError, SourceChangedError, PomscaleError, PomscaleError]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_parquet_asks_for_pyarrow_and_nothing_else_does(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [{"path": "a.jpg"}])
    script = f"""
import sys
sys.modules["pyarrow"] = None  # as where it is not installed
from pomscale.sources import build_source
from pomscale.config.encode import TableSourceConfig
print(len(list(build_source(TableSourceConfig(kind="table", path="{tmp_path}/t.csv", media="{{path}}")).scan())))
(list(build_source(TableSourceConfig(kind="table", path="{tmp_path}/*.parquet")).scan()))
"""
    (tmp_path / "t.parquet").write_bytes(b"x")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "1\n"
    assert "InputError: source: Parquet tables need pyarrow: pip install -e '.[table]'" in done.stderr
