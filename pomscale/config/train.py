"""Recipes of kind `train`: one YAML file is one training run.

Every field is checked here, once; all other packages receive these frozen objects and trust them. Anything counted in
samples ends in `_samples`; steps appear nowhere in a recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pomscale.config.codecs import CodecConfig, Uint8CodecConfig
from pomscale.config.data import DataConfig
from pomscale.config.engine import (
    CheckpointConfig,
    ComputeConfig,
    DeepSpeedConfig,
    EmaConfig,
    FaultsConfig,
    Fsdp2Config,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from pomscale.config.evaluation import EvaluationConfig
from pomscale.config.model import ImageModelConfig, ModelConfig, VideoModelConfig
from pomscale.config.monitoring import MonitoringConfig
from pomscale.config.sampling import SamplingConfig
from pomscale.config.section import FolderName, Fraction, GrownSection, NonNegativeInt, PositiveFloat, Section, Seed

DEFAULT_CLAMP, DEFAULT_NOISE_SCALE = 0.05, 1.0
"""Clamp and noise scale of objective x where none is given, as in JiT (Li & He 2025, arXiv 2511.13720)."""


class TimeConfig(Section):
    """Distribution of t in [0, 1] (0 = data, 1 = noise)."""

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    per_frame_group: bool = Field(
        False, description="Clips: a t of its own for every frame group (diffusion forcing); needs block_causal."
    )
    mean: float = Field(
        0.0, description="logit_normal: mean of the normal; JiT's -0.8, which counts from noise to data, is 0.8 here."
    )
    std: PositiveFloat = Field(1.0, description="logit_normal: standard deviation of the normal.")
    shift_base_tokens: PositiveInt | None = Field(
        None,
        description="flow, x: tokens n0 of samples whose times stay as they are drawn: with n tokens t becomes "
        "s t / (1 + (s - 1) t), s = sqrt(n / n0) (Stable Diffusion 3), in training, and when sampling on no other "
        "grid; null = no shift.",
    )


class AlignmentLossConfig(Section):
    """Loss that draws hidden states towards a teacher's features: - cosine, by token (REPA, arXiv 2410.06940)."""

    weight: PositiveFloat = Field(0.5, description="Factor of the alignment loss beside the diffusion loss.")
    until_samples: PositiveInt | None = Field(
        None, description="Global position from which on samples are trained without it; null = all of them have it."
    )


class DiffusionConfig(GrownSection):
    _later = frozenset({"alignment"})

    objective: Literal["flow", "eps", "x"] = Field(
        "flow",
        description="flow: predict v = eps - x0; eps: predict the noise; x: predict x0, with the loss in v (JiT).",
    )
    clamp: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description=f"x: least t that v = (x_t - x0) / t is divided by, in the loss and in samplers that follow v; "
        f"{DEFAULT_CLAMP} by default.",
    )
    noise_scale: PositiveFloat | None = Field(
        None,
        description=f"x: standard deviation of the noise, {DEFAULT_NOISE_SCALE:g} by default; JiT's is 2 for pictures "
        "of 512 pixels.",
    )
    time: TimeConfig = TimeConfig()
    condition_dropout: Fraction = Field(
        0.1, description="Chance that a sample is trained without its class or text, for guidance."
    )
    max_start_group: NonNegativeInt = Field(
        0,
        description="Clips: each is given a random first frame group from 0 to this, so that generation may continue "
        "to positions beyond the length of the clips.",
    )

    alignment: AlignmentLossConfig | None = Field(
        None, description="Alignment loss; needs model.alignment and data.features; null = none."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_for_x(cls, values: Any) -> Any:
        # Filled in rather than defaults, so that recipes of the other objectives have nothing of them.
        if not isinstance(values, dict) or values.get("objective") != "x":
            return values
        defaults = {"clamp": DEFAULT_CLAMP, "noise_scale": DEFAULT_NOISE_SCALE}
        return {**values, **{key: value for key, value in defaults.items() if values.get(key) is None}}

    @model_validator(mode="after")
    def _check(self) -> DiffusionConfig:
        for key, value in (("clamp", self.clamp), ("noise_scale", self.noise_scale)):
            if value is not None and self.objective != "x":
                raise ValueError(f"{key}: is for objective x, and this is {self.objective}")
        if self.time.shift_base_tokens is not None and self.objective == "eps":
            raise ValueError("time.shift_base_tokens: is for objectives flow and x, and this is eps")
        return self

    @property
    def loss_space(self) -> str:
        """What training measures its loss of; losses of two spaces cannot be compared."""
        match self.objective:
            case "flow":
                return "v"
            case "eps":
                return "eps"
            case "x":
                return f"v of x, clamp {self.clamp:g}, noise scale {self.noise_scale:g}"


class TrainingConfig(GrownSection):
    """Length of a run and size of its steps: so many samples of one shape, or packed samples of any shapes."""

    _later = frozenset({"global_tokens", "micro_tokens"})

    total_samples: PositiveInt = Field(
        description="Samples that the optimiser sees; the last step of a packed run is cut there."
    )
    global_batch: PositiveInt | None = Field(
        None, description="Samples per optimiser step over all ranks, all of one shape; fixed for the run."
    )
    micro_batch: PositiveInt | None = Field(None, description="Most samples per rank and forward; null = no split.")
    global_tokens: PositiveInt | None = Field(
        None,
        description="Instead of global_batch: most tokens per optimiser step over all ranks; samples of any shapes are "
        "packed without padding. Fixed for the run.",
    )
    micro_tokens: PositiveInt | None = Field(
        None, description="Packed: most tokens per rank and forward; null = no split."
    )

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if (self.global_batch is None) == (self.global_tokens is None):
            raise ValueError(
                "global_batch: give either global_batch, samples of one shape per step, or global_tokens, a budget for "
                "packed samples of any shapes"
            )
        if self.global_batch is not None and self.micro_tokens is not None:
            raise ValueError("micro_tokens: is for packed steps (global_tokens); use micro_batch")
        if self.global_tokens is not None and self.micro_batch is not None:
            raise ValueError("micro_batch: is for steps of global_batch samples; use micro_tokens with global_tokens")
        return self

    @property
    def order_batch(self) -> int:
        """Samples at a time that the order of the samples gives one shape: a global batch, or one packed sample."""
        return 1 if self.global_batch is None else self.global_batch


class ValidationConfig(Section):
    """Held-out loss by time bin, and in v for every objective, with noise fixed for the whole run."""

    path: str = Field(description="Dataset that is not trained on.")
    text: str | None = Field(None, description="Its companion set of text embeddings, joined by key.")
    every_samples: PositiveInt
    num_samples: PositiveInt = 1024
    num_time_bins: PositiveInt = 8
    batch: PositiveInt = 64
    seed: Seed = 0


class ProfileConfig(Section):
    """Window of the profiler, which leaves a Chrome trace and a memory snapshot in the run folder."""

    start_samples: NonNegativeInt
    num_steps: PositiveInt = 3


class InitFromConfig(Section):
    """Initial weights for fine-tuning; the network is the same, except for the size of its latents and its classes."""

    path: str = Field(description="Run folder, checkpoint or exported folder.")
    weights: str = Field("ema", description="ema: the average that stands for the model; model: as last trained.")


class TrainRecipe(Section):
    """One training run."""

    kind: Literal["train"]
    name: FolderName = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$", description="Run folder: output/name.")
    output: str = Field("runs", description="Folder of run folders.")
    seed: Seed = 0
    resume: Literal["auto", "never"] = Field("auto", description="auto: continue from the last complete checkpoint.")
    codec: CodecConfig
    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    init_from: InitFromConfig | None = Field(None, description="Trained model whose weights the run begins with.")
    mesh: MeshConfig = MeshConfig()
    engine: Literal["fsdp2", "deepspeed"] = "fsdp2"
    fsdp2: Fsdp2Config = Fsdp2Config()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    compute: ComputeConfig = ComputeConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig
    faults: FaultsConfig = FaultsConfig()
    validation: ValidationConfig | None = None
    sampling: SamplingConfig = SamplingConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    evaluations: list[EvaluationConfig] = Field([], description="Jobs that evaluate checkpoints beside training.")
    profile: ProfileConfig | None = None
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="Dotted key -> values: `pomscale launch` starts one run per point of the grid."
    )

    @model_validator(mode="after")
    def _check(self) -> TrainRecipe:
        training, schedule = self.training, self.schedule
        if training.global_batch is not None and training.total_samples % training.global_batch:
            raise ValueError(
                f"training.total_samples: {training.total_samples} is not a multiple of "
                f"training.global_batch {training.global_batch}"
            )
        if schedule.warmup_samples + schedule.cooldown_samples > training.total_samples:
            raise ValueError("schedule: warmup_samples + cooldown_samples exceed training.total_samples")
        names = [evaluation.name for evaluation in self.evaluations]
        if len(set(names)) < len(names):
            raise ValueError("evaluations: two of them have the same name")
        try:
            self.sampling.check_objective(self.diffusion.objective)
        except ValueError as error:
            raise ValueError(f"sampling.{error}") from error
        if isinstance(self.model, VideoModelConfig):
            self._check_video(self.model)
        else:
            self._check_image(self.model)
        if self.model.text_dim is not None:
            self._check_texts()
        self._check_mesh()
        self._check_alignment()
        self._check_packing()
        self._check_best()
        self._check_consistency()
        return self

    def _check_image(self, model: ImageModelConfig) -> None:
        for key, is_set in (
            ("sampling.num_frames", self.sampling.num_frames),
            ("diffusion.time.per_frame_group", self.diffusion.time.per_frame_group),
            ("diffusion.max_start_group", self.diffusion.max_start_group),
        ):
            if is_set:
                raise ValueError(f"{key}: is for clips, and model.kind is image")
        if model.num_classes is not None:
            self._check_classes(model.num_classes)

    def _check_classes(self, num_classes: int) -> None:
        if self.sampling.num_classes is not None and self.sampling.num_classes > num_classes:
            raise ValueError("sampling.num_classes: more than model.num_classes")
        for key, is_set in (
            ("sampling.prompts", self.sampling.prompts),
            ("sampling.text_path", self.sampling.text_path),
            ("data.text", self.data.text),
            *((f"data.mixture.{i}.text", component.text) for i, component in enumerate(self.data.mixture)),
            ("validation.text", self.validation and self.validation.text),
        ):
            if is_set:
                raise ValueError(
                    f"{key}: is for models of texts, and this one is of classes (model.num_classes); for pictures of a "
                    "text give model.text_dim instead"
                )

    def _check_texts(self) -> None:
        if self.sampling.num_classes is not None:
            raise ValueError("sampling.num_classes: is for models of classes; for texts give sampling.prompts")
        if self.sampling.every_samples is not None and not self.sampling.prompts:
            what = "clips" if isinstance(self.model, VideoModelConfig) else "pictures"
            raise ValueError(f"sampling.prompts: say what the {what} are to show, or set sampling.every_samples: null")

    def _check_video(self, model: VideoModelConfig) -> None:
        if isinstance(self.codec, Uint8CodecConfig):
            raise ValueError(f"codec.name: {self.codec.name} makes latents of pictures, and model.kind is video")
        if self.diffusion.time.per_frame_group and model.temporal != "block_causal":
            raise ValueError("diffusion.time.per_frame_group: needs model.temporal: block_causal")
        sampling = self.sampling
        if sampling.num_frames is not None and sampling.num_frames % model.patch_frames:
            raise ValueError(
                f"sampling.num_frames: {sampling.num_frames} frames are not divisible by "
                f"model.patch_frames {model.patch_frames}"
            )

    def _check_mesh(self) -> None:
        if self.mesh.sp == 1:
            return
        if self.mesh.sp > self.model.num_tokens:
            raise ValueError(
                f"mesh.sp: {self.mesh.sp} ranks cannot share the {self.model.num_tokens} tokens of a sample; "
                f"use at most {self.model.num_tokens}"
            )
        if any(mixer.kind == "attention" for mixer in self.model.mixers):
            raise ValueError(
                "mesh.sp: attention reads all tokens, which ranks cannot share; use PoM in all blocks, or mesh.sp: 1"
            )
        if self.model.in_context is not None:
            raise ValueError(
                "mesh.sp: tokens in context lie before those of the picture, which ranks share; set "
                "model.in_context: null, or mesh.sp: 1"
            )

    def _check_alignment(self) -> None:
        parts = {
            "model.alignment": self.model.alignment is not None,
            "diffusion.alignment": self.diffusion.alignment is not None,
            "data.features": any(component.features is not None for component in self.data.components),
        }
        given = [key for key, is_given in parts.items() if is_given]
        missing = [key for key in parts if key not in given]
        if given and missing:
            raise ValueError(
                f"{given[0]}: the alignment loss needs {', '.join(parts)}; give {' and '.join(missing)} too, or leave "
                "out all of them"
            )
        if given and self.mesh.sp > 1:
            raise ValueError("mesh.sp: the alignment loss needs all tokens of a sample on one rank; use mesh.sp: 1")

    def _check_packing(self) -> None:
        if self.training.global_tokens is None:
            return
        for key, is_set, remedy in (
            ("mesh.sp", self.mesh.sp > 1, "packed samples are not split over ranks; use mesh.sp: 1"),
            ("compute.compile", self.compute.compile, "packed steps have other shapes each time; use compile: false"),
            ("model.alignment", self.model.alignment, "packed steps have no alignment loss; leave it out"),
            (
                "deepspeed.zero_stage",
                self.engine == "deepspeed" and self.deepspeed.zero_stage == 3,
                "stage 3 hangs on packed steps of several ranks; use stage 2 or engine: fsdp2",
            ),
            (
                "model.dropout",
                self.model.dropout is not None
                and isinstance(self.model, ImageModelConfig)
                and self.model.text == "in_context"
                and self.model.text_dim is not None,
                "its mask is by the place of a token, which the padding of a text in context moves; use text: cross",
            ),
        ):
            if is_set:
                raise ValueError(f"{key}: {remedy}, or training.global_batch instead of global_tokens")

    @property
    def samples_per_step(self) -> int:
        """Samples of a step; of a packed one, as many of `model.latent_shape` as fit."""
        training = self.training
        if training.global_batch is not None:
            return training.global_batch
        assert training.global_tokens is not None
        return max(training.global_tokens // self.model.num_tokens, 1)

    def _check_best(self) -> None:
        if not self.checkpoint.keep_best:
            return
        if self.validation is None:
            raise ValueError("checkpoint.keep_best: nothing is measured to choose checkpoints by; add validation")
        bins = [f"validation/loss_bin_{index:02d}" for index in range(self.validation.num_time_bins)]
        if self.checkpoint.best_metric not in ("validation/loss", "validation/v_loss", *bins):
            raise ValueError(
                f"checkpoint.best_metric: {self.checkpoint.best_metric!r} is not measured of a checkpoint; "
                f"use validation/loss, validation/v_loss or one of {bins[0]} to {bins[-1]}"
            )

    def _check_consistency(self) -> None:
        sharded = self.fsdp2.shard_size is None if self.engine == "fsdp2" else self.deepspeed.zero_stage == 3
        if self.faults.consistency_every_samples is not None and sharded:
            raise ValueError(
                "faults.consistency_every_samples: every parameter is on one rank only, so there are no replicas to "
                "compare; set fsdp2.shard_size, or deepspeed.zero_stage to 1 or 2, or leave it out"
            )
