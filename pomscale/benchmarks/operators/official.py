"""The authors' layers, loaded from a checkout that the caller names; nothing of theirs is part of pomscale."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from pomscale.base.errors import InputError

_POM = Path("pom/__init__.py")  # in a checkout of davidpicard/pom
_HOMM = Path("src/model/network/layers.py")  # in a checkout of davidpicard/HoMM


@dataclass(frozen=True)
class Official:
    """Layers of the authors; None = no checkout was given that has it.

    hom: HoM of davidpicard/HoMM (v1). pom, pom_rope: PoM and PoMRoPE of davidpicard/pom (v2). aggregate: the function
    (u, coefficients, degree) -> (b 1 D) of PoM, which runs their kernels on a GPU.
    """

    hom: Callable[..., nn.Module] | None = None
    pom: Callable[..., nn.Module] | None = None
    pom_rope: Callable[..., nn.Module] | None = None
    aggregate: Callable[..., Tensor] | None = None


def load_official(folders: Iterable[Path]) -> Official:
    """Load what the checkouts hold. Raises InputError for a folder that is a checkout of neither repository."""
    found: dict[str, Callable[..., Any]] = {}
    for folder in folders:
        if (folder / _POM).is_file():
            package = _load("pomscale_official_pom", folder / _POM)
            pom = importlib.import_module(f"{package.__name__}.pom")
            rope = importlib.import_module(f"{package.__name__}.pom_rope")
            found |= {"pom": pom.PoM, "pom_rope": rope.PoMRoPE, "aggregate": pom.polynomial_aggregation_}
        elif (folder / _HOMM).is_file():
            found["hom"] = _load("pomscale_official_homm", folder / _HOMM).HoM
        else:
            raise InputError(
                f"--official {folder}: expected a checkout of davidpicard/pom (with {_POM}) or davidpicard/HoMM "
                f"(with {_HOMM})"
            )
    return Official(**found)


def _load(name: str, path: Path) -> ModuleType:
    """Import a file, or a package by its __init__.py, under a name that no other package has."""
    is_package = path.name == "__init__.py"
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(path.parent)] if is_package else None
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # relative imports inside the package look there
    spec.loader.exec_module(module)
    return module
