"""The typed recipe: one YAML file is one experiment.

Every field is checked here, once; the rest of the house receives these frozen objects and trusts them.
Anything counted in samples ends in `_samples`; steps appear nowhere in a recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import (
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from pomscale.config.engine import (
    CheckpointConfig,
    ComputeConfig,
    DeepSpeedConfig,
    EmaConfig,
    FaultsConfig,
    Fsdp2Config,
    OptimizerConfig,
    ScheduleConfig,
)
from pomscale.config.evaluation import EvaluationConfig
from pomscale.config.model import ImageModelConfig, ModelConfig, VideoModelConfig
from pomscale.config.monitoring import MonitoringConfig, WandbConfig
from pomscale.config.names import SamplerName
from pomscale.config.section import Fraction, NonNegativeInt, PositiveFloat, Section, Seed


class PixelCodecConfig(Section):
    """Space-to-depth of the pixels themselves: no weights, exact decode."""

    name: Literal["pixel"]
    block: PositiveInt = Field(2, description="Pixels per side folded into channels.")
    channels: Literal[1, 3] = Field(3, description="1 = grey, 3 = RGB.")


class SdVaeCodecConfig(Section):
    """Stable Diffusion's AutoencoderKL, from a local folder or a hub id."""

    name: Literal["sd_vae"]
    path: str = Field("stabilityai/sd-vae-ft-ema", description="Local folder or hub id for from_pretrained.")
    store: Literal["moments", "sample"] = Field(
        "moments", description="moments = mean and log-variance stacked on channels; sample = one posterior draw."
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Arithmetic of the encoder.")


class CogVideoXVaeCodecConfig(Section):
    """CogVideoX's 3-D causal AutoencoderKL for clips, from a local folder or a hub id."""

    name: Literal["cogvideox_vae"]
    path: str = Field("THUDM/CogVideoX-5b", description="Local folder or hub id for from_pretrained.")
    subfolder: str = Field("vae", description="Folder inside `path` that holds config.json; '' = path itself.")
    store: Literal["moments", "sample"] = Field(
        "sample", description="sample = one posterior draw; moments = mean and log-variance, twice the bytes."
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="Arithmetic of the encoder.")
    tiling: bool = Field(False, description="Encode and decode in overlapping tiles: less memory, not the same bits.")


CodecConfig = Annotated[Union[PixelCodecConfig, SdVaeCodecConfig, CogVideoXVaeCodecConfig], Field(discriminator="name")]


class TextEncoderConfig(Section):
    """T5's encoder, from a local folder or a hub id. Embeddings are stored without padding, in float16."""

    name: Literal["t5"] = "t5"
    path: str = Field("google/t5-v1_1-xxl", description="Local folder or hub id for from_pretrained.")
    subfolder: str = Field("", description="Folder inside `path` that holds the encoder's config.json.")
    tokenizer: Literal["pretrained", "bytes"] = Field(
        "pretrained", description="pretrained: the tokenizer beside the weights; bytes: ByT5's, needs no vocabulary."
    )
    max_length: PositiveInt = Field(120, description="Most tokens kept of a caption, the end token included.")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="Arithmetic of the encoder.")


class MixtureComponentConfig(Section):
    """One dataset of a mixture."""

    path: str = Field(description="Folder or URL with manifest.json.")
    weight: PositiveFloat = Field(1.0, description="Share of the samples, relative to the other components.")
    text: str | None = Field(None, description="Companion set of text embeddings, joined by key.")


class CacheConfig(Section):
    """Whole shards kept on a disk of the node. Needed for datasets that lie behind a URL."""

    path: str = Field(description="Folder on this node's own disk; processes of the node share it.")
    max_gib: PositiveFloat = Field(100.0, description="Least recently used shards go when this is exceeded.")


class DataConfig(Section):
    """Which latents to train on and how to read them."""

    path: str | None = Field(
        None, description="Folder or URL with manifest.json, as written by `pomscale data encode`."
    )
    text: str | None = Field(None, description="Companion set of text embeddings for `path`, joined by key.")
    mixture: list[MixtureComponentConfig] = Field([], description="Several datasets instead of `path`.")
    normalization: Literal["codec", "dataset"] = Field(
        "codec", description="codec: the codec's scaling factor; dataset: the measured per-channel mean and std."
    )
    flip_probability: Fraction = Field(0.5, description="Chance of the flipped copy, where the dataset has one.")
    shuffle_window: PositiveInt = Field(
        65536, description="Records shuffled together; larger is more random, smaller reads more sequentially."
    )
    num_threads: PositiveInt = Field(2, description="Reader threads per process.")
    prefetch: PositiveInt = Field(
        4,
        description="Micro-batches kept ready per process; besides, each thread has up to min(4, prefetch) in hand.",
    )
    reading: Literal["mapped", "streamed"] = Field(
        "mapped", description="mapped: from disk or cache; streamed: shards pass through memory, for object stores."
    )
    cache: CacheConfig | None = Field(None, description="Node-local copies of shards.")
    bad_samples: Literal["raise", "skip"] = Field(
        "raise", description="A sample that cannot be read ends the run, or is counted, listed and given weight 0."
    )
    max_bad_samples: NonNegativeInt = Field(100, description="skip: a run with more of them ends with an error.")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.path is None) == (not self.mixture):
            raise ValueError("give either `path` or `mixture`")
        if self.text is not None and self.mixture:
            raise ValueError("text: belongs to `path`; a mixture names `text` per component")
        return self

    @property
    def components(self) -> list[MixtureComponentConfig]:
        """The datasets; `path` is a mixture of one."""
        if self.path is not None:
            return [MixtureComponentConfig(path=self.path, text=self.text)]
        return self.mixture


class TimeConfig(Section):
    """Distribution of t in [0, 1] (0 = data, 1 = noise)."""

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    per_frame_group: bool = Field(
        False, description="Clips: a t of its own for every frame group (diffusion forcing); needs block_causal."
    )
    mean: float = Field(0.0, description="logit_normal: mean of the normal.")
    std: PositiveFloat = Field(1.0, description="logit_normal: standard deviation of the normal.")


class DiffusionConfig(Section):
    objective: Literal["flow", "eps"] = Field("flow", description="flow: v = eps - x0; eps: predict the noise.")
    time: TimeConfig = TimeConfig()
    condition_dropout: Fraction = Field(
        0.1, description="Chance that a sample is trained without its class or text, for guidance."
    )
    max_start_group: NonNegativeInt = Field(
        0,
        description="Clips: each is told to begin at a random frame group from 0 to this, so that generation may go on "
        "to positions beyond the length of the clips.",
    )


class TrainingConfig(Section):
    total_samples: PositiveInt
    global_batch: PositiveInt = Field(description="Samples per optimiser step over all ranks; fixed for the run.")
    micro_batch: PositiveInt | None = Field(None, description="Most samples per rank and forward; null = no split.")


class SamplingConfig(Section):
    """How pictures and clips are drawn; also the defaults of `pomscale sample`."""

    every_samples: PositiveInt | None = Field(None, description="Draw some into the run folder; null = never.")
    num_classes: PositiveInt | None = Field(None, description="Classes in the grid, from class 0 on; null = up to 8.")
    prompts: list[Annotated[str, Field(min_length=1)]] = Field([], description="Clips: what they are to show.")
    text_path: str | None = Field(
        None, description="Clips: where the text encoder lies on this machine, if not where the captions were encoded."
    )
    num_each: PositiveInt = Field(4, description="Pictures of each class, clips of each prompt.")
    num_frames: PositiveInt | None = Field(
        None, description="Clips: latent frames; null = as many as model.latent_shape has."
    )
    sampler: SamplerName | None = Field(None, description="null follows the objective: euler for flow, ddim for eps.")
    num_steps: PositiveInt = 50
    guidance: float = Field(0.0, description="w in pred_c + w (pred_c - pred_u); 0 = off.")
    seed: Seed = 0


class ValidationConfig(Section):
    """Held-out loss by time bin, with noise fixed for the whole run."""

    path: str = Field(description="Dataset that is not trained on.")
    text: str | None = Field(None, description="Its companion set of text embeddings, joined by key.")
    every_samples: PositiveInt
    num_samples: PositiveInt = 1024
    num_time_bins: PositiveInt = 8
    batch: PositiveInt = 64
    seed: Seed = 0


class ProfileConfig(Section):
    """A profiler window: Chrome trace and memory snapshot in the run folder."""

    start_samples: NonNegativeInt
    num_steps: PositiveInt = 3


class InitFromConfig(Section):
    """Fine-tuning: the network is the same, but for the size of its latents and its classes."""

    path: str = Field(description="Run folder, checkpoint or exported folder.")
    weights: str = Field("ema", description="ema: the average that stands for the model; model: as last trained.")


class TrainRecipe(Section):
    """One training run."""

    kind: Literal["train"]
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$", description="Run folder: output/name.")
    output: str = Field("runs", description="Folder of run folders.")
    seed: Seed = 0
    resume: Literal["auto", "never"] = Field("auto", description="auto: go on from the last complete checkpoint.")
    codec: CodecConfig
    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    init_from: InitFromConfig | None = Field(None, description="Begin with the weights of a trained model.")
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
    evaluations: list[EvaluationConfig] = Field([], description="Jobs over checkpoints while training goes on.")
    profile: ProfileConfig | None = None
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="Dotted key -> values: `pomscale launch` starts one run per point of the grid."
    )

    @model_validator(mode="after")
    def _check(self) -> TrainRecipe:
        training, schedule = self.training, self.schedule
        if training.total_samples % training.global_batch:
            raise ValueError(
                f"training.total_samples: {training.total_samples} is not a multiple of "
                f"training.global_batch {training.global_batch}"
            )
        if schedule.warmup_samples + schedule.cooldown_samples > training.total_samples:
            raise ValueError("schedule: warmup_samples + cooldown_samples exceed training.total_samples")
        names = [evaluation.name for evaluation in self.evaluations]
        if len(set(names)) < len(names):
            raise ValueError("evaluations: two of them have the same name")
        if isinstance(self.model, VideoModelConfig):
            self._check_video(self.model)
        else:
            self._check_image(self.model)
        self._check_best()
        self._check_consistency()
        return self

    def _check_image(self, model: ImageModelConfig) -> None:
        if self.sampling.num_classes is not None and self.sampling.num_classes > model.num_classes:
            raise ValueError("sampling.num_classes: more than model.num_classes")
        for key, is_set in (
            ("sampling.prompts", self.sampling.prompts),
            ("sampling.num_frames", self.sampling.num_frames),
            ("sampling.text_path", self.sampling.text_path),
            ("diffusion.time.per_frame_group", self.diffusion.time.per_frame_group),
            ("diffusion.max_start_group", self.diffusion.max_start_group),
            ("data.text", self.data.text),
            *((f"data.mixture.{i}.text", component.text) for i, component in enumerate(self.data.mixture)),
            ("validation.text", self.validation and self.validation.text),
        ):
            if is_set:
                raise ValueError(f"{key}: is for clips, and model.kind is image")

    def _check_video(self, model: VideoModelConfig) -> None:
        if isinstance(self.codec, SdVaeCodecConfig):
            raise ValueError("codec.name: sd_vae makes latents of pictures, and model.kind is video")
        if self.diffusion.time.per_frame_group and model.temporal != "block_causal":
            raise ValueError("diffusion.time.per_frame_group: needs model.temporal: block_causal")
        sampling = self.sampling
        if sampling.num_classes is not None:
            raise ValueError("sampling.num_classes: is for pictures; for clips give sampling.prompts")
        if sampling.every_samples is not None and not sampling.prompts:
            raise ValueError("sampling.prompts: say what the clips are to show, or set sampling.every_samples: null")
        if sampling.num_frames is not None and sampling.num_frames % model.patch_frames:
            raise ValueError(
                f"sampling.num_frames: {sampling.num_frames} frames are not divisible by "
                f"model.patch_frames {model.patch_frames}"
            )

    def _check_best(self) -> None:
        if not self.checkpoint.keep_best:
            return
        if self.validation is None:
            raise ValueError("checkpoint.keep_best: nothing is measured to judge checkpoints by; add validation")
        bins = [f"validation/loss_bin_{index:02d}" for index in range(self.validation.num_time_bins)]
        if self.checkpoint.best_metric not in ("validation/loss", *bins):
            raise ValueError(
                f"checkpoint.best_metric: {self.checkpoint.best_metric!r} is not measured of a checkpoint; "
                f"use validation/loss or one of {bins[0]} to {bins[-1]}"
            )

    def _check_consistency(self) -> None:
        sharded = self.fsdp2.shard_size is None if self.engine == "fsdp2" else self.deepspeed.zero_stage == 3
        if self.faults.consistency_every_samples is not None and sharded:
            raise ValueError(
                "faults.consistency_every_samples: every parameter is on one rank only, so there are no replicas to "
                "compare; set fsdp2.shard_size, or deepspeed.zero_stage to 1 or 2, or leave it out"
            )


class ImageFolderConfig(Section):
    """A folder with one subfolder of pictures (PNG, JPEG, WebP) per class; classes in sorted order."""

    kind: Literal["image_folder"]
    path: str = Field(description="Local folder or fsspec URL.")


class VideoFolderConfig(Section):
    """A folder of clips (mp4, webm, mkv, mov, avi), at any depth."""

    kind: Literal["video_folder"]
    path: str = Field(description="Local folder or fsspec URL.")
    captions: bool = Field(False, description="Beside every clip lies NAME.txt with its caption.")


class TarSourceConfig(Section):
    """WebDataset tars of pictures or clips with their labels and captions, e.g. as img2dataset writes them."""

    kind: Literal["tars"]
    path: str | list[str] = Field(description="Local paths or fsspec URLs; wildcards and {000..012} are expanded.")
    label: str | None = Field(None, description="Member with the class id: cls, or json:FIELD.")
    caption: str | None = Field(None, description="Member with the caption: txt, or json:FIELD.")
    class_names: str | None = Field(None, description="Text file with one class name per line, in the order of ids.")


class TableSourceConfig(Section):
    """A Parquet, CSV or JSONL table: one row is one picture or clip, named by a path or held as bytes."""

    kind: Literal["table"]
    path: str | list[str] = Field(description="Local paths or fsspec URLs (.parquet, .csv, .jsonl); wildcards.")
    media: str | None = Field(
        None, description="Path of the file, relative to `root`, with columns in braces: '{page_dir}/{videoid}.mp4'."
    )
    bytes_column: str | None = Field(None, description="Parquet: column that holds the file itself.")
    root: str = Field("", description="Folder or URL that `media` is relative to; '' = as it stands.")
    key: str | None = Field(None, description="Column with a unique key; null = the row's number.")
    caption: str | None = Field(None, description="Column with the caption.")
    label: str | None = Field(None, description="Column with the class id.")
    class_names: str | None = Field(None, description="Text file with one class name per line, in the order of ids.")

    @model_validator(mode="after")
    def _check(self) -> TableSourceConfig:
        if self.media is not None and self.bytes_column is not None:
            raise ValueError("give `media` or `bytes_column`, not both")
        return self


class LatentsSourceConfig(Section):
    """The captions of an existing dataset: a companion set of text embeddings leaves its latents untouched."""

    kind: Literal["latents"]
    path: str = Field(description="Dataset whose records carry captions.")


SourceConfig = Annotated[
    Union[ImageFolderConfig, VideoFolderConfig, TarSourceConfig, TableSourceConfig, LatentsSourceConfig],
    Field(discriminator="kind"),
]


class ImageTransformConfig(Section):
    """From a picture to pixels: resize so that the target is just covered, cut its centre out."""

    kind: Literal["image"] = "image"
    size: PositiveInt | None = Field(None, description="Square pictures of this side, in pixels.")
    sizes: list[PositiveInt] = Field([], description="Several square sizes in one pass: datasets OUTPUT/SIZE.")
    buckets: list[tuple[PositiveInt, PositiveInt]] = Field(
        [], description="(height, width) in pixels; a picture goes to the nearest aspect ratio."
    )
    filter: Literal["lanczos", "area"] = "lanczos"
    flip: bool = Field(False, description="Also store the latent of the horizontally flipped picture.")

    @model_validator(mode="after")
    def _check(self) -> ImageTransformConfig:
        if sum([self.size is not None, bool(self.sizes), bool(self.buckets)]) != 1:
            raise ValueError("give exactly one of `size`, `sizes`, `buckets`")
        for name in ("sizes", "buckets"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name}: a value is there twice")
        return self

    @property
    def targets(self) -> list[tuple[int, ...]]:
        """(height, width) in pixels that a picture may get, without `sizes`: those are datasets of their own."""
        return [(self.size, self.size)] if self.size is not None else list(self.buckets)


class VideoTransformConfig(Section):
    """From a clip to frames: resample in time from its start, resize to cover the target, cut the centre out."""

    kind: Literal["video"]
    fps: PositiveFloat = Field(16.0, description="Frames per second after resampling.")
    buckets: list[tuple[PositiveInt, PositiveInt, PositiveInt]] = Field(
        [(80, 240, 384)],
        min_length=1,
        description="(frames, height, width); a clip goes to the longest it can fill, then the nearest aspect ratio.",
    )
    filter: Literal["lanczos", "area"] = "area"
    flip: bool = Field(False, description="Also store the latent of the horizontally flipped clip.")

    @field_validator("buckets")
    @classmethod
    def _distinct(cls, buckets: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        if len(set(buckets)) != len(buckets):
            raise ValueError("a bucket is there twice")
        return buckets

    @property
    def targets(self) -> list[tuple[int, ...]]:
        """(frames, height, width) that a clip may get."""
        return list(self.buckets)


def kind(value: Any) -> str:
    """Which transform is meant; named like its key, since errors name it."""
    return value.get("kind", "image") if isinstance(value, dict) else getattr(value, "kind", "image")


TransformConfig = Annotated[
    Union[
        Annotated[ImageTransformConfig, Tag("image")],
        Annotated[VideoTransformConfig, Tag("video")],
    ],
    Discriminator(kind),
]


class EncodeRecipe(Section):
    """One dataset of latents, of text embeddings, or of both in the same shards."""

    kind: Literal["encode"]
    name: str = Field(min_length=1)
    output: str = Field(description="Folder that receives shards and manifest.json.")
    seed: Seed = Field(0, description="Deals items to shards; and posterior draws (store: sample).")
    source: SourceConfig
    codec: CodecConfig | None = Field(None, description="null: no latents, text embeddings only.")
    transform: TransformConfig | None = Field(None, description="How media become the codec's pixels.")
    text: TextEncoderConfig | None = Field(None, description="Also store embeddings of the captions.")
    shard_samples: PositiveInt = Field(4096, description="Items per shard.")
    batch: PositiveInt = Field(64, description="Items per encoder call.")
    num_workers: PositiveInt = Field(2, description="Threads that decode pictures and clips.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_skipped: NonNegativeInt = Field(
        0, description="Up to so many items that cannot be encoded, exit code 0 instead of 3; they are listed anyway."
    )
    wandb: WandbConfig = WandbConfig(mode="disabled")

    @model_validator(mode="after")
    def _check(self) -> EncodeRecipe:
        if (self.codec is None) != (self.transform is None):
            raise ValueError("codec, transform: give both, or neither for a set of text embeddings only")
        if self.codec is None and self.text is None:
            raise ValueError("codec, text: give at least one of them, or there is nothing to encode")
        if isinstance(self.codec, SdVaeCodecConfig) and self.transform is not None and self.transform.kind != "image":
            raise ValueError("codec.name: sd_vae takes a transform of kind image")
        if self.codec is not None and not _has_media(self.source):
            raise ValueError(f"codec: a source of kind {self.source.kind} without files has captions only")
        if self.text is not None and not has_captions(self.source):
            raise ValueError("text: the source has no captions; set source.caption (or source.captions)")
        return self


def _has_media(source: SourceConfig) -> bool:
    if isinstance(source, TableSourceConfig):
        return source.media is not None or source.bytes_column is not None
    return not isinstance(source, LatentsSourceConfig)


def has_captions(source: SourceConfig) -> bool:
    """Whether every item of the source has to have a caption."""
    if isinstance(source, ImageFolderConfig):
        return False
    if isinstance(source, VideoFolderConfig):
        return source.captions
    return isinstance(source, LatentsSourceConfig) or source.caption is not None
