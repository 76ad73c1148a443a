"""The Polynomial Mixer as a layer: the linear maps around the operator of `pomscale.ops.pom`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from pomscale.ops.pom import Mask, PomState, StateReduce, polynomial_mixer, polynomial_mixer_step

# Name of each linear map here and in the authors' HoM layer.
_OFFICIAL_NAMES = {"projection": "ho_proj", "gate": "se_proj", "output": "ag_proj"}


class PoM(nn.Module):
    """Mixer in which every query reads the mean monomial state of its context through a gate.

    In the product form (arXiv 2411.12663):

        PoM(X, C) = Wo [sigmoid(Ws X) o H(C)],  H(C) = mean [h(W1 c); h(W1 c) o h(W2 c); ..; prod_m h(Wm c)],  h = GELU

    degree is the number k of monomials, expand the width of one of them over dim. Cost is linear in the tokens.
    `state_reduce`, None by default, is set by sequence parallelism: it merges the state of the tokens that this
    process holds with the others'. Raises ValueError unless degree and expand are at least 1.
    """

    def __init__(
        self, dim: int, degree: int = 2, expand: int = 2, bias: bool = True, form: Literal["product"] = "product"
    ) -> None:
        super().__init__()
        if form != "product":
            raise ValueError(f"PoM: form must be 'product' (PoM v1), got {form!r}")
        if degree < 1 or expand < 1:
            raise ValueError(f"PoM: degree and expand must be at least 1, got {degree} and {expand}")
        width = degree * expand * dim
        self.degree = degree
        self.projection = nn.Linear(dim, width, bias=bias)
        self.gate = nn.Linear(dim, width, bias=bias)
        self.output = nn.Linear(width, dim, bias=bias)
        self.state_reduce: StateReduce | None = None

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Mask = None) -> Tensor:
        """Let x (b m d) read context (b n d), by default x itself -> (b m d).

        mask: None, "causal", BlockCausal(frame_length), bool (b n) of the context or bool (b m n); True takes part.
        A query with an empty context gets H = 0. Raises ValueError for a mask that does not fit.
        """
        u = self.projection(x if context is None else context)
        return self.output(polynomial_mixer(u, self.gate(x), self.degree, mask, state_reduce=self.state_reduce))

    def step(self, x: Tensor, state: PomState | None = None, mask: Mask = None) -> tuple[Tensor, PomState]:
        """Map the next chunk x (b n d) of a sequence -> (b n d) and the state to pass to the next call.

        mask None or bool (b n): the chunk is one block that reads the past and all of itself, so chunks of frames
        equal the block-causal full pass. "causal": each token reads the past and the chunk up to itself.
        """
        if self.state_reduce is not None:
            raise ValueError("step: carried states do not combine with sequence parallelism (state_reduce)")
        y, state = polynomial_mixer_step(self.projection(x), self.gate(x), self.degree, state, mask)
        return self.output(y), state

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], degree: int = 2) -> PoM:
        """Build the layer with the weights of a HoM layer of davidpicard/HoMM.

        Keys: ho_proj, se_proj, ag_proj with .weight and, all or none, .bias. The degree cannot be seen in the shapes;
        dim and expand are. Raises ValueError for other keys and for shapes that do not fit together.
        """
        bias = "ho_proj.bias" in state_dict
        official_of = {
            f"{ours}.{part}": f"{theirs}.{part}"
            for ours, theirs in _OFFICIAL_NAMES.items()
            for part in (("weight", "bias") if bias else ("weight",))
        }
        if set(state_dict) != set(official_of.values()):
            raise ValueError(f"HoM layer: expected keys {sorted(official_of.values())}, got {sorted(state_dict)}")
        weight = state_dict["ho_proj.weight"]
        if weight.dim() != 2 or weight.shape[0] % (degree * weight.shape[1]):
            raise ValueError(f"HoM layer: ho_proj.weight of shape {tuple(weight.shape)} does not fit degree {degree}")
        width, dim = weight.shape
        mixer = cls(dim, degree, width // (degree * dim), bias).to(weight.dtype)
        for name, parameter in mixer.named_parameters():
            found = state_dict[official_of[name]].shape
            if found != parameter.shape:
                raise ValueError(
                    f"HoM layer: {official_of[name]} has shape {tuple(found)}, expected {tuple(parameter.shape)}"
                )
        mixer.load_state_dict({ours: state_dict[theirs] for ours, theirs in official_of.items()})
        return mixer
