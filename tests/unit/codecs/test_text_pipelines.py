"""Embeddings beside those of the pipelines of diffusers whose conventions they follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pomscale.codecs import TextEncoder, build_text_encoder
from pomscale.config.text import CONVENTIONS, TextEncoderConfig
from support.tiny_models import save_sentencepiece, save_t5
from support.tiny_text_encoders import (
    save_clip_text,
    save_clip_tokenizer,
    save_gemma,
    save_llama,
    save_mistral3,
    save_qwen3,
    save_qwen_vl,
    save_t5gemma,
    save_umt5,
)

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CAPTIONS = [
    "a red dog",
    "",
    "A very old horse walks over the river &amp; the hill,  then {sleeps}",
    "\n naïve 馬 ",
    "a small cat flies over the lazy fox " * 12,
]

Embedded = tuple[torch.Tensor, torch.Tensor]
"""Embeddings (b n dim), and which of them the pipeline uses (b n)."""


def text_encoder(path: Path, **fields: object) -> TextEncoder:
    settings = {"name": "text", "path": str(path), "precision": "fp32"}
    return build_text_encoder(TextEncoderConfig.model_validate(settings | fields))


def whole(embeddings: torch.Tensor) -> Embedded:
    return embeddings, torch.ones(embeddings.shape[:2])


def t5_of(module: str, pipeline: str, encoder: str, **options: Any) -> Callable[[Path], Embedded]:
    """Call `_get_t5_prompt_embeds` of a pipeline, with the encoder under its name there."""

    def embed(folder: Path) -> Embedded:
        number = encoder.removeprefix("text_encoder")
        parts = {
            encoder: transformers.T5EncoderModel.from_pretrained(folder),
            f"tokenizer{number}": transformers.AutoTokenizer.from_pretrained(folder),
            "text_encoder": transformers.T5EncoderModel.from_pretrained(folder),
            "tokenizer_max_length": 77,
            "_execution_device": torch.device("cpu"),
        }
        of_pipeline = getattr(diffusers, pipeline)
        return whole(of_pipeline._get_t5_prompt_embeds(SimpleNamespace(**parts), list(CAPTIONS), **options))

    return embed


def of_pixart(folder: Path) -> Embedded:
    pipeline = diffusers.PixArtAlphaPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        text_encoder=transformers.T5EncoderModel.from_pretrained(folder),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    embeddings, mask, _, _ = pipeline.encode_prompt(
        list(CAPTIONS), do_classifier_free_guidance=False, max_sequence_length=120
    )
    return embeddings, mask


def of_glyph(folder: Path) -> Embedded:
    """ByT5, which embeds the quoted parts of a prompt."""
    parts = transformers.ByT5Tokenizer(), transformers.T5EncoderModel.from_pretrained(folder)
    quoted = [f'"{caption}"' for caption in BYTES]
    return diffusers.HunyuanVideo15Pipeline._get_byt5_prompt_embeds(*parts, quoted, torch.device("cpu"))


def of_wan(folder: Path) -> Embedded:
    pipeline = diffusers.WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(folder),
        vae=None,
        scheduler=None,
    )
    embeddings, _ = pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False, max_sequence_length=512)
    return embeddings, (embeddings != 0).any(-1)


def clip_of(folder: Path, projected: bool) -> tuple[Any, Any]:
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return transformers.CLIPTokenizer.from_pretrained(folder), getattr(transformers, name).from_pretrained(folder)


def of_sd(folder: Path) -> Embedded:
    tokenizer, encoder = clip_of(folder, projected=False)
    pipeline = diffusers.StableDiffusionPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=None, unet=None, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return whole(pipeline.encode_prompt(list(CAPTIONS), "cpu", 1, do_classifier_free_guidance=False)[0])


def of_sdxl(folder: Path) -> tuple[torch.Tensor, ...]:
    tokenizer, encoder = clip_of(folder, projected=True)
    pipeline = diffusers.StableDiffusionXLPipeline(
        tokenizer=None, text_encoder=None, tokenizer_2=tokenizer, text_encoder_2=encoder, vae=None, unet=None,
        scheduler=None, add_watermarker=False,
    )  # fmt: skip
    prompts = [caption or " " for caption in CAPTIONS]  # it takes no empty prompt_2 for a prompt
    found = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    return found[0], found[2]


def of_flux_clip(folder: Path) -> Embedded:
    tokenizer, encoder = clip_of(folder, projected=False)
    parts = SimpleNamespace(
        tokenizer=tokenizer, text_encoder=encoder, tokenizer_max_length=77, _execution_device=torch.device("cpu")
    )
    return whole(diffusers.FluxPipeline._get_clip_prompt_embeds(parts, list(CAPTIONS))[:, None])


def of_prx(folder: Path) -> Embedded:
    from diffusers.pipelines.prx import pipeline_prx  # noqa: PLC0415

    # Without ftfy, which mends texts that were read in a wrong encoding, the pipeline has no cleaning at all.
    pipeline_prx.ftfy = getattr(pipeline_prx, "ftfy", None) or SimpleNamespace(fix_text=str)
    text = transformers.models.t5gemma.modeling_t5gemma.T5GemmaEncoder.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pipeline = diffusers.PRXPipeline(transformer=None, scheduler=None, text_encoder=text, tokenizer=tokenizer)
    found = pipeline.encode_prompt(
        list(CAPTIONS),
        torch.device("cpu"),
        do_classifier_free_guidance=False,
        skip_text_cleaning=True,
        tokenizer_max_length=256,
    )
    return found[0], found[1]


def of_sana(folder: Path, instructed: bool = True) -> Embedded:
    import inspect  # noqa: PLC0415

    call = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    pipeline = diffusers.SanaPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        text_encoder=transformers.AutoModel.from_pretrained(folder),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    embeddings, mask, _, _ = pipeline.encode_prompt(
        list(CAPTIONS),
        do_classifier_free_guidance=False,
        complex_human_instruction=call["complex_human_instruction"].default if instructed else None,
    )
    return embeddings, mask


def of_lumina(folder: Path) -> Embedded:
    pipeline = diffusers.Lumina2Pipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        text_encoder=transformers.AutoModel.from_pretrained(folder),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    pipeline.tokenizer.padding_side = "right"
    embeddings, mask, _, _ = pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    return embeddings, mask


def qwen3_of(folder: Path) -> dict[str, Any]:
    return {
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder),
        "text_encoder": transformers.Qwen3ForCausalLM.from_pretrained(folder),
    }


def of_flux2(folder: Path) -> Embedded:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.Mistral3ForConditionalGeneration.from_pretrained(folder)
    return whole(diffusers.Flux2Pipeline._get_mistral_3_small_prompt_embeds(network, tokenizer, list(CAPTIONS)))


def of_klein(folder: Path) -> Embedded:
    pipeline = diffusers.Flux2KleinPipeline(**qwen3_of(folder), vae=None, transformer=None, scheduler=None)
    return whole(pipeline.encode_prompt(list(CAPTIONS), text_encoder_out_layers=(9, 18, 27))[0])


def of_z_image(folder: Path) -> Embedded:
    pipeline = diffusers.ZImagePipeline(**qwen3_of(folder), vae=None, transformer=None, scheduler=None)
    found, _ = pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    padded = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < torch.tensor([len(one) for one in found])[:, None]


def of_qwen_image(folder: Path) -> Embedded:
    pipeline = diffusers.QwenImagePipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    return pipeline.encode_prompt(list(CAPTIONS))


def of_hunyuan(folder: Path) -> Embedded:
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video  # noqa: PLC0415

    parts = SimpleNamespace(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        text_encoder=transformers.LlamaModel.from_pretrained(folder),
        _execution_device=torch.device("cpu"),
    )
    return diffusers.HunyuanVideoPipeline._get_llama_prompt_embeds(
        parts, list(CAPTIONS), pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE
    )


BYTES = ["sale", "x", "50 % off 馬", "y" * 300]


def save_small_t5(folder: Path) -> Path:
    return save_sentencepiece(save_t5(folder, seed=0, vocab_size=128))


def save_small_umt5(folder: Path) -> Path:
    """As the hub has it, with a tokenizer.json: transformers converts no sentencepiece model for it."""
    learnt = save_sentencepiece(folder / "learnt")
    transformers.T5Tokenizer.from_pretrained(learnt).save_pretrained(folder)
    return save_umt5(folder, 0)


def save_small_clip(folder: Path) -> Path:
    return save_clip_tokenizer(save_clip_text(folder, seed=0, projected=False))


T5, CLIP = save_small_t5, save_small_clip
CASES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Embedded]]] = {
    "t5": (T5, of_pixart),
    "flux_t5": (T5, t5_of("flux", "FluxPipeline", "text_encoder_2", max_sequence_length=512)),
    "sd3_t5": (T5, t5_of("stable_diffusion_3", "StableDiffusion3Pipeline", "text_encoder_3", max_sequence_length=256)),
    "cogvideox": (T5, t5_of("cogvideo", "CogVideoXPipeline", "text_encoder")),
    "wan": (save_small_umt5, of_wan),
    "sd": (CLIP, of_sd),
    "flux_clip": (CLIP, of_flux_clip),
    "prx": (lambda folder: save_t5gemma(folder, 0), of_prx),
    "sana": (lambda folder: save_gemma(folder, 0), of_sana),
    "lumina2": (lambda folder: save_gemma(folder, 0), of_lumina),
    "gemma": (lambda folder: save_gemma(folder, 0, number=3), lambda folder: of_sana(folder, instructed=False)),
    "flux2": (lambda folder: save_mistral3(folder, 0, blocks=31), of_flux2),
    "flux2_klein": (lambda folder: save_qwen3(folder, 0, blocks=28), of_klein),
    "z_image": (lambda folder: save_qwen3(folder, 0), of_z_image),
    "qwen_image": (lambda folder: save_qwen_vl(folder, 0), of_qwen_image),
    "hunyuan_video": (lambda folder: save_llama(folder, 0), of_hunyuan),
}
LOWER = {"t5", "gemma"}  # pipelines that lower the case, where the convention does not


@pytest.mark.parametrize("convention", CASES)
def test_embeddings_are_those_of_the_pipeline(tmp_path: Path, convention: str) -> None:
    save, of_pipeline = CASES[convention]
    folder = save(tmp_path)
    fields = {"clean": "lower"} if convention in LOWER else {}
    encoder = text_encoder(folder, convention=convention, **fields)
    with torch.no_grad():
        embeddings, mask = of_pipeline(folder)
    mask = torch.ones(embeddings.shape[:2]) if mask is None else mask
    for caption, ours, theirs, used in zip(CAPTIONS, encoder.encode(CAPTIONS), embeddings, mask, strict=True):
        expected = theirs[used.bool()].numpy()
        assert ours.shape == expected.shape, caption
        np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=1e-4, err_msg=caption)
        assert np.isfinite(ours).all()
        assert len(ours) <= encoder.max_length
        (alone,) = encoder.encode([caption])
        np.testing.assert_allclose(alone, ours, atol=2e-5, rtol=1e-4)


def test_sdxl_and_sd3(tmp_path: Path) -> None:
    """Penultimate hidden states and projected pooled vectors; padding has a token of its own."""
    folder = save_clip_tokenizer(save_clip_text(tmp_path, 0, projected=True), pad="!")
    with torch.no_grad():
        tokens, pooled = of_sdxl(folder)
    captions = [caption or " " for caption in CAPTIONS]
    ours = np.stack(text_encoder(folder).encode(captions))
    np.testing.assert_allclose(ours, tokens.numpy(), atol=2e-5)
    encoder = text_encoder(folder, output="pooled")
    assert (encoder.dim, encoder.max_length) == (12, 1)
    np.testing.assert_allclose(np.concatenate(encoder.encode(captions)), pooled.numpy(), atol=2e-5)

    parts = SimpleNamespace(tokenizer_max_length=77, _execution_device=torch.device("cpu"))
    parts.tokenizer = parts.tokenizer_2 = transformers.CLIPTokenizer.from_pretrained(folder)
    parts.text_encoder = parts.text_encoder_2 = transformers.CLIPTextModelWithProjection.from_pretrained(folder)
    with torch.no_grad():
        tokens, pooled = diffusers.StableDiffusion3Pipeline._get_clip_prompt_embeds(parts, CAPTIONS)
    np.testing.assert_allclose(np.stack(text_encoder(folder).encode(CAPTIONS)), tokens.numpy(), atol=2e-5)
    np.testing.assert_allclose(np.concatenate(encoder.encode(CAPTIONS)), pooled.numpy(), atol=2e-5)


def test_quoted_bytes(tmp_path: Path) -> None:
    """ByT5 of HunyuanVideo 1.5, whose pipeline sets every quoted text into a sentence of its own."""
    folder = save_t5(tmp_path, seed=0)
    encoder = text_encoder(folder, convention="glyph", tokenizer="bytes")
    with torch.no_grad():
        embeddings, mask = of_glyph(folder)
    for ours, theirs, used in zip(encoder.encode(BYTES), embeddings, mask, strict=True):
        np.testing.assert_allclose(ours, theirs[used.bool()].numpy(), atol=2e-5)


def test_every_convention_is_compared() -> None:
    assert set(CONVENTIONS) == {*CASES, "sdxl", "glyph"}
