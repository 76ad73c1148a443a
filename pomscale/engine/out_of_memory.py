"""Explanation of running out of memory: the request, the resident memory, and the changes that help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch

from pomscale.base.errors import PomscaleError
from pomscale.config.train import TrainRecipe

_GIB = 2**30
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


@contextmanager
def explained_out_of_memory(
    recipe: TrainRecipe, device: torch.device, resident_bytes: Callable[[], Mapping[str, int]]
) -> Iterator[None]:
    """Turn running out of memory within the block, on GPU or host, into a PomscaleError that says what to change.

    `resident_bytes` (see Engine) is called when that happens.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _explanation(error, recipe, device, resident_bytes()) from error
    except RuntimeError as error:
        if _CPU_ALLOCATOR not in str(error):
            raise
        raise _explanation(error, recipe, device, resident_bytes()) from error


def _explanation(
    error: BaseException, recipe: TrainRecipe, device: torch.device, resident: Mapping[str, int]
) -> PomscaleError:
    parts = ", ".join(f"{part} {num_bytes / _GIB:.2f} GiB" for part, num_bytes in resident.items())
    return PomscaleError(
        f"out of memory: {_asked(error)}. Resident: {parts or 'no model yet'}; {_usage(device)}. "
        f"What to change, cheapest first: {'; '.join(remedies(recipe))}"
    )


def _asked(error: BaseException) -> str:
    """Return the allocator's sentence on the request, from a message that may fill a screen."""
    text = str(error) or type(error).__name__
    if _CPU_ALLOCATOR in text:
        return text[text.index(_CPU_ALLOCATOR) :].splitlines()[0].rstrip(".")
    return text.splitlines()[0].split(". GPU ")[0].rstrip(".")


def _usage(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_allocated(device) / _GIB
        return (
            f"on the GPU {torch.cuda.memory_allocated(device) / _GIB:.2f} GiB allocated (peak {peak:.2f}), "
            f"{torch.cuda.memory_reserved(device) / _GIB:.2f} reserved, {free / _GIB:.2f} of {total / _GIB:.2f} free"
        )
    process, host = psutil.Process().memory_info(), psutil.virtual_memory()
    return f"this process {process.rss / _GIB:.2f} GiB, on the host {host.available / _GIB:.2f} GiB free"


def remedies(recipe: TrainRecipe) -> list[str]:
    """Return changes to the recipe that save memory and are not made yet, those that cost least speed first."""
    training, micro_batch = recipe.training, recipe.training.micro_batch
    is_packed, micro_tokens = training.global_tokens is not None, training.micro_tokens
    stronger = {"none": "selective|full", "full": ""}.get(recipe.compute.activation_checkpointing, "full")
    fsdp2, deepspeed = (recipe.fsdp2, None) if recipe.engine == "fsdp2" else (None, recipe.deepspeed)
    changes = (
        (is_packed and micro_tokens is None, "training.micro_tokens=... (now a rank's whole share at once)"),
        (micro_tokens is not None, f"training.micro_tokens={(micro_tokens or 0) // 2}"),
        (not is_packed and micro_batch is None, "training.micro_batch=1|2|4|... (now a rank's whole batch at once)"),
        (micro_batch is not None and micro_batch > 1, f"training.micro_batch={(micro_batch or 0) // 2}"),
        (stronger, f"compute.activation_checkpointing={stronger}"),
        (fsdp2 and fsdp2.shard_size is not None, "fsdp2.shard_size=null"),
        (fsdp2 and not fsdp2.reshard_after_forward, "fsdp2.reshard_after_forward=true"),
        (deepspeed and deepspeed.zero_stage < 3, "deepspeed.zero_stage=3"),
        (recipe.optimizer.moments == "fp32", "optimizer.moments=bf16"),
        (fsdp2 and not fsdp2.cpu_offload, "fsdp2.cpu_offload=true"),
        (deepspeed and not deepspeed.offload_optimizer, "deepspeed.offload_optimizer=true"),
        (True, "more GPUs (pomscale plan tells how many)"),
    )
    return [change for is_due, change in changes if is_due]
