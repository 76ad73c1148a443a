"""Import of JiT's checkpoints, against a restatement of the authors' network (tests/support/jit_reference.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pomscale.base.errors import InputError
from pomscale.cli import main
from pomscale.layers import grid_positions
from pomscale.ops.pom.rotary import cos_sin
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.jit import import_jit, is_jit
from pomscale.pretrained.jit_export import export_jit
from pomscale.pretrained.load import load_pretrained
from pomscale.pretrained.weights import open_weights, parameter_shapes, write_weights
from support.jit_reference import JitSizes, jit_forward, jit_weights

every_mixer = pytest.mark.parametrize("mixer", ["attention", "pom"])


def tables(sizes: JitSizes) -> dict[str, dict[str, Tensor]]:
    """Tables of rotary positions, by the name of the parameter that they stand before in a state_dict."""
    if sizes.mixer == "pom":
        whole = torch.arange(sizes.side)[:, None].expand(-1, 2)
        (row_cos, row_sin), (col_cos, col_sin) = cos_sin(whole, 2 * sizes.dim, 2)
        of_mixer = {"row_cos": row_cos, "row_sin": row_sin, "col_cos": col_cos, "col_sin": col_sin}
        return {
            f"blocks.{n}.attn.qc_proj.weight": {f"blocks.{n}.attn.{name}": table for name, table in of_mixer.items()}
            for n in range(sizes.depth)
        }
    axes = cos_sin(grid_positions(sizes.side, sizes.side), sizes.dim // sizes.heads, 2)
    cos, sin = (torch.cat(parts, -1).repeat_interleave(2, -1) for parts in zip(*axes, strict=True))
    ones = torch.ones(sizes.tokens, cos.shape[1])
    found = {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}
    found |= {"feat_rope_incontext.freqs_cos": torch.cat([ones, cos])}
    return {"blocks.0.norm1.weight": found | {"feat_rope_incontext.freqs_sin": torch.cat([0 * ones, sin])}}


def state_of(sizes: JitSizes, weights: dict[str, Tensor], infix: str = "") -> dict[str, Tensor]:
    """A state_dict in the authors' order, tables among the parameters."""
    state: dict[str, Tensor] = {}
    before = tables(sizes)
    for name, value in weights.items():
        state |= {f"denoiser.net.{infix}{key}": table for key, table in before.get(name, {}).items()}
        state[f"denoiser.net.{infix}{name}"] = value
    return state


def lightning(sizes: JitSizes, infix: str = "") -> dict[str, Any]:
    return {
        "epoch": 3,
        "state_dict": state_of(sizes, jit_weights(sizes, 0), infix),
        "ema_params1": list(jit_weights(sizes, 1).values()),
        "ema_params2": list(jit_weights(sizes, 2).values()),
    }


def original(sizes: JitSizes) -> dict[str, Any]:
    names = ("model", "model_ema1", "model_ema2")
    return {key: {f"net.{n}": v for n, v in jit_weights(sizes, seed).items()} for seed, key in enumerate(names)}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@every_mixer
@pytest.mark.parametrize(
    "layout", [lightning, lambda sizes: lightning(sizes, "_orig_mod."), original], ids=["Lightning", "compiled", "JiT"]
)
def test_an_imported_network_computes_what_theirs_does(
    mixer: str, layout: Callable[[JitSizes], dict[str, Any]], tmp_path: Path
) -> None:
    sizes = JitSizes(mixer)
    file = save(tmp_path / "last.ckpt", layout(sizes))
    assert is_jit(file)
    report = import_jit(file, tmp_path / "out", in_context_start=sizes.start)
    assert report.sets == ("ema1", "ema2", "model")
    assert f"JiT with {'PoM' if mixer == 'pom' else 'attention'}: dim 48, depth 4, patch 4, 12x12 pixels" in str(report)
    pictures = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    t, classes = torch.tensor([0.0, 0.31, 0.8, 1.0]), torch.tensor([0, 3, sizes.classes, 6])
    by_default = load_pretrained(tmp_path / "out", device="cpu")(pictures, t, classes)
    for seed, weights in enumerate(("model", "ema1", "ema2")):
        ours = load_pretrained(tmp_path / "out", weights=weights, device="cpu")(pictures, t, classes)
        theirs = jit_forward(jit_weights(sizes, seed), sizes, pictures, 1 - t, classes)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert torch.equal(ours, by_default) == (weights == "ema1")


def test_the_card_is_that_of_their_training(tmp_path: Path) -> None:
    sizes = JitSizes("pom")
    import_jit(save(tmp_path / "last.ckpt", lightning(sizes)), tmp_path / "out", in_context_start=2)
    card = load_pretrained(tmp_path / "out", device="cpu").card
    diffusion = card.diffusion
    assert (diffusion.objective, diffusion.noise_scale, diffusion.clamp) == ("x", 1.0, 0.05)
    assert (diffusion.time.mean, diffusion.time.std, diffusion.condition_dropout) == (0.8, 0.8, 0.1)
    assert (card.averages, card.main_weights, card.codec.name) == (("ema1", "ema2"), "ema1", "uint8")
    assert (card.latent_mean, card.latent_std) == ((127.5,) * 3, (127.5,) * 3)
    without = {key: value for key, value in lightning(sizes).items() if not key.startswith("ema")}
    import_jit(save(tmp_path / "new.ckpt", without), tmp_path / "new", in_context_start=2, noise_scale=1.5)
    card = load_pretrained(tmp_path / "new", device="cpu").card
    assert (card.averages, card.diffusion.noise_scale) == ((), 1.5)


def shorter(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"ema_params1": content["ema_params1"][:-1]}


def swapped(content: dict[str, Any]) -> dict[str, Any]:
    values = list(content["ema_params2"])
    values[2], values[3] = values[3], values[2]
    return content | {"ema_params2": values}


def renamed(content: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    state = {name.replace(old, new): value for name, value in content["state_dict"].items()}
    return {"state_dict": state}


def changed(content: dict[str, Any], name: str, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    key = f"denoiser.net.{name}"
    return {"state_dict": content["state_dict"] | {key: function(content["state_dict"][key])}}


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an average too short": (shorter, "ema_params1 holds 62 tensors, and the network has 63; averages are kept"),
    "averages in another order": (swapped, r"number 2 of ema_params2 has the shape \(48,\), and t_embedder.mlp.0"),
    "PoM of before": (lambda c: renamed(c, ".attn.", ".attn.pom."), "JiTpp's before April 2026, which turned"),
    "a missing tensor": (lambda c: renamed(c, "norm2", "norm3"), "block 0: lacks: norm2.weight; has also: norm3"),
    "another root": (lambda c: renamed(c, "final_layer.linear", "head"), "lacks: final_layer.linear.bias"),
    "another network": (lambda c: {"state_dict": {"denoiser.net.x": torch.zeros(1)}}, "it lacks: x_embedder.pro"),
    "other positions": (lambda c: changed(c, "pos_embed", lambda p: p + 1), "pos_embed: holds other positions"),
    "other frequencies": (lambda c: changed(c, "blocks.1.attn.row_cos", lambda p: 0 * p), "block 1: .*row_cos must"),
    "another shape": (lambda c: changed(c, "final_layer.linear.bias", lambda p: p[1:]), r"head.bias the shape \(47"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    file = save(tmp_path / "last.ckpt", change(lightning(JitSizes("pom"))))
    with pytest.raises(InputError, match=message) as error:
        import_jit(file, tmp_path / "out", in_context_start=2)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


RESHAPED = [
    "x_embedder.proj1.weight",
    "x_embedder.proj2.bias",
    "pos_embed",
    "in_context_posemb",
    "final_layer.adaLN_modulation.1.weight",
    "blocks.0.mlp.w3.weight",
    "blocks.0.adaLN_modulation.1.bias",
    "blocks.0.attn.q_norm.weight",
    "blocks.1.attn.q_norm.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.1.attn.qkv.bias",
]


@pytest.mark.parametrize(
    "change", [lambda p: p[:0], lambda p: p.flatten()[0].clone(), lambda p: p[..., : p.shape[-1] // 2]]
)
@pytest.mark.parametrize("name", RESHAPED)
def test_no_wrong_shape_is_a_traceback(name: str, change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    content = {"state_dict": state_of(JitSizes("attention"), jit_weights(JitSizes("attention"), 0))}
    file = save(tmp_path / "last.ckpt", changed(content, name, change))
    with pytest.raises(InputError) as error:
        import_jit(file, tmp_path / "out", in_context_start=2)
    assert str(error.value).startswith(str(file))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p * float("nan"), "model: blocks.1.norm2.weight holds values that are not finite"),
        (lambda p: p / 0, "model: blocks.1.norm2.weight holds values that are not finite"),
        (lambda p: p.to("meta"), "model: blocks.1.norm2.weight is on the meta device: a shape that was saved without"),
        (lambda p: p.int(), "model: blocks.1.norm2.weight is of torch.int32"),
        (lambda p: p + 0j, "model: blocks.1.norm2.weight is of torch.complex64"),
    ],
)
def test_values_that_are_no_weights_are_refused(
    change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    file = save(tmp_path / "last.ckpt", changed(lightning(JitSizes("attention")), "blocks.1.norm2.weight", change))
    with pytest.raises(InputError, match=message):
        import_jit(file, tmp_path / "out", in_context_start=2)
    averages = lightning(JitSizes("attention"))
    averages["ema_params2"][-1] = averages["ema_params2"][-1] / 0
    with pytest.raises(InputError, match=r"ema2: .* holds values that are not finite"):
        import_jit(save(tmp_path / "averages.ckpt", averages), tmp_path / "out", in_context_start=2)


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_are_imported(mixer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    content = lightning(JitSizes(mixer))
    content["state_dict"] = {name: value.to(dtype) for name, value in content["state_dict"].items()}
    for key in ("ema_params1", "ema_params2"):
        content[key] = [value.to(dtype) for value in content[key]]
    import_jit(save(tmp_path / "last.ckpt", content), tmp_path / "out", in_context_start=2)
    theirs = content["state_dict"]["denoiser.net.final_layer.linear.weight"]
    torch.testing.assert_close(load_pretrained(tmp_path / "out", weights="model").head.weight.cpu(), theirs.float())


def test_a_denoiser_that_was_compiled_as_a_whole_is_recognised(tmp_path: Path) -> None:
    content = lightning(JitSizes("attention"))
    content["state_dict"] = {
        name.replace("denoiser.", "denoiser._orig_mod."): value for name, value in content["state_dict"].items()
    }
    file = save(tmp_path / "last.ckpt", content)
    assert is_jit(file)
    assert import_jit(file, tmp_path / "out", in_context_start=2).sets == ("ema1", "ema2", "model")


def test_a_block_in_context_without_tokens_in_context_is_refused(tmp_path: Path) -> None:
    content = {
        key: {n: v for n, v in state.items() if "posemb" not in n} for key, state in original(JitSizes("pom")).items()
    }
    with pytest.raises(InputError, match=r"--in-context-start: the network in .* has no tokens in context"):
        import_jit(save(tmp_path / "last.ckpt", content), tmp_path / "out", in_context_start=2)


def test_a_file_of_neither_code_is_not_said_to_be_of_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(tmp_path / "last.ckpt", {"state_dict": {}})
    with pytest.raises(SystemExit):
        main(["import", str(file), "--out", str(tmp_path / "out"), "--in-context-start", "2"])
    assert f"--in-context-start: is for checkpoints of JiT, and {file} is none" in capsys.readouterr().err


def test_other_tables_of_attention_are_refused(tmp_path: Path) -> None:
    content = changed(lightning(JitSizes("attention")), "feat_rope_incontext.freqs_sin", lambda table: table + 1)
    with pytest.raises(InputError, match=r"model: feat_rope_incontext.freqs_sin: holds other positions"):
        import_jit(save(tmp_path / "last.ckpt", content), tmp_path / "out", in_context_start=2)


def test_sizes_of_no_preset_need_the_first_block_in_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "last.ckpt", original(JitSizes("attention")))
    with pytest.raises(InputError, match=r"width 48 and depth 4 are those of no preset; .* --in-context-start"):
        import_jit(file, tmp_path / "out")
    with pytest.raises(InputError, match=r"in_context.start: 4 is no block; they are 0 to 3"):
        import_jit(file, tmp_path / "out", in_context_start=4)
    command = ["import", str(file), "--out", str(tmp_path / "out")]
    for options, code in ((["--degree", "3"], 2), (["--in-context-start", "2"], 0)):
        with pytest.raises(SystemExit) as ended:
            main([*command, *options])
        assert ended.value.code == code
    printed = capsys.readouterr()
    assert f"--degree: is for checkpoints of HoMM, and {file} is none" in printed.err
    assert "tokens in context from block 2 (--in-context-start)" in printed.out


@every_mixer
def test_an_exported_file_is_the_imported_one(mixer: str, tmp_path: Path) -> None:
    """Names, order and every bit of the parameters, the fixed positions among them; tables to rounding."""
    sizes = JitSizes(mixer)
    theirs = lightning(sizes)
    import_jit(save(tmp_path / "last.ckpt", theirs), tmp_path / "out", in_context_start=sizes.start)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "back.ckpt"), "--format", "jitpp"])
    assert ended.value.code == 0
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert back["state_dict"].keys() == theirs["state_dict"].keys()
    names = [f"denoiser.net.{name}" for name in jit_weights(sizes, 0)]
    assert [name for name in back["state_dict"] if name in names] == names
    for name, value in theirs["state_dict"].items():
        fixed = name not in names or name.endswith("pos_embed")
        torch.testing.assert_close(back["state_dict"][name], value, rtol=0, atol=1e-6 if fixed else 0)
    for key in ("ema_params1", "ema_params2"):
        torch.testing.assert_close(back[key][0], theirs[key][0], rtol=0, atol=1e-6)
        assert all(map(torch.equal, back[key][1:], theirs[key][1:]))
    assert back["hyper_parameters"]["cfg"]["data"] == {"num_classes": sizes.classes}
    import_jit(tmp_path / "back.ckpt", tmp_path / "again", in_context_start=sizes.start)
    for weights in ("model", "ema1", "ema2"):
        first, again = (
            load_pretrained(tmp_path / name, weights=weights, device="cpu").state_dict() for name in ("out", "again")
        )
        assert all(torch.equal(again[name], value) for name, value in first.items())


NOT_THEIRS: dict[str, tuple[dict[str, Any], str]] = {
    "norm": ({"norm": "layer"}, "model.norm is layer, and theirs rms"),
    "grey": ({"latent_shape": (1, 12, 12)}, "model.latent_shape is 1 x 12 x 12"),
    "oblong": ({"latent_shape": (3, 12, 8)}, "model.latent_shape is 3 x 12 x 8"),
    "no tokens of the class": ({"in_context": None}, "model.in_context are what theirs always has"),
    "hybrid": ({"mixer": [{"kind": "attention", "qk_norm": True, "rope": True}, "pom"]}, "is a hybrid"),
    "attention": ({"mixer": "attention"}, "model.mixer has no rope"),
}


@pytest.mark.parametrize("case", NOT_THEIRS)
def test_a_network_that_theirs_is_not_is_not_exported(case: str, tmp_path: Path) -> None:
    changes, message = NOT_THEIRS[case]
    sizes = JitSizes("attention")
    import_jit(save(tmp_path / "last.ckpt", original(sizes)), tmp_path / "theirs", in_context_start=sizes.start)
    card = open_weights(tmp_path / "theirs").card
    content = card.model_dump(mode="json")
    other = ModelCard.model_validate(content | {"model": content["model"] | changes, "averages": ()})
    shapes = parameter_shapes(other.model)
    write_weights(tmp_path / "ours", other, {}, shapes, {"model": (torch.zeros(shape) for shape in shapes.values())})
    with pytest.raises(InputError, match=rf"ours: JiTpp has no such network: .*{message}"):
        export_jit(tmp_path / "ours", tmp_path / "back.ckpt")
    assert not (tmp_path / "back.ckpt").exists()
