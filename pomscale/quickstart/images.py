"""`make quickstart`: the whole life of a run on real pictures, on a laptop's CPU, by the usual commands.

raw pictures -> latent shards -> FSDP2 training on two processes -> a SIGKILL and an exact resume -> samples of the
averaged weights -> curves -> figures; then the same recipe once more with attention in place of PoM. Every command
is printed before it runs.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pomscale.quickstart.tour import ENVIRONMENT, pomscale, read_figures, remove_earlier, run, section, train_command
from pomscale.runs.history import samples_seen

DIGITS, LATENTS = Path("data/digits"), Path("data/digits-latents")
RECIPE = "quickstart"
RUNS = {"PoM": Path("runs/quickstart"), "attention": Path("runs/quickstart-attention")}
KILL_AFTER_SAMPLES = 16_000  # lies between the checkpoints at 12,800 and 19,200: some work is lost and done again
NUM_PER_CLASS = 20


def main(mixers: Sequence[str]) -> None:
    """Run the tour. `mixers` are keys of RUNS, PoM first; attention, which is compared with it, may be left out."""
    started = time.monotonic()
    runs = {mixer: RUNS[mixer] for mixer in mixers}
    remove_earlier(*runs.values())
    prepare_data()
    section("3. training a DiPoM on two processes (FSDP2), killed with SIGKILL midway")
    train_and_kill(RUNS["PoM"])
    section("4. the same command again: training continues from the last complete checkpoint")
    train(RUNS["PoM"])
    if "attention" in runs:
        section("5. the same recipe with attention: one override (and a name of its own)")
        train(RUNS["attention"], "model.mixer=attention")
    section("6. samples, curves and figures")
    figures = {}
    for mixer, folder in runs.items():
        npz = folder / "samples.npz"
        pomscale(
            "sample", str(folder), "--num-samples", str(NUM_PER_CLASS), "--out", f"{folder}/grid.png", "--npz", str(npz)
        )
        pomscale("report", str(folder))
        pomscale("evaluate", "digits", str(npz), "--out", f"{folder}/digits.json")
        figures[mixer] = read_figures(folder, "digits")
    summary = table(figures, minutes=(time.monotonic() - started) / 60)
    (RUNS["PoM"] / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    section("done")
    print(summary)


def prepare_data() -> None:
    """Write the digits and their shards, unless they are there."""
    section("1. raw pictures: 1,797 scans of handwritten digits, one half to train on, one half to evaluate on")
    run("-m", "data_pipelines.demos.digits", str(DIGITS))
    section("2. pictures -> latent shards, verified")
    for recipe, half in (("digits", "train"), ("digits-heldout", "heldout")):
        pomscale("data", "encode", f"data/{recipe}")
        pomscale("data", "verify", str(LATENTS / half))


def train(folder: Path, *overrides: str) -> None:
    run(*train_command(RECIPE, folder, *overrides))


def train_and_kill(folder: Path) -> None:
    """Start training and kill every process of it, without warning, once enough samples have been seen."""
    command = train_command(RECIPE, folder)
    print(f"$ python {' '.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, *command], env=ENVIRONMENT)
    while samples_seen(folder) < KILL_AFTER_SAMPLES:
        if process.poll() is not None:
            sys.exit(f"quickstart stopped: training ended by itself with exit code {process.returncode}")
        time.sleep(0.1)
    launcher = psutil.Process(process.pid)
    victims = [launcher, *launcher.children(recursive=True)]
    for victim in victims:
        with suppress(psutil.NoSuchProcess):  # a helper process may just have ended by itself
            victim.send_signal(signal.SIGKILL)
    psutil.wait_procs(victims)
    print(f"--- killed {len(victims)} processes with SIGKILL at {samples_seen(folder):,} samples", flush=True)


def table(figures: dict[str, dict[str, Any]], minutes: float) -> str:
    real = figures["PoM"]
    rows = [
        ("recognised as asked", "accuracy_generated", "accuracy_real", ".1%"),
        ("distance to nearest training picture", "nearest_generated_mean", "nearest_heldout_mean", ".3f"),
        ("  its 5th percentile", "nearest_generated_p05", "nearest_heldout_p05", ".3f"),
        ("held-out loss", "validation/loss", None, ".4f"),
        ("training, samples/s", "speed/samples_per_s", None, ".0f"),
    ]
    lines = [f"{'':38}{''.join(f'{mixer:>12}' for mixer in figures)}{'real digits':>14}"]
    for label, key, real_key, form in rows:
        cells = "".join(f"{format(found[key], form):>12}" for found in figures.values())
        lines.append(f"{label:38}{cells}{format(real[real_key], form) if real_key else '':>14}")
    folder = RUNS["PoM"]
    return "\n".join(
        [
            *lines,
            "(real digits: recognition of the training half, distance of the held-out half to it)",
            "",
            f"{minutes:.1f} minutes. Look at:",
            f"  {folder}/grid.png      {NUM_PER_CLASS} samples per class",
            f"  {folder}/report.html   curves, grids, recipe, where the run was resumed",
            "",
            "What to run next:",
            f"  pomscale sample {folder} --classes 3,8 --num-samples 30 --sampler heun --guidance 2 --out more.png",
            "  pomscale config show image/dipom-xl-2",
            "  pomscale data encode data/imagenet-256 source.path=YOUR_IMAGENET --dry-run",
        ]
    )
