#!/usr/bin/env bash
# torch 2.13.0, torchrun: an option of the script that abbreviates several of torchrun's own is refused.
#
# Usage: torchrun [options] SCRIPT [options of the script]. What stands behind SCRIPT goes to the script as it is: --num-samples,
# --help and even --nnodes do. But `torchrun script.py --num 5` ends with "ambiguous option: --num could match --numa-binding,
# --numa_binding", and --log, --max or --master likewise: every option of several words is there twice, with - and _, so that
# its abbreviations are always ambiguous. argparse compares all words with the options before it knows which belong to SCRIPT;
# only a word -- before SCRIPT stops it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q numpy==2.4.6
cd "$work"
echo 'import sys; print("script got", *sys.argv[1:])' >script.py
failed=0
# expect TEXT WORD..: torchrun with the words says the text.
expect() {
    local text=$1 said
    shift
    said=$(venv/bin/torchrun --nproc-per-node=1 "$@" 2>&1 | tail -1) || true  # refused: exit code 2
    echo "torchrun --nproc-per-node=1 $*: $said"
    [[ $said == *"$text"* ]] || failed=1
}
expect "script got --num-samples 5" script.py --num-samples 5
expect "script got --nnodes 5" script.py --nnodes 5
expect "ambiguous option: --num could match --numa-binding, --numa_binding" script.py --num 5
expect "ambiguous option: --max could match --max-restarts, --max_restarts" script.py --max 5
expect "script got --num 5" -- script.py --num 5
[[ $failed == 0 ]] && echo "as found" || echo "CHANGED: torchrun leaves the options of the script alone, or says something else"
exit "$failed"
