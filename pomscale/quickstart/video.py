"""`make quickstart-video`: text to video with a carried state, on a laptop's CPU, by the usual commands.

clips with captions -> latent shards -> block-causal training on two processes -> clips three times as long as those
trained on, made frame group by frame group -> are they what was asked for? Every command is printed before it runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pomscale.quickstart.tour import pomscale, read_figures, remove_earlier, run, section, train_command

CLIPS, TEXT_ENCODER, LATENTS = Path("data/moving-digits"), Path("data/byte-t5"), Path("data/moving-digits-latents")
RECIPE = "quickstart-video"
RUN = Path("runs/quickstart-video")
NUM_FRAMES = 24  # the clips trained on have 8
NUM_SHOWN, NUM_EVALUATED = 3, 10  # per caption


def main(overrides: Sequence[str]) -> None:
    """Run the tour. `overrides` change the training recipe, e.g. model.mixer=attention."""
    started = time.monotonic()
    remove_earlier(RUN)
    prepare_data()
    section("4. training a V-DiPoM with block-causal time on two processes (FSDP2)")
    run(*train_command(RECIPE, RUN, *overrides))
    pomscale("report", str(RUN))
    section(f"5. clips of {NUM_FRAMES} frames: group by group, from a state that does not grow")
    sample("--num-samples", str(NUM_SHOWN), "--out", f"{RUN}/clips.mp4", "--sheet", f"{RUN}/clips.png")
    section("6. more clips, and their evaluation")
    npz = f"{RUN}/clips.npz"
    sample("--num-samples", str(NUM_EVALUATED), "--out", f"{RUN}/judged.mp4", "--npz", npz)
    pomscale("evaluate", "moving-digits", npz, "--out", f"{RUN}/moving-digits.json")
    summary = table(read_figures(RUN, "moving-digits"), minutes=(time.monotonic() - started) / 60)
    (RUN / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    section("done")
    print(summary)


def prepare_data() -> None:
    """Write the clips, their text encoder and their shards, unless they are there."""
    section("1. clips: handwritten digits that move over a small canvas, one half to train on, one half to evaluate on")
    run("-m", "data_pipelines.demos.moving_digits", str(CLIPS))
    section("2. a text encoder: a small byte-level T5, its weights random but always the same")
    run("-m", "data_pipelines.demos.byte_t5", str(TEXT_ENCODER))
    section("3. clips and captions -> latent shards, verified")
    for recipe, half in (("moving-digits", "train"), ("moving-digits-heldout", "heldout")):
        pomscale("data", "encode", f"data/{recipe}")
        pomscale("data", "verify", str(LATENTS / half))


def sample(*arguments: str) -> None:
    """Generate clips of the recipe's prompts."""
    pomscale("sample", str(RUN), "--frames", str(NUM_FRAMES), *arguments)


def table(figures: dict[str, Any], minutes: float) -> str:
    rows = [
        ("digit asked for, middle frame", "digit_generated", "digit_real", ".1%"),
        ("direction asked for", "direction_generated", "direction_real", ".1%"),
        ("steps in it, of all", "steps_generated", "steps_real", ".1%"),
        ("frames of a clip", "num_frames_generated", "num_frames_real", "d"),
        ("held-out loss", "validation/loss", None, ".4f"),
        ("training, samples/s", "speed/samples_per_s", None, ".0f"),
    ]
    lines = [f"{'':34}{'generated':>12}{'real clips':>14}"]
    for label, key, real_key, form in rows:
        real = format(figures[real_key], form) if real_key else ""
        lines.append(f"{label:34}{format(figures[key], form):>12}{real:>14}".rstrip())
    return "\n".join(
        [
            *lines,
            "",
            f"{minutes:.1f} minutes. Look at:",
            f"  {RUN}/clips.mp4     {NUM_SHOWN} clips per caption, {NUM_FRAMES} frames each",
            f"  {RUN}/clips.png     the same as a contact sheet",
            f"  {RUN}/report.html   curves, clips while training, recipe",
            "",
            "What to run next:",
            f'  pomscale sample {RUN} --prompt "four moving right" --frames 48 --out long.mp4',
            "  pomscale config show moving-digits-full   # all digits, four directions: for a GPU",
            "  pomscale bench video",
        ]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
