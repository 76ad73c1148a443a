"""The parts of a training recipe for engine, optimiser, schedule, averages, checkpoints and faults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from pomscale.config.section import NonNegativeInt, PositiveFloat, Section

AdamBeta = Annotated[float, Field(ge=0.0, lt=1.0)]
# A power function is wider than any other at gamma = 0, where sigma_rel is 12^(-1/2) (EDM2, appendix C).
EmaWidth = Annotated[float, Field(gt=0.0, lt=12**-0.5)]
ActivationCheckpointing = Annotated[str, Field(pattern=r"^(none|full|selective|every-[1-9][0-9]*)$")]


class MuonConfig(Section):
    """Muon, as torch.optim.Muon has it with adjust_lr_fn="match_rms_adamw"."""

    momentum: AdamBeta = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = Field(5, description="Newton-Schulz iterations per matrix.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Arithmetic of the iterations, and what is sent for them."
    )


class OptimizerConfig(Section):
    """AdamW, or Muon for the weights of the blocks' linear maps and AdamW for all other parameters.

    AdamW does not decay biases, embeddings and coefficients. lr and weight_decay serve for both: Muon's steps are
    scaled to the root mean square of AdamW's.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 1e-4
    betas: tuple[AdamBeta, AdamBeta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    grad_clip: PositiveFloat | None = Field(1.0, description="Largest global gradient norm; null = no clipping.")
    moments: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Precision of AdamW's two moments and Muon's one; bf16 (stochastically rounded) saves 4 or 2 bytes "
        "per parameter.",
    )
    muon: MuonConfig = MuonConfig()

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.name != "muon" and self.muon != MuonConfig():
            raise ValueError(f"muon: is for name: muon, and name is {self.name}; leave it out, or change name")
        return self


class ScheduleConfig(Section):
    """Learning rate over samples: linear warm-up, constant, then lr (1 - sqrt(u)) to zero."""

    warmup_samples: NonNegativeInt = 0
    cooldown_samples: NonNegativeInt = 0


class ComputeConfig(Section):
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16: bf16 compute, fp32 master and reduction.")
    activation_checkpointing: ActivationCheckpointing = Field(
        "none",
        description="full: recompute every block in the backward pass; every-N: every N-th block, from the first; "
        "selective: keep what matrix products give, recompute the rest.",
    )
    mixer_memory: Literal["fast", "lean"] = Field(
        "fast",
        description="Kept by a PoM mixer for the backward pass. fast: expanded tokens and gates; lean: its input, "
        "from which it computes these again (1.2 times the mixer's matrix products).",
    )
    compile: bool = Field(False, description="torch.compile each block.")
    float8: bool = Field(False, description="Blocks' linear maps in float8 (torchao; H100 and newer).")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = cuda where there is one.")


class MeshConfig(Section):
    """Layout of the ranks beyond the engine's own."""

    sp: PositiveInt = Field(
        1,
        description="Sequence parallelism: ranks next to each other that share the tokens of every sample, so that "
        "activations are divided by so many. Needs PoM in all mixers; divides the number of ranks.",
    )


class Fsdp2Config(Section):
    """PyTorch's fully sharded data parallelism."""

    shard_size: PositiveInt | None = Field(
        None,
        description="HSDP: ranks that share one copy of the model, e.g. those of a node; null = all ranks share one.",
    )
    reshard_after_forward: bool = Field(
        True, description="Free a block's gathered weights between forward and backward: less memory, more traffic."
    )
    prefetch: NonNegativeInt = Field(1, description="Blocks whose weights are gathered ahead of the one that computes.")
    cpu_offload: bool = Field(False, description="Parameters, gradients and optimiser state rest in host memory.")


class DeepSpeedConfig(Section):
    """DeepSpeed's ZeRO."""

    zero_stage: Literal[1, 2, 3] = Field(2, description="Sharded: 1 optimiser, 2 and gradients, 3 and parameters.")
    offload_optimizer: bool = Field(False, description="Optimiser state and its step in host memory.")
    offload_parameters: bool = Field(False, description="Parameters rest in host memory; stage 3.")

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedConfig:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters: needs zero_stage 3; below, every rank holds all parameters")
        return self


class PostHocEmaConfig(Section):
    """Averages with power-function profiles, snapshots of which give any other profile afterwards (EDM2, section 3)."""

    widths: list[EmaWidth] = Field([0.05, 0.1], min_length=2, description="sigma_rel of each average.")
    every_samples: PositiveInt = Field(description="Keep a snapshot of the averages this often.")


class EmaConfig(Section):
    """Exponential moving averages of the weights; their lengths are half-lives in samples (EDM2, appendix C)."""

    halflives_samples: list[PositiveInt] = Field(
        [500_000], min_length=1, description="One average each; the first is validated, sampled and exported."
    )
    rampup_ratio: PositiveFloat | None = Field(
        0.05, description="A half-life is at most this share of the samples seen; null = no warm-up."
    )
    post_hoc: PostHocEmaConfig | None = Field(None, description="For `pomscale ema`: choose the length afterwards.")

    @field_validator("halflives_samples")
    @classmethod
    def _distinct(cls, halflives: list[int]) -> list[int]:
        if len(set(halflives)) != len(halflives):
            raise ValueError("a half-life is there twice")
        return halflives

    @model_validator(mode="after")
    def _named_apart(self) -> EmaConfig:
        if len(set(self.averages)) != len(self.averages):
            raise ValueError("post_hoc.widths: a width is there twice")
        return self

    @property
    def averages(self) -> list[str]:
        """Names of all averages that training keeps, that of `main` first."""
        powers = [] if self.post_hoc is None else [f"power-{width:g}" for width in self.post_hoc.widths]
        return [f"halflife-{halflife}" for halflife in self.halflives_samples] + powers

    @property
    def main(self) -> str:
        """Name of the average that stands for the model: it is validated, sampled and exported."""
        return self.averages[0]


class CheckpointConfig(Section):
    every_samples: PositiveInt
    keep_last: PositiveInt = 2
    keep_every_samples: PositiveInt | None = Field(
        None, description="Keep forever the first one at or after each multiple."
    )
    keep_best: NonNegativeInt = Field(0, description="Keep this many with the lowest `best_metric`.")
    best_metric: str = Field("validation/loss", description="Metric at a checkpoint's samples that ranks it.")
    asynchronous: bool = Field(True, description="Write beside training.")


class LossSpikeConfig(Section):
    """Rule by which a loss far above those before it sends a run back to the last checkpoint, past this data."""

    z_score: PositiveFloat = Field(10.0, description="Robust: distance from the median in 1.4826 MAD.")
    num_steps: Annotated[int, Field(ge=16)] = Field(128, description="Steps that the median is taken over.")


class FaultsConfig(Section):
    """Reactions of a run to faults."""

    max_non_finite: PositiveInt = Field(
        3, description="Steps in a row whose loss or gradient is not finite, each left out, before going back."
    )
    loss_spike: LossSpikeConfig | None = None
    max_rollbacks: NonNegativeInt = Field(3, description="Returns to the last checkpoint before the run gives up.")
    hang_timeout_s: PositiveFloat | None = Field(
        600.0, description="Without a step for so long: stacks of all ranks, then abort. null = never."
    )
    slow_hang_timeout_s: PositiveFloat = Field(
        3600.0, description="The same for what may be slow: start-up, compilation, validation, sampling."
    )
    consistency_every_samples: PositiveInt | None = Field(
        None, description="Compare the parameters of replicas bit by bit this often."
    )
    preflight: bool = Field(True, description="Before training, time every rank's matmul, all-reduce and disk.")
