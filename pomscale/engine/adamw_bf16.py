"""AdamW with moments in bf16, which saves 4 bytes per parameter.

With beta2 = 0.999 the second moment changes by a thousandth of itself per step, less than half of a bf16 digit:
rounded to nearest it would never change. Rounded up or down at random, in proportion to how near each is, it is right
on average (Gupta et al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pomscale.distributed.flat_shard import local_part

_DROPPED_BITS = 16  # of fp32's 32 bits, bf16 keeps the upper half


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) on fp32 parameters, with arithmetic in fp32 and moments in bf16.

    The rounding draws from a generator that is seeded with the number of the step, so that a run which is resumed with
    the same shards is the same, and so are the replicas of a shard.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loss is computed by the engine"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        state["step"] += 1
        # The count is on the CPU, as torch.optim keeps it, so that this does not wait for the device.
        step = int(state["step"].item())
        held = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
        value, gradient, first, second = map(local_part, held)
        m = first.float().lerp_(gradient, 1 - beta1)
        v = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        generator = torch.Generator(value.device).manual_seed(step)
        first.copy_(round_to_bf16(m, generator))
        second.copy_(round_to_bf16(v, generator))
        value.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = v.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        value.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))


def round_to_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to bf16 of the same shape, at random, so that the expected value of the result is x."""
    noise = torch.randint(0, 1 << _DROPPED_BITS, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # Adding below the digits that stay carries into them with the right probability, for either sign.
    bits = (x.view(torch.int32) + noise) & -(1 << _DROPPED_BITS)
    return bits.view(torch.float32).to(torch.bfloat16)
