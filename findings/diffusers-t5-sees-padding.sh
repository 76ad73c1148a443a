#!/usr/bin/env bash
# diffusers 0.42.1 (transformers 5.23.0, torch 2.13.0): the pipelines of FLUX.1, Stable Diffusion 3 and CogVideoX call T5 without
# an attention mask, so that it attends to the padding; the embeddings of a prompt's own tokens depend on
# max_sequence_length. The pipelines of PixArt and Wan pass the mask, and theirs do not depend on it.
#
# Padding of T5 is token 0, with an embedding like any other, and relative positions have no end. So the same prompt at 512
# tokens, FLUX.1's default, and at 256 is another condition already in its first token, and embeddings that were computed
# ahead with one length, or without padding, are not those that a model was trained on with the other. Nothing warns, and
# the argument is documented as a length to cut at.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q numpy==2.4.6 diffusers==0.42.1 transformers==5.23.0 sentencepiece==0.2.3
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python - <<'PYTHON'
import sys

import diffusers
import tokenizers
import torch
import transformers

torch.manual_seed(0)
words = ["<pad>", "</s>", "<unk>", "a", "red", "dog", "runs"]
backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
)
backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
)
sizes = dict(vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
t5 = transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
umt5 = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).eval()
with torch.no_grad():
    for parameter in [*t5.parameters(), *umt5.parameters()]:
        parameter.normal_(std=0.3)

flux = diffusers.FluxPipeline(
    scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=t5, tokenizer_2=tokenizer, transformer=None
)
cogvideox = diffusers.CogVideoXPipeline.__new__(diffusers.CogVideoXPipeline)
diffusers.DiffusionPipeline.__init__(cogvideox)
cogvideox.register_modules(tokenizer=tokenizer, text_encoder=t5)
wan = diffusers.WanPipeline(tokenizer=tokenizer, text_encoder=umt5, vae=None, scheduler=None, transformer=None)

prompt, own = "a red dog runs", 5  # with the end token
found = {}
for name, pipeline in (("FLUX.1", flux), ("CogVideoX", cogvideox), ("Wan", wan)):
    with torch.no_grad():
        short, long = (
            pipeline._get_t5_prompt_embeds(prompt, max_sequence_length=length, device="cpu", dtype=torch.float32)[0, :own]
            for length in (16, 64)
        )
    found[name] = ((short - long).abs().max() / long.abs().max()).item()
print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}: the {own} tokens of {prompt!r}")
for name, difference in found.items():
    print(f"  {name:10} at 16 and at 64 tokens they differ by {difference:.1e} of the largest value")
as_found = found["FLUX.1"] > 1e-2 and found["CogVideoX"] > 1e-2 and found["Wan"] < 1e-5
print("as found" if as_found else "CHANGED: they depend on the length, or do not, as they did not, or did")
sys.exit(0 if as_found else 1)
PYTHON
