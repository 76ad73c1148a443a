"""A loss that networks of all objectives can be compared by: the error of v of flow matching."""

from __future__ import annotations

from torch import Tensor

from pomscale.base.condition import Condition
from pomscale.diffusion.objectives import Network, Objective, expand_time, interpolate

COMMON_TIMES = (0.05, 0.95)
"""First and last time of flow matching at which `common_loss` is measured."""


def common_loss(
    objective: Objective, network: Network, x0: Tensor, eps: Tensor, flow_t: Tensor, condition: Condition
) -> Tensor:
    """Return the error of v of flow matching that a network of any objective makes, squared, (b,) fp32.

    The network sees data and noise in the proportion 1 - flow_t : flow_t, at the time at which its own path has it, and
    the x0 that its prediction implies is compared: v - v_pred = (x0_pred - x0) / flow_t. This is the loss of flow
    matching at noise scale 1 itself, so the figure of such a network needs no conversion, and that of every other is on
    its scale. The x0 of an eps prediction divides by alpha and v divides by flow_t: within COMMON_TIMES an error of
    eps counts at most 1 / (1 - 0.95) times, one of x0 at most 1 / 0.05 times. Nearer to the ends both would be divided
    by next to nothing, and the last bits of a prediction would be all of the mean.

    Args:
        objective: What the network was trained to predict.
        network: The network.
        x0: Data (b, ...) fp32.
        eps: Standard normal noise (b, ...) fp32.
        flow_t: Times of flow matching (b,), within COMMON_TIMES.
        condition: Conditions of the b samples.
    """
    t = objective.time_of(1 - flow_t, flow_t)
    x = interpolate(objective, x0, eps, t)
    found, _ = objective.decompose(x, t, network(x, t, condition))
    return ((found - x0) / expand_time(flow_t, x0)).square().flatten(1).mean(1)
