"""Text encoders of captions, and the conventions by which published pipelines use them.

Every default that depends on the network is a `Convention`, and stands in `CONVENTIONS` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from pomscale.config.section import GrownSection, NonNegativeInt

T5_MAX_LENGTH = 120
"""Tokens kept of a caption by sections of the name t5."""

CAPTION = "{}"
"""Mark of the caption in a template."""


@dataclass(frozen=True)
class Chat:
    """The tokenizer's own template, for one message of a user that is the caption."""

    arguments: dict[str, bool]
    """Arguments of `apply_chat_template`."""
    system: str = ""
    """Message of the system before it; '' = none."""

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages as `apply_chat_template` takes them, with the mark in the place of the caption."""
        if not self.system:
            return [{"role": "user", "content": CAPTION}]
        texts = {"system": self.system, "user": CAPTION}
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]


CHATS = {
    "chat": Chat({"add_generation_prompt": True, "enable_thinking": False}),
    "chat_thinking": Chat({"add_generation_prompt": True, "enable_thinking": True}),
    "chat_flux2": Chat(
        {"add_generation_prompt": False},
        # The line break is that of flux2.system_messages.
        system="You are an AI that reasons about image descriptions. You give structured responses focusing on object "
        "relationships, object\nattribution and actions without speculation.",
    ),
}
"""Templates that the tokenizer has itself."""

Output = Literal["tokens", "pooled"]
Clean = Literal["none", "html", "spaces", "lower"]
Padding = Literal["none", "masked", "seen"]
Side = Literal["right", "left"]
DropTokens = NonNegativeInt | Literal["prefix"]


@dataclass(frozen=True)
class Convention:
    """The way in which a pipeline of diffusers uses a text encoder; fields as in `TextEncoderConfig`."""

    pipeline: str
    """Module of diffusers.pipelines, and the function whose embeddings are equal."""
    model_types: tuple[str, ...]
    max_length: int
    output: Output = "tokens"
    layers: tuple[int, ...] = (-1,)
    template: str = ""
    drop_tokens: DropTokens = 0
    clean: Clean = "none"
    padding: Padding = "none"


_T5 = ("t5", "mt5")
_CLIP = ("clip_text_model", "clip")
_T5GEMMA = ("t5gemma", "t5_gemma_module")
_MISTRAL = ("mistral3", "mistral")
_QWEN_VL = ("qwen2_5_vl", "qwen2_5_vl_text")

# The instruction that Sana sets before a caption (pipeline_sana, `complex_human_instruction`), joined as there.
_SANA = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: {}",
    )
)
_LUMINA = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> {}"
)
_QWEN_IMAGE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_HUNYUAN_VIDEO = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)

CONVENTIONS: dict[str, Convention] = {
    "t5": Convention("pixart_alpha.pipeline_pixart_alpha encode_prompt, without its cleaning", _T5, T5_MAX_LENGTH),
    "flux_t5": Convention("flux.pipeline_flux _get_t5_prompt_embeds", _T5, 512, padding="seen"),
    "sd3_t5": Convention(
        "stable_diffusion_3.pipeline_stable_diffusion_3 _get_t5_prompt_embeds", _T5, 256, padding="seen"
    ),
    "cogvideox": Convention("cogvideo.pipeline_cogvideox _get_t5_prompt_embeds", _T5, 226, padding="seen"),
    "glyph": Convention(
        "hunyuan_video1_5.pipeline_hunyuan_video1_5 _get_byt5_prompt_embeds, of a prompt's one quoted text",
        _T5,
        256,
        template='Text "{}". ',
    ),
    "wan": Convention("wan.pipeline_wan _get_t5_prompt_embeds", ("umt5",), 512, clean="spaces"),
    "sdxl": Convention(
        "stable_diffusion_xl.pipeline_stable_diffusion_xl encode_prompt, and that of stable_diffusion_3",
        _CLIP,
        77,
        layers=(-2,),
        padding="seen",
    ),
    "sd": Convention("stable_diffusion.pipeline_stable_diffusion encode_prompt", _CLIP, 77, padding="seen"),
    "flux_clip": Convention(
        "flux.pipeline_flux _get_clip_prompt_embeds; pooled embeddings of SDXL and SD3", _CLIP, 77, output="pooled"
    ),
    "prx": Convention("prx.pipeline_prx encode_prompt with skip_text_cleaning", _T5GEMMA, 256, clean="html"),
    "sana": Convention(
        "sana.pipeline_sana encode_prompt", ("gemma2",), 300, template=_SANA, drop_tokens="prefix", clean="lower"
    ),
    "lumina2": Convention("lumina2.pipeline_lumina2 encode_prompt", ("gemma2",), 256, layers=(-2,), template=_LUMINA),
    "gemma": Convention(
        "none has it alone: the last hidden state, of pipeline_sana without its instruction",
        ("gemma2", "gemma3_text", "gemma3"),
        300,
    ),
    "flux2": Convention(
        "flux2.pipeline_flux2 encode_prompt",
        _MISTRAL,
        512,
        layers=(10, 20, 30),
        template="chat_flux2",
        padding="masked",
    ),
    "flux2_klein": Convention(
        "flux2.pipeline_flux2_klein encode_prompt",
        ("qwen3",),
        512,
        layers=(9, 18, 27),
        template="chat",
        padding="masked",
    ),
    "z_image": Convention(
        "z_image.pipeline_z_image encode_prompt", ("qwen3",), 512, layers=(-2,), template="chat_thinking"
    ),
    "qwen_image": Convention(
        "qwenimage.pipeline_qwenimage encode_prompt", _QWEN_VL, 1024, template=_QWEN_IMAGE, drop_tokens=34
    ),
    "hunyuan_video": Convention(
        "hunyuan_video.pipeline_hunyuan_video _get_llama_prompt_embeds",
        ("llama",),
        256,
        layers=(-3,),
        template=_HUNYUAN_VIDEO,
        drop_tokens=95,
    ),
}

# The convention of a kind of network whose section names none.
_OF_MODEL_TYPE = {
    **dict.fromkeys(_T5, "t5"),
    "umt5": "wan",
    **dict.fromkeys(_CLIP, "sdxl"),
    **dict.fromkeys(_T5GEMMA, "prx"),
    "gemma2": "sana",
    "gemma3_text": "gemma",
    "gemma3": "gemma",
    **dict.fromkeys(_MISTRAL, "flux2"),
    "qwen3": "flux2_klein",
    **dict.fromkeys(_QWEN_VL, "qwen_image"),
    "llama": "hunyuan_video",
}
MODEL_TYPES = tuple(_OF_MODEL_TYPE)
"""Values of `model_type` in a config.json that are text encoders."""


def _choice(description: str) -> Any:
    return Field(None, description=f"{description} null: as the convention says.")


class TextEncoderConfig(GrownSection):
    """A text encoder of transformers, from a local folder or a hub id. Embeddings are stored in float16."""

    _later: ClassVar[frozenset[str]] = frozenset(
        {
            "convention",
            "output",
            "layers",
            "final_norm",
            "template",
            "drop_tokens",
            "clean",
            "padding",
            "padding_side",
        }
    )

    name: Literal["t5", "text"] = Field(
        "t5",
        description="text: any text encoder, by a convention; t5: a T5 by the convention t5 with 120 tokens, as "
        "sections without a name always meant.",
    )
    path: str = Field("google/t5-v1_1-xxl", description="Local folder or hub id for from_pretrained.")
    subfolder: str = Field("", description="Folder inside `path` that holds the encoder's config.json.")
    tokenizer: Literal["pretrained", "bytes"] = Field(
        "pretrained", description="pretrained: the tokenizer beside the weights; bytes: ByT5's, needs no vocabulary."
    )
    max_length: PositiveInt | None = Field(
        None,
        description="Most tokens kept of a caption, the end token included, and those that are cut off a template not. "
        "null: as the convention says; 120 for name t5.",
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="Arithmetic of the encoder.")
    convention: str | None = Field(
        None,
        description=f"Pipeline whose embeddings these equal, with the defaults of all that follows: "
        f"{', '.join(CONVENTIONS)}. null: that of the network's model_type.",
    )
    output: Output | None = _choice("tokens: hidden states; pooled: the network's one vector, as one token.")
    layers: tuple[int, ...] | None = _choice(
        "Hidden states that are stacked on channels: 0 = the word embeddings, n = those after block n, -1 = the last.",
    )
    final_norm: bool | None = Field(
        None, description="Apply the network's last norm to the hidden states. null: to the last one alone."
    )
    template: str | None = _choice(
        "Text with {} where the caption goes; '' = the caption alone; chat, chat_thinking, chat_flux2 = the "
        "tokenizer's own, for one message of a user, chat_flux2 with FLUX.2's of the system before it.",
    )
    drop_tokens: DropTokens | None = _choice(
        "Tokens that are cut off the beginning; prefix = those of the template before the caption, but for the first "
        "and the last one.",
    )
    clean: Clean | None = _choice(
        "What is done to a caption: html = entities resolved, stripped; spaces = also its spaces joined; lower = in "
        "lower case, stripped."
    )
    padding: Padding | None = _choice(
        "Padding to max_length tokens. none: no stored token is padding; masked, seen: it is stored, and the network "
        "does not or does attend to it.",
    )
    padding_side: Side | None = Field(None, description="Side of stored padding. null: the tokenizer's own.")

    @model_validator(mode="before")
    @classmethod
    def _default_of_t5(cls, values: Any) -> Any:
        is_t5 = isinstance(values, dict) and values.get("name", "t5") == "t5"
        return {"max_length": T5_MAX_LENGTH, **values} if is_t5 else values

    @field_validator("convention")
    @classmethod
    def _known(cls, convention: str | None) -> str | None:
        if convention is not None and convention not in CONVENTIONS:
            raise ValueError(f"there is no convention {convention!r}; there are: {', '.join(CONVENTIONS)}")
        return convention

    @property
    def stored_length(self) -> int:
        """Longest embeddings of a caption, in tokens, of a section that leaves nothing to a convention."""
        assert self.max_length is not None
        return 1 if self.output == "pooled" else self.max_length

    @model_validator(mode="after")
    def _check(self) -> TextEncoderConfig:
        if self.name == "t5":
            given = sorted(name for name in self._later if getattr(self, name) is not None)
            if given:
                raise ValueError(f"{', '.join(given)}: for name t5 all is fixed; set name: text")
            if self.max_length is None:
                raise ValueError("max_length: give a number, or set name: text")
        if self.layers == ():
            raise ValueError("layers: give at least one, such as [-1]")
        if self.template and self.template not in CHATS and self.template.count(CAPTION) != 1:
            raise ValueError(f"template: write {CAPTION} once, where the caption goes")
        return self


def text_form(value: Any) -> Literal["one", "several"]:
    """Return the tag of a section of texts: that of one encoder, or of several in a list."""
    return "several" if isinstance(value, list | tuple) else "one"


MAX_ENCODERS = 4
"""Encoders side by side, at most."""

TextConfig = Annotated[
    Union[
        Annotated[TextEncoderConfig, Tag("one")],
        Annotated[tuple[TextEncoderConfig, ...], Field(min_length=1, max_length=MAX_ENCODERS), Tag("several")],
    ],
    Discriminator(text_form),
]


def text_encoders(text: TextEncoderConfig | tuple[TextEncoderConfig, ...] | None) -> tuple[TextEncoderConfig, ...]:
    """Return the encoders of a section of texts, in their order; () where there is none."""
    if text is None:
        return ()
    return (text,) if isinstance(text, TextEncoderConfig) else text


def resolved(config: TextEncoderConfig, model_type: str) -> TextEncoderConfig:
    """Return a section of name text with all that the convention of a network decides.

    Raises ValueError, which names the key, for a convention of another kind of network.
    """
    name = config.convention or _OF_MODEL_TYPE[model_type]
    convention = CONVENTIONS[name]
    if config.convention is not None and model_type not in convention.model_types:
        fitting = [other for other, one in CONVENTIONS.items() if model_type in one.model_types]
        raise ValueError(
            f"text.convention: {name} is for {' or '.join(convention.model_types)}, and this network is {model_type}; "
            f"take {' or '.join(fitting)}"
        )
    fields = ("max_length", "output", "layers", "template", "drop_tokens", "clean", "padding")
    values = {field: getattr(convention, field) for field in fields if getattr(config, field) is None}
    return config.model_copy(update={"name": "text", "convention": name, **values})
