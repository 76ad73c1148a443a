"""Folders of pictures and of clips, on disk and behind URLs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipelines.encode.items import ItemTable
from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.encode import ImageFolderConfig, VideoFolderConfig
from pomscale.shards import location as location_module
from pomscale.sources import build_source, storage
from pomscale.sources.folders import sorted_on_disk
from pomscale.sources.item_fields import checked_key
from pomscale.sources.protocol import Item, Source, SourceChangedError
from support.file_server import FileServer


def touch(path: Path, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def image_folder(path: Path | str) -> Source:
    return build_source(ImageFolderConfig(kind="image_folder", path=str(path)))


def video_folder(path: Path | str, captions: bool = False) -> Source:
    return build_source(VideoFolderConfig(kind="video_folder", path=str(path), captions=captions))


def scan(source: Source) -> list[Item]:
    return list(source.scan())


def read(source: Source, item: Item) -> bytes:
    with source.open(item) as stream:
        return stream.read()


def problems(source: Source) -> dict[str, str | None]:
    return {item.key: item.problem for item in source.scan()}


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    storage = fsspec.filesystem("memory")
    yield storage
    storage.rm("/", recursive=True)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location_module, "RETRY_DELAYS_S", (0.01, 0.01, 0.01))


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_are_sorted_and_keys_are_safe_for_tars(tmp_path: Path) -> None:
    names = ("b/2.PNG", "a.1/x.y.jpeg", "b/1.webp", "b/deep/3.jpg", "b/deep-er/4.jpg", "b/notes.txt", ".git/4.png")
    for name in (*names, "README"):
        touch(tmp_path / name)
    source = image_folder(tmp_path)
    assert [(item.key, item.where, item.label) for item in source.scan()] == [
        ("a_1/x_y", "a.1/x.y.jpeg", 0),
        ("b/1", "b/1.webp", 1),
        ("b/2", "b/2.PNG", 1),
        ("b/deep/3", "b/deep/3.jpg", 1),
        ("b/deep-er/4", "b/deep-er/4.jpg", 1),
    ]
    assert source.class_names == ("a.1", "b")
    assert source.num_ignored == 3
    assert source.shuffled


def test_a_folder_is_the_same_source_on_disk_and_behind_a_url(
    tmp_path: Path, memory: fsspec.AbstractFileSystem
) -> None:
    for name in ("dog/1.png", "dog/old/2.jpg", "cat/[1].webp", "cat/notes.txt", ".git/x.png"):
        touch(tmp_path / "set" / name, name.encode())
        memory.pipe(f"/set/{name}", name.encode())
    local, remote = image_folder(tmp_path / "set"), image_folder("memory://set")
    tables = [ItemTable.build(source, tmp_path / str(i)) for i, source in enumerate((local, remote))]
    assert tables[0].fingerprint == tables[1].fingerprint
    assert scan(local) == scan(remote) == scan(image_folder(f"file://{tmp_path}/set"))
    assert (local.class_names, local.num_ignored) == (remote.class_names, remote.num_ignored) == (("cat", "dog"), 2)
    for source in (local, remote):
        for item in source.scan():
            with source.open(item) as stream:
                stream.seek(1)
                assert stream.read() == item.where.encode()[1:]


STRANGE_NAMES = (
    "a b/1 2.png",
    "a-b/50%.png",
    "a-b/%20.png",
    "c#d/#1.png",
    "e?f/1?x=y.png",
    "i&j/'1'&amp;.png",
    "k+l/ü~.png",
)


def test_names_behind_http_are_those_on_disk(tmp_path: Path) -> None:
    """Servers escape names in their listings, which would change keys, and with their order the ids of classes."""
    for name in (*STRANGE_NAMES, "a b/.hidden.png", "a b/notes.txt", ".git/x.png"):
        touch(tmp_path / "the set" / name, name.encode())
    local = image_folder(tmp_path / "the set")
    items = scan(local)
    assert sorted(item.where for item in items) == sorted(STRANGE_NAMES)
    with FileServer(tmp_path) as server:
        for root in (f"{server.url}/the%20set", f"{server.url}/the set/"):
            remote = image_folder(root)
            found = scan(remote)
            assert [(item.key, item.where, item.label) for item in found] == [
                (item.key, item.where, item.label) for item in items
            ]
            assert (remote.class_names, remote.num_ignored) == (local.class_names, local.num_ignored)
            assert [read(remote, item) for item in found] == [item.where.encode() for item in items]


def test_a_page_that_links_to_other_places_lists_its_own_folder_only(tmp_path: Path) -> None:
    """Apache's pages sort themselves and link upwards; other servers' have whole URLs."""
    elsewhere = ("?C=N;O=D", "/set/", "/", "../", "b/c.png", "#top", "http://example.com/set/a/4.png")
    links = (*elsewhere, "./1.png", "/set/a/2.png", "URL/set/a/3.png", "x&amp;y'z.png")
    with FileServer(tmp_path) as server:
        lines = "".join(f'<td><a href="{link}">name</a></td>' for link in links).replace("URL", server.url)
        touch(tmp_path / "set" / "a" / "index.html", f"<html>http://example.com {lines}</html>".encode())
        touch(tmp_path / "set" / "a" / "x&y'z.png")
        source = image_folder(f"{server.url}/set")
        found = scan(source)
        assert [item.where for item in found] == ["a/1.png", "a/2.png", "a/3.png", "a/x&y'z.png"]
        assert (source.num_ignored, read(source, found[3])) == (0, b"x")


def test_a_server_that_fails_for_a_while_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "set" / "a" / "1.png", b"picture")
    with FileServer(tmp_path) as server:
        source = image_folder(f"{server.url}/set")
        server.plan["a"] = ["503"]
        (item,) = scan(source)
        server.plan["1.png"] = ["503", "cut", "503"]
        assert read(source, item) == b"picture"
        server.plan["1.png"] = ["403"]
        with pytest.raises(SourceChangedError, match="the server answers 403"):
            source.open(item)
        assert server.num_requests["1.png"] == 4 + 1
        monkeypatch.setattr(location_module, "READ_TIMEOUT_S", 0.1)
        server.plan["1.png"] = ["hold"] * 4
        with pytest.raises(PomscaleError, match=r"1\.png: cannot be read, 4 attempts failed: \w*Timeout\w*"):
            source.open(item)


def test_what_is_hidden_is_ignored_and_counted_at_any_depth(tmp_path: Path) -> None:
    hidden = ("a/.ipynb_checkpoints/1.png", "a/b/._2.png", "a/b/c/__MACOSX/._3.png", "__MACOSX/4.png", ".5.png")
    for name in ("a/b/2.png", *hidden):
        touch(tmp_path / name)
    source = image_folder(tmp_path)
    assert problems(source) == {"a/b/2": None}
    assert (source.class_names, source.num_ignored) == (("a",), len(hidden))


def test_a_failing_server_is_not_taken_for_a_missing_file(tmp_path: Path) -> None:
    """fsspec raises FileNotFoundError for whatever keeps it from asking for a size."""
    with FileServer(tmp_path) as server:
        url = f"{server.url}/0.tar"
        for open_file in (storage.open_stream, lambda url: storage.open_large_item(url, 10)):
            server.plan["0.tar"] = ["503"] * 4
            with pytest.raises(
                PomscaleError, match=r"0\.tar: cannot be read, 4 attempts failed: ClientResponseError: 503"
            ):
                open_file(url)
        with pytest.raises(InputError, match=r"cannot read .*0\.tar: the server answers 404"):
            storage.open_stream(url)
        with pytest.raises(FileNotFoundError):
            storage.open_large_item(url, 10)


def test_the_fingerprint_follows_names_and_sizes_not_the_place(tmp_path: Path) -> None:
    for root in ("one", "two", "three", "four"):
        touch(tmp_path / root / "a" / ("2.png" if root == "four" else "1.png"), b"xxx" if root == "three" else b"xx")
    one, two, three, four = (
        ItemTable.build(image_folder(tmp_path / root), tmp_path / "table").fingerprint
        for root in ("one", "two", "three", "four")
    )
    assert one == two
    assert len({one, three, four}) == 3


def test_wrong_folders_are_named(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(InputError, match=rf"cannot read {tmp_path}/nowhere: No such file"):
        scan(image_folder(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"cannot read memory://nowhere/: No such file"):
        scan(image_folder("memory://nowhere"))
    with (
        FileServer(tmp_path) as server,
        pytest.raises(InputError, match=r"cannot read http://.*/nowhere/?: No such file"),
    ):
        scan(image_folder(f"{server.url}/nowhere"))
    touch(tmp_path / "loose.png")
    with pytest.raises(InputError, match="no class folders"):
        scan(image_folder(tmp_path))
    touch(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match=r"class folder\(s\) dog"):
        scan(image_folder(tmp_path))


def test_a_folder_that_cannot_be_listed_ends_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "cat" / "1.png")
    real = os.scandir

    def forbidden(path: str) -> object:
        if path.endswith("cat"):  # as root, no folder of the test's own is unreadable
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr("os.scandir", forbidden)
    with pytest.raises(InputError, match=rf"cannot read {tmp_path}/cat: Permission denied"):
        scan(image_folder(tmp_path))


def test_one_bad_file_is_a_problem_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "cat"
    for name in ("1.png", "1.jpg", f"{'n' * 90}.png", "new\nline.png"):
        touch(folder / name)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    table = ItemTable.build(image_folder(tmp_path / "set"), tmp_path / "table")
    found = {table[i].where: table[i].problem for i in range(len(table))}
    assert found.pop("cat/1.jpg") is None
    assert found.pop("cat/1.png") == "its key cat/1 is also that of cat/1.jpg"
    assert found.pop("cat/gone.png") == "cannot be read: No such file or directory"
    assert "too long for a tar header: at most 84 bytes" in (found.pop(f"cat/{'n' * 90}.png") or "")
    assert found.popitem() == (r"cat/new\x0aline.png", r"the name cat/new\x0aline has control characters; rename it")
    assert table.num_problems == 4


@pytest.mark.parametrize("name", [b"cat/\xff.png", b"c\xe4t/1.png"])
def test_names_that_are_not_utf8_are_problems(tmp_path: Path, name: bytes) -> None:
    try:
        touch(tmp_path / "set" / os.fsdecode(name))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    touch(tmp_path / "set" / "dog" / "1.png")
    source = image_folder(tmp_path / "set")
    table = ItemTable.build(source, tmp_path / "table")
    bad = table[0]
    escaped = name.decode(errors="backslashreplace")
    assert bad.where == escaped
    assert bad.problem == f"the name {escaped.removesuffix('.png')} is not UTF-8; rename it"
    with source.open(bad) as stream:  # the file itself can be found all the same
        assert stream.read() == b"x"
    assert table[1].problem is None


def test_links_are_followed(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    assert problems(image_folder(tmp_path / "set")) == {"cat/more/1": None}
    (tmp_path / "set" / "cat" / "round").symlink_to(tmp_path / "set" / "cat")
    with pytest.raises(InputError, match=r"cannot read .*: Too many levels of symbolic links"):
        scan(image_folder(tmp_path / "set"))


def test_items_that_changed_since_the_scan_are_told_from_failing_storage(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a" / "1.png", b"before")
    memory.pipe("/set/a/1.png", b"before")
    for source in (image_folder(tmp_path), image_folder("memory://set")):
        (item,) = source.scan()
        touch(tmp_path / "a" / "1.png", b"changed")
        memory.pipe("/set/a/1.png", b"changed")
        with pytest.raises(SourceChangedError, match=r"changed since it was listed \(6 bytes then, 7 now\); encode"):
            source.open(item)
        (tmp_path / "a" / "1.png").unlink()
        memory.rm("/set/a/1.png")
        with pytest.raises(FileNotFoundError):
            source.open(item)
        touch(tmp_path / "a" / "1.png", b"before")
        memory.pipe("/set/a/1.png", b"before")

    def failing(*arguments: object, **options: object) -> bytes:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr(type(memory), "cat_file", failing)
    with pytest.raises(
        PomscaleError,
        match=r"memory://set/a/1.png: cannot be read, 4 attempts failed: ConnectionResetError: .*run the same command",
    ):
        source.open(item)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\0b.png", "embedded null byte"),
        ("half of a pair \ud800.png", "surrogates not allowed"),
        ("n" * 300 + ".png", "File name too long"),
        ("cat", "Is a directory"),
        ("cat/1.png/x.png", "Not a directory"),
        ("round.png", "Too many levels of symbolic links"),
    ],
)
def test_a_path_that_is_none_of_a_file_concerns_one_item_or_ends_the_scan(
    tmp_path: Path, name: str, reason: str
) -> None:
    touch(tmp_path / "cat" / "1.png")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    with pytest.raises(SourceChangedError, match=f"cannot be read: .*{reason}"):
        image_folder(tmp_path).open(Item("key", "where", [name, None]))
    with pytest.raises(InputError, match=f"cannot read .*{reason}"):
        storage.read_file(f"{tmp_path}/{name}")
    if name != "cat":
        with pytest.raises(InputError, match=f"cannot read .*({reason}|Not a directory)"):
            scan(image_folder(f"{tmp_path}/{name}"))


def test_a_kind_of_url_that_does_not_exist_is_told() -> None:
    with pytest.raises(SourceChangedError, match=r"cannot be read: .*nokind"):
        image_folder("nokind://set").open(Item("key", "where", ["cat", None]))
    with pytest.raises(InputError, match=r"cannot read nokind://set.*: .*nokind"):
        scan(image_folder("nokind://set"))


def test_a_read_that_fails_says_so_by_name() -> None:
    """/proc/self/mem opens, and reading its first page is an input/output error."""
    source = video_folder("/proc/self")
    with (
        source.open(Item("mem", "mem", ["mem", None])) as stream,
        pytest.raises(PomscaleError, match=r"/proc/self/mem"),
    ):
        stream.read(10)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_concerns_one_item(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "1.png")
    source = image_folder(tmp_path)
    (item,) = source.scan()
    (tmp_path / "a" / "1.png").chmod(0)
    with pytest.raises(SourceChangedError, match="Permission denied"):
        source.open(item)


# -- clips -------------------------------------------------------------------------------------------------------------


def test_clips_with_captions(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    contents = {
        "a/1.mp4": b"clip",
        "a/1.txt": "\ufeffein Hund läuft \n".encode(),
        "2.WEBM": b"clip",
        "2.txt": b" \n",
        "3.mov": b"clip",
        "4.mkv": b"clip",
        "4.txt": b"\xff",
        "poster.jpg": b"x",
        "a/._1.mp4": b"x",
        "a/._1.txt": b"x",
        "__MACOSX/1.mp4": b"x",
        "unused.txt": b"x",
    }
    for name, content in contents.items():
        touch(tmp_path / "set" / name, content)
        memory.pipe(f"/set/{name}", content)
    for path in (str(tmp_path / "set"), "memory://set"):
        source = video_folder(path, captions=True)
        assert [(item.key, item.caption, item.problem) for item in source.scan()] == [
            ("2", None, "its caption is empty"),
            ("3", None, "its caption is missing"),
            ("4", None, "its caption is not UTF-8"),
            ("a/1", "ein Hund läuft", None),
        ]
        assert (source.num_ignored, source.class_names, source.shuffled) == (4, (), True)
        without = video_folder(path)
        assert [item.caption for item in without.scan()] == [None] * 4
        assert without.num_ignored == 8
        with without.open(next(iter(without.scan()))) as stream:
            assert stream.read() == b"clip"


def test_the_fingerprint_of_clips_follows_their_captions(tmp_path: Path) -> None:
    touch(tmp_path / "set" / "1.mp4")
    prints = []
    for caption in (b"one", b"two", b"two"):
        touch(tmp_path / "set" / "1.txt", caption)
        prints.append(ItemTable.build(video_folder(tmp_path / "set", captions=True), tmp_path / "table").fingerprint)
    assert prints[0] != prints[1] == prints[2]


def test_a_folder_without_clips_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "1.png")
    with pytest.raises(InputError, match=rf"no clip \(.*\.mp4.*\) in {tmp_path}"):
        scan(video_folder(tmp_path))


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "problem"),
    [
        ("a/b", "a/b", None),
        ("../a.b", "__/a_b", None),
        ("Hund ünd Katze", "Hund ünd Katze", None),
        ("n" * 84, "n" * 84, None),
        ("n" * 85, "n" * 85, "too long"),
        ("ü" * 43, "ü" * 43, "too long"),
        (f"{'f' * 155}/n", f"{'f' * 155}/n", None),
        (f"{'f' * 156}/n", f"{'f' * 156}/n", "too long"),
        ("/a", "/a", "empty part"),
        ("a//b", "a//b", "empty part"),
        ("a/", "a/", "empty part"),
        ("", "", "empty part"),
        ("a\0b", r"a\x00b", "control characters"),
        ("a\udcff", r"a\xff", "not UTF-8"),
        ("a\ud800", r"a\ud800", "not UTF-8"),
    ],
)
def test_keys(name: str, key: str, problem: str | None) -> None:
    found, why_not = checked_key(name)
    assert found == key
    assert (why_not is None) if problem is None else (problem in (why_not or ""))
    key.encode()


@pytest.mark.parametrize("num_names", [0, 1, 6, 7, 8, 50])
def test_sorting_beyond_memory(num_names: int) -> None:
    names = [f"{i * 7919 % 101}\n\udcff" for i in range(num_names)]
    assert list(sorted_on_disk(iter(names), run_length=7)) == sorted(names)
