"""Layers that are measured, behind one interface: tokens in, tokens out, and the oracle that each is held to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pomscale.benchmarks.operators.cases import DTYPES, Case, randomize
from pomscale.benchmarks.operators.official import Official
from pomscale.benchmarks.operators.plain import plain_mixer
from pomscale.layers import PoM
from pomscale.layers.attention import Attention
from pomscale.layers.official import read_official
from pomscale.ops.pom import Context, Mask, Queries, dense_mask, naive, polynomial_mixer
from pomscale.ops.pom.dispatch import CannotServeError, Implementation

_HEAD_WIDTH = 64  # least width of an attention head


class Entry(nn.Module):
    """A layer of one case: x (b n d) -> one or two tensors. `own_error` is the relative error that it has by design."""

    own_error = 0.0

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__()
        self.case, self.device = case, device

    def prepared(self) -> Entry:
        """Move to the device and dtype of the case, and return itself."""
        return self.to(self.device, DTYPES[self.case.dtype])

    def oracle(self) -> Entry:
        """Return a slow form over the same weights in float64, on the same device; by default a copy."""
        return copy.deepcopy(self).double()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the parameters, by the names that the oracle has."""
        return {name: parameter.grad for name, parameter in self.named_parameters() if parameter.grad is not None}


class Gemms(Entry):
    """The bare matrix products of the layer, nothing between them: the floor."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.layer = case.make_layer()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.output(self.layer.projection(x)), self.layer.gate(x)


class Ours(Entry):
    """The layer as a user calls it."""

    def __init__(self, case: Case, device: torch.device, layer: PoM | None = None) -> None:
        super().__init__(case, device)
        self.layer = case.make_layer() if layer is None else layer
        self.mask: Mask = case.make_mask(device)
        self.positions = case.make_positions(device)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.layer(x, mask=self.mask, positions=self.positions)
        return mixed

    def oracle(self) -> Entry:
        return Oracle(self.case, self.device, copy.deepcopy(self.layer)).double()


class Lean(Ours):
    """The layer where it keeps its tokens alone for the backward pass, and computes the rest again."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.layer.mixer_memory = "lean"


class Layered(Ours):
    """One path of the operator between linear maps, each an operation of its own that keeps its result."""

    def __init__(self, case: Case, device: torch.device, path: Implementation) -> None:
        super().__init__(case, device)
        if path == "triton" and device.type != "cuda":
            raise CannotServeError("its kernels run on CUDA; on a CPU they are interpreted, which is no measure")
        self._path = path

    def forward(self, x: Tensor) -> Tensor:
        return layered(self.layer, x, self.mask, self.positions, self._path)


def layered(layer: PoM, x: Tensor, mask: Mask, positions: Tensor | None, path: Implementation) -> Tensor:
    """Mix x (b n d) by the operator between linear maps; the last is folded into states where heads share them."""
    folded = layer.form.heads > 1 and layer.output.bias is None
    context = Context(layer.projection(x), layer.form, layer.coefficients, positions)
    queries = Queries(layer.gate(x), positions, layer.output.weight if folded else None)
    mixed = polynomial_mixer(context, queries, mask, implementation=path)
    return mixed if folded else layer.output(mixed)


class Oracle(Ours):
    """The layer with the naive operator; float64."""

    def forward(self, x: Tensor) -> Tensor:
        context = Context(self.layer.projection(x), self.layer.form, self.layer.coefficients, self.positions)
        queries = Queries(self.layer.gate(x), self.positions)
        mixed: Tensor = self.layer.output(naive.polynomial_mixer(context, queries, self.mask))
        return mixed


class CompiledPlain(Ours):
    """The equations in a few lines of PyTorch, through torch.compile; a dense mask where sums need one."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.takes_part: Tensor | Literal["causal"] | None = None
        if case.mask == "causal":
            self.takes_part = "causal"
        elif isinstance(self.mask, Tensor):
            self.takes_part = self.mask
        elif self.mask is not None:
            self.takes_part = dense_mask(self.mask, case.batch, case.num_tokens, case.num_tokens, device).contiguous()
        # One compilation serves all numbers of tokens of a curve.
        self._mix = torch.compile(plain_mixer, dynamic=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self._mix(self.layer, x, self.takes_part, self.positions)
        return mixed


class OfficialLayer(Entry):
    """The authors' layer, and ours over its weights as its oracle. HoM adds 1e-7 to the counts of a mask."""

    own_error = 1e-6

    def __init__(self, case: Case, device: torch.device, official: Official, compiled: bool = False) -> None:
        super().__init__(case, device)
        make = {"product": official.hom, "rope": official.pom_rope}.get(case.form, official.pom)
        if make is None:
            repository = "HoMM" if case.form == "product" else "pom"
            raise CannotServeError(f"no checkout of davidpicard/{repository} was given with --official")
        sizes = (case.dim, case.degree, case.expand)
        heads = 1 if case.form == "coefficients" else case.heads
        if case.form == "product":
            self.layer = make(*sizes)
        elif case.form == "rope":
            self.layer = make(*sizes, 1, heads, max_h=case.side, max_w=case.side, rope_2d=True)
        else:
            self.layer = make(*sizes, 1, heads)
        randomize(self.layer)
        self.mask = self._mask()
        positions = case.make_positions(device)
        self._arguments = {"mask": self.mask} | ({} if positions is None else {"positions_hw": positions})
        self._compiled = torch.compile(_call, dynamic=True) if compiled else None

    def forward(self, x: Tensor) -> Tensor:
        if self._compiled is not None:
            mixed: Tensor = self._compiled(self.layer, x, self._arguments)
            return mixed
        with torch.compiler.set_stance("force_eager"):  # parts of HoM are compiled otherwise
            return _call(self.layer, x, self._arguments)

    def oracle(self) -> Entry:
        layer = PoM.from_official(dict(self.layer.named_parameters()), **self._told)
        return Oracle(self.case, self.device, copy.deepcopy(layer)).to(self.device).double()

    def gradients(self) -> dict[str, Tensor]:
        # What maps their weights to ours takes parts of them, so it maps the gradients, too.
        found = {name: parameter.grad for name, parameter in self.layer.named_parameters()}
        gradients = read_official({name: grad for name, grad in found.items() if grad is not None}, **self._told)
        return {f"layer.{name}": grad for name, grad in gradients.parameters.items()}

    @property
    def _told(self) -> dict[str, Any]:
        """What our importer cannot see in the parameters alone."""
        return {"degree": self.case.degree, "heads": None, "rope": 2 if self.case.form == "rope" else None}

    def _mask(self) -> Mask:
        case = self.case
        mask = case.make_mask(self.device)
        if mask is None or (mask == "causal" and case.form != "product"):
            return mask  # their v2 has a causal form
        if isinstance(mask, Tensor):
            return mask.to(
                DTYPES[case.dtype]
            )  # their mean is in fp32 under a mask of integers, which bf16 cannot follow
        return dense_mask(mask, case.batch, case.num_tokens, case.num_tokens, self.device).contiguous()


def _call(layer: nn.Module, x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    mixed: Tensor = layer(x, **arguments)
    return mixed


class AttentionLayer(Entry):
    """Attention in the same place, through one backend of scaled_dot_product_attention or torch's choice."""

    def __init__(self, case: Case, device: torch.device, backend: SDPBackend | None = None) -> None:
        super().__init__(case, device)
        heads = max(heads for heads in (1, 2, 3, 4, 6, 8, 12, 16) if case.dim % heads == 0 and _wide(case, heads))
        self.layer = Attention(case.dim, heads)
        self.mask, self._backend = case.make_mask(device), backend

    def forward(self, x: Tensor) -> Tensor:
        with nullcontext() if self._backend is None else sdpa_kernel(self._backend):
            try:
                mixed: Tensor = self.layer(x, mask=self.mask)
            except RuntimeError as error:
                if "No available kernel" in str(error):
                    raise CannotServeError(f"{self._backend} has no kernel for this case") from error
                raise
        return mixed

    def oracle(self) -> Entry:
        return _AttentionOracle(self.case, self.device, copy.deepcopy(self.layer)).double()


class _AttentionOracle(Entry):
    """Softmax over all pairs, under a dense mask."""

    def __init__(self, case: Case, device: torch.device, layer: Attention) -> None:
        super().__init__(case, device)
        self.layer = layer
        self.takes_part = dense_mask(case.make_mask(device), case.batch, case.num_tokens, case.num_tokens, device)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        query, key, value = (
            part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
            for part in (layer.query(x), *layer.key_value(x).chunk(2, dim=-1))
        )
        logits = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~self.takes_part[:, None], float("-inf"))
        return F.linear((logits.softmax(-1) @ value).transpose(1, 2).flatten(2), layer.output.weight, layer.output.bias)


def _wide(case: Case, heads: int) -> bool:
    return heads == 1 or case.dim // heads >= _HEAD_WIDTH
