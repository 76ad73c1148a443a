"""Metrics, what each needs, and the choice of those that extractors, pictures and reference can serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pomscale.base.errors import InputError
from pomscale.codecs.extractors.base import Extractor, FeatureName
from pomscale.evaluation.generated.picture_sets import Kind, PictureSet, kind_of
from pomscale.evaluation.generated.statistics_files import Statistics

Kept = Literal["moments", "features", "splits", "texts"]
"""Forms in which features are kept: mean and covariance; all, on disk; sums for inception and CLIP scores."""

MOST_PAIRED = 100_000
"""Largest set whose metrics of all pairs are measured unasked: their time grows with the square of the number."""


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        role: The extractor that it takes: "dinov2", "clip", or "any" other (dinov2, too, where `or_dinov2`).
        feature: The feature that it takes.
        kept: What is kept of the features.
        of_reference: Whether the reference's are needed, too.
        or_dinov2: Whether it takes dinov2's features where that is the only extractor.
        good_number: Number of pictures from which on the field reports it.
        bias: What is wrong with it of fewer pictures.
        fewest: Number of pictures without which it has no value.
        of: The kinds of sets that it is measured of.
    """

    role: Literal["any", "dinov2", "clip"]
    feature: FeatureName
    kept: Kept
    of_reference: bool = True
    or_dinov2: bool = False
    good_number: int = 0
    bias: str = ""
    fewest: int = 2
    of: tuple[Kind, ...] = ("pictures",)


_HIGH = "is biased upwards, by about 1 / number"
_WIDE = "comes out too high, since balls around few pictures are large"

METRICS = {
    "fid": Metric("any", "pooled", "moments", good_number=50_000, bias=_HIGH),
    "sfid": Metric("any", "spatial", "moments", good_number=50_000, bias=_HIGH),
    "inception_score": Metric(
        "any", "logits", "splits", of_reference=False, good_number=50_000, bias="is biased downwards", fewest=1
    ),
    "precision": Metric("any", "pooled", "features", or_dinov2=True, good_number=10_000, bias=_WIDE, fewest=4),
    "recall": Metric("any", "pooled", "features", or_dinov2=True, good_number=10_000, bias=_WIDE, fewest=4),
    "density": Metric("any", "pooled", "features", or_dinov2=True, good_number=10_000, bias="is noisy", fewest=6),
    "coverage": Metric(
        "any", "pooled", "features", or_dinov2=True, good_number=10_000, bias="depends on the number", fewest=6
    ),
    "kid": Metric("any", "pooled", "features", or_dinov2=True),
    "fdd": Metric("dinov2", "pooled", "moments", good_number=50_000, bias=_HIGH),
    "cmmd": Metric("clip", "pooled", "features", good_number=1_000, bias="is biased upwards, by up to 20 / number"),
    "fvd": Metric("any", "pooled", "moments", good_number=2_048, bias=_HIGH, of=("clips",)),
    "clip_score": Metric("clip", "pooled", "texts", of_reference=False, fewest=1, of=("pictures", "clips")),
}


def metrics_of(kind: Kind) -> list[str]:
    """Return the names of the metrics that are measured of pictures or of clips."""
    return [name for name, metric in METRICS.items() if kind in metric.of]


class Want(NamedTuple):
    """One thing that is kept of the features of every picture."""

    extractor: int  # number of the extractor
    feature: FeatureName
    kept: Kept

    @property
    def key(self) -> str:
        return f"{self.extractor}.{self.feature}.{self.kept}"


@dataclass(frozen=True)
class Choice:
    """The metrics that are measured.

    Attributes:
        wants: By metric, what it is computed from.
        left_out: By metric that could be asked for and is not measured, the reason.
        for_file: What statistics that are written take beside that.
    """

    wants: dict[str, Want]
    left_out: dict[str, str]
    for_file: tuple[Want, ...] = ()

    @property
    def of_source(self) -> list[Want]:
        """Features that are kept of the pictures that are measured."""
        return sorted({*self.wants.values(), *self.for_file})

    def of_reference(self, reference: Reference) -> list[Want]:
        """Return what is kept of the pictures of the reference: nothing that its statistics tell."""
        needed = {want for name, want in self.wants.items() if METRICS[name].of_reference}
        return sorted(want for want in needed if reference.statistics is None or want.kept != "moments")


class Reference(NamedTuple):
    """Pictures or statistics to compare with; without either, only metrics without a reference are measured.

    ADM's files have both: its evaluator takes FID from the statistics and precision from the pictures, and so do we.
    """

    pictures: PictureSet | None = None
    statistics: Statistics | None = None


class Sides(NamedTuple):
    """The two sides of a comparison."""

    source: PictureSet
    reference: Reference


def choose(
    extractors: Sequence[Extractor],
    sides: Sides,
    asked: Sequence[str] | None,
    *,
    splits: int = 10,
    writes_statistics: bool = False,
    writes_pictures: bool = False,
) -> Choice:
    """Choose the metrics.

    Args:
        extractors: The extractors.
        sides: The pictures and the reference.
        asked: Names of metrics; None = all that can be served.
        splits: Number of splits of the inception score.
        writes_statistics: Whether statistics of the pictures are written.
        writes_pictures: Whether the pictures are written, so that there need be no metric.

    Raises:
        InputError: A metric that is asked for cannot be served, there is none to measure, or an extractor serves none.
    """
    check_names(asked)
    wants: dict[str, Want] = {}
    left_out: dict[str, str] = {}
    for name in metrics_of(kind_of(sides.source)) if asked is None else asked:
        metric = METRICS[name]
        found = _want(metric, extractors, sides, unasked=asked is None)
        if isinstance(found, Want):
            found = _too_few_for_splits(metric, sides.source, splits) or found
        if isinstance(found, Want):
            wants[name] = found
        elif asked is not None:
            raise InputError(f"--metrics {name}: {found}")
        else:
            left_out[name] = found
    choice = Choice(wants, left_out, _for_file(extractors) if writes_statistics else ())
    if not choice.of_source and not writes_pictures:
        raise InputError(f"there is no metric to measure: {'; '.join(reasons(left_out))}")
    _check_used(extractors, choice)
    return choice


def check_names(asked: Sequence[str] | None) -> None:
    """Raise InputError for a name that is none of a metric."""
    for name in asked or ():
        if name not in METRICS:
            raise InputError(f"--metrics: {name!r} is none of {', '.join(METRICS)}")


def _want(metric: Metric, extractors: Sequence[Extractor], sides: Sides, unasked: bool) -> Want | str:
    """Return what a metric is computed from, or the reason why it cannot be measured."""
    kind = kind_of(sides.source)
    number = _extractor_of(metric, [extractor.name for extractor in extractors])
    if number is None or kind not in metric.of:
        return _why_not(metric, kind)
    extractor = extractors[number]
    if metric.feature not in extractor.dims:
        return f"needs {metric.feature} features, and extractor {extractor.name} has {', '.join(extractor.dims)}"
    if metric.kept == "texts" and not sides.source.has_captions:
        return f"needs {kind} with captions, and these have none"
    if metric.of_reference and (problem := _problem_of_reference(metric, number, extractors, sides.reference)):
        return problem
    if problem := _too_few(metric, sides) or (_too_many(sides) if unasked and metric.kept == "features" else None):
        return problem
    return Want(number, metric.feature, metric.kept)


def _why_not(metric: Metric, kind: Kind) -> str:
    """Return why a metric is not measured of sets of a kind, or which extractor it needs."""
    if kind not in metric.of:
        return f"is not measured of {kind}, only {', '.join(metrics_of(kind))} are"
    if metric.role != "any":
        return f"needs --extractor {metric.role}:FOLDER"
    others = "inception:FILE or another extractor" if kind == "pictures" else "torchscript:FILE of a network of clips"
    return f"needs --extractor {others}"


def _extractor_of(metric: Metric, names: Sequence[str]) -> int | None:
    others = [number for number, name in enumerate(names) if name not in ("dinov2", "clip")]
    if metric.role == "any" and others:
        return others[0]
    role = "dinov2" if metric.or_dinov2 else metric.role
    return names.index(role) if role in names else None


def _problem_of_reference(
    metric: Metric, number: int, extractors: Sequence[Extractor], reference: Reference
) -> str | None:
    statistics = reference.statistics
    if reference.pictures is None and statistics is None:
        return "needs a --reference"
    if statistics is None or (metric.kept == "features" and reference.pictures is not None):
        return None
    if metric.kept == "features":
        return "needs the pictures of the reference, and statistics are only mean and covariance"
    if number != owner_of(statistics, extractors):
        return f"needs statistics of extractor {extractors[number].name}, and those of the reference are of another"
    if metric.feature not in statistics.gaussians:
        return f"needs {metric.feature} features, and the statistics have {', '.join(statistics.gaussians)}"
    return None


def owner_of(statistics: Statistics, extractors: Sequence[Extractor]) -> int:
    """Return the number of the extractor that statistics are of: the first one of their width, where they do not tell.

    It is 0 where they are of none of these, and `Statistics.check` then says so.
    """
    width = statistics.gaussians["pooled"].width
    for number, extractor in enumerate(extractors):
        told, known = statistics.extractor == extractor.identity, statistics.extractor is not None
        if told or (not known and extractor.name != "clip" and extractor.dims.get("pooled") == width):
            return number
    return 0


def _pictures_of(sides: Sides) -> list[PictureSet]:
    return [one for one in (sides.source, sides.reference.pictures) if one is not None]


def _too_few(metric: Metric, sides: Sides) -> str | None:
    for one in _pictures_of(sides) if metric.of_reference else [sides.source]:
        if one.num_pictures < metric.fewest:
            return f"needs {metric.fewest} {kind_of(one)}, and {one.name} has {one.num_pictures}"
    return None


def _too_few_for_splits(metric: Metric, source: PictureSet, splits: int) -> str | None:
    if metric.kept != "splits" or source.num_pictures >= splits:
        return None
    return f"needs a picture for each of its {splits} splits, and {source.name} has {source.num_pictures}; see --splits"


def _too_many(sides: Sides) -> str | None:
    largest = max(one.num_pictures for one in _pictures_of(sides))
    if largest <= MOST_PAIRED:
        return None
    return (
        f"compares all pairs of {largest:,} pictures, which takes long; take fewer with --num-samples and "
        f"--num-reference, or ask for it with --metrics"
    )


def _for_file(extractors: Sequence[Extractor]) -> tuple[Want, ...]:
    """Return what a file of statistics holds: moments of the first extractor's features."""
    if not extractors:
        raise InputError("--write-statistics: needs an --extractor, whose features they are of")
    features: tuple[FeatureName, ...] = ("pooled", "spatial")
    return tuple(Want(0, feature, "moments") for feature in features if feature in extractors[0].dims)


def _check_used(extractors: Sequence[Extractor], choice: Choice) -> None:
    """Raise InputError if an extractor is given for nothing."""
    used = {want.extractor for want in choice.of_source}
    for number, extractor in enumerate(extractors):
        if number not in used:
            raise InputError(
                f"--extractor {extractor.name}: no metric takes its features "
                f"({'; '.join(reasons(choice.left_out)) or '--metrics'}); "
                f"leave it out"
            )


def reasons(left_out: Mapping[str, str]) -> list[str]:
    """Return the reasons why metrics are left out (name -> reason), each once with the names of its metrics."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(of)}: {reason}" for reason, of in names.items()]


def warnings_of(choice: Choice, numbers: Mapping[str, int], kind: Kind = "pictures") -> list[str]:
    """Return a sentence for each metric of fewer pictures than the field reports it of.

    Args:
        choice: The metrics.
        numbers: Number of pictures or clips of "source", and of "reference" where it is known.
        kind: The kind of the sets.
    """
    found: dict[tuple[str, int, int], list[str]] = {}
    for name in choice.wants:
        metric = METRICS[name]
        sides = ("source", "reference") if metric.of_reference else ("source",)
        fewest = min(numbers[side] for side in sides if side in numbers)
        if fewest < metric.good_number:
            found.setdefault((metric.bias, metric.good_number, fewest), []).append(name)
    return [
        f"{', '.join(names)} of {fewest:,} {kind} {bias}; it is reported of {good:,} and more, and compared only "
        f"with values of as many"
        for (bias, good, fewest), names in found.items()
    ]
