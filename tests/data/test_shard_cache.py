"""One copy of a shard per node: fetched once, never half, within the limit, and no trouble for those who read it."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from pomscale.base.errors import InputError, PomscaleError
from pomscale.config.data import CacheConfig
from pomscale.data.readers.shard_files import ShardFiles, open_shard_files
from pomscale.data.remote.shard_cache import ShardCache
from pomscale.shards.schema import Manifest, read_manifest
from support.file_server import FileServer
from support.running import open_process
from support.synthetic_dataset import write_dataset

NUM_SHARDS = 6

# A process of the node: reads the index and every shard, some of them announced, and prints what it read.
READER = """
import hashlib, sys
from contextlib import closing
from pomscale.config.data import CacheConfig
from pomscale.shards.schema import read_manifest
from pomscale.data.remote.shard_cache import local_index
from pomscale.data.readers.shard_files import open_shard_files

location, cache = sys.argv[1], CacheConfig(path=sys.argv[2])
manifest = read_manifest(location)
print(hashlib.sha256(local_index(location, manifest, cache).read_bytes()).hexdigest() == manifest.index.sha256)
with closing(open_shard_files(location, manifest, "mapped", cache)) as files:
    files.will_need(range(0, len(manifest.shards), 2))
    for shard, info in enumerate(manifest.shards):
        print(hashlib.sha256(files.open(shard)).hexdigest() == info.sha256)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", [4] * NUM_SHARDS)
    return tmp_path / "set"


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@contextmanager
def reader(location: str, cache_folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", READER, location, str(cache_folder)]
    process = open_process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def limited(cache_folder: Path, num_bytes: float) -> CacheConfig:
    return CacheConfig(path=str(cache_folder), max_gib=num_bytes / 2**30)


def cached(cache_folder: Path) -> list[str]:
    """What fills the cache, leftovers included."""
    return sorted(path.name for path in cache_folder.glob("*/*") if path.suffix != ".lock")


def cached_at_once(cache_folder: Path) -> list[str]:
    """The same while others evict: a listing without the lock mixes two moments."""
    with (cache_folder / "room.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return cached(cache_folder)


def nothing_to_drop(_num_bytes: int) -> bool:
    return False


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def test_processes_of_a_node_fetch_a_file_once(folder: Path, tmp_path: Path, cache_folder: Path) -> None:
    with FileServer(tmp_path) as server:
        location = f"{server.url}/set"
        with reader(location, cache_folder) as one, reader(location, cache_folder) as other:
            for process in (one, other):
                out, err = process.communicate(timeout=120)
                assert process.returncode == 0, err
                assert out.split() == ["True"] * (1 + NUM_SHARDS)
        manifest = read_manifest(location)
        assert server.num_requests == {
            "manifest.json": 3,
            "index.npy": 1,
            **{shard_name(shard): 1 for shard in range(NUM_SHARDS)},
        }
    (dataset_folder,) = (path for path in cache_folder.iterdir() if path.is_dir())
    assert dataset_folder.name == manifest.fingerprint[:16]
    index = f"index-{manifest.index.sha256[:16]}.npy"
    assert cached(cache_folder) == sorted([index, *(shard_name(shard) for shard in range(NUM_SHARDS))])


def test_a_killed_fetcher_leaves_nothing_half_and_blocks_nobody(
    folder: Path, tmp_path: Path, cache_folder: Path
) -> None:
    with FileServer(tmp_path) as server:
        location = f"{server.url}/set"
        server.plan[shard_name(1)] = ["hold"]
        manifest = read_manifest(location)
        shard_files = open_shard_files(location, manifest, "mapped", CacheConfig(path=str(cache_folder)))
        with closing(shard_files) as files, reader(location, cache_folder) as victim:
            assert server.holding.wait(120)
            assert [name for name in cached(cache_folder) if name.startswith(f"{shard_name(1)}.{victim.pid}-")]
            assert shard_name(1) not in cached(cache_folder)
            waiting: list[np.ndarray] = []
            thread = threading.Thread(target=lambda: waiting.append(files.open(1)))
            thread.start()
            victim.kill()
            victim.wait()
            thread.join(60)
            assert waiting[0].tobytes() == (folder / shard_name(1)).read_bytes()
            for shard in range(NUM_SHARDS):  # any other one it may have been fetching when it died
                assert files.open(shard).tobytes() == (folder / shard_name(shard)).read_bytes()
        assert not [name for name in cached(cache_folder) if name.endswith(".tmp")]


def test_what_a_dead_process_left_makes_room(folder: Path, cache_folder: Path) -> None:
    manifest = read_manifest(folder)
    num_bytes = manifest.shards[0].num_bytes
    shards = ShardCache(str(folder), manifest, limited(cache_folder, 2.5 * num_bytes))
    dataset_folder = cache_folder / manifest.fingerprint[:16]
    for name in (f"{shard_name(5)}.123-0123abcd.tmp", f"{shard_name(0)}.123-0123abcd.tmp"):
        (dataset_folder / name).write_bytes(bytes(num_bytes))
    for shard in (0, 1):
        assert shards.open(shard, threading.Event(), True, nothing_to_drop) is not None
    assert cached(cache_folder) == [shard_name(0), shard_name(1)]


def test_least_recently_opened_shards_go_first_also_those_of_other_datasets(
    folder: Path, tmp_path: Path, cache_folder: Path
) -> None:
    write_dataset(tmp_path / "other", [4, 4], first_record=1000)
    num_bytes = read_manifest(folder).shards[0].num_bytes
    config = limited(cache_folder, 3.5 * num_bytes)

    def read(dataset: Path, *shards: int) -> None:
        with closing(open_shard_files(str(dataset), read_manifest(dataset), "mapped", config)) as files:
            for shard in shards:
                assert files.open(shard).tobytes() == (dataset / shard_name(shard)).read_bytes()

    read(tmp_path / "other", 0)
    read(folder, 1, 2)
    read(tmp_path / "other", 0)
    read(folder, 3)
    assert cached(cache_folder) == [shard_name(shard) for shard in (0, 2, 3)]
    read(folder, 4, 5)
    assert cached(cache_folder) == [shard_name(shard) for shard in (3, 4, 5)]
    read(tmp_path / "other", 1)
    assert cached(cache_folder) == [shard_name(shard) for shard in (1, 4, 5)]


def test_shards_in_use_give_way_to_what_is_needed_but_not_to_what_is_fetched_ahead(
    folder: Path, cache_folder: Path
) -> None:
    manifest = read_manifest(folder)
    num_bytes = manifest.shards[0].num_bytes
    config = limited(cache_folder, 3.5 * num_bytes)
    expected = [(folder / shard_name(shard)).read_bytes() for shard in range(NUM_SHARDS)]
    with closing(open_shard_files(str(folder), manifest, "mapped", config)) as files:
        views = [files.open(shard) for shard in (0, 1, 2)]
        # Another process would see the same: the lock is that of the mapping.
        others = ShardCache(str(folder), manifest, config)
        assert others.open(3, threading.Event(), True, nothing_to_drop) is None
        assert cached(cache_folder) == [shard_name(shard) for shard in (0, 1, 2)]
        for shard in (3, 4, 5):
            views.append(files.open(shard))
            assert len(cached(cache_folder)) == 3
        assert [view.tobytes() for view in views] == expected
        assert cached(cache_folder) == [shard_name(shard) for shard in (3, 4, 5)]
        del views
    assert others.open(0, threading.Event(), True, nothing_to_drop) is not None


def test_announcing_more_than_the_cache_holds(folder: Path, cache_folder: Path) -> None:
    manifest = read_manifest(folder)
    config = limited(cache_folder, 2.5 * manifest.shards[0].num_bytes)
    with closing(open_shard_files(str(folder), manifest, "mapped", config)) as files:
        for _ in range(3):
            files.will_need(range(NUM_SHARDS))
            for shard in range(NUM_SHARDS):
                assert files.open(shard).tobytes() == (folder / shard_name(shard)).read_bytes()
                assert len([name for name in cached_at_once(cache_folder) if name.endswith(".tar")]) <= 2
            files.will_need([])


def test_processes_share_a_cache_that_holds_one_shard(folder: Path, cache_folder: Path) -> None:
    manifest = read_manifest(folder)
    config = limited(cache_folder, 1.5 * manifest.shards[0].num_bytes)
    held: list[set[str]] = []
    wrong: list[int] = []

    def read(files: ShardFiles, shards: range) -> None:
        for _ in range(5):
            for shard in shards:
                if files.open(shard).tobytes() != (folder / shard_name(shard)).read_bytes():
                    wrong.append(shard)
                held.append({name.partition(".tar")[0] for name in cached_at_once(cache_folder)})

    # Locks belong to the opened file, so caches in one process meet as those of several do.
    caches = [open_shard_files(str(folder), manifest, "mapped", config) for _ in range(3)]
    orders = [range(NUM_SHARDS), range(NUM_SHARDS - 1, -1, -1), range(0, NUM_SHARDS, 2)]
    threads = [threading.Thread(target=read, args=pair) for pair in zip(caches, orders, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for files in caches:
        files.close()
    assert wrong == []
    assert len(held) == 5 * (6 + 6 + 3)
    assert max(map(len, held)) == 1


def test_evicted_shards_give_their_room_back(folder: Path, cache_folder: Path) -> None:
    manifest = read_manifest(folder)
    config = limited(cache_folder, 2.5 * manifest.shards[0].num_bytes)
    with closing(open_shard_files(str(folder), manifest, "mapped", config)) as files:
        files.will_need(range(NUM_SHARDS))
        for shard in range(NUM_SHARDS):
            files.open(shard)
            deadline_s = time.monotonic() + 60.0
            while True:  # the thread that has fetched it ahead may not yet have come to letting go of it
                maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(cache_folder) in line]
                assert maps
                if not [line for line in maps if "(deleted)" in line]:
                    break
                assert time.monotonic() < deadline_s, maps
                time.sleep(0.01)


def test_what_is_taken_is_known_and_counted_when_the_limit_would_be_passed(folder: Path, cache_folder: Path) -> None:
    manifest = read_manifest(folder)
    num_bytes = manifest.shards[0].num_bytes

    def taken() -> int:
        return int((cache_folder / "room.lock").read_bytes())

    with closing(open_shard_files(str(folder), manifest, "mapped", limited(cache_folder, 2.5 * num_bytes))) as files:
        for shard in (0, 1):
            files.open(shard)
            assert taken() == (shard + 1) * num_bytes
        shutil.rmtree(cache_folder / manifest.fingerprint[:16])
        files.open(2)
        assert taken() == num_bytes
        for shard in (3, 4, 5):
            files.open(shard)
            assert taken() == 2 * num_bytes
        locks = {path.name for path in cache_folder.glob("*/*.lock")}
        assert locks == {f"{name}.lock" for name in cached(cache_folder)}


def test_waiting_for_another_process_can_be_stopped(folder: Path, cache_folder: Path) -> None:
    manifest = read_manifest(folder)
    files = open_shard_files(str(folder), manifest, "mapped", CacheConfig(path=str(cache_folder)))
    lock = cache_folder / manifest.fingerprint[:16] / f"{shard_name(0)}.lock"
    told: list[PomscaleError] = []

    def read() -> None:
        try:
            files.open(0)
        except PomscaleError as error:
            told.append(error)

    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=read)
        thread.start()
        files.close()
        thread.join(60)
        assert not thread.is_alive()
    assert "reading was stopped" in str(told[0])


def test_a_damaged_copy_is_fetched_again(folder: Path, cache_folder: Path) -> None:
    manifest, config = read_manifest(folder), CacheConfig(path=str(cache_folder))
    for _ in range(2):
        with closing(open_shard_files(str(folder), manifest, "mapped", config)) as files:
            assert files.open(0).tobytes() == (folder / shard_name(0)).read_bytes()
        os.truncate(cache_folder / manifest.fingerprint[:16] / shard_name(0), 100)


def test_a_limit_below_one_shard_is_refused(folder: Path, cache_folder: Path) -> None:
    with pytest.raises(InputError, match=r"data\.cache\.max_gib: .* cannot hold a shard .* raise it"):
        open_shard_files(str(folder), read_manifest(folder), "mapped", limited(cache_folder, 1000))


def test_indexes_stay_and_may_leave_no_room(folder: Path, cache_folder: Path) -> None:
    manifest = read_manifest(folder)
    num_bytes = manifest.shards[0].num_bytes
    index = cache_folder / "0123456789abcdef" / "index-x.npy"
    index.parent.mkdir(parents=True)
    index.write_bytes(bytes(num_bytes))
    with closing(open_shard_files(str(folder), manifest, "mapped", limited(cache_folder, 2 * num_bytes))) as files:
        for shard in (0, 1):
            files.open(shard)
            assert cached(cache_folder) == sorted(["index-x.npy", shard_name(shard)])
    with closing(open_shard_files(str(folder), manifest, "mapped", limited(cache_folder, 1.5 * num_bytes))) as files:
        files.will_need([2])
        with pytest.raises(InputError, match=rf"no room for a shard beside the indexes in {cache_folder}; raise it"):
            files.open(2)


def test_files_of_others_are_left_alone(folder: Path, cache_folder: Path) -> None:
    manifest = read_manifest(folder)
    theirs = [cache_folder / "mine.tar", cache_folder / "results" / "mine.tar"]
    theirs[1].parent.mkdir(parents=True)
    for path in theirs:
        path.write_bytes(bytes(manifest.shards[0].num_bytes))
    config = limited(cache_folder, 1.5 * manifest.shards[0].num_bytes)
    with closing(open_shard_files(str(folder), manifest, "mapped", config)) as files:
        for shard in range(NUM_SHARDS):
            files.open(shard)
    assert all(path.exists() for path in theirs)


def test_a_cache_folder_that_cannot_be_used_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file/.*: this folder cannot be made"):
        open_shard_files(str(folder), read_manifest(folder), "mapped", CacheConfig(path=str(tmp_path / "file")))


def full_disk_is_told(folder: Path, manifest: Manifest, cache_folder: Path) -> None:
    with closing(open_shard_files(str(folder), manifest, "mapped", CacheConfig(path=str(cache_folder)))) as files:
        files.will_need(range(NUM_SHARDS))
        match = rf"data\.cache\.path {cache_folder}: no room for shard-00000\d\.tar, .* Lower data\.cache\.max_gib"
        with pytest.raises(PomscaleError, match=match):
            _ = [files.open(shard) for shard in range(NUM_SHARDS)]
    assert not [name for name in cached(cache_folder) if name.endswith(".tmp")]


def test_a_file_size_limit_is_told_like_a_full_disk(folder: Path, cache_folder: Path) -> None:
    manifest = read_manifest(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (manifest.shards[0].num_bytes - 1, limits[1]))
    try:
        full_disk_is_told(folder, manifest, cache_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cached(cache_folder) == []


def test_a_full_disk_is_told(folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    manifest = read_manifest(folder)
    size = 3 * manifest.shards[0].num_bytes
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        full_disk_is_told(folder, manifest, disk / "cache")
        assert cached(disk / "cache")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
