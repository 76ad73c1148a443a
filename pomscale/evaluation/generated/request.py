"""An evaluation as a user asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pomscale.base.errors import InputError
from pomscale.base.files import check_can_be_written, check_suffix
from pomscale.evaluation.generated.figures import Conventions
from pomscale.evaluation.generated.opening import Opening


@dataclass(frozen=True)
class Outputs:
    """Files that are written beside the result; None = not written.

    Attributes:
        npz: File for the pictures of SOURCE as arr_0 (n, h, w, c) uint8, and arr_1 (n,) with their classes.
        tars: Folder for them as PNGs in tars, or for clips as mp4.
        statistics: File for their statistics, which can be a reference later.
    """

    npz: Path | None = None
    tars: Path | None = None
    statistics: Path | None = None

    def check(self) -> None:
        """Raise InputError if a file cannot be written, before any work."""
        for path in filter(None, (self.npz, self.statistics)):
            check_suffix(path, ".npz")
            check_can_be_written(path)
        if self.npz is not None and self.statistics is not None and self.npz.absolute() == self.statistics.absolute():
            raise InputError(f"{self.npz}: pictures and statistics cannot be one file; give it another name")


@dataclass(frozen=True)
class Request:
    """An evaluation as it is asked for.

    Attributes:
        source: What is measured; see `opening.open_pictures`.
        reference: What it is compared with; None = metrics without a reference alone.
        extractors: Specifications of extractors; see `build_extractor`.
        metrics: Names of metrics; None = all that can be served.
        opening: How the source is opened.
        num_reference: Number of pictures of the reference that are taken; None = all.
        batch: Pictures at once; None = 64, or 8 clips.
        part: Pictures of a part; None = 1,000, or 64 clips, or a hundredth of a larger set.
        repeats_grey: Whether grey pictures are given to colour extractors with three equal channels.
        any_crop: Whether a reference may have been cropped otherwise than the training pictures.
        max_skipped: Pictures that may be left out, since they cannot be read.
        conventions: Choices in which packages differ.
        outputs: Files beside the result.
        work: Folder that the processes share; None = a folder below evaluations/ that the plan names.
    """

    source: str
    reference: str | None
    extractors: tuple[str, ...]
    metrics: tuple[str, ...] | None = None
    opening: Opening = field(default_factory=Opening)
    num_reference: int | None = None
    batch: int | None = None
    part: int | None = None
    repeats_grey: bool = False
    any_crop: bool = False
    max_skipped: int = 0
    conventions: Conventions = field(default_factory=Conventions)
    outputs: Outputs = field(default_factory=Outputs)
    work: Path | None = None
