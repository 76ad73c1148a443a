#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer makes up a tokenizer for a folder that has none, and every text becomes unknown tokens.
#
# A folder with a config.json alone, as an encoder of diffusers' pipelines has it (their tokenizer lies in a folder of its
# own), is a valid argument of AutoTokenizer.from_pretrained. It neither raises nor warns: it returns a tokenizer of the
# architecture's class with the special tokens and little else. Of a CLIP folder it has 2 tokens; two texts of as many
# letters have the same ids. Of a GPT-2 or Qwen2 folder it has 1, and a text has no id at all. Of a UMT5 folder it raises.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 sentencepiece==0.2.1
cd "$work"
cat >made_up.py <<'PYTHON'
import json
import logging
import sys
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoTokenizer

TEXTS = ("a red car", "a big dog")
FOUND = {
    "clip": (2, [[0, 2, 2, 2, 2, 2, 2, 2, 2]] * 2),
    "bert": (5, [[2, 1, 1, 1, 3]] * 2),
    "gpt2": (1, [[], []]),
    "qwen2": (1, [[], []]),
}
records = []
handler = logging.Handler()
handler.emit = records.append
transformers.logging.add_handler(handler)

seen = {}
for name in FOUND:
    AutoConfig.for_model(name).save_pretrained(name)
    assert [file.name for file in Path(name).iterdir()] == ["config.json"]
    tokenizer = AutoTokenizer.from_pretrained(name)
    seen[name] = (len(tokenizer), [tokenizer(text).input_ids for text in TEXTS])
    print(f"transformers {transformers.__version__}: {name}: {type(tokenizer).__name__} of {len(tokenizer)} tokens;", seen[name][1])
print(f"warnings: {len(records)}")
as_found = json.dumps(seen) == json.dumps(FOUND) and not records
print("as found" if as_found else "CHANGED: such folders are refused, warned of, or have other tokens now")
sys.exit(0 if as_found else 1)
PYTHON
venv/bin/python made_up.py
