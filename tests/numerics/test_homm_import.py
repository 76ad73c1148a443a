"""Import of HoMM's Lightning checkpoints, against a plain reading of their two networks with their parameter names."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomscale.base.errors import InputError
from pomscale.pretrained.homm import import_homm
from pomscale.pretrained.load import load_pretrained
from pomscale.sampling.api import decode
from support.tiny_models import save_vae

CLASSES, CHANNELS, SIDE, PATCH, DIM, DEPTH, HEADS = 10, 4, 8, 2, 32, 3, 4


class TheirMixer(nn.Module):
    """HoM: chunks of GELU(ho_proj x), multiplied up, averaged over tokens; gated by sigmoid(se_proj x)."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree = degree
        width = degree * 2 * DIM
        self.ho_proj, self.se_proj = nn.Linear(DIM, width), nn.Linear(DIM, width)
        self.ag_proj = nn.Linear(width, DIM)

    def forward(self, x: Tensor) -> Tensor:
        monomials = [F.gelu(self.ho_proj(x)).chunk(self.degree, -1)[0]]
        for factor in F.gelu(self.ho_proj(x)).chunk(self.degree, -1)[1:]:
            monomials.append(monomials[-1] * factor)
        state = torch.cat(monomials, -1).mean(1, keepdim=True)
        return self.ag_proj(torch.sigmoid(self.se_proj(x)) * state)


class TheirAttention(nn.Module):
    """timm's: one map to query, key and value, heads inside each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(DIM // HEADS)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, DIM))


class TheirBlock(nn.Module):
    def __init__(self, degree: int | None) -> None:
        super().__init__()
        self.closed_gate = 0.0 if degree is None else 1.0
        self.mixer_name = "mha" if degree is None else "hom"
        self.add_module(self.mixer_name, TheirAttention() if degree is None else TheirMixer(degree))
        self.ffw = nn.Sequential(nn.Linear(DIM, 3 * DIM), nn.GELU(), nn.Linear(3 * DIM, DIM))
        self.cond_mlp = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 4 * DIM))
        self.gate_mlp = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 2 * DIM))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale1, shift1, scale2, shift2 = self.cond_mlp(c).chunk(4, -1)
        gate1, gate2 = (gate + self.closed_gate for gate in self.gate_mlp(c).chunk(2, -1))
        x = x + gate1 * getattr(self, self.mixer_name)(norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.ffw(norm(x) * (1 + scale2) + shift2)


class TheirNetwork(nn.Module):
    """degree None: ClassConditionalDiT; a number: ClassConditionalDiH. time counts to 1000."""

    def __init__(self, degree: int | None, timesteps: int = 1000) -> None:
        super().__init__()
        frequencies = torch.exp(-2 * math.log(timesteps) * torch.arange(DIM // 2) / DIM)
        self.freqs = nn.Parameter(frequencies, requires_grad=False)
        self.classes_emb = nn.Embedding(CLASSES + 1, DIM)
        self.time_emb = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.SiLU(), nn.Linear(4 * DIM, DIM))
        self.in_conv = nn.Conv2d(CHANNELS, DIM, PATCH, stride=PATCH)
        self.layers = nn.ModuleList(TheirBlock(degree) for _ in range(DEPTH))
        self.out_mod = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 2 * DIM))
        self.out_proj = nn.Linear(DIM, PATCH * PATCH * CHANNELS)

    def forward(self, pictures: Tensor, time: Tensor, classes: Tensor) -> Tensor:
        side = pictures.shape[-1] // PATCH
        x = self.in_conv(pictures).flatten(2).transpose(1, 2) + positions(side).to(pictures)
        angles = time[:, None] * self.freqs.float()
        features = torch.cat([angles.cos(), angles.sin()], -1).to(pictures)
        c = (self.classes_emb(classes) + self.time_emb(features))[:, None]
        for layer in self.layers:
            x = layer(x, c)
        scale, shift = self.out_mod(c).chunk(2, -1)
        patches = self.out_proj(norm(x) * (1 + scale) + shift)
        grid = patches.reshape(-1, side, side, PATCH, PATCH, CHANNELS)  # row, column, row in patch, column in patch
        return torch.einsum("bhwklc->bchkwl", grid).reshape(pictures.shape)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (DIM,), eps=1e-6)


def positions(side: int) -> Tensor:
    """(side^2, DIM) fp32: sin and cos of odd multiples of pi times the column's place in [0, 1], then the row's."""
    along = torch.linspace(0, 1, side)[:, None] * torch.arange(1, DIM // 2, 2) * math.pi
    features = torch.cat([along.sin(), along.cos()], -1)
    return torch.cat([features.repeat(side, 1), features.repeat_interleave(side, 0)], -1)


def random_network(degree: int | None, seed: int, **options: Any) -> TheirNetwork:
    """No weight is zero, so no part is idle. Weights have few bits, so that 1 can be subtracted without rounding."""
    network = TheirNetwork(degree, **options).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name != "freqs":
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            parameter.normal_(0, fan_in**-0.5, generator=generator).mul_(1024).round_().div_(1024)
    return network


class Callback:
    """Lightning's files hold the state of anything."""

    def __init__(self) -> None:
        self.best = {"loss": 0.5}


def save_lightning(path: Path, state: dict[str, Tensor]) -> Path:
    content = {"epoch": 3, "global_step": 70, "callbacks": {"best": Callback(), "path": path}, "state_dict": state}
    torch.save(content, path)
    return path


def state_of(trained: nn.Module, average: nn.Module | None = None, infix: str = "") -> dict[str, Tensor]:
    state = {f"model.{infix}{name}": value for name, value in trained.state_dict().items()}
    if average is not None:
        state |= {f"ema.ema_model.{infix}{name}": value for name, value in average.state_dict().items()}
        state |= {"ema.initted": torch.tensor(True), "ema.step": torch.tensor(70)}
    return state


@pytest.mark.parametrize("infix", ["", "_orig_mod."], ids=["plain", "compiled"])
@pytest.mark.parametrize("degree", [2, 3, None], ids=["DiH of degree 2", "DiH of degree 3", "DiT"])
def test_an_imported_network_computes_what_theirs_does(degree: int | None, infix: str, tmp_path: Path) -> None:
    trained, average = random_network(degree, seed=0), random_network(degree, seed=1)
    file = save_lightning(tmp_path / "last.ckpt", state_of(trained, average, infix))
    options: dict[str, Any] = {"heads": HEADS} if degree is None else {"degree": degree}
    report = import_homm(file, tmp_path / "out", latent_size=SIDE, **options)
    assert report.sets == ("ema", "model")

    generator = torch.Generator().manual_seed(2)
    pictures = torch.randn(8, CHANNELS, SIDE, SIDE, generator=generator)
    time = torch.tensor([0.0, 1.0, 125.0, 500.0, 750.0, 777.0, 999.0, 1000.0])
    classes = torch.tensor([0, 3, CLASSES, 9, 1, 5, CLASSES, 2])
    by_default = load_pretrained(tmp_path / "out", device="cpu")(pictures, time / 1000, classes)
    for weights, theirs in {"model": trained, "ema": average}.items():
        ours = load_pretrained(tmp_path / "out", weights=weights, device="cpu")
        expected, found = theirs(pictures, time, classes), ours(pictures, time / 1000, classes)
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert torch.equal(found, by_default) == (weights == "ema")
        # Nothing is left in double precision: no other epsilon, no approximate GELU, no gate off by one.
        expected, found = (
            theirs.double()(pictures.double(), time, classes),
            ours.double()(pictures.double(), time / 1000, classes),
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_what_the_tensors_do_not_tell_is_told(tmp_path: Path) -> None:
    file = save_lightning(tmp_path / "last.ckpt", state_of(random_network(None, seed=0)))
    report = str(import_homm(file, tmp_path / "out"))
    assert "ClassConditionalDiT: dim 32, depth 3, patch 2, 10 classes; weights: model" in report
    for assumed in ("16 attention heads", "latents of 32x32", "predict noise", "times 0.18215", "weights not recorded"):
        assert assumed in report
    card = load_pretrained(tmp_path / "out", device="cpu").card  # without an average, "ema" is the model
    assert (card.diffusion.objective, card.codec_identity, card.averages) == ("eps", None, ())
    with pytest.raises(InputError, match=r"has no weights 'power-0\.05'; there are: ema, model"):
        load_pretrained(tmp_path / "out", weights="power-0.05")
    flow = tmp_path / "flow"
    assert "velocity" in str(import_homm(file, flow, heads=4, latent_size=64, objective="flow"))
    card = load_pretrained(flow, device="cpu").card
    assert (card.diffusion.objective, card.model.num_heads, card.model.latent_shape) == ("flow", 4, (4, 64, 64))


def test_the_vae_named_is_the_vae_recorded(tmp_path: Path) -> None:
    vae = save_vae(tmp_path / "vae", seed=0)
    file = save_lightning(tmp_path / "last.ckpt", state_of(random_network(2, seed=0)))
    import_homm(file, tmp_path / "out", latent_size=SIDE, codec_path=str(vae))
    model = load_pretrained(tmp_path / "out", device="cpu")
    assert model.card.latent_std == (2.0,) * CHANNELS  # its scaling factor is 0.5
    assert decode(model, torch.zeros(1, CHANNELS, SIDE, SIDE)).shape == (1, 3, 2 * SIDE, 2 * SIDE)
    save_vae(vae, seed=1)
    with pytest.raises(InputError, match="not those that made the training latents"):
        decode(load_pretrained(tmp_path / "out", device="cpu"), torch.zeros(1, CHANNELS, SIDE, SIDE))


def without(state: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith(ending)}


REFUSED: dict[str, tuple[Any, str]] = {
    "a file that is no checkpoint": (b"PK or not", "cannot be read as a checkpoint"),
    "another pickle": ([1, 2], "no `state_dict` with tensors model"),
    "no weights": ({"state_dict": {"optimizer": torch.zeros(1)}}, "no `state_dict` with tensors model"),
    "another network": (lambda s: {"model.encoder.weight": torch.zeros(1)}, "neither .* nor .*encoder.weight"),
    "DiH++": (lambda s: s | {"model.registers": torch.zeros(1, 16, DIM)}, "has also: registers"),
    "an earlier DiH": (lambda s: s | {"model.pos_emb": torch.zeros(1, 16, DIM)}, "another version .* pos_emb"),
    "a missing tensor": (lambda s: without(s, "layers.1.ffw.0.bias"), "lacks: layers.1.ffw.0.bias"),
    "a missing layer": (lambda s: {k: v for k, v in s.items() if ".layers.1." not in k}, "lacks: layers.1"),
    "another shape": (lambda s: s | {"model.out_proj.weight": torch.zeros(32, DIM)}, "out_proj.weight .* expected"),
    "half an average": (lambda s: s | {"ema.ema_model.freqs": s["model.freqs"]}, "lacks: classes_emb.weight"),
    "a vector for a map": (lambda s: s | {"model.in_conv.weight": torch.zeros(8)}, r"in_conv.weight has the shape"),
    "an empty clock": (lambda s: s | {"model.freqs": torch.zeros(0)}, r"freqs has the shape \(0,"),
    "not finite": (lambda s: s | {"model.out_proj.bias": s["model.out_proj.bias"] / 0}, "out_proj.bias holds values"),
    "integers": (lambda s: s | {"model.out_proj.bias": s["model.out_proj.bias"].int()}, "out_proj.bias is of"),
    "another clock": (lambda s: s | {"model.freqs": TheirNetwork(2, 250).freqs}, "for 250 steps; pomscale's has 1000"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_checkpoint_is_refused(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    file = tmp_path / "last.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif callable(content):
        save_lightning(file, content(state_of(random_network(2, seed=0))))
    else:
        torch.save(content, file)
    with pytest.raises(InputError, match=message) as error:
        import_homm(file, tmp_path / "out", latent_size=SIDE)
    assert str(error.value).startswith(str(file))
    assert not (tmp_path / "out").exists()


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    file = save_lightning(tmp_path / "last.ckpt", state_of(random_network(2, seed=0)))
    with pytest.raises(InputError, match="--degree 3 does not divide the mixer's width, 4 x 32"):
        import_homm(file, tmp_path / "out", degree=3)
    with pytest.raises(InputError, match="31x31 is not divisible by patch_size 2"):
        import_homm(file, tmp_path / "out", latent_size=31)
    with pytest.raises(InputError, match=r"there\.ckpt"):
        import_homm(tmp_path / "there.ckpt", tmp_path / "out")


@pytest.mark.parametrize("call", [(os.system, "touch {0}"), (shutil.copy, __file__, "{0}")], ids=["os", "shutil"])
def test_nothing_in_a_checkpoint_is_executed(call: tuple[Any, ...], tmp_path: Path) -> None:
    trap = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> Any:
            return call[0], tuple(argument.format(trap) for argument in call[1:])

    content = {"state_dict": state_of(random_network(2, seed=0)), "callbacks": {"best": Attack()}}
    torch.save(content, tmp_path / "last.ckpt")
    # Whether the rest is imported or the file refused, nothing has happened.
    with suppress(InputError):
        import_homm(tmp_path / "last.ckpt", tmp_path / "out", latent_size=SIDE)
    assert not trap.exists()
    torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert trap.exists()  # the trap works
