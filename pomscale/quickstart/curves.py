"""`make check-curves`: train the smallest recipe and compare its curves with those that come with pomscale.

    python -m pomscale.quickstart.curves                        a run of a seed that the reference has not; its verdict
    python -m pomscale.quickstart.curves --write DIR [NAME ..]  DIR/NAME.json of all references or of these, trained
                                                                again, 3 seeds each

The second is for a change that moves the curves on purpose.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pomscale.quickstart import images, video
from pomscale.quickstart.tour import pomscale, remove_earlier, run, section, train_command
from pomscale.runs.history import samples_seen


@dataclass(frozen=True)
class Reference:
    """Training of a reference, and the evaluation that is recorded beside its losses.

    Attributes:
        recipe: Name of the recipe.
        prepare: Writes the shards, unless they are there.
        sample: Words of `pomscale sample` that follow the run.
        evaluation: Verb of `pomscale evaluate` that judges the samples.
        overrides: Changes to the recipe.
    """

    recipe: str
    prepare: Callable[[], None]
    sample: tuple[str, ...]
    evaluation: str
    overrides: tuple[str, ...]


# The held-out loss at 30 points or so, and no samples while training: neither changes what is trained.
_OFTEN = ("sampling.every_samples=null", "validation.every_samples=1280")
_PICTURES = ("--num-samples", str(images.NUM_PER_CLASS), "--out", "grid.png")
_CLIPS = ("--frames", str(video.NUM_FRAMES), "--num-samples", str(video.NUM_EVALUATED), "--out", "judged.mp4")
REFERENCES = {
    "quickstart": Reference("quickstart", images.prepare_data, _PICTURES, "digits", _OFTEN),
    "quickstart-attention": Reference(
        "quickstart", images.prepare_data, _PICTURES, "digits", (*_OFTEN, "model.mixer=attention")
    ),
    "quickstart-video": Reference("quickstart-video", video.prepare_data, _CLIPS, "moving-digits", _OFTEN),
}
CHECKED = "quickstart"
SEEDS, CHECKED_SEED = (0, 1, 2), 3


def check() -> None:
    """Train one run and compare it; exit code 1 if it leaves the band."""
    folder = Path("runs/check-curves")
    reference = REFERENCES[CHECKED]
    reference.prepare()
    section("the smallest recipe, with a seed that the reference has not")
    train(reference, folder, CHECKED_SEED)
    section("its curves and its digits against those of three other seeds")
    pomscale("report", str(folder), "--against", CHECKED)


def write(out: Path, names: Sequence[str]) -> None:
    """Train references again and write their files."""
    for name in names:
        reference = REFERENCES[name]
        reference.prepare()
        folders = [Path(f"runs/reference-{name}-{seed}") for seed in SEEDS]
        for folder, seed in zip(folders, SEEDS, strict=True):
            section(f"{name}, seed {seed}")
            train(reference, folder, seed)
        pomscale("report", *map(str, folders), "--write-reference", str(out / f"{name}.json"))


def train(reference: Reference, folder: Path, seed: int) -> None:
    """Train a run, and record in it how its samples are recognised."""
    remove_earlier(folder)
    run(*train_command(reference.recipe, folder, f"seed={seed}", *reference.overrides))
    npz, figures = folder / "samples.npz", folder / "evaluations" / reference.evaluation / "figures.json"
    figures.parent.mkdir(parents=True)
    *words, out = reference.sample
    pomscale("sample", str(folder), *words, f"{folder}/{out}", "--npz", str(npz))
    pomscale("evaluate", reference.evaluation, str(npz), "--out", str(figures))
    pomscale("evaluate", "record", str(folder), reference.evaluation, str(samples_seen(folder)), str(figures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="DIR", help="Directory that receives the curves")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"References to write: {', '.join(REFERENCES)}")
    arguments = parser.parse_args()
    unknown = sorted({*arguments.names} - {*REFERENCES})
    if unknown or (arguments.names and arguments.write is None):
        parser.error(f"there is no reference {unknown[0]!r}" if unknown else "NAME goes with --write")
    if arguments.write is None:
        check()
    else:
        write(arguments.write, arguments.names or [*REFERENCES])
