"""Checks that both sides of a comparison are alike: pictures or clips, size, colours, frames and their rate."""

from __future__ import annotations

from typing import Any

from pomscale.base.errors import InputError
from pomscale.evaluation.generated.clip_files import same_rate
from pomscale.evaluation.generated.picture_sets import PictureSet, kind_of
from pomscale.evaluation.generated.statistics_files import Statistics


def check_alike(source: PictureSet, reference: PictureSet, repeats_grey: bool) -> None:
    """Raise InputError if one side has clips and the other pictures, or if their sizes, rates or channels differ."""
    kind = kind_of(source)
    if kind != kind_of(reference):
        raise InputError(
            f"{source.name} has {kind}, and the reference {reference.name} has {kind_of(reference)}; compare {kind} "
            f"with {kind}"
        )
    if None not in (reference.size, source.size) and reference.size != source.size:
        ours, theirs = ("x".join(map(str, (one.size or ())[-2:])) for one in (source, reference))
        raise InputError(
            f"{source.name} has {kind} of {ours} pixels, and the reference {reference.name} of {theirs}; cut and "
            f"resize those in files with --fit, or name a reference of this size"
        )
    if source.fps is not None and reference.fps is not None and not same_rate(source.fps, reference.fps):
        raise InputError(
            f"{source.name} has {source.fps:g} frames per second, and the reference {reference.name} "
            f"{reference.fps:g}; resample those in files with --fps, or name a reference of this rate"
        )
    if reference.num_channels != source.num_channels and not repeats_grey:
        grey, other = (source, reference) if source.num_channels == 1 else (reference, source)
        raise InputError(
            f"{grey.name} has grey {kind}, and {other.name} has {kind} with colours; compare grey ones as three "
            f"equal channels with --grey repeat"
        )


def frame_settings(clips: PictureSet) -> dict[str, Any] | None:
    """Return JSON that says which frames of clips are measured: number, stride, rate and size; None for pictures."""
    if clips.frames is None or clips.size is None:
        return None
    return {
        "number": clips.frames.num,
        "stride": clips.frames.stride,
        "fps": clips.fps,
        "size": list(clips.size[-2:]),
    }


def check_frames(statistics: Statistics, source: PictureSet) -> None:
    """Raise InputError if statistics tell that they are of clips with other frames, or of pictures instead of clips.

    Those of other tools tell nothing.
    """
    ours, theirs = frame_settings(source), statistics.settings.get("frames")
    if not statistics.settings or ours == theirs:
        return
    if ours is None or theirs is None:
        has, other = ("pictures", "clips") if ours is None else ("clips", "pictures")
        raise InputError(f"{statistics.path}: is of {other}, and {source.name} has {has}; name statistics of {has}")
    rates = (ours["fps"], theirs.get("fps"))
    if None in rates or same_rate(*rates):
        ours, theirs = ({**one, "fps": None} for one in (ours, theirs))
    differing = [f"{key} {theirs.get(key)} there, {ours[key]} here" for key in ours if theirs.get(key) != ours[key]]
    if differing:
        raise InputError(
            f"{statistics.path}: is of clips with other frames ({'; '.join(differing)}), so the distance would not be "
            f"the clips' alone; measure alike with --measured-frames, --frame-stride, --fps and --fit"
        )
