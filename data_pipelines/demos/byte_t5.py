"""Write a text encoder that needs no download: a small T5 over bytes, with random weights that a seed fixes.

    python -m data_pipelines.demos.byte_t5 data/byte-t5

The network is not trained. Yet every caption gets embeddings of its own, and captions that share words get similar
ones, which is enough for datasets of few words such as the moving digits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import pomscale.codecs  # noqa: F401  (keeps what transformers imports quiet)
from pomscale.base.errors import InputError, PomscaleError

_SEED = 0
_NUM_TOKENS = 384  # of transformers' ByT5Tokenizer: 256 bytes, and its special tokens


def write_byte_t5(folder: Path, dim: int = 64) -> None:
    """Write config.json and model.safetensors, the same on every call, for `text: {path: FOLDER, tokenizer: bytes}`.

    Raises InputError if transformers is not installed.
    """
    try:
        import transformers  # noqa: PLC0415  an extra
        from transformers import T5Config, T5EncoderModel  # noqa: PLC0415
    except (ImportError, RuntimeError) as error:  # RuntimeError: it is there, but something that it imports is not
        raise InputError(f"text needs the package transformers: {error}. Run: pip install -e '.[text]'") from error
    transformers.logging.disable_progress_bar()
    config = T5Config(
        vocab_size=_NUM_TOKENS,
        d_model=dim,
        d_kv=16,
        d_ff=2 * dim,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        network = T5EncoderModel(config)
    network.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that receives config.json and model.safetensors")
    parser.add_argument("--dim", type=int, default=64, help="width of the embeddings (default 64)")
    arguments = parser.parse_args()
    try:
        write_byte_t5(arguments.out, arguments.dim)
    except (PomscaleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, PomscaleError) else 1
    print(f"{arguments.out}: a byte-level T5 encoder, {arguments.dim} wide, random weights of seed {_SEED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
