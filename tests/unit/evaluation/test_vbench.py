"""VBench: which videos it wants, under which names, and what its results are worth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pomscale.base.errors import InputError
from pomscale.evaluation.vbench import DIMENSIONS, VBenchScores, read_results
from pomscale.sampling.vbench_suite import (
    MANIFEST,
    VIDEOS,
    Prompt,
    check,
    claim,
    list_videos,
    read_manifest,
    read_prompts,
    video_seed,
)

# --- prompts and names ---------------------------------------------------------------------------------------------


def test_lines_are_stripped_as_vbench_does_and_a_prompt_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffA cat. \r\n\r\nThe bund Shanghai, oil painting\nA cat.\nein Fluß".encode())
    prompts = read_prompts(path)
    assert prompts == [Prompt("A cat.", 5), Prompt("The bund Shanghai, oil painting", 5), Prompt("ein Fluß", 5)]
    videos = list_videos(prompts[:1], seed=7)
    assert [video.name for video in videos] == [f"A cat.-{index}.mp4" for index in range(5)]


def test_full_info_asks_for_more_videos_where_static_ones_are_chosen(tmp_path: Path) -> None:
    """As VBench_full_info.json of 45e79ec: two of its entries, and a prompt of two dimensions that is there twice."""
    path = tmp_path / "VBench_full_info.json"
    still = {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]}
    bund = {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["appearance_style"]}
    twice = {**bund, "dimension": ["temporal_style"], "auxiliary_info": {"x": 1}}
    path.write_text(json.dumps([still, bund, twice]))
    assert read_prompts(path) == [Prompt(still["prompt_en"], 25), Prompt(bund["prompt_en"], 5)]
    assert [prompt.num_videos for prompt in read_prompts(path, num=2)] == [2, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", " \n\n", "there is no prompt in it"),
        ("p.txt", "a\nup/down\n", "line 2: 'up/down' has a slash"),
        ("p.txt", "a\0b", "line 1: .*NUL"),
        ("p.txt", "ü" * 130, "line 1: 'ü+'... makes a file name of 266 bytes; the most is 255"),
        ("p.json", "[", "cannot be read as JSON"),
        ("p.json", "[]", "there is no prompt"),
        ("p.json", '{"a cat": 5}', "entry 0 has no prompt_en"),
        ("p.json", '[{"prompt_en": " ", "dimension": []}]', "entry 0 has no prompt_en"),
        ("p.json", '[{"prompt_en": "\\ud800", "dimension": []}]', "no valid Unicode"),
        ("p.txt", None, "cannot be read"),
    ],
)
def test_prompts_that_vbench_could_not_use_are_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


def test_the_longest_prompt_makes_the_longest_name(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("x" * 249)
    (video,) = list_videos(read_prompts(path, num=1), seed=0)
    (tmp_path / video.name).touch()  # this file system takes it
    with pytest.raises(InputError, match="256 bytes"):
        read_prompts(path, num=11)  # its last is number 10


def test_seeds_depend_on_seed_prompt_and_index_alone() -> None:
    short, long = [Prompt("b", 5)], [Prompt("a", 25), Prompt("b", 25)]
    assert list_videos(short, 3) == [video for video in list_videos(long, 3) if video.prompt == "b"][:5]
    seeds = {video_seed(seed, prompt, index) for seed in range(10) for prompt in "abc" for index in range(25)}
    assert len(seeds) == 10 * 3 * 25
    assert max(seeds) < 2**48
    assert video_seed(0, "a cat", 1) == 73529846334604, "videos of former runs would be others"


# --- a folder and what made its videos -----------------------------------------------------------------------------


def made_by(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"run": "r", "samples": changes.get("samples", 64), "checkpoint": "/r/checkpoints/x"},
        "sampling": {"steps": changes.get("steps", 5), "shape": (1, 2)},
        "videos": {f"{prompt}-0.mp4": 1 for prompt in changes.get("prompts", "ab")},
    }


def test_a_folder_is_of_one_model_one_sampler_and_one_list_of_prompts(tmp_path: Path) -> None:
    (tmp_path / VIDEOS).mkdir()
    claim(tmp_path, made_by(), {"versions": {"torch": "1"}})
    claim(tmp_path, made_by(), {"versions": {"torch": "2"}})
    assert read_manifest(tmp_path)["versions"] == {"torch": "1"}
    for change, message in (
        ({"samples": 128}, "made in another way: samples 64 there and 128 now"),
        ({"steps": 50}, "steps 5 there and 50 now"),
        ({"prompts": "abc"}, "2 videos of other prompts there and 3 now"),
    ):
        with pytest.raises(InputError, match=message):
            claim(tmp_path, made_by(**change), {})


def test_videos_of_nobody_knows_what_are_refused(tmp_path: Path) -> None:
    (tmp_path / VIDEOS).mkdir()
    check(tmp_path, made_by())
    (tmp_path / VIDEOS / "a-0.mp4").touch()
    with pytest.raises(InputError, match=f"no {MANIFEST} says what made them"):
        check(tmp_path, made_by())
    for content in ("{", "[]", '{"model": {}}'):
        (tmp_path / MANIFEST).write_text(content)
        with pytest.raises(InputError, match=MANIFEST):
            claim(tmp_path, made_by(), {})


# --- results -------------------------------------------------------------------------------------------------------

# What VBench's own scripts/cal_final_score.py makes of these scores.
SCORES = {
    "subject_consistency": 0.15, "background_consistency": 0.2, "temporal_flickering": 0.25, "motion_smoothness": 0.3,
    "dynamic_degree": 0.35, "aesthetic_quality": 0.4, "imaging_quality": 0.45, "object_class": 0.5,
    "multiple_objects": 0.55, "human_action": 0.6, "color": 0.65, "spatial_relationship": 0.7, "scene": 0.75,
    "appearance_style": 0.33, "temporal_style": 0.34, "overall_consistency": 0.35,
}  # fmt: skip
QUALITY, SEMANTIC, TOTAL = -0.22612637808778197, 0.7737945571885435, -0.02614219103251687


def write_results(path: Path, scores: dict[str, Any]) -> Path:
    """As VBench writes them."""
    videos = [{"video_path": f"./videos/a cat-{index}.mp4", "video_results": 0.5} for index in range(360)]
    path.write_text(json.dumps({name: [score, videos] for name, score in scores.items()}, indent=4))
    return path


def test_scores_are_those_of_vbench_itself(tmp_path: Path) -> None:
    assert DIMENSIONS.keys() == SCORES.keys()
    half = list(SCORES)[::2]
    one = write_results(tmp_path / "one.json", {name: SCORES[name] for name in half})
    two = write_results(tmp_path / "two.json", {name: SCORES[name] for name in SCORES if name not in half})
    found = read_results([one, two])
    assert found.quality == pytest.approx(QUALITY, rel=1e-12)
    assert found.semantic == pytest.approx(SEMANTIC, rel=1e-12)
    assert found.total == pytest.approx(TOTAL, rel=1e-12)
    assert found.figures == {"quality": found.quality, "semantic": found.semantic, "total": found.total, **SCORES}


def test_what_is_missing_is_named_and_what_is_not_comparable(tmp_path: Path) -> None:
    scores = {name: SCORES[name] for name in SCORES if name not in ("scene", "color")}
    found = read_results([write_results(tmp_path / "a.json", scores)])
    assert (found.semantic, found.total) == (None, None)
    assert found.figures.keys() == {"quality"} | scores.keys()
    table = found.table()
    assert re.search(r"^semantic +-  missing: color, scene$", table, re.MULTILINE)
    assert re.search(r"^total +-  missing: color, scene$", table, re.MULTILINE)
    assert re.search(r"^quality +-22\.61%$", table, re.MULTILINE)
    assert re.search(r"^subject_consistency +0\.1500 +0\.45%  360$", table, re.MULTILINE)
    assert "360 (VBench's suite: 465; not comparable" in table
    assert re.search(r"^temporal_flickering .* 360$", table, re.MULTILINE), "some of its videos move, and never count"


def test_all_dimensions_of_a_perfect_model_are_full() -> None:
    best = VBenchScores({name: one.high for name, one in DIMENSIONS.items()}, dict.fromkeys(DIMENSIONS, 1))
    assert (best.quality, best.semantic, best.total) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "no results of VBench"),
        ('[{"prompt_en": "a"}]', "give the files NAME_eval_results.json"),
        ('{"beauty": [0.5, [1]]}', "'beauty' is no dimension of VBench; there are: subject_consistency"),
        ('{"color": 0.5}', r"color: must be \[score, \[videos\]\]"),
        ('{"color": ["0.5", [1]]}', "color: must be"),
        ('{"color": [true, [1]]}', "color: its score is no number"),
        ('{"color": [0.5, []]}', "color: score 0.5 of 0 videos: VBench found no video"),
        ('{"color": [NaN, [1]]}', "color: score nan"),
        ('{"color": [45.2, [1]]}', "color: score 45.2 is not between 0 and 1"),
        ('{"color": [-0.1, [1]]}', "color: score -0.1 is not between 0 and 1"),
        ('{"temporal_style": [-1.1, [1]]}', "not between -1 and 1"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "r_eval_results.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_results([path])
    assert str(path) in str(error.value)


def test_a_dimension_of_two_files_is_refused(tmp_path: Path) -> None:
    one, two = (write_results(tmp_path / f"{name}.json", {"color": 0.5}) for name in ("one", "two"))
    with pytest.raises(InputError, match=r"two\.json: color is also in .*one\.json"):
        read_results([one, two])
    with pytest.raises(InputError, match=r"gone\.json: cannot be read"):
        read_results([tmp_path / "gone.json"])


def test_a_cosine_that_rounds_to_more_than_one_is_no_error(tmp_path: Path) -> None:
    assert read_results([write_results(tmp_path / "a.json", {"subject_consistency": 1.0000001})]).scores
