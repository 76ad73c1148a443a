"""AdamW and its learning rate as a function of samples seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pomscale.config.engine import OptimizerConfig, ScheduleConfig
from pomscale.engine.adamw_bf16 import AdamWBf16


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW that leaves biases, embeddings and coefficients undecayed; its state exists from the start.

    Decay would pull the gate biases from their start at -1 towards 0, that is, open every block; a class embedding
    would shrink at every step in which its class does not occur; and the coefficients of a polynomial are factors of
    single channels, like the weights of a norm.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_factor = name.rsplit(".", 1)[-1] in ("bias", "coefficients")
        (undecayed if is_factor or id(parameter) in embeddings else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if config.moments == "bf16":
        optimizer = AdamWBf16(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    for parameter in (*decayed, *undecayed):
        init_adam_state(optimizer, parameter, config)
    return optimizer


def init_adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor, config: OptimizerConfig) -> None:
    """Make AdamW's initial state before the first step, so that a checkpoint can be loaded into it."""
    dtype = torch.bfloat16 if config.moments == "bf16" else torch.float32
    optimizer.state[parameter] = {
        # The fused kernel counts on the device; AdamWBf16 reads the count.
        "step": torch.zeros((), device="cpu" if config.moments == "bf16" else parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype, requires_grad=False),
    }


def learning_rate(config: ScheduleConfig, peak: float, samples: int, total_samples: int) -> float:
    """Return the rate: linear warm-up, constant, then peak (1 - sqrt(u)), u from 0 to 1, in the cooldown.

    This is the schedule of Haegele et al. 2024.
    """
    if samples < config.warmup_samples:
        return peak * samples / config.warmup_samples
    into_cooldown = samples - (total_samples - config.cooldown_samples)
    if config.cooldown_samples and into_cooldown > 0:
        return peak * (1 - math.sqrt(into_cooldown / config.cooldown_samples))
    return peak
