"""The first losses of a tiny run: numbers that must not change unnoticed.

After a change that moves them on purpose, write them again and say in the commit why they moved:

    python tests/golden/test_losses.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run as a script; pytest has it already

from support.running import GLOBAL_BATCH, losses, train, write_tiny_recipe

GOLDEN = Path(__file__).with_name("losses.json")
NUM_STEPS = 10
CASES = {
    "flow": [],
    "eps, logit-normal": ["diffusion.objective=eps", "diffusion.time.distribution=logit_normal"],
    "attention": ["model.mixer=attention"],
}


def first_losses(folder: Path, digits: Path, overrides: list[str]) -> list[float]:
    recipe = write_tiny_recipe(folder, digits)
    length = [f"training.total_samples={NUM_STEPS * GLOBAL_BATCH}", "schedule.cooldown_samples=0"]
    train(recipe, *length, *overrides)
    return list(losses(folder / "runs" / "tiny").values())


@pytest.mark.parametrize("case", CASES)
def test_first_losses_are_as_recorded(case: str, digits: Path, tmp_path: Path) -> None:
    # Machines and torch versions sum in other orders; ten steps let that grow to no more than this.
    assert first_losses(tmp_path, digits, CASES[case]) == pytest.approx(json.loads(GOLDEN.read_text())[case], rel=1e-4)


if __name__ == "__main__":
    from support.digits import make_digits

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_digits(root)
        found = {}
        for i, (name, overrides) in enumerate(CASES.items()):
            (root / str(i)).mkdir()
            found[name] = first_losses(root / str(i), root, overrides)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
