"""AdamW, or Muon with AdamW for the rest, and their learning rate as a function of samples seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pomscale.config.engine import OptimizerConfig, ScheduleConfig
from pomscale.engine.adamw_bf16 import AdamWBf16
from pomscale.engine.matrices import block_matrices
from pomscale.engine.muon import Muon


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimiser of a model, whole or sharded by FSDP2; its state exists from the start.

    With Muon the weights of the blocks' linear maps are its matrices (`matrices.block_matrices`); AdamW steps all other
    parameters. AdamW leaves vectors, embeddings, learned positions and coefficients undecayed. Decay would pull the
    gate biases from their start at -1 towards 0, that is, open every block; a class embedding would shrink at every
    step in which its class does not occur; and the coefficients of a polynomial are factors of single channels, like
    the weights of a norm.
    """
    matrices: dict[nn.Parameter, int] = {}
    if config.name == "muon":
        matrices = {model.get_parameter(name): number for name, number in block_matrices(model).items()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter in matrices:
            continue
        is_no_map = parameter.ndim < 2 or name.endswith(("coefficients", "positions")) or id(parameter) in embeddings
        (undecayed if is_no_map else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if config.moments == "bf16":
        optimizer = AdamWBf16(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    if matrices:
        optimizer = Muon(matrices, optimizer, config)
    for parameter in model.parameters():
        init_state(optimizer, parameter, config, is_matrix=parameter in matrices)
    return optimizer


def init_state(optimizer: torch.optim.Optimizer, tensor: Tensor, config: OptimizerConfig, *, is_matrix: bool) -> None:
    """Make the initial state of a parameter or partition before the first step, so that a checkpoint loads into it.

    is_matrix: whether Muon steps the tensor, which keeps one moment where AdamW keeps two.
    """
    dtype = torch.bfloat16 if config.moments == "bf16" else torch.float32
    # The fused kernel of AdamW counts on the device; others read the count.
    is_read = is_matrix or config.moments == "bf16"
    state = {"step": torch.zeros((), device="cpu" if is_read else tensor.device)}
    for name in ("momentum_buffer",) if is_matrix else ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
    optimizer.state[tensor] = state


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
