"""WebDataset tars, as other tools write them, and the shards of our own datasets."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipelines.encode.items import ItemTable
from data_pipelines.encode.latents_source import build_encode_source
from pomscale.base.errors import InputError
from pomscale.config.encode import LatentsSourceConfig, TarSourceConfig
from pomscale.shards.index import key_hash
from pomscale.sources import build_source
from pomscale.sources.protocol import Item, Source, SourceChangedError
from support.file_server import FileServer
from support.synthetic_dataset import write_dataset

NEIGHBOURS = (
    "if it is elsewhere in the tar, write the tar with `tar --sort=name`: the members of a sample must be neighbours"
)


def tars(path: Path | str | list[str], **options: Any) -> Source:
    paths = path if isinstance(path, list) else str(path)
    return build_source(TarSourceConfig(kind="tars", path=paths, **options))


def scan(source: Source) -> list[Item]:
    return list(source.scan())


def problems(source: Source) -> dict[str, str | None]:
    return {item.key: item.problem for item in source.scan()}


def content(source: Source, item: Item) -> bytes:
    with source.open(item) as stream:
        return stream.read()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members:
            header = tarfile.TarInfo(name)
            header.size = len(payload)
            tar.addfile(header, io.BytesIO(payload))


def img2dataset_sample(key: str, payload: bytes, caption: str | None, **fields: object) -> list[tuple[str, bytes]]:
    """Picture, caption and metadata in the order and with the names that img2dataset gives them."""
    text = [] if caption is None else [(f"{key}.txt", caption.encode())]
    metadata = {"caption": caption, "url": f"http://x/{key}", "key": key, "status": "success", **fields}
    return [(f"{key}.jpg", payload), *text, (f"{key}.json", json.dumps(metadata).encode())]


def test_tars_of_stock_webdataset_are_read(tmp_path: Path) -> None:
    """ShardWriter writes PAX headers: its times are fractions of a second."""
    rng = np.random.default_rng(0)
    written: dict[str, Mapping[str, Any]] = {}
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            writer.write({"__key__": f"n0{i % 3}/{i:04d}", "jpg": pixels, "cls": i % 3, "json": {"name": f"cat {i}"}})
            written[f"train-{i // 4:06d}/n0{i % 3}/{i:04d}"] = {"label": i % 3, "caption": f"cat {i}"}
    assert b"mtime" in (tmp_path / "train-000000.tar").read_bytes()  # a PAX header
    source = tars(tmp_path / "train-*.tar", label="cls", caption="json:name")
    items = scan(source)
    assert {item.key: {"label": item.label, "caption": item.caption} for item in items} == written
    assert [item.problem for item in items] == [None] * 10
    assert source.class_names == ("0", "1", "2")
    assert not source.shuffled
    stock = {
        sample["__key__"]: sample["jpg"]
        for sample in webdataset.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False)
    }
    for item in items:
        picture = content(source, item)
        assert picture == stock[item.key.partition("/")[2]]
        assert Image.open(io.BytesIO(picture)).size == (8, 8)


def test_tars_of_gnu_tar_are_read(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.cls", "b.jpg", "b.cls", "README", ".DS_Store"):
        (tmp_path / name).write_bytes(b"1")
    subprocess.run("tar cf set.tar --sort=name ./*.* ./README ./.DS_Store", shell=True, check=True, cwd=tmp_path)
    source = tars(tmp_path / "set.tar", label="cls")
    assert [(item.key, item.label, item.problem) for item in source.scan()] == [
        ("set/a", 1, None),
        ("set/b", 1, None),
    ]
    assert source.num_ignored == 2
    assert source.class_names == ("0", "1")


def test_the_img2dataset_layout(tmp_path: Path) -> None:
    """Keys start again in every tar; files that could not be downloaded are only in the parquet beside it."""
    for shard in range(2):
        samples = [
            img2dataset_sample("000000000", b"first", "a dog", width=10, class_id=7),
            img2dataset_sample("000000003", b"second", None, class_id=None),
            img2dataset_sample("000000005", b"third", "", class_id="seven"),
        ]
        write_tar(tmp_path / f"{shard:05d}.tar", [member for sample in samples for member in sample])
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    source = tars(f"{tmp_path}/{{00000..00001}}.tar", caption="txt", label="json:class_id")
    items = scan(source)
    assert [(item.key, item.where, item.label, item.caption, item.problem) for item in items[:3]] == [
        ("00000/000000000", "00000.tar/000000000.jpg", 7, "a dog", None),
        ("00000/000000003", "00000.tar/000000003.jpg", None, None, "its class is missing"),
        ("00000/000000005", "00000.tar/000000005.jpg", None, None, "its class 'seven' is no class id (0, 1, ...)"),
    ]
    assert len({item.key for item in items}) == 6
    assert [content(source, item) for item in items[3:]] == [b"first", b"second", b"third"]
    assert problems(tars(f"{tmp_path}/00000.tar", caption="txt")) == {
        "00000/000000000": None,
        "00000/000000003": f"its caption is missing: it has no txt member; {NEIGHBOURS}",
        "00000/000000005": "its caption is empty",
    }


def test_what_samples_may_lack(tmp_path: Path) -> None:
    samples = {
        "nothing": [("json", b"{}")],
        "broken": [("jpg", b"x"), ("json", b"{")],
        "list": [("jpg", b"x"), ("json", b"[]")],
        "number": [("jpg", b"x"), ("json", b'{"text": 5}')],
        "latin": [("jpg", b"x"), ("json", b'{"text": "\\udc80"}')],
        "good": [("MP4", b"clip"), ("json", b'{"text": " a \\u00e9 "}')],
    }
    members = [(f"d/{key}.{suffix}", payload) for key, parts in samples.items() for suffix, payload in parts]
    write_tar(tmp_path / "x.y.tar", members)
    source = tars(tmp_path / "x.y.tar", caption="json:text")
    items = {item.key.removeprefix("x_y/d/"): item for item in source.scan()}
    assert {key: item.problem for key, item in items.items()} == {
        "nothing": f"none of its members (json) is a picture or a clip; {NEIGHBOURS}",
        "broken": "its json member is no JSON",
        "list": "its json member is no JSON object",
        "number": "its caption is no text but 5",
        "latin": "its caption is not UTF-8",
        "good": None,
    }
    assert content(source, items["good"]) == b"clip"
    assert items["good"].caption == "a é"


def test_the_case_of_suffixes_does_not_matter(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.PNG", b"x"), ("a.TXT", b"red"), ("a.Json", b'{"class": 1}')])
    for caption, label in (("txt", "json:class"), ("TXT", "JSON:class")):
        (item,) = scan(tars(tmp_path / "0.tar", caption=caption, label=label))
        assert (item.where, item.caption, item.label, item.problem) == ("0.tar/a.PNG", "red", 1, None)


def test_members_that_are_no_neighbours_are_told_with_the_remedy(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.png", b"x"), ("1.png", b"x"), ("0.txt", b"red"), ("1.txt", b"blue")])
    with pytest.raises(InputError, match=r"none of its 4 items .*its caption is missing.*`tar --sort=name`"):
        ItemTable.build(tars(tmp_path / "0.tar", caption="txt"), tmp_path / "table")
    found = [item.problem for item in scan(tars(tmp_path / "0.tar"))]
    assert found == [None, None, *2 * [f"none of its members (txt) is a picture or a clip; {NEIGHBOURS}"]]


def test_the_picture_of_a_sample(tmp_path: Path) -> None:
    """A suffix may have several parts; where a sample has several pictures, the recipe says which one."""
    samples = {
        "one": [("rgb.png", b"rgb")],
        "two": [("png", b"mask"), ("webp", b"photo")],
        "parts": [("rgb.PNG", b"rgb"), ("mask.png", b"mask"), ("txt", b"x")],
    }
    members = [(f"{key}.{suffix}", payload) for key, parts in samples.items() for suffix, payload in parts]
    write_tar(tmp_path / "0.tar", members)

    def found(**options: str) -> list[bytes | str | None]:
        source = tars(tmp_path / "0.tar", **options)
        return [item.problem or content(source, item) for item in source.scan()]

    several = "it has several pictures or clips ({}); say which one with source.media, e.g. source.media={}"
    assert found() == [b"rgb", several.format("png, webp", "png"), several.format("rgb.png, mask.png", "rgb.png")]
    none = "none of its members ({}) is called rgb.png; " + NEIGHBOURS
    assert found(media="rgb.png") == [b"rgb", none.format("png, webp"), b"rgb"]
    assert found(media="WEBP")[1] == b"photo"
    for media in ("", ".png", "a/b.png"):
        with pytest.raises(InputError, match=r"source\.media: .* is no member's extension"):
            tars(tmp_path / "0.tar", media=media)


def test_class_names_from_a_file(tmp_path: Path) -> None:
    labels = [b"0", b" 1\n", b"2", b"-1", b"1.5", b"", b"99999999999999999999"]
    members = [
        (f"{i}.{suffix}", payload)
        for i, label in enumerate(labels)
        for suffix, payload in (("jpg", b"x"), ("cls", label))
    ]
    write_tar(tmp_path / "set.tar", members)
    names = tmp_path / "names.txt"
    names.write_text("cat\ntabby dog\n\n")
    source = tars(tmp_path / "set.tar", label="cls", class_names=str(names))
    items = scan(source)
    assert [item.label for item in items] == [0, 1, None, None, None, None, None]
    assert items[2].problem == f"its class 2 is not among the 2 classes of {names}"
    assert "is no class id" in (items[3].problem or "")
    assert "is no class id" in (items[4].problem or "")
    assert items[5].problem == "its class is missing"
    assert source.class_names == ("cat", "tabby dog")
    counted = tars(tmp_path / "set.tar", label="cls")
    assert "if it is an id, name the classes in source.class_names" in (scan(counted)[6].problem or "")
    assert counted.class_names == ("0", "1", "2")
    names.write_text("cat\n\ndog\n")
    with pytest.raises(InputError, match=r"names\.txt must have one class name"):
        scan(source)
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.txt"):
        scan(tars(tmp_path / "set.tar", label="cls", class_names=str(tmp_path / "nowhere.txt")))


def test_keys_stay_apart_in_folders_of_tars(tmp_path: Path) -> None:
    for place in ("a/0.tar", "b/0.tar"):
        write_tar(tmp_path / place, [("1.jpg", b"x")])
    assert list(problems(tars(tmp_path / "*" / "*.tar"))) == ["a/0/1", "b/0/1"]
    assert list(problems(tars([f"{tmp_path}/b/0.tar", f"{tmp_path}/{{a,b}}/0.tar"]))) == ["a/0/1", "b/0/1"]
    assert list(problems(tars(tmp_path / "a" / "0.tar"))) == ["0/1"]


def test_a_key_twice_in_one_tar_is_a_problem_of_the_second(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("1.jpg", b"x"), ("1.jpg", b"y"), ("2.jpg", b"z"), ("1.jpg", b"w")])
    table = ItemTable.build(tars(tmp_path / "0.tar"), tmp_path / "table")
    twice = "its key 0/1 is also that of 0.tar/1.jpg"
    assert [table[i].problem for i in range(4)] == [None, twice, None, twice]


@pytest.mark.parametrize("damage", ["middle of a picture", "before the end mark", "a header", "in a header"])
def test_a_damaged_tar_gives_what_is_whole_and_one_problem(tmp_path: Path, damage: str) -> None:
    members = [(f"{i}.jpg", bytes([i]) * 600) for i in range(5)]
    for name in ("0.tar", "1.tar", "2.tar"):
        write_tar(tmp_path / name, members)
    size = 512 + 1024  # of a member, with its header
    whole = (tmp_path / "1.tar").read_bytes()
    broken, num_whole, reason = {
        "middle of a picture": (whole[: 2 * size + 700], 2, "2.jpg is cut off"),
        "before the end mark": (whole[: 5 * size], 5, "it has no end mark, so it may be cut off"),
        "a header": (whole[: 3 * size] + b"\xaa" * 512 + whole[3 * size + 512 :], 3, "the header at byte 4,608"),
        "in a header": (whole[: 3 * size + 100], 3, "the header at byte 4,608 is damaged"),
    }[damage]
    (tmp_path / "1.tar").write_bytes(broken)
    source = tars(tmp_path / "*.tar")
    table = ItemTable.build(source, tmp_path / "table")
    items = [table[i] for i in range(len(table))]
    good = [item for item in items if item.problem is None]
    expected = [f"{tar}/{i}" for tar in range(3) for i in range(num_whole if tar == 1 else 5)]
    assert [item.key for item in good] == expected
    assert [content(source, item) for item in good] == [bytes([int(item.key[-1])]) * 600 for item in good]
    (bad,) = (item for item in items if item.problem is not None)
    assert (bad.key, bad.where) == ("1", "1.tar")
    assert f"the tar is damaged: {reason}" in (bad.problem or "")
    assert f"its {num_whole} samples before that are read" in (bad.problem or "")


@pytest.mark.parametrize(
    "options",
    ["--format=gnu", *(f"--format=posix --sparse-version={version}" for version in ("0.0", "0.1", "1.0"))],
)
def test_a_sparse_member_is_a_problem_of_its_own(tmp_path: Path, options: str) -> None:
    """The tar has such a file without its zeros: read as it stands, it would be shifted."""
    (tmp_path / "a.png").write_bytes(b"a" * 1000)
    with (tmp_path / "b.png").open("wb") as file:
        file.write(b"begin" * 1000)
        file.seek(1_000_000)
        file.write(b"end" * 1000)
    (tmp_path / "c.png").write_bytes(b"c" * 1000)
    subprocess.run(
        f"tar -S --hole-detection=raw {options} -cf 0.tar a.png b.png c.png", shell=True, check=True, cwd=tmp_path
    )
    assert (tmp_path / "0.tar").stat().st_size < 100_000
    source = tars(tmp_path / "0.tar")
    a, b, c = scan(source)
    assert (b.key, b.where, b.location) == ("0/b", "0.tar/b.png", None)
    assert b.problem == (
        "its png member is stored sparse, without its zeros; write the tar without -S (bsdtar: with --no-read-sparse)"
    )
    assert (content(source, a), content(source, c)) == (b"a" * 1000, b"c" * 1000)


def test_archives_behind_the_end_mark_of_another_are_read(tmp_path: Path) -> None:
    """`cat a.tar b.tar` makes such files."""
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", [(f"{i}.png", bytes([i]) * 600), (f"{i}.txt", b"text")])
    archives = [(tmp_path / f"{i}.tar").read_bytes() for i in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(archives))
    source = tars(tmp_path / "all.tar", caption="txt")
    assert [(item.key, item.problem, content(source, item)) for item in source.scan()] == [
        (f"all/{i}", None, bytes([i]) * 600) for i in range(3)
    ]
    (tmp_path / "all.tar").write_bytes(archives[0] + b"no tar" * 1000)
    whole, rest = scan(source)
    assert (whole.key, whole.problem) == ("all/0", None)
    assert f"the tar is damaged: the header at byte {len(archives[0]):,} is damaged" in (rest.problem or "")


def test_links_in_a_tar_are_named_as_what_they_are(tmp_path: Path) -> None:
    for name in ("a.png", "a.txt", "c.png", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    (tmp_path / "b.txt").write_bytes(b"x")
    (tmp_path / "d.png").symlink_to("c.png")
    (tmp_path / "d.txt").symlink_to("c.txt")
    (tmp_path / "e.png").write_bytes(b"x")
    (tmp_path / "e.txt").hardlink_to(tmp_path / "a.txt")
    subprocess.run("tar --sort=name -cf 0.tar $(ls *.png *.txt | sort)", shell=True, check=True, cwd=tmp_path)
    assert problems(tars(tmp_path / "0.tar", caption="txt")) == {
        "0/a": None,
        "0/b": "its png member is a hard link to a.png; write the tar with --hard-dereference",
        "0/c": None,
        "0/d": "its png member is a symbolic link to c.png; write the tar with --dereference",
        "0/e": "its txt member is a hard link to a.txt; write the tar with --hard-dereference",
    }
    assert problems(tars(tmp_path / "0.tar"))["0/e"] is None


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_wildcards_match_nothing_hidden(tmp_path: Path, scheme: str) -> None:
    for name in ("a/0.tar", "__MACOSX/0.tar", ".git/0.tar", "a/._0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, [("x.png", b"x")])
    assert [item.key for item in tars(f"{scheme}{tmp_path}/**/*.tar").scan()] == ["0/x"]
    assert [item.key for item in tars(f"{scheme}{tmp_path}/__MACOSX/*.tar").scan()] == ["0/x"]


def test_hidden_members_and_notes_on_the_tar_are_ignored_and_counted(tmp_path: Path) -> None:
    hidden = ("a/._x.png", "a/.ipynb_checkpoints/x.png", ".git/x.png", "__MACOSX/a/x.png", ".x.png", "__meta__/x.json")
    write_tar(tmp_path / "0.tar", [*((name, b"x") for name in hidden), ("./a/x.png", b"x"), ("../b/__x__.png", b"x")])
    source = tars(tmp_path / "0.tar")
    assert problems(source) == {"0/a/x": None, "0/__/b/__x__": None}
    assert source.num_ignored == len(hidden)


@pytest.mark.parametrize("garbage", [b"", b"<html>404</html>" * 100])
def test_what_is_no_tar_is_a_problem_of_its_own(tmp_path: Path, garbage: bytes) -> None:
    write_tar(tmp_path / "0.tar", [("1.jpg", b"x")])
    (tmp_path / "1.tar").write_bytes(garbage)
    found = problems(tars(tmp_path / "*.tar"))
    assert found.pop("0/1") is None
    assert "the tar is damaged" in (found.pop("1") or "")


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("1.jpg", b"x")])
    with pytest.raises(InputError, match=rf"{tmp_path} is a folder; name the files in it, e\.g\. {tmp_path}/\*\.tar"):
        scan(tars(tmp_path))
    with pytest.raises(InputError, match=r"there is no file .*/1\.tar"):
        scan(tars(f"{tmp_path}/{{0..1}}.tar"))
    with pytest.raises(InputError, match=r"no file matches .*/x\*\.tar"):
        scan(tars(f"{tmp_path}/x*.tar"))
    with pytest.raises(InputError, match="close every brace"):
        scan(tars(f"{tmp_path}/{{0..1.tar"))
    with pytest.raises(InputError, match="names no file"):
        scan(tars([]))
    for rule in ("json", "json:", "txt:name", ":x", ""):
        with pytest.raises(InputError, match=r"source\.caption: .* neither"):
            tars(tmp_path / "0.tar", caption=rule)


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_tars_are_named(tmp_path: Path, mode: Any, name: str) -> None:
    with tarfile.open(tmp_path / "0.tar", mode) as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    with pytest.raises(InputError, match=rf"0\.tar is compressed \({name}\).*decompress it first"):
        scan(tars(tmp_path / "0.tar"))
    # A tar begins with a name, which may be any.
    write_tar(tmp_path / "1.tar", [("BZhang.jpg", b"x")])
    assert list(problems(tars(tmp_path / "1.tar"))) == ["1/BZhang"]


def test_json_that_cannot_be_told_is_the_problem_of_its_sample(tmp_path: Path) -> None:
    """Python ends with RecursionError where lists are nested too deep, and takes the last of two fields of one name."""
    fields = {"deep": b"[" * 100_000, "twice": b'{"caption": "a", "caption": "b"}', "good": b'{"caption": "a"}'}
    members = [member for key, content in fields.items() for member in ((f"{key}.jpg", b"x"), (f"{key}.json", content))]
    write_tar(tmp_path / "0.tar", members)
    assert problems(tars(tmp_path / "0.tar", caption="json:caption")) == {
        "0/deep": "its json member is no JSON",
        "0/twice": "its json member names 'caption' twice",
        "0/good": None,
    }


def test_names_with_brackets_are_taken_as_they_are(tmp_path: Path) -> None:
    write_tar(tmp_path / "[new] {a,b}.tar", [("1.jpg", b"x")])
    assert list(problems(tars(tmp_path / "[new] {a,b}.tar"))) == ["[new] {a,b}/1"]


def test_tars_behind_urls_are_the_same_source(tmp_path: Path) -> None:
    storage = fsspec.filesystem("memory")
    for i in range(3):
        members = [
            (f"{k}.{suffix}", f"{i} {k} {suffix}".encode() * 900) for k in range(20) for suffix in ("jpg", "txt")
        ]
        write_tar(tmp_path / f"{i}.tar", members)
        storage.pipe(f"/tars/{i}.tar", (tmp_path / f"{i}.tar").read_bytes())
    local = tars(tmp_path / "*.tar", caption="txt")
    items = scan(local)
    for pattern in ("memory://tars/*.tar", "memory://tars/{0..2}.tar"):
        remote = tars(pattern, caption="txt")
        assert [(item.key, item.where, item.caption) for item in remote.scan()] == [
            (item.key, item.where, item.caption) for item in items
        ]
        assert [content(remote, item) for item in remote.scan()] == [content(local, item) for item in items]
    tables = [ItemTable.build(source, tmp_path / str(i)) for i, source in enumerate((local, remote))]
    assert tables[0].fingerprint == tables[1].fingerprint
    storage.pipe("/tars/2.tar", b"short")
    with pytest.raises(SourceChangedError, match="changed since it was listed"):
        remote.open(scan_last := tables[1][len(tables[1]) - 1])
    storage.rm("/tars", recursive=True)
    with pytest.raises(FileNotFoundError):
        remote.open(scan_last)


def test_tars_that_moved_are_found_where_they_are_named_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        write_tar(tmp_path / "old" / name, [("1.jpg", name.encode())])
    monkeypatch.chdir(tmp_path)
    tables = [
        ItemTable.build(tars(pattern), tmp_path / str(i))
        for i, pattern in enumerate(("old/*/*.tar", str(tmp_path / "old/{a/0,a/1,b/0}.tar")))
    ]
    assert tables[0].fingerprint == tables[1].fingerprint
    (tmp_path / "old").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for table in tables:
        for moved in (f"{tmp_path}/moved/*/*.tar", "../moved/**/*.tar", [f"{tmp_path}/moved/{x}/*.tar" for x in "ba"]):
            source = tars(moved)
            with ThreadPoolExecutor(8) as pool:
                found = pool.map(lambda i, source=source, table=table: content(source, table[i]), range(len(table)))
                assert [f"{name.decode().removesuffix('.tar')}/1" for name in found] == [
                    table[i].key for i in range(len(table))
                ]
        with pytest.raises(FileNotFoundError):
            tars(f"{tmp_path}/old/*/*.tar").open(table[0])


def test_a_tar_that_is_gone_does_not_hide_the_others(tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", [("1.jpg", b"x")])
    pattern = f"{tmp_path}/{{0..1}}.tar"
    gone, there = scan(tars(pattern))
    (tmp_path / "0.tar").unlink()
    assert content(tars(pattern), there) == b"x"
    with pytest.raises(FileNotFoundError):
        tars(pattern).open(gone)


def test_many_threads_read_many_tars(tmp_path: Path) -> None:
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", [(f"{k}.jpg", f"{i}/{k}".encode()) for k in range(200)])
    source = tars(tmp_path / "*.tar")
    items = scan(source)[::7] * 3
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda item: content(source, item).decode(), items)) == [item.key for item in items]


def test_a_tar_that_changed_since_the_scan(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("1.jpg", b"x")])
    (item,) = scan(tars(tmp_path / "0.tar"))
    write_tar(tmp_path / "0.tar", [("1.jpg", b"x"), *((f"{i}.jpg", bytes(5000)) for i in range(5))])
    with pytest.raises(SourceChangedError, match="changed since it was listed"):
        tars(tmp_path / "0.tar").open(item)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(FileNotFoundError):
        tars(tmp_path / "0.tar").open(item)


# -- our own shards ----------------------------------------------------------------------------------------------------


def latents(path: Path | str) -> Source:
    return build_encode_source(LatentsSourceConfig(kind="latents", path=str(path)))


def test_captions_of_a_dataset_in_the_order_of_its_index(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [3, 2], text=True)
    source = latents(tmp_path / "set")
    items = scan(source)
    assert [(item.key, item.caption, item.problem) for item in items] == [
        (f"c/{i:05d}", f"caption {i}", None) for i in range(5)
    ]
    table = ItemTable.build(source, tmp_path / "table")
    assert table.key_hashes().tolist() == [key_hash(item.key) for item in items]
    assert not table.shuffled
    with pytest.raises(InputError, match="captions only"):
        source.open(items[0])


def test_captions_of_a_dataset_behind_a_url(tmp_path: Path) -> None:
    """Python's own server knows no ranges: it serves what is small enough to be fetched at once."""
    write_dataset(tmp_path / "set", [3, 2], text=True)
    storage = fsspec.filesystem("memory")
    storage.put(str(tmp_path / "set"), "/set", recursive=True)
    expected = scan(latents(tmp_path / "set"))
    with FileServer(tmp_path) as server:
        for url in ("memory://set", f"file://{tmp_path}/set", f"{server.url}/set"):
            assert scan(latents(url)) == expected
        write_tar(tmp_path / "0.tar", [("1.jpg", bytes(30_000_000))])
        with pytest.raises(InputError, match=r"/0\.tar: its server does not send parts of files; download it"):
            scan(tars(f"{server.url}/0.tar"))
    storage.rm("/set", recursive=True)


def test_small_tars_of_a_server_that_does_not_send_parts(tmp_path: Path) -> None:
    """Asked for a part, it sends everything, and fsspec does not tell."""
    write_tar(tmp_path / "a b.tar", [(f"{i}.png", bytes([i]) * 600) for i in range(3)])
    local = scan(tars(tmp_path / "a b.tar"))
    with FileServer(tmp_path) as server:
        for name in ("a%20b.tar", "a b.tar"):
            source = tars(f"{server.url}/{name}")
            assert scan(source) == local
            assert [content(source, item) for item in local] == [bytes([i]) * 600 for i in range(3)]
        write_tar(tmp_path / "a b.tar", [(f"{i}.png", bytes([i]) * 600) for i in range(30)])
        with pytest.raises(SourceChangedError, match="changed since it was listed"):
            source.open(local[0])


def test_a_damaged_shard_and_missing_captions(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "set", [3, 2], text=True)
    shard = tmp_path / "set" / manifest.shards[0].name
    shard.write_bytes(shard.read_bytes()[: manifest.shards[0].num_bytes // 2])
    items = scan(latents(tmp_path / "set"))
    (bad,) = (item for item in items if item.problem)
    assert bad.key == "shard-000000"
    assert "is damaged" in (bad.problem or "")
    assert "repair" in (bad.problem or "")
    assert [item.caption for item in items[-2:]] == ["caption 3", "caption 4"]
    write_dataset(tmp_path / "plain", [2])
    with pytest.raises(InputError, match="have no captions"):
        scan(latents(tmp_path / "plain"))
    with pytest.raises(InputError, match="there is no such folder"):
        scan(latents(tmp_path / "nowhere"))
