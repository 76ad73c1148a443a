"""Post-hoc EMA: averages that training did not keep, against the same averages kept."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pomscale.base.errors import InputError
from pomscale.checkpoint.store import CheckpointStore
from pomscale.config.codecs import PixelCodecConfig
from pomscale.config.engine import CheckpointConfig, EmaConfig
from pomscale.config.model import ImageModelConfig
from pomscale.config.sampling import SamplingConfig
from pomscale.config.train import DiffusionConfig
from pomscale.distributed.world import join_world
from pomscale.engine.averages import Ema, ema_weights
from pomscale.models import DiPoM, init_weights
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.load import load_pretrained
from pomscale.pretrained.post_hoc_ema import ExponentialProfile, PowerProfile, Profile, export_post_hoc, fit

BATCH, STEPS = 32, 960
WIDTHS = [0.05, 0.1]


def config(*widths: float) -> EmaConfig:
    return EmaConfig(post_hoc={"widths": list(widths), "every_samples": BATCH})


def power_averages(ema: Ema) -> dict[str, list[torch.Tensor]]:
    return {name: average for name, average in ema.averages.items() if name.startswith("power-")}


@pytest.fixture(scope="module")
def discrete_profiles() -> dict[str, list[torch.Tensor]]:
    """By average, after every step: how much of each step's weights is in it. Float64, by the updates of training."""
    weights = torch.zeros(STEPS, dtype=torch.float64)
    settings = config(*WIDTHS, 0.03, 0.07, 0.2)
    ema = Ema([name for name in settings.averages if name.startswith("power-")], [weights])
    profiles: dict[str, list[torch.Tensor]] = {name: [] for name in power_averages(ema)}
    for step in range(STEPS):
        weights.zero_()[step] = 1.0  # the weights of step i are the i-th unit vector: an average is its own profile
        ema.update(
            {name: w for name, w in ema_weights(settings, (step + 1) * BATCH, BATCH).items() if name in profiles}
        )
        for name, (average,) in power_averages(ema).items():
            profiles[name].append(average.clone())
    return profiles


@pytest.mark.parametrize("width", [0.03, 0.07, 0.2])
def test_the_profile_made_of_snapshots_is_as_close_as_told_and_closer_with_more(
    width: float, discrete_profiles: dict[str, list[torch.Tensor]]
) -> None:
    end = STEPS * BATCH
    wanted = PowerProfile.of_width(width, end)
    kept = discrete_profiles[f"power-{width:g}"][-1]
    errors = []
    for count in (4, 8, 16, 32, 64):
        steps = [STEPS * (i + 1) // count for i in range(count)]
        snapshots = [(step, w) for step in steps for w in WIDTHS]
        found = fit([PowerProfile.of_width(w, step * BATCH) for step, w in snapshots], wanted)
        assert sum(found.coefficients) == pytest.approx(1.0, abs=1e-12)
        made = sum(
            coefficient * discrete_profiles[f"power-{w:g}"][step - 1]
            for coefficient, (step, w) in zip(found.coefficients, snapshots, strict=True)
        )
        # Over one step a discrete profile is the mean of the continuous one, so the error told is a bound.
        error = ((made - kept) ** 2).sum().div(BATCH).sqrt().item() / wanted.norm_squared() ** 0.5
        assert error <= found.relative_error + 1e-9
        errors.append(error)
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] < min(4e-3, errors[0] / 20)


def test_inner_products_are_integrals() -> None:
    tau = (np.arange(400_000) + 0.5) / 400_000 * 1000.0

    def on_grid(profile: PowerProfile | ExponentialProfile) -> np.ndarray:
        if isinstance(profile, PowerProfile):
            values = np.where(tau <= profile.time, (tau / profile.time) ** profile.exponent, 0.0)
        else:
            values = 2.0 ** ((tau - profile.time) / profile.halflife)
        return values / values.mean() / 1000.0

    early, late = PowerProfile.of_width(0.1, 700.0), PowerProfile.of_width(0.05, 1000.0)
    wanted: list[Profile] = [late, *(ExponentialProfile(halflife, 1000.0) for halflife in (3, 50, 2000))]
    for profile in wanted:
        for other in (early, late):
            integral = (on_grid(profile) * on_grid(other)).mean() * 1000
            assert profile.inner_product(other) == pytest.approx(integral, rel=1e-5, abs=1e-12)
        assert profile.norm_squared() == pytest.approx((on_grid(profile) ** 2).mean() * 1000, rel=1e-5)
    assert early.inner_product(late) == pytest.approx(late.inner_product(early), rel=1e-12)
    spread = (on_grid(late) * tau**2).mean() * 1000 - ((on_grid(late) * tau).mean() * 1000) ** 2
    assert spread**0.5 / 1000 == pytest.approx(0.05, rel=1e-4)


MODEL = ImageModelConfig(latent_shape=(4, 4, 4), num_classes=10, patch_size=1, dim=16, depth=2, num_heads=2)


def make_run(folder: Path, num_snapshots: int) -> Ema:
    """Snapshots in folder/ema of a network whose weights walk at random; returns all averages at the end."""
    settings = config(*WIDTHS, 0.07)
    kept = [f"power-{width:g}" for width in WIDTHS]
    model = DiPoM(MODEL).requires_grad_(False)
    init_weights(model, seed=0)
    names, tensors = zip(*model.named_parameters(), strict=True)
    ema = Ema(settings.averages, tensors)
    card = ModelCard(
        model=MODEL, diffusion=DiffusionConfig(), sampling=SamplingConfig(), codec=PixelCodecConfig(name="pixel"),
        codec_identity=None, class_names=(), latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4,
        averages=("halflife-500000", *kept),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with join_world("cpu"):
        store = CheckpointStore(folder / "ema", CheckpointConfig(every_samples=1, keep_last=10_000), None)
        for step in range(1, STEPS + 1):
            for tensor in tensors[1:]:  # the first one never moves
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.01)
            ema.update(ema_weights(settings, step * BATCH, BATCH))
            if step % (STEPS // num_snapshots) == 0:
                state = {"ema": {name: dict(zip(names, ema.averages[name], strict=True)) for name in kept}}
                meta = {
                    "samples": step * BATCH,
                    "card": card.model_dump(mode="json"),
                    "recipe": {"name": "the run"},
                    "data": [],
                    "versions": {"pomscale": "0"},
                }
                store.save(step * BATCH, state, meta)
        store.wait()
    return ema


def distance(folder: Path, kept: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Distance of an exported folder's weights from the average `kept`, over that of `other` from it."""
    made = [p.detach() for p in load_pretrained(folder, device="cpu").parameters()]
    assert torch.equal(made[0], kept[0])
    distances = [
        torch.cat([(a - b).flatten() for a, b in zip(what, kept, strict=True)]).norm() for what in (made, other)
    ]
    return float(distances[0] / distances[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ema]:
    folder = tmp_path_factory.mktemp("post-hoc") / "run"
    return folder, make_run(folder, num_snapshots=20)


def test_a_reconstructed_average_is_the_one_that_training_would_have_kept(
    run: tuple[Path, Ema], tmp_path: Path
) -> None:
    folder, ema = run
    report = export_post_hoc(folder, tmp_path / "many", width=0.07)
    assert (report.name, report.samples, report.num_snapshots) == ("power-0.07", STEPS * BATCH, 20)
    provenance = json.loads((tmp_path / "many" / "config.json").read_text())["provenance"]
    assert [part["samples"] for part in provenance["snapshots"]] == [1536 * i for i in range(1, 21)]
    coefficients = [part[name] for part in provenance["snapshots"] for name in ("power-0.05", "power-0.1")]
    assert sum(coefficients) == pytest.approx(1.0, abs=1e-12)
    assert (provenance["run"], provenance["samples"]) == ("the run", STEPS * BATCH)
    assert provenance["relative_error"] == report.relative_error < 5e-3
    few = tmp_path / "few"
    make_run(few, num_snapshots=5)
    export_post_hoc(few, tmp_path / "few out", width=0.07)
    kept, other = ema.averages["power-0.07"], ema.averages["power-0.1"]
    error, error_of_few = (distance(tmp_path / name, kept, other) for name in ("many", "few out"))
    assert error < 0.01
    assert error < error_of_few / 5 < 0.1


def test_the_end_and_the_kind_of_the_average_can_be_chosen(run: tuple[Path, Ema], tmp_path: Path) -> None:
    folder, _ = run
    report = export_post_hoc(folder, tmp_path / "early", width=0.1, samples=STEPS * BATCH // 2 + 5)
    assert (report.samples, report.num_snapshots) == (STEPS * BATCH // 2, 10)
    assert report.relative_error < 1e-6  # one of the snapshots is just that
    report = export_post_hoc(folder, tmp_path / "short", halflife_samples=STEPS * BATCH // 10, dtype="bf16")
    assert (report.name, report.samples) == ("halflife-3072", STEPS * BATCH)
    assert 0 < report.relative_error < 0.02
    assert "30,720 samples from 20 snapshots; its profile is off by" in str(report)


def test_what_cannot_be_reconstructed_is_an_error(run: tuple[Path, Ema], tmp_path: Path) -> None:
    folder, _ = run
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"--width 0\.3: a power function's lies between 0 and 0\.289"):
        export_post_hoc(folder, out, width=0.3)
    with pytest.raises(InputError, match="no snapshots of at most 9 samples; training keeps them if"):
        export_post_hoc(folder, out, width=0.1, samples=9)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'ema'}: no snapshots;")):
        export_post_hoc(tmp_path, out, width=0.1)
    with pytest.raises(InputError, match="either a width or a half-life"):
        export_post_hoc(folder, out)
    assert not out.exists()
