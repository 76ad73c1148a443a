"""Encodes of the shipped recipes' sources, from small real instances: true column names, types and layouts."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

av = pytest.importorskip("av")

from data_pipelines.check.repair import repair  # noqa: E402
from data_pipelines.check.verify import verify  # noqa: E402
from data_pipelines.encode.dry_run import describe  # noqa: E402
from data_pipelines.encode.encode import EncodeReport, encode  # noqa: E402
from pomscale.base.errors import InputError  # noqa: E402
from pomscale.base.task_index import TaskIndex  # noqa: E402
from pomscale.config.encode import EncodeRecipe  # noqa: E402
from pomscale.config.load import load_encode_recipe  # noqa: E402
from pomscale.media.clips import DecodedClip, Span, decode_spans  # noqa: E402
from pomscale.shards.schema import FAILURES_NAME, MANIFEST_NAME, read_manifest  # noqa: E402
from support.encoding import contents, only, shard_members  # noqa: E402
from support.make_video import numbered_frame, read_number, write_video  # noqa: E402
from support.paths import RECIPES  # noqa: E402

CLIP = {"kind": "video", "fps": 8, "buckets": [[8, 20, 32]]}  # one second
PIXELS = {"name": "pixel", "block": 2, "channels": 3}


def shipped(name: str, tmp_path: Path, source: dict[str, Any], **changes: Any) -> EncodeRecipe:
    """A shipped recipe whose source lies elsewhere, with pixels in place of the networks."""
    values = load_encode_recipe(RECIPES / "data" / f"{name}.yaml").model_dump(mode="json")
    is_video = values["transform"]["kind"] == "video"
    plain = {
        "codec": PIXELS, "text": None, "output": str(tmp_path / "out"), "batch": 3, "shard_samples": 4,
        "transform": CLIP if is_video else {"size": 16}, "device": "cpu",
    }  # fmt: skip
    where = {**values["source"].get("where", {}), **source.pop("where", {})}
    source = values["source"] | source | ({"where": where} if where else {})
    return EncodeRecipe.model_validate(values | plain | changes | {"source": source})


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])


def clip(path: Path, seconds: float, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [numbered_frame(first + number, 40, 64) for number in range(round(24 * seconds))]
    return write_video(path, frames, 24, codec_options={"g": "24", "bf": "2"})


def failures(recipe: EncodeRecipe) -> dict[str, str]:
    path = Path(recipe.output, FAILURES_NAME)
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["key"]: line["reason"] for line in map(json.loads, lines)}


def records(recipe: EncodeRecipe) -> dict[str, tuple[str | None, int, list[float] | None]]:
    """Caption, number that the first frame shows, and range of each record by its key, from stored pixels."""
    manifest = read_manifest(recipe.output)
    found = {}
    for shard in manifest.shards:
        with tarfile.open(Path(recipe.output, shard.name)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for key in {name.partition(".")[0] for name in members}:
            latent = np.load(io.BytesIO(members[f"{key}.latent.npy"])).astype(np.float32)
            grey = latent[:, 0].reshape(3, 2, 2, *latent.shape[2:]).mean((0, 2)).transpose(1, 0, 2)
            rows = grey.reshape(-1, grey.shape[-1]) * 127.5 + 127.5
            info = json.loads(members[f"{key}.json"])
            caption = members.get(f"{key}.txt")
            number = read_number(np.broadcast_to(rows[..., None], (*rows.shape, 3)))
            found[key] = (None if caption is None else caption.decode(), number, info.get("range_s"))
    return found


def check(recipe: EncodeRecipe, num_samples: int, num_filtered: int) -> EncodeReport:
    """A dry run, an encode, and what is said of them."""
    said = describe(recipe)
    report = encode(recipe, progress=False)
    assert only(report).num_samples == num_samples
    assert report.num_filtered == num_filtered == read_manifest(recipe.output).source.num_filtered
    if num_filtered:
        assert f"{num_filtered:,} more left out by source.where" in said
        assert f"{num_filtered:,} rows were left out by source.where" in str(report)
    assert verify(recipe.output, progress=False).num_problems == 0
    return report


OPENVID = [
    "video", "caption", "aesthetic score", "motion score", "temporal consistency score", "camera motion", "frame",
    "fps", "seconds",
]  # fmt: skip


def openvid_rows() -> list[list[Any]]:
    return [
        ["celebv_--Jiv5iYqT8_0.mp4", "The video shows a woman, speaking.", 5.2, 4.1, 0.998, "static", 30, 24.0, 6.25],
        ["a_0.mp4", "A dog runs.", 5.0, 9.9, 0.99, "pan_left", 30, 24.0, 5.0],
        ["b_1.mp4", "Too plain.", 3.9, 9.9, 0.99, "pan_left", 30, 24.0, 9.0],
        ["c_2.mp4", "Too short.", 5.9, 9.9, 0.99, "pan_left", 30, 24.0, 1.5],
        ["d_3.mp4", "No score.", "", 9.9, 0.99, "Undetermined", 30, 24.0, 7.0],
        ["e_4.mp4", "Not there.", 5.5, 9.9, 0.99, "static", 30, 24.0, 7.0],
    ]


def test_openvid(tmp_path: Path) -> None:
    write_csv(tmp_path / "OpenVid-1M.csv", OPENVID, openvid_rows())
    for row in openvid_rows()[:5]:
        clip(tmp_path / "videos" / row[0], 1.25, 100)
    source = {"path": str(tmp_path / "OpenVid-1M.csv"), "root": str(tmp_path / "videos")}
    recipe = shipped("openvid-1m", tmp_path, source)
    report = check(recipe, 2, 2)
    assert report.exit_code == 3
    assert failures(recipe) == {"d_3_mp4": "its aesthetic score is missing", "e_4_mp4": "the file is gone"}
    assert records(recipe) == {
        "celebv_--Jiv5iYqT8_0_mp4": ("The video shows a woman, speaking.", 100, None),
        "a_0_mp4": ("A dog runs.", 100, None),
    }


def test_openvid_as_webdataset(tmp_path: Path) -> None:
    media = clip(tmp_path / "x.mp4", 1.25, 7).read_bytes()
    for number in range(2):
        with tarfile.open(tmp_path / f"openvid-train-{number:06d}.tar", "w") as tar:
            for i, row in list(enumerate(openvid_rows()))[3 * number : 3 * number + 3]:
                fields = dict(zip(OPENVID, row, strict=True))
                fields["aesthetic score"] = fields["aesthetic score"] or None
                for suffix, content in (("mp4", media), ("json", json.dumps(fields).encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    recipe = shipped("openvid-1m-wds", tmp_path, {"path": f"{tmp_path}/openvid-train-*.tar"})
    check(recipe, 3, 2)
    assert failures(recipe) == {"openvid-train-000001/000000004": "its aesthetic score is missing"}
    assert records(recipe)["openvid-train-000000/000000001"] == ("A dog runs.", 7, None)


KOALA = [
    "videoID", "url", "timestamp", "caption", "clarity_score", "aesthetic_score", "motion_score",
    "video_training_suitability_score",
]  # fmt: skip


def koala_rows() -> list[list[Any]]:
    def row(clip: str, span: str, *scores: float) -> list[Any]:
        return [clip, f"https://www.youtube.com/watch?v={clip[:11]}", span, f"About {clip}.", *scores]

    good = (0.95, 5.1, 3.2, 4.5)
    return [
        row("xED6jYxWa_g_0", "['0:00:01.000', '0:00:02.500']", *good),
        row("00000000000_0", "['0:00:00.000', '0:00:01.000']", *good),
        row("xED6jYxWa_g_12", "['0:00:04.500', '0:00:06.000']", *good),
        row("xED6jYxWa_g_2", "['0:00:02.500', '0:00:03.900']", 0.95, 5.1, 3.2, 3.9),
        row("xED6jYxWa_g_3", "['0:00:09.500', '0:00:11.000']", *good),
        row("xED6jYxWa_g_4", "['0:00:04.000', '0:00:04.000']", *good),
        row("xED6jYxWa_g_5", "", *good),
        row("xED6jYxWa_g_6", "['0:00:04.000']", *good),
        row("xED6jYxWa_g_7", "['0:00:04.000', 'soon']", *good),
    ]


def write_koala(tmp_path: Path) -> dict[str, Any]:
    write_csv(tmp_path / "Koala_36M_1.csv", KOALA, koala_rows()[:4])
    write_csv(tmp_path / "Koala_36M_2.csv", KOALA, koala_rows()[4:])
    clip(tmp_path / "videos" / "xED6jYxWa_g.mp4", 10)
    clip(tmp_path / "videos" / "00000000000.mp4", 2, 500)
    return {"path": f"{tmp_path}/Koala_36M_*.csv", "root": str(tmp_path / "videos")}


def test_koala(tmp_path: Path) -> None:
    recipe = shipped("koala-36m", tmp_path, write_koala(tmp_path))
    check(recipe, 3, 1)
    assert records(recipe) == {
        "xED6jYxWa_g_0": ("About xED6jYxWa_g_0.", 24, [1.0, 2.5]),
        "xED6jYxWa_g_12": ("About xED6jYxWa_g_12.", 108, [4.5, 6.0]),
        "00000000000_0": ("About 00000000000_0.", 500, [0.0, 1.0]),
    }
    assert failures(recipe) == {
        "xED6jYxWa_g_3": "has 0.50 s of its range, 9.50 s to 11.00 s, then the video's end (QuickTime / MOV); needs at "
        "least 1 s for 8 frames at 8 fps",
        "xED6jYxWa_g_4": "its range is empty: it ends at 0:00:04.000 and starts at 0:00:04.000",
        "xED6jYxWa_g_5": "its timestamp is missing",
        "xED6jYxWa_g_6": "its timestamp has an element that is not [start, end] but '0:00:04.000'",
        "xED6jYxWa_g_7": "the end of its range is no time but 'soon'",
    }


PANDA = [
    "videoID", "url", "timestamp", "caption", "matching_score", "desirable_filtering", "shot_boundary_detection",
]  # fmt: skip


def panda_rows() -> list[list[Any]]:
    return [
        [
            "-2yHu5qgTzM", "https://www.youtube.com/watch?v=-2yHu5qgTzM",
            "[['0:00:01.000', '0:00:02.500'], ['0:00:03.000', '0:00:05.000'], ['0:00:06.500', '0:00:07.500']]",
            "['A neuron in a black background.', \"It's a woman.\", 'There is a whiteboard, and a man.']",
            "[0.451416015625, 0.4990234375, 0.434814453125]", "['1_still_foreground_image', 'desirable', 'desirable']",
            "[[['0:00:00.000', '0:00:01.500']], [['0:00:00.000', '0:00:02.000']], [['0:00:00.000', '0:00:01.000']]]",
        ],
        ["b", "u", "[['0:00:00.000', '0:00:01.000']]", "['one', 'two']", "[0.5]", "['desirable']", "[]"],
        ["c", "u", "[['0:00:00.000', '0:00:01.000']]", "['one]", "[0.5]", "['desirable']", "[]"],
        ["d", "u", "[]", "[]", "[]", "[]", "[]"],
    ]  # fmt: skip


def test_panda(tmp_path: Path) -> None:
    write_csv(tmp_path / "panda70m_training_2m.csv", PANDA, panda_rows())
    for name in ("-2yHu5qgTzM", "b", "c", "d"):
        clip(tmp_path / "videos" / f"{name}.mp4", 8)
    source = {"path": str(tmp_path / "panda70m_training_2m.csv"), "root": str(tmp_path / "videos")}
    recipe = shipped("panda-70m", tmp_path, source)
    check(recipe, 2, 1)
    assert records(recipe) == {
        "-2yHu5qgTzM_00001": ("It's a woman.", 72, [3.0, 5.0]),
        "-2yHu5qgTzM_00002": ("There is a whiteboard, and a man.", 156, [6.5, 7.5]),
    }
    assert failures(recipe) == {
        "b": "it has 1 ranges and 2 values of caption",
        "c": 'its caption is no list that can be read: "[\'one]"',
        "d": "its timestamp is an empty list",
    }


def test_ranges_in_parquet_and_jsonl_by_start_and_end(tmp_path: Path) -> None:
    clip(tmp_path / "v.mp4", 6)
    rows = [
        {"file": "v.mp4", "id": "one", "start": 1.0, "end": 2.0, "text": "single"},
        {"file": "v.mp4", "id": "nan", "start": 1.0, "end": float("nan"), "text": "single"},
    ]
    lists = [{"file": "v.mp4", "id": "two", "start": ["0:03", "4.5"], "end": ["0:04", "00:05.5"], "text": ["a", "b"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(lists), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*rows[:1], *lists]))
    for path, num_samples in (("[ab].parquet", 3), ("c.jsonl", 3)):
        recipe = EncodeRecipe.model_validate(
            {
                "kind": "encode", "name": "x", "output": str(tmp_path / f"out-{num_samples}-{path[-1]}"),
                "codec": PIXELS, "transform": CLIP, "device": "cpu",
                "source": {
                    "kind": "table", "path": f"{tmp_path}/{path}", "root": str(tmp_path), "media": "{file}",
                    "key": "id", "caption": "text", "start": "start", "end": "end",
                },
            }
        )  # fmt: skip
        check(recipe, num_samples, 0)
        assert records(recipe) == {
            "one": ("single", 24, [1.0, 2.0]),
            "two_00000": ("a", 72, [3.0, 4.0]),
            "two_00001": ("b", 108, [4.5, 5.5]),
        }
        assert failures(recipe) == ({"nan": "its range has no end"} if "parquet" in path else {})


def test_ranges_of_a_clip_that_lies_in_the_table(tmp_path: Path) -> None:
    """The row's ranges share its bytes, and need not be in order; rows keep the order of the table."""
    media = clip(tmp_path / "v.mp4", 6).read_bytes()
    rows = [
        {"video": {"bytes": media}, "at": [["0:04", "0:05.2"], ["0:01", "0:02"], ["0:03", "0:04"]]},
        {"video": {"bytes": media}, "at": [["0:02", "0:03"]]},
        {"video": None, "at": [["0:00", "0:01"]]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    recipe = EncodeRecipe.model_validate(
        {
            "kind": "encode", "name": "x", "output": str(tmp_path / "out"), "codec": PIXELS, "transform": CLIP,
            "source": {"kind": "table", "path": f"{tmp_path}/t.parquet", "bytes_column": "video.bytes", "ranges": "at"},
            "device": "cpu",
        }
    )  # fmt: skip
    check(recipe, 4, 0)
    firsts = {key: number for key, (_, number, _) in records(recipe).items()}
    assert firsts == {
        "000000000000_00000": 96, "000000000000_00001": 24, "000000000000_00002": 72, "000000000001_00000": 48,
    }  # fmt: skip
    assert failures(recipe) == {"000000000002_00000": "its video.bytes is missing"}


def test_a_table_without_its_time_columns_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    source = write_koala(tmp_path)
    for changes, column in (({"ranges": "time"}, "time"), ({"ranges": None, "start": "begin", "end": "stop"}, "begin")):
        with pytest.raises(
            InputError, match=rf"Koala_36M_1\.csv has no column '{column}'; its columns are videoID, url"
        ):
            encode(shipped("koala-36m", tmp_path, source | changes), progress=False)
    with pytest.raises(InputError, match="has no column 'beauty'"):
        encode(shipped("koala-36m", tmp_path, source | {"where": {"beauty": ">= 1"}}), progress=False)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_filter_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    recipe = shipped("koala-36m", tmp_path, write_koala(tmp_path) | {"where": {"clarity_score": "> 1"}})
    with pytest.raises(InputError, match=r"source\.where: none of 9 rows meets all of its rules"):
        encode(recipe, progress=False)


def many_ranges(tmp_path: Path) -> EncodeRecipe:
    """Three files with rows in no order, ranges that overlap, and one that is damaged in the middle."""
    rng = np.random.default_rng(0)
    rows = []
    for number, name in enumerate("abc"):
        clip(tmp_path / "videos" / f"{name}.mp4", 12, 300 * number)
        for part in range(9):
            start = round(float(rng.uniform(0, 10.8)), 3)
            rows.append([f"{name}{part}", name, start, start + 1.1, f"caption {name}{part}"])
    content = bytearray((tmp_path / "videos" / "b.mp4").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 300] = b"\xff" * 300
    (tmp_path / "videos" / "b.mp4").write_bytes(content)
    rows.append(["late", "a", 50, 52, "beyond"])
    rng.shuffle(rows)
    write_csv(tmp_path / "t.csv", ["id", "file", "start", "end", "text"], rows)
    return EncodeRecipe.model_validate(
        {
            "kind": "encode", "name": "x", "output": "out", "codec": PIXELS, "transform": CLIP, "device": "cpu",
            "shard_samples": 5, "batch": 2, "num_workers": 2,
            "source": {
                "kind": "table", "path": str(tmp_path / "t.csv"), "root": str(tmp_path / "videos"),
                "media": "{file}.mp4", "key": "id", "caption": "text", "start": "start", "end": "end",
            },
        }
    )  # fmt: skip


def test_ranges_of_a_file_are_neighbours_and_equal_to_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = many_ranges(tmp_path)
    encode(recipe, progress=False)
    order = [json.loads(line)["source"] for line in shard_members(Path("out"), ".json")]
    names = [source.split(": ")[1].split(".")[0] for source in order]
    assert sum(a != b for a, b in pairwise(names)) == 2  # three files, one after the other
    starts = [(name, float(source.split()[-2].split("-")[0])) for name, source in zip(names, order, strict=True)]
    assert all(one[1] <= other[1] for one, other in pairwise(starts) if one[0] == other[0])
    for source, latent in zip(order, shard_members(Path("out"), ".latent.npy"), strict=True):
        path = tmp_path / "videos" / source.split(": ")[1].split()[0]
        start, end = (round(1000 * float(time)) for time in source.split()[-2].split("-"))
        with path.open("rb") as stream:
            span = Span(Fraction(start, 1000), Fraction(end, 1000))
            (alone,) = decode_spans(stream, [span], [(8, 20, 32)], 8, "area")
        assert isinstance(alone, DecodedClip)
        pixels = np.load(io.BytesIO(latent)).astype(np.float32)
        blocks = alone.frames.transpose(3, 0, 1, 2).reshape(3, 8, 10, 2, 16, 2).transpose(0, 3, 5, 1, 2, 4)
        assert np.allclose(pixels, (blocks.reshape(12, 8, 10, 16) / 127.5 - 1), atol=1e-3)
    assert "late" in failures(recipe)


def test_neither_threads_nor_passes_nor_tasks_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, three, one range of a file at once; stopped and resumed; failures tried again; a shard repaired."""
    recipe = many_ranges(tmp_path)
    made = {}
    ways = [({}, 2**28), ({"num_workers": 3, "batch": 7}, 1), ({}, 50_000), ({}, 2**28)]
    for number, (changes, num_bytes) in enumerate(ways):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setattr("data_pipelines.encode.media_loader._PASS_BYTES", num_bytes)
        changed = recipe.model_copy(update=changes)
        if number == 2:
            asked = iter(range(1000))
            stopped = encode(changed, progress=False, stop=lambda asked=asked: next(asked) >= 17)
            assert stopped.exit_code == 75
        if number == 3:  # an array of two tasks, the first of which is stopped
            asked = iter(range(1000))
            encode(changed, progress=False, task=TaskIndex(0, 2), stop=lambda asked=asked: next(asked) >= 9)
            encode(changed, progress=False, task=TaskIndex(1, 2), stop=lambda asked=asked: next(asked) >= 30)
        report = encode(changed, progress=False)
        assert (report.num_resumed > 0) == (number > 1)
        if number == 2:
            encode(changed, progress=False, only_failed=True)
            shard = sorted(Path("out").glob("*.tar"))[1]
            shard.write_bytes(shard.read_bytes()[:-1024] + b"x" * 1024)
            assert repair("out", progress=False).exit_code == 3
        made[number] = {name: content for name, content in contents(Path("out")).items() if name != MANIFEST_NAME}
    for number in (1, 2, 3):
        assert made[0].keys() == made[number].keys()
        assert [name for name, content in made[0].items() if made[number][name] != content] == []


def test_a_half_done_encode_is_not_continued_under_another_filter(tmp_path: Path) -> None:
    source = write_koala(tmp_path)
    encode(shipped("koala-36m", tmp_path, dict(source)), progress=False)
    with pytest.raises(InputError, match=r"holds parts of another encode: source is .*where"):
        encode(shipped("koala-36m", tmp_path, source | {"where": {"motion_score": "> 0"}}), progress=False)


def test_sound_is_said_to_be_ignored_once(tmp_path: Path) -> None:
    for name in "ab":
        path = tmp_path / "clips" / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        with av.open(str(path), "w") as container:
            video, sound = container.add_stream("libx264", rate=24), container.add_stream("aac", rate=16000)
            video.width, video.height, video.pix_fmt = 64, 40, "yuv420p"
            for number in range(30):
                container.mux(video.encode(av.VideoFrame.from_ndarray(numbered_frame(number, 40, 64), format="rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 16000
            container.mux(sound.encode(samples))
            container.mux([*video.encode(None), *sound.encode(None)])
    recipe = EncodeRecipe.model_validate(
        {
            "kind": "encode", "name": "x", "output": str(tmp_path / "out"), "codec": PIXELS, "transform": CLIP,
            "source": {"kind": "video_folder", "path": str(tmp_path / "clips")}, "device": "cpu",
        }
    )  # fmt: skip
    assert describe(recipe).count("sound    of clips is ignored") == 1
    assert str(encode(recipe, progress=False)).count("the sound of clips was ignored") == 1


def jpeg(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (value, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def test_imagenet_in_parquet(tmp_path: Path) -> None:
    kind = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    for number in range(2):
        rows = [
            {"image": {"bytes": jpeg(10 * i), "path": f"n0144076{i}_1.JPEG"}, "label": (i + number) % 3}
            for i in range(5)
        ]
        pq.write_table(pa.Table.from_pylist(rows, kind), tmp_path / f"train-{number:05d}-of-00002.parquet")
    recipe = shipped("imagenet-256-parquet", tmp_path, {"path": f"{tmp_path}/train-*.parquet"})
    check(recipe, 10, 0)
    assert read_manifest(recipe.output).class_names == ("0", "1", "2")
    assert [int(label) for label in shard_members(Path(recipe.output), ".cls")] == [0, 1, 2, 0, 1, 1, 2, 0, 1, 2]


def test_captioned_pictures_with_several_captions(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": jpeg(i)}, "captions": [f"{i} a", f"{i} b"]} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    recipe = shipped("captioned-images-table", tmp_path, {"path": str(tmp_path / "t.parquet")})
    check(recipe, 3, 0)
    infos = [json.loads(content) for content in shard_members(Path(recipe.output), ".json")]
    assert [info["captions"] for info in infos] == [[f"{i} a", f"{i} b"] for i in range(3)]
