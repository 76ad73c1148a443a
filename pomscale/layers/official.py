"""Weights of the authors' mixers: HoM of davidpicard/HoMM (PoM v1), PoM and PoMRoPE of davidpicard/pom (PoM v2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from pomscale.ops.pom import Form, check_count
from pomscale.ops.pom.rotary import cos_sin

# Names of the linear maps here and in HoM.
_HOM = {"projection": "ho_proj", "gate": "se_proj", "output": "ag_proj"}
# Buffers of PoMRoPE: a table of cosines and one of sines per axis, over all positions up to some largest one.
_TABLES = {1: [("freqs_cos", "freqs_sin")], 2: [("row_cos", "row_sin"), ("col_cos", "col_sin")]}
_SAME_TABLES = 1e-5


@dataclass(frozen=True)
class OfficialMixer:
    """A mixer read from a state_dict: arguments of our PoM, and its parameters by our names."""

    dim: int
    form: Form
    expand: int
    groups: int
    bias: bool
    parameters: dict[str, Tensor]


def read_official(
    tensors: Mapping[str, Tensor], degree: int | None, heads: int | None, rope: Literal[1, 2] | None
) -> OfficialMixer:
    """Read the state_dict of a mixer of the authors.

    Args:
        tensors: state_dict, of HoM (ho_proj, se_proj, ag_proj), PoM, PoMRoPE, or JiTpp's older PoM with po_proj.
        degree: k; None = the one that the tensors tell, and 2 for HoM, whose tensors do not tell it.
        heads: Number of selection heads; None = the one that the tensors tell.
        rope: Number of axes; None = the one that the tensors tell, by their tables of cosines and sines. Parameters
            alone, as in averages and in old files of JiTpp, have none: there, None is no rope.

    Raises:
        ValueError: Keys or shapes are of another layer, or differ from what was given.
    """
    if "ho_proj.weight" in tensors:
        return _read_hom(tensors, degree, heads, rope)
    return _read_pom(tensors, degree, heads, rope)


def _read_hom(
    tensors: Mapping[str, Tensor], degree: int | None, heads: int | None, rope: Literal[1, 2] | None
) -> OfficialMixer:
    if heads not in (None, 1) or rope is not None:
        raise ValueError(f"HoM layer: PoM v1 has neither heads nor rope, got heads={heads} and rope={rope}")
    degree = 2 if degree is None else degree
    check_count("HoM layer: degree", degree)
    bias = "ho_proj.bias" in tensors
    official_of = {
        f"{ours}.{part}": f"{theirs}.{part}"
        for ours, theirs in _HOM.items()
        for part in (("weight", "bias") if bias else ("weight",))
    }
    _check_keys("HoM layer", tensors, set(official_of.values()))
    weight = tensors["ho_proj.weight"]
    if weight.dim() != 2 or 0 in weight.shape or weight.shape[0] % (degree * weight.shape[1]):
        raise ValueError(
            f"HoM layer: expected ho_proj.weight of shape (degree {degree} * expand * dim, dim), "
            f"got {tuple(weight.shape)}"
        )
    width, dim = weight.shape
    for name, shape in (
        ("se_proj.weight", (width, dim)),
        ("ag_proj.weight", (dim, width)),
        *((("ho_proj.bias", (width,)), ("se_proj.bias", (width,)), ("ag_proj.bias", (dim,))) if bias else ()),
    ):
        _check_shape("HoM layer", tensors, name, shape)
    parameters = {ours: tensors[theirs] for ours, theirs in official_of.items()}
    return OfficialMixer(dim, Form("product", degree), width // (degree * dim), 1, bias, parameters)


def _read_pom(
    tensors: Mapping[str, Tensor], degree: int | None, heads: int | None, rope: Literal[1, 2] | None
) -> OfficialMixer:
    for name in ("po_coeff", "ag_proj.weight"):
        if name not in tensors or tensors[name].dim() != 2:
            got = tuple(tensors[name].shape) if name in tensors else f"the keys {sorted(tensors)}"
            raise ValueError(f"PoM layer: expected a matrix {name}, got {got}")
    (width, found_degree), dim = tensors["po_coeff"].shape, tensors["ag_proj.weight"].shape[0]
    if dim == 0 or width % dim:
        raise ValueError(f"PoM layer: expected channels of po_coeff that dim {dim} divides, got {width}")
    _check_shape("PoM layer", tensors, "ag_proj.weight", (dim, width))
    fused = "qc_proj.weight" in tensors
    own = ["qc_proj.weight", "se_bias"] if fused else ["po_proj.weight", "se_proj.weight", "se_proj.bias"]
    biases = [name for name in ("po_proj.bias", "ag_proj.bias") if name in tensors and not (fused and "po" in name)]
    found_rope, tables = _rope_of(tensors, width)
    _check_keys("PoM layer", tensors, {"po_coeff", "ag_proj.weight", *own, *biases, *tables})
    parameters = _fused_maps(tensors, width, dim) if fused else _separate_maps(tensors, width, dim)
    parameters |= {"output.weight": tensors["ag_proj.weight"], "coefficients": tensors["po_coeff"]}
    for ours, theirs, size in (("projection.bias", "po_proj.bias", width), ("output.bias", "ag_proj.bias", dim)):
        if theirs in biases:
            _check_shape("PoM layer", tensors, theirs, (size,))
        if biases:  # a bias of 0 is none
            parameters[ours] = tensors.get(theirs, torch.zeros(size, dtype=tensors["po_coeff"].dtype))
    num_gates = len(parameters["gate.weight"])
    found_heads = 1 if num_gates == width else num_gates
    for name, given, found in (("degree", degree, found_degree), ("heads", heads, found_heads)):
        if given is not None and given != found:
            raise ValueError(f"PoM layer: {name} {given} was given, and the tensors have {found}")
    if rope not in (None, found_rope or 1, found_rope or 2):
        raise ValueError(f"PoM layer: rope {rope} was given, and the tensors have {found_rope or '1 or 2'} axes")
    form = Form("coefficients", found_degree, found_heads, found_rope or rope)
    groups = dim // parameters["projection.weight"].shape[1]
    return OfficialMixer(dim, form, width // dim, groups, bool(biases), parameters)


def _fused_maps(tensors: Mapping[str, Tensor], width: int, dim: int) -> dict[str, Tensor]:
    """Return the maps of context and gates, which are the first and the last rows of one matrix."""
    num_gates = max(len(tensors["qc_proj.weight"]) - width, 1)
    _check_shape("PoM layer", tensors, "qc_proj.weight", (width + num_gates, dim))
    _check_shape("PoM layer", tensors, "se_bias", (num_gates,))
    projection, gate = tensors["qc_proj.weight"].split([width, num_gates])
    return {"projection.weight": projection, "gate.weight": gate, "gate.bias": tensors["se_bias"]}


def _separate_maps(tensors: Mapping[str, Tensor], width: int, dim: int) -> dict[str, Tensor]:
    """Return the maps of context, a linear map or a grouped convolution of kernel 1, and of gates."""
    projection, num_gates = tensors["po_proj.weight"], max(len(tensors["se_proj.weight"]), 1)
    inputs = projection.shape[1] if projection.dim() > 1 and projection.shape[1] else dim
    inputs = inputs if dim % inputs == 0 else dim
    _check_shape("PoM layer", tensors, "po_proj.weight", (width, inputs) + (1,) * (projection.dim() == 3))
    _check_shape("PoM layer", tensors, "se_proj.weight", (num_gates, dim))
    _check_shape("PoM layer", tensors, "se_proj.bias", (num_gates,))
    return {
        "projection.weight": projection.flatten(1),
        "gate.weight": tensors["se_proj.weight"],
        "gate.bias": tensors["se_proj.bias"],
    }


def _rope_of(tensors: Mapping[str, Tensor], width: int) -> tuple[Literal[1, 2] | None, list[str]]:
    """Return the number of axes that the tables tell, and their names. Raise ValueError for other frequencies."""
    for num_axes, pairs in _TABLES.items():
        names = [name for pair in pairs for name in pair]
        if not any(name in tensors for name in names):
            continue
        for axis, pair in enumerate(pairs):
            _check_tables(tensors, pair, width, axis, num_axes)
        return cast(Literal[1, 2], num_axes), names
    return None, []


def _check_tables(tensors: Mapping[str, Tensor], names: tuple[str, str], width: int, axis: int, num_axes: int) -> None:
    """Raise ValueError unless a table of cosines and one of sines are those of our rotary positions."""
    for name in names:
        if name not in tensors:
            raise ValueError(f"PoM layer: expected the tables {list(names)}, got keys {sorted(tensors)}")
    length = len(tensors[names[0]]) if tensors[names[0]].dim() else 0
    positions = torch.zeros(length, num_axes, dtype=torch.int64)
    positions[:, axis] = torch.arange(length)
    for name, expected in zip(names, cos_sin(positions, width, num_axes)[axis], strict=True):
        _check_shape("PoM layer", tensors, name, tuple(expected.shape))
        table = tensors[name].cpu()
        # A layer that was cast to bf16 or fp16 has rounded tables.
        tolerance = max(_SAME_TABLES, torch.finfo(table.dtype).eps)
        error = (table.float() - expected).abs().amax() if length else 0.0
        if not error <= tolerance:
            raise ValueError(
                f"PoM layer: {name} must hold the frequencies 10000^(-c/P) (rope_base=10000), got others: the largest "
                f"difference is {error:.1e}"
            )


def _check_keys(what: str, tensors: Mapping[str, Tensor], expected: set[str]) -> None:
    if set(tensors) != expected:
        raise ValueError(f"{what}: expected keys {sorted(expected)}, got {sorted(tensors)}")


def _check_shape(what: str, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
    if tuple(tensors[name].shape) != shape:
        raise ValueError(f"{what}: {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
