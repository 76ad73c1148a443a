"""Weights of the authors' mixers: HoM of davidpicard/HoMM (PoM v1), PoM and PoMRoPE of davidpicard/pom (PoM v2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from pomscale.ops.pom import Form
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
        rope: Number of axes; None = the one that the tensors tell. Old files of JiTpp have no tables and do not.

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
        raise ValueError("HoM layer: PoM v1 has neither heads nor rope")
    degree = 2 if degree is None else degree
    bias = "ho_proj.bias" in tensors
    official_of = {
        f"{ours}.{part}": f"{theirs}.{part}"
        for ours, theirs in _HOM.items()
        for part in (("weight", "bias") if bias else ("weight",))
    }
    _check_keys("HoM layer", tensors, set(official_of.values()))
    weight = tensors["ho_proj.weight"]
    if weight.dim() != 2 or weight.shape[0] % (degree * weight.shape[1]):
        raise ValueError(f"HoM layer: ho_proj.weight of shape {tuple(weight.shape)} does not fit degree {degree}")
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
    what = "PoM layer"
    for name in ("po_coeff", "ag_proj.weight"):
        if name not in tensors:
            raise ValueError(f"{what}: lacks {name}; it has {sorted(tensors)}")
    (width, found_degree), dim = tensors["po_coeff"].shape, tensors["ag_proj.weight"].shape[0]
    fused = "qc_proj.weight" in tensors
    own = ["po_coeff", "ag_proj.weight", *(["qc_proj.weight", "se_bias"] if fused else [])]
    own += [] if fused else ["po_proj.weight", "se_proj.weight", "se_proj.bias"]
    optional = [name for name in ("po_proj.bias", "ag_proj.bias") if name in tensors]
    found_rope, tables = _rope_of(tensors, width)
    _check_keys(what, tensors, {*own, *optional, *tables})
    if fused:
        projection, gate = tensors["qc_proj.weight"][:width], tensors["qc_proj.weight"][width:]
        gate_bias = tensors["se_bias"]
    else:
        projection, gate, gate_bias = tensors["po_proj.weight"], tensors["se_proj.weight"], tensors["se_proj.bias"]
        projection = projection[..., 0] if projection.dim() == 3 else projection
    if dim % projection.shape[1] or width % dim:
        raise ValueError(f"{what}: a map {tuple(projection.shape)} does not fit dim {dim} and {width} channels")
    found_heads = 1 if gate.shape[0] == width else gate.shape[0]
    for name, given, found in (("degree", degree, found_degree), ("heads", heads, found_heads)):
        if given is not None and given != found:
            raise ValueError(f"{what}: {name} {given} was given, and the tensors have {found}")
    if rope is not None and found_rope is not None and rope != found_rope:
        raise ValueError(f"{what}: rope {rope} was given, and the tensors have {found_rope} axes")
    bias = bool(optional)
    parameters = {
        "projection.weight": projection,
        "gate.weight": gate,
        "gate.bias": gate_bias,
        "output.weight": tensors["ag_proj.weight"],
        "coefficients": tensors["po_coeff"],
    }
    for ours, theirs, size in (("projection.bias", "po_proj.bias", width), ("output.bias", "ag_proj.bias", dim)):
        if bias:  # a bias of 0 is none
            parameters[ours] = tensors.get(theirs, torch.zeros(size, dtype=projection.dtype))
    form = Form("coefficients", found_degree, found_heads, found_rope or rope)
    return OfficialMixer(dim, form, width // dim, dim // projection.shape[1], bias, parameters)


def _rope_of(tensors: Mapping[str, Tensor], width: int) -> tuple[Literal[1, 2] | None, list[str]]:
    """Return the number of axes that the tables tell, and their names. Raise ValueError for other frequencies."""
    for num_axes, pairs in _TABLES.items():
        if pairs[0][0] not in tensors:
            continue
        names = [name for pair in pairs for name in pair]
        for axis, (cos_name, sin_name) in enumerate(pairs):
            cos, sin = tensors.get(cos_name), tensors.get(sin_name)
            if cos is None or sin is None or cos.shape != sin.shape:
                raise ValueError(f"PoM layer: {cos_name} and {sin_name} are no pair of tables")
            positions = torch.zeros(len(cos), num_axes, dtype=torch.int64)
            positions[:, axis] = torch.arange(len(cos))
            ours = cos_sin(positions, width, num_axes)[axis]
            for name, table, expected in ((cos_name, cos, ours[0]), (sin_name, sin, ours[1])):
                if table.shape != expected.shape or not torch.allclose(
                    table.float().cpu(), expected, atol=_SAME_TABLES
                ):
                    raise ValueError(
                        f"PoM layer: {name} has other frequencies than 10000^(-c/P); rope_base must be 10000"
                    )
        return cast(Literal[1, 2], num_axes), names
    return None, []


def _check_keys(what: str, tensors: Mapping[str, Tensor], expected: set[str]) -> None:
    if set(tensors) != expected:
        raise ValueError(f"{what}: expected keys {sorted(expected)}, got {sorted(tensors)}")


def _check_shape(what: str, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
    if tuple(tensors[name].shape) != shape:
        raise ValueError(f"{what}: {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
