"""Shards come out byte for byte wherever they lie, and what is wrong with them is said."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.data import CacheConfig
from pomscale.data.readers.shard_files import ShardFiles, check_room, open_shard_files
from pomscale.data.remote.shard_cache import local_index
from pomscale.shards import location as location_module
from pomscale.shards.schema import INDEX_NAME, MANIFEST_NAME, read_manifest
from support.file_server import FileServer
from support.running import wait_until
from support.synthetic_dataset import write_dataset

SHARD_SIZES = (3, 5, 2, 4, 4, 3)

# How shards can be read, by what is in the recipe.
WAYS = ["mapped", "cached", "streamed"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", SHARD_SIZES)
    return tmp_path / "set"


@pytest.fixture
def server(tmp_path: Path, folder: Path) -> Iterator[FileServer]:
    with FileServer(tmp_path) as server:
        yield server


@pytest.fixture(params=["path", "file", "memory", "http"])
def location(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """One dataset in every kind of place."""
    if request.param == "http":
        yield f"{request.getfixturevalue('server').url}/set"
    elif request.param == "memory":
        memory = fsspec.filesystem("memory")
        memory.put(str(folder), "/set", recursive=True)
        yield "memory://set"
        memory.rm("/set", recursive=True)
    else:
        yield f"file://{folder}" if request.param == "file" else str(folder)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location_module, "RETRY_DELAYS_S", (0.01, 0.01, 0.01))


@pytest.fixture
def open_files(tmp_path: Path) -> Iterator[Callable[[str, str], ShardFiles]]:
    """Shard files of a location, in one of WAYS; they are closed, and no thread is left, when the test ends."""
    opened: list[ShardFiles] = []

    def open_files(location: str, way: str) -> ShardFiles:
        cache = CacheConfig(path=str(tmp_path / "cache")) if way == "cached" else None
        reading = "streamed" if way == "streamed" else "mapped"
        opened.append(open_shard_files(location, read_manifest(location), reading, cache))
        return opened[-1]

    yield open_files
    for files in opened:
        files.close()
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.tar"))]


@pytest.mark.parametrize("way", WAYS)
def test_every_place_gives_the_same_bytes(
    location: str, way: str, folder: Path, open_files: Callable[[str, str], ShardFiles]
) -> None:
    if way == "mapped" and location.startswith(("memory", "http")):
        with pytest.raises(InputError, match=r"is remote: set data\.cache\.path .* or data\.reading: streamed"):
            open_files(location, way)
        return
    files = open_files(location, way)
    files.will_need([4, 1, 0])
    for shard, content in enumerate(contents(folder)):
        opened = files.open(shard)
        assert opened.dtype == np.uint8
        assert not opened.flags.writeable
        assert opened.tobytes() == content
    files.close()
    assert opened.tobytes() == content


def test_manifest_and_index_of_every_place(
    location: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(location)
    assert manifest == read_manifest(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for cache in (None, CacheConfig(path=str(tmp_path / "cache"))):
        path = local_index(location, manifest, cache)
        assert path.read_bytes() == (folder / INDEX_NAME).read_bytes()
    if location.startswith(("memory", "http")):
        assert tmp_path / "cache" in path.parents
        (kept,) = (tmp_path / "home" / "pomscale").rglob("*.npy")
        assert kept.name == path.name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["path", "http"])
def test_missing_and_cut_off_shards_are_named(
    way: str, place: str, folder: Path, server: FileServer, open_files: Callable[[str, str], ShardFiles]
) -> None:
    if (way, place) == ("mapped", "http"):
        pytest.skip("refused as such")
    location = str(folder) if place == "path" else f"{server.url}/set"
    remedy = "pomscale data repair" if place == "path" else "Upload it again"
    first, second, third, *_ = sorted(folder.glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    third.write_bytes(third.read_bytes() + b"\0")
    files = open_files(location, way)
    files.will_need([0, 1, 2, 3])
    for shard, (path, problem) in enumerate(
        [(first, "cannot be read: "), (second, "the manifest says"), (third, "the manifest says")]
    ):
        for _ in range(2):
            with pytest.raises(InputError, match=rf"{location}/{path.name}: .*{problem}.*{remedy}"):
                files.open(shard)
    assert files.open(3).tobytes() == contents(folder)[2]


@pytest.mark.parametrize("place", ["path", "http"])
def test_changed_bytes_stay_out_of_the_cache(
    place: str, folder: Path, server: FileServer, tmp_path: Path, open_files: Callable[[str, str], ShardFiles]
) -> None:
    location = str(folder) if place == "path" else f"{server.url}/set"
    path = folder / "shard-000001.tar"
    payload = bytearray(path.read_bytes())
    payload[700] ^= 1
    path.write_bytes(payload)
    files = open_files(location, "cached")
    with pytest.raises(InputError, match=rf"{location}/{path.name}: its sha256 is not the manifest's"):
        files.open(1)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    # Streamed, the checksums of the records tell which of them is spoilt; the others can be used.
    assert open_files(location, "streamed").open(1).tobytes() == payload


def test_a_changed_index_is_refused(folder: Path, server: FileServer, tmp_path: Path) -> None:
    location, cache = f"{server.url}/set", CacheConfig(path=str(tmp_path / "cache"))
    manifest = read_manifest(location)
    (folder / INDEX_NAME).write_bytes(bytes(manifest.index.num_bytes))
    with pytest.raises(InputError, match=r"set/index\.npy: its sha256 is not the manifest's"):
        local_index(location, manifest, cache)
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_a_failing_server_is_asked_again(
    way: str, folder: Path, server: FileServer, open_files: Callable[[str, str], ShardFiles]
) -> None:
    server.plan.update({MANIFEST_NAME: ["503", "503"], "shard-000000.tar": ["503", "cut"], "shard-000001.tar": ["cut"]})
    files = open_files(f"{server.url}/set", way)
    assert [files.open(shard).tobytes() for shard in (0, 1)] == contents(folder)[:2]
    assert server.num_requests == {MANIFEST_NAME: 3, "shard-000000.tar": 3, "shard-000001.tar": 2}
    server.plan["shard-000002.tar"] = ["503"] * 4
    with pytest.raises(PomscaleError, match=r"shard-000002\.tar: cannot be read, 4 attempts failed: .*503") as raised:
        files.open(2)
    assert not isinstance(raised.value, InputError)
    assert files.open(2).tobytes() == contents(folder)[2]


@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_a_server_that_refuses_is_not_asked_again(
    way: str, server: FileServer, open_files: Callable[[str, str], ShardFiles]
) -> None:
    files = open_files(f"{server.url}/set", way)
    server.plan["shard-000000.tar"] = ["403"]
    with pytest.raises(PomscaleError, match=r"shard-000000\.tar: the server refuses it: .*403.*credentials") as raised:
        files.open(0)
    assert not isinstance(raised.value, InputError)
    assert server.num_requests["shard-000000.tar"] == 1


def test_windows_that_do_not_fit_are_refused() -> None:
    gib = 2**30
    cache = CacheConfig(path="x", max_gib=8)
    check_room(8 * gib, 65_536, "mapped", cache)
    check_room(800 * gib, 65_536, "mapped", None)
    with pytest.raises(InputError, match=r"data\.shuffle_window: .*65,536 records take 9 GiB.*data\.cache\.max_gib 8;"):
        check_room(9 * gib, 65_536, "mapped", cache)
    check_room(16 * gib, 65_536, "streamed", cache)
    with pytest.raises(InputError, match=r"data\.shuffle_window: .*take 17 GiB, more than the 16 GiB of memory"):
        check_room(17 * gib, 65_536, "streamed", cache)


def test_places_that_cannot_be_read(folder: Path, server: FileServer) -> None:
    for location in (f"{server.url}/nowhere", "memory://nowhere", folder.parent):
        with pytest.raises(InputError, match=r"no manifest\.json; is the encode finished\?"):
            read_manifest(location)
    with pytest.raises(InputError, match=r"nosuch://set/manifest\.json: this kind of URL cannot be read here"):
        read_manifest("nosuch://set")
    server.plan[MANIFEST_NAME] = ["503"] * 4
    with pytest.raises(PomscaleError, match=r"manifest\.json: cannot be read, 4 attempts failed"):
        read_manifest(f"{server.url}/set")


@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_threads_and_announcements_fetch_a_shard_once(
    way: str, folder: Path, server: FileServer, open_files: Callable[[str, str], ShardFiles]
) -> None:
    files, expected = open_files(f"{server.url}/set", way), contents(folder)
    wrong: list[int] = []

    def read(first: int) -> None:
        for step in range(20):
            shard = (first + step) % len(expected)
            files.will_need(range(len(expected)))
            if files.open(shard).tobytes() != expected[shard]:
                wrong.append(shard)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    del server.num_requests[MANIFEST_NAME]
    assert server.num_requests == {f"shard-{shard:06d}.tar": 1 for shard in range(len(expected))}


def test_announced_shards_are_fetched_before_they_are_opened(
    folder: Path, server: FileServer, open_files: Callable[[str, str], ShardFiles]
) -> None:
    server.plan["shard-000004.tar"] = ["hold"]
    files = open_files(f"{server.url}/set", "streamed")
    files.will_need([4])
    assert server.holding.wait(60)
    server.release.set()  # the server hangs up; the shard is asked for again
    assert files.open(4).tobytes() == contents(folder)[4]
    assert server.num_requests["shard-000004.tar"] == 2


def test_memory_holds_two_announcements_and_two_more(folder: Path) -> None:
    with closing(open_shard_files(str(folder), read_manifest(folder), "streamed", None)) as files:
        alive = weakref.WeakValueDictionary[int, np.ndarray]()

        def read(shards: list[int], kept: list[int]) -> None:
            files.will_need(shards)
            for shard in shards:
                alive[shard] = files.open(shard)
            they_stay(kept)

        def they_stay(kept: list[int]) -> None:
            # A thread that has fetched one may not yet have come to letting go of it.
            wait_until(lambda: sorted(alive) == kept, lambda: sorted(alive), timeout_s=60)

        read([0, 1], kept=[0, 1])
        read([1, 2], kept=[0, 1, 2])
        read([1, 2], kept=[0, 1, 2])  # the same list again is no news
        read([3, 4], kept=[0, 1, 2, 3, 4])
        read([5], kept=[1, 2, 3, 4, 5])
        read([], kept=[3, 4, 5])
        for shard in range(6):  # nobody has announced them
            alive[shard] = files.open(shard)
        they_stay([3, 4, 5])


def test_closed_files_fetch_nothing(folder: Path, server: FileServer) -> None:
    location = f"{server.url}/set"
    files = open_shard_files(location, read_manifest(location), "streamed", None)
    files.will_need([0])
    first = files.open(0)
    files.close()
    files.close()
    files.will_need([1])
    assert first.tobytes() == contents(folder)[0]
    with pytest.raises(PomscaleError, match="reading was stopped"):
        files.open(1)
