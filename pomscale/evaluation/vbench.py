"""VBench's result files, and the quality, semantic and total scores that are computed from them.

VBench (Huang et al. 2024) measures videos in 16 dimensions and writes NAME_eval_results.json: by dimension its score
and a list of its videos. Names, ranges, weights and the formula of its leaderboard are taken from
github.com/Vchitect/VBench at 45e79ec (scripts/constant.py and scripts/cal_final_score.py), and so is the number of
prompts per dimension (prompts/README.md). The ranges are those of scores that models can reach; a better score is
above 1 when normalised, as on the leaderboard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomscale.base.errors import InputError
from pomscale.sampling.vbench_suite import NUM_VIDEOS

_QUALITY_WEIGHT, _SEMANTIC_WEIGHT = 4.0, 1.0
_SLACK = 1e-3  # the cosine of two equal vectors may come out a little above 1


@dataclass(frozen=True)
class Dimension:
    """A dimension of VBench.

    Attributes:
        low: Score that counts as 0 when normalised.
        high: Score that counts as 1 when normalised.
        num_prompts: Number of prompts in its suite.
        weight: Weight in the mean of its group.
        all_count: Every video of the suite has a score. VBench leaves out videos that move (temporal flickering, by
            static_filter.py) and videos in which it does not find the object (color).
        lowest: Lowest possible score. Most are shares or means of values in [0, 1]; the cosine of two embeddings is
            not.
    """

    low: float
    high: float
    num_prompts: int
    weight: float = 1.0
    all_count: bool = True
    lowest: float = 0.0

    def normalized(self, score: float) -> float:
        """Return (score - low) / (high - low)."""
        return (score - self.low) / (self.high - self.low)


QUALITY = {
    "subject_consistency": Dimension(0.1462, 1.0, 72),
    "background_consistency": Dimension(0.2615, 1.0, 86),
    "temporal_flickering": Dimension(0.6293, 1.0, 75, all_count=False),
    "motion_smoothness": Dimension(0.706, 0.9975, 72),
    "dynamic_degree": Dimension(0.0, 1.0, 72, weight=0.5),
    "aesthetic_quality": Dimension(0.0, 1.0, 93),
    "imaging_quality": Dimension(0.0, 1.0, 93),
}
SEMANTIC = {
    "object_class": Dimension(0.0, 1.0, 79),
    "multiple_objects": Dimension(0.0, 1.0, 82),
    "human_action": Dimension(0.0, 1.0, 100),
    "color": Dimension(0.0, 1.0, 85, all_count=False),
    "spatial_relationship": Dimension(0.0, 1.0, 84),
    "scene": Dimension(0.0, 0.8222, 86),
    "appearance_style": Dimension(0.0009, 0.2855, 90, lowest=-1.0),
    "temporal_style": Dimension(0.0, 0.364, 100, lowest=-1.0),
    "overall_consistency": Dimension(0.0, 0.364, 93, lowest=-1.0),
}
DIMENSIONS = QUALITY | SEMANTIC


@dataclass(frozen=True)
class VBenchScores:
    """Scores by dimension as VBench gave them, not normalised, and the number of videos behind each."""

    scores: dict[str, float]
    num_videos: dict[str, int]

    @property
    def quality(self) -> float | None:
        """Mean of the normalised scores of QUALITY; None unless all its dimensions are there."""
        return self._mean(QUALITY)

    @property
    def semantic(self) -> float | None:
        """Mean of the normalised scores of SEMANTIC; None unless all its dimensions are there."""
        return self._mean(SEMANTIC)

    @property
    def total(self) -> float | None:
        """Total score of the leaderboard; None unless all 16 dimensions are there."""
        quality, semantic = self.quality, self.semantic
        if quality is None or semantic is None:
            return None
        return (_QUALITY_WEIGHT * quality + _SEMANTIC_WEIGHT * semantic) / (_QUALITY_WEIGHT + _SEMANTIC_WEIGHT)

    @property
    def figures(self) -> dict[str, float]:
        """Figures to record: the scores as VBench gave them, and quality, semantic and total where they exist."""
        sums = {"quality": self.quality, "semantic": self.semantic, "total": self.total}
        return {name: value for name, value in sums.items() if value is not None} | self.scores

    def table(self) -> str:
        """Return a table for people: a line per dimension, then the three scores, or the dimensions they lack."""
        lines = [f"{'dimension':24}{'score':>10}{'normalised':>12}  videos"]
        for name, dimension in DIMENSIONS.items():
            if name in self.scores:
                score = self.scores[name]
                lines.append(f"{name:24}{score:10.4f}{dimension.normalized(score):12.2%}  {self._videos(name)}")
        for title, value, needed in (
            ("quality", self.quality, QUALITY),
            ("semantic", self.semantic, SEMANTIC),
            ("total", self.total, DIMENSIONS),
        ):
            missing = [name for name in needed if name not in self.scores]
            shown = f"{value:12.2%}" if value is not None else f"{'-':>12}  missing: {', '.join(missing)}"
            lines.append(f"{title:34}{shown}")
        return "\n".join(lines)

    def _mean(self, group: dict[str, Dimension]) -> float | None:
        if not group.keys() <= self.scores.keys():
            return None
        weighted = (one.weight * one.normalized(self.scores[name]) for name, one in group.items())
        return sum(weighted) / sum(one.weight for one in group.values())

    def _videos(self, name: str) -> str:
        found, expected = self.num_videos[name], DIMENSIONS[name].num_prompts * NUM_VIDEOS
        if DIMENSIONS[name].all_count and found != expected:
            return f"{found:,} (VBench's suite: {expected:,}; not comparable with its leaderboard)"
        return f"{found:,}"


def read_results(paths: Sequence[Path]) -> VBenchScores:
    """Read the scores in one or several NAME_eval_results.json, each of which has some of the dimensions.

    Raise InputError, naming the file, for a file of another kind, for a dimension that VBench does not have or that is
    there twice, and for a score that is no number or impossible.
    """
    scores: dict[str, float] = {}
    num_videos: dict[str, int] = {}
    file_of: dict[str, Path] = {}
    for path in paths:
        for name, entry in _read(path).items():
            if name not in DIMENSIONS:
                raise InputError(f"{path}: {name!r} is no dimension of VBench; there are: {', '.join(DIMENSIONS)}")
            if name in file_of:
                raise InputError(f"{path}: {name} is also in {file_of[name]}; give the file that counts")
            file_of[name] = path
            scores[name], num_videos[name] = _score(path, name, entry)
    return VBenchScores(scores, num_videos)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path}: no results of VBench, which are an object of dimensions with at least one; "
            "give the files NAME_eval_results.json of its --output_path"
        )
    return content


def _score(path: Path, name: str, entry: Any) -> tuple[float, int]:
    match entry:
        case [bool(), *_]:
            raise InputError(f"{path}: {name}: its score is no number")
        case [int() | float() as score, list() as videos]:
            pass
        case _:
            raise InputError(f"{path}: {name}: must be [score, [videos]], as VBench writes it")
    if not videos or not math.isfinite(score):
        raise InputError(
            f"{path}: {name}: score {score} of {len(videos)} videos: VBench found no video to score; "
            "its --videos_path must be the folder `videos` of `pomscale sample --vbench`"
        )
    lowest = DIMENSIONS[name].lowest
    if not lowest - _SLACK <= score <= 1.0 + _SLACK:
        raise InputError(f"{path}: {name}: score {score} is not between {lowest:g} and 1")
    return float(score), len(videos)
