"""`make check-curves`: train the smallest recipe and compare its curves with those that come with pomscale.

    python -m pomscale.quickstart.curves                 one run, of a seed that the reference has not, and its verdict
    python -m pomscale.quickstart.curves --write DIR     DIR/NAME.json of every reference, trained again, 3 seeds each

The second is for a change that moves the curves on purpose.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pomscale.quickstart.images import DIGITS, LATENTS, NUM_PER_CLASS
from pomscale.quickstart.tour import pomscale, remove_earlier, run, section, train_command
from pomscale.runs.history import samples_seen

RECIPE = "quickstart"
REFERENCES: dict[str, tuple[str, ...]] = {"quickstart": (), "quickstart-attention": ("model.mixer=attention",)}
"""Overrides of the recipe by the name of the reference."""

SEEDS, CHECKED_SEED = (0, 1, 2), 3
# The held-out loss at 30 points, and no pictures while training: neither changes what is trained.
_OVERRIDES = ("validation.every_samples=1280", "sampling.every_samples=null")


def check() -> None:
    """Train one run and compare it; exit code 1 if it leaves the band."""
    folder = Path("runs/check-curves")
    prepare_data()
    section("the smallest recipe, with a seed that the reference has not")
    train(folder, CHECKED_SEED)
    section("its curves and its digits against those of three other seeds")
    pomscale("report", str(folder), "--against", RECIPE)


def write(out: Path) -> None:
    """Train all references again and write their files."""
    prepare_data()
    for name, overrides in REFERENCES.items():
        folders = [Path(f"runs/reference-{name}-{seed}") for seed in SEEDS]
        for folder, seed in zip(folders, SEEDS, strict=True):
            section(f"{name}, seed {seed}")
            train(folder, seed, *overrides)
        pomscale("report", *map(str, folders), "--write-reference", str(out / f"{name}.json"))


def prepare_data() -> None:
    """Write the digits and their shards, unless they are there."""
    section("the digits")
    if not DIGITS.is_dir():
        run("-m", "data_pipelines.demos.digits", str(DIGITS))
    for recipe in ("digits", "digits-heldout"):
        pomscale("data", "encode", f"data/{recipe}")
    for half in ("train", "heldout"):
        pomscale("data", "verify", str(LATENTS / half))


def train(folder: Path, seed: int, *overrides: str) -> None:
    """Train a run, and record in it how its digits are recognised."""
    remove_earlier(folder)
    words = train_command(RECIPE, folder, f"seed={seed}", *_OVERRIDES, *overrides)
    run(*words)
    figures = folder / "evaluations" / "digits" / "figures.json"
    figures.parent.mkdir(parents=True)
    npz = folder / "samples.npz"
    pomscale(
        "sample", str(folder), "--num-samples", str(NUM_PER_CLASS), "--out", f"{folder}/grid.png", "--npz", str(npz)
    )
    pomscale("evaluate", "digits", str(npz), "--out", str(figures))
    pomscale("evaluate", "record", str(folder), "digits", str(samples_seen(folder)), str(figures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="DIR", help="Directory that receives the curves")
    arguments = parser.parse_args()
    if arguments.write is None:
        check()
    else:
        write(arguments.write)
