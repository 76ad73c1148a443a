#!/usr/bin/env bash
# transformers 5.23.0: the text "</s>" is the end token, for ByT5 and for T5 from spiece.model.
#
# A caption "</s>" has the tokens of an empty one, and "a</s>b" ends in the middle. sentencepiece itself, asked with the
# same model, takes "</s>" for text. `split_special_tokens=True` makes text of it for ByT5, and does not for T5.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 sentencepiece==0.2.3 protobuf==7.36.2
cd "$work"
mkdir t5
venv/bin/python -W ignore - <<'PYTHON' 2>/dev/null
import io
import sys

import sentencepiece
import transformers

lines = ["the quick brown fox jumps over the lazy dog", "<s> or </s> is markup"] * 50
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=model, vocab_size=60, hard_vocab_limit=False,
    pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
)
with open("t5/spiece.model", "wb") as file:
    file.write(model.getvalue())
pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode("</s>")
t5, byt5 = transformers.T5Tokenizer.from_pretrained("t5"), transformers.ByT5Tokenizer()
end = t5.eos_token_id
empty = [tokenizer("").input_ids for tokenizer in (t5, byt5)]
told = [tokenizer("</s>").input_ids for tokenizer in (t5, byt5)]
split = [tokenizer("</s>", split_special_tokens=True).input_ids for tokenizer in (t5, byt5)]
print(f"transformers {transformers.__version__}, sentencepiece {sentencepiece.__version__}: tokens of '</s>' as text")
print(f"  sentencepiece with the same model  {pieces}")
for name, *found in zip(("T5 from spiece.model", "ByT5"), empty, told, split):
    print(f"  {name:34} {found[1]}; of an empty text {found[0]}; with split_special_tokens=True {found[2]}")
as_found = (
    end not in pieces
    and all(set(tokens) == {end} for tokens in (*told, *empty))
    and end in split[0][:-1]
    and end not in split[1][:-1]
)
print("as found" if as_found else "CHANGED: '</s>' in a text is no longer taken for the end token in this way")
sys.exit(0 if as_found else 1)
PYTHON
