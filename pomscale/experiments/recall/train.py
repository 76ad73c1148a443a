"""Training on recall and its figures: accuracy on sequences never trained on, and the cost of a step."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pomscale.base.console import say
from pomscale.base.errors import InputError
from pomscale.base.files import atomic_write, write_text
from pomscale.config.engine import OptimizerConfig, ScheduleConfig
from pomscale.config.mixer import PomMixer
from pomscale.engine.optimizers import build_optimizer, learning_rate
from pomscale.experiments.recall.config import RecallConfig
from pomscale.experiments.recall.data import EVALUATED_FROM, RecallBatch, recall_batch
from pomscale.experiments.recall.network import RecallNetwork, build_network

_NUM_SAVES = 20
_NUM_TIMED = 100
_COOLDOWN = 0.2


def train_recall(config: RecallConfig, out: Path, device: torch.device) -> dict[str, float]:
    """Train a network and measure it; `out` receives the figures, and beside it lies the state until then.

    A killed training continues from the state. Raises InputError if that is of other settings.
    """
    network = build_network(config).to(device)
    optimizer = build_optimizer(network, OptimizerConfig(lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01))
    state_file = out.with_suffix(".state.pt")
    begun_at, seconds = _restore(state_file, config, network, optimizer, device)
    save_every = max(1, config.num_steps // _NUM_SAVES)
    for step in range(begun_at, config.num_steps):
        begun_s = time.perf_counter()
        loss = _step(config, network, optimizer, step, device)
        seconds.append(time.perf_counter() - begun_s)
        if (step + 1) % save_every == 0:
            state = {"settings": config.model_dump(mode="json"), "step": step + 1, "seconds": seconds[-_NUM_TIMED:]}
            _save(state_file, state | {"network": network.state_dict(), "optimizer": optimizer.state_dict()})
            say(f"step {step + 1:,} of {config.num_steps:,}: loss {loss:.4f}")
    figures = {**_evaluate(config, network, device), **_cost(config, network, seconds)}
    write_text(out, json.dumps({"metrics": figures, "settings": config.model_dump(mode="json")}, indent=1) + "\n")
    state_file.unlink(missing_ok=True)
    say(json.dumps(figures))
    return figures


def _step(
    config: RecallConfig, network: RecallNetwork, optimizer: torch.optim.Optimizer, step: int, device: torch.device
) -> float:
    batch = recall_batch(config, range(step * config.batch, (step + 1) * config.batch)).to(device)
    schedule = ScheduleConfig(warmup_samples=config.warmup_steps, cooldown_samples=int(_COOLDOWN * config.num_steps))
    rate = learning_rate(schedule, config.lr, step + 1, config.num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = _loss(network, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()  # waits for the device, so that a step's time is its own


def _loss(network: RecallNetwork, batch: RecallBatch) -> torch.Tensor:
    return F.cross_entropy(network(batch).flatten(0, 1), batch.answers.flatten())


@torch.no_grad()
def _evaluate(config: RecallConfig, network: RecallNetwork, device: torch.device) -> dict[str, float]:
    right, loss, forward_s = 0, 0.0, []
    for begin in range(0, config.num_evaluated, config.batch):
        num = min(config.batch, config.num_evaluated - begin)
        batch = recall_batch(config, range(EVALUATED_FROM + begin, EVALUATED_FROM + begin + num)).to(device)
        begun_s = time.perf_counter()
        logits = network(batch)
        right += int((logits.argmax(-1) == batch.answers).sum())
        forward_s.append((time.perf_counter() - begun_s) / num)
        loss += F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten(), reduction="sum").item()
    num_answers = config.num_evaluated * config.num_questions
    return {
        "accuracy": right / num_answers,
        "loss": loss / num_answers,
        "chance": 1 / config.num_values,
        "forward_s_per_sequence": statistics.median(forward_s),
    }


def _cost(config: RecallConfig, network: RecallNetwork, seconds: list[float]) -> dict[str, float]:
    states = [mixer.width(config.dim) for mixer in config.mixers if isinstance(mixer, PomMixer)]
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "state": max(states, default=0),
        "step_s": statistics.median(seconds[-_NUM_TIMED:]),
    }


def _save(path: Path, state: dict[str, Any]) -> None:
    with atomic_write(path) as stream:
        torch.save(state, stream)


def _restore(
    path: Path, config: RecallConfig, network: RecallNetwork, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[int, list[float]]:
    """Load the state of a training that was killed; return its number of steps and the seconds of the last ones."""
    if not path.exists():
        return 0, []
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if state["settings"] != config.model_dump(mode="json"):
        raise InputError(f"{path}: is the state of a training with other settings; delete it, or name another --out")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    say(f"continuing from step {state['step']:,}")
    return state["step"], state["seconds"]
