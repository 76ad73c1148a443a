"""The Polynomial Mixer as a layer: the linear maps around the operator of `pomscale.ops.pom`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from pomscale.layers.maps import is_plain, serves_operators
from pomscale.layers.official import read_official
from pomscale.ops.pom import (
    Context,
    Form,
    FormName,
    Mask,
    PomState,
    Queries,
    TokenSplit,
    check_count,
    check_rotary,
    check_tokens,
    is_path_forced,
    polynomial_mixer,
    polynomial_mixer_step,
)
from pomscale.ops.pom.whole import Memory, Weights, mix


class GroupedLinear(nn.Module):
    """Linear map (.. inputs) -> (.. outputs) in which each of `groups` parts of the outputs reads one of the inputs.

    weight: (outputs, inputs/groups), as of a grouped convolution of kernel 1. Raises ValueError unless the groups
    divide both sizes.
    """

    def __init__(self, inputs: int, outputs: int, groups: int, bias: bool) -> None:
        super().__init__()
        if inputs % groups or outputs % groups:
            raise ValueError(f"groups: {groups} do not divide {inputs} inputs and {outputs} outputs")
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        for part in self.weight.chunk(groups):
            nn.init.xavier_uniform_(part)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(0, (self.groups, -1))
        y = torch.einsum("...gi,goi->...go", x.unflatten(-1, (self.groups, -1)), weight).flatten(-2)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # autocast leaves the bias in fp32


class PoM(nn.Module):
    """Mixer in which every query reads the mean polynomial state of its context through a gate.

    In the product form (PoM v1, arXiv 2411.12663):

        PoM(X, C) = Wo [sigmoid(Ws X) o H(C)],  H(C) = mean [h(W1 c); h(W1 c) o h(W2 c); ..; prod_m h(Wm c)],  h = GELU

    In the coefficient form (PoM v2, arXiv 2604.06129), R = rotation by the position of the token, 1 without rope:

        PoM(X, C) = Wo [R hardsigmoid(Ws X) o H(C)],  H(C) = mean R sum_m c_m o h(W c)^m,  h = clamp(leaky_relu)

    Cost is linear in the tokens.

    Args:
        dim: Width d of the tokens.
        degree: k, number of monomials.
        expand: Width of one monomial over dim.
        bias: Add biases to the linear maps; by default in the product form alone, as the authors have it. The gate of
            the coefficient form always has one.
        form: Polynomial; see `ops.pom.Form`.
        heads: Coefficient form: number of gates of a query, each shared by neighbouring channels; 1 = one per channel.
        groups: Coefficient form: number of groups of the context's linear map.
        rope: Coefficient form: axes of the rotary positions, or None.

    Raises:
        ValueError: The sizes do not fit together.
    """

    def __init__(
        self,
        dim: int,
        degree: int = 2,
        expand: int = 2,
        bias: bool | None = None,
        form: FormName = "product",
        heads: int = 1,
        groups: int = 1,
        rope: Literal[1, 2, 3] | None = None,
    ) -> None:
        super().__init__()
        self.form = Form(form, degree, heads, rope)
        for name, value in (("dim", dim), ("expand", expand), ("groups", groups)):
            check_count(f"PoM: {name}", value)
        self.dim = dim
        is_product = self.form.name == "product"
        if is_product and groups != 1:
            raise ValueError(f"PoM: groups must be 1 in the product form, got {groups}")
        bias = is_product if bias is None else bias
        width = degree * expand * dim if is_product else expand * dim
        num_gates = self.form.num_gates(width)
        if rope is not None:
            check_rotary(width, heads, rope)
        self.projection: nn.Linear | GroupedLinear
        if groups == 1:
            self.projection = nn.Linear(dim, width, bias=bias)
        else:
            self.projection = GroupedLinear(dim, width, groups, bias)
        # In the product form W1 to Wk, one above the other.
        self.stacked_maps = {"projection": degree if is_product else groups}
        self.gate = nn.Linear(dim, num_gates, bias=bias or not is_product)
        self.output = nn.Linear(width, dim, bias=bias)
        # The authors' initial values: a normal distribution that is clamped to +-0.001.
        self.coefficients = None if is_product else nn.Parameter(torch.randn(width, degree).clamp(-0.001, 0.001))
        # Set by compute.mixer_memory: what the backward pass finds kept; see `ops.pom.whole.mix`.
        self.mixer_memory: Memory = "fast"

    @property
    def rope(self) -> Literal[1, 2, 3] | None:
        """Axes of the rotary positions."""
        return self.form.rope

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Mask = None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
        split: TokenSplit | None = None,
    ) -> Tensor:
        """Let x (b m d) read context (b n d), by default x itself -> (b m d).

        Args:
            x: Queries.
            context: Tokens that are read; by default x.
            mask: None, "causal", BlockCausal(frame_length), Segments(lengths, ..), bool (b n) of the context or bool
                (b m n); True takes part. A query with an empty context gets H = 0.
            positions: (m axes) or (b m axes) integers, with rope alone.
            context_positions: (n axes) or (b n axes) integers; without a context by default those of x.
            split: Where the context's tokens lie if other ranks hold the rest of them (sequence parallelism); mask
                and positions are those of the local ones. With Segments or (b m n) there is none.

        Raises:
            ValueError: Tokens, mask, positions or split do not fit.
        """
        read = x if context is None else context
        check_tokens(x, read, self.dim)
        if split is None and self._is_whole(x, mask):
            return mix(
                x, context, self._weights(), self.form, mask, positions, context_positions, memory=self.mixer_memory
            )
        if context is None and context_positions is None:
            context_positions = positions
        operands = self._operands(x, read, positions, context_positions)
        return self._mapped(polynomial_mixer(*operands, mask, split=split))

    def step(
        self, x: Tensor, state: PomState | None = None, mask: Mask = None, positions: Tensor | None = None
    ) -> tuple[Tensor, PomState]:
        """Map the next chunk x (b n d) of a sequence -> (b n d) and the state to pass to the next call.

        mask None or bool (b n): the chunk is one block that reads the past and all of itself, so chunks of frames
        equal the block-causal full pass. "causal": each token reads the past and the chunk up to itself.
        BlockCausal: the chunk begins with a frame and may hold several. positions are those of the chunk.
        """
        check_tokens(x, x, self.dim)
        y, state = polynomial_mixer_step(*self._operands(x, x, positions, positions), state, mask)
        return self._mapped(y), state

    def _is_whole(self, x: Tensor, mask: Mask) -> bool:
        """Decide between one function for the whole mixer, and linear maps around `polynomial_mixer` (layered).

        Layered are, beside tokens that are split over ranks: a path that POMSCALE_POM forces; torch.func; patterns
        (b m n); linear maps that are not plain ones; autocast; CUDA unless memory is to be lean, since Triton has the
        operator there, and torch.compile fuses what is around it; and devices without kernels (meta).
        """
        return (
            not is_path_forced()
            and serves_operators(x)
            and not (isinstance(mask, Tensor) and mask.dim() == 3)
            and (x.device.type == "cpu" or (x.device.type == "cuda" and self.mixer_memory == "lean"))
            and all(is_plain(map_) for map_ in (self.projection, self.gate, self.output))
        )

    def _weights(self) -> Weights:
        projection, gate, output = self.projection, self.gate, self.output
        return Weights(
            projection.weight, projection.bias, gate.weight, gate.bias, output.weight, output.bias, self.coefficients
        )

    def _operands(
        self, x: Tensor, context: Tensor, positions: Tensor | None, context_positions: Tensor | None
    ) -> tuple[Context, Queries]:
        output = self.output.weight if self._folds else None
        return (
            Context(self.projection(context), self.form, self.coefficients, context_positions),
            Queries(self.gate(x), positions, output),
        )

    @property
    def _folds(self) -> bool:
        """Whether the operator applies the weight of the output map, to states rather than to tokens."""
        return self.form.heads > 1 and is_plain(self.output)

    def _mapped(self, y: Tensor) -> Tensor:
        if not self._folds:
            return self.output(y)
        return y if self.output.bias is None else y + self.output.bias.to(y.dtype)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        degree: int | None = None,
        heads: int | None = None,
        rope: Literal[1, 2] | None = None,
    ) -> PoM:
        """Build the layer with the weights of one of the authors': HoM of HoMM, PoM and PoMRoPE of pom.

        degree, heads and rope are checked against what the tensors tell, and need not be given where they tell it; the
        degree of HoM is in no shape and by default 2. Raises ValueError for keys or shapes of another layer.
        """
        found = read_official(state_dict, degree, heads, rope)
        form = found.form
        mixer = cls(found.dim, form.degree, found.expand, found.bias, form.name, form.heads, found.groups, form.rope)
        mixer = mixer.to(found.parameters["projection.weight"].dtype)
        mixer.load_state_dict(found.parameters)
        return mixer
