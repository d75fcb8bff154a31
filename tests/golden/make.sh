#!/usr/bin/env bash
# Make the golden checkpoints again, each peer in an environment of its own: tests/golden/make.sh [FOLDER [NAME ...]]
# FOLDER (default: $TMPDIR or /tmp) takes the two environments, about 3 GB; existing ones are used as they are.
# Without names, every checkpoint is made; ar_*, arct_*, gptq_* and awq_* come from auto-round, lc_* from llm-compressor.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-${TMPDIR:-/tmp}}
shift || true
PYTHON=${PYTHON:-python3}
TORCH_INDEX_URL=${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu}
TORCH=${TORCH:-torch==2.13.0+cpu}
AUTOROUND=(auto-round==0.16.1 transformers==5.23.0 compressed-tensors==0.20.0)
LLMCOMPRESSOR=(llmcompressor==0.14.0.1 transformers==5.17.0 compressed-tensors==0.19.0 auto-round==0.15.1)

environment() { # environment NAME PACKAGE...
    local venv=$folder/$1
    shift
    if "$venv/bin/python" -m pip show --quiet "${1%%==*}" 2>/dev/null; then return; fi
    test -d "$venv" || "$PYTHON" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --no-deps ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "$TORCH"
    "$venv/bin/python" -m pip install --quiet "$@"
}

run() { # run NAME MAKER CHECKPOINT...
    CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} "$folder/$1/bin/python" "$here/$2" "${@:3}"
}

autoround=() llmcompressor=()
for name in "$@"; do
    case $name in
        lc_*) llmcompressor+=("$name") ;;
        *) autoround+=("$name") ;;
    esac
done
if [ $# -eq 0 ] || [ ${#autoround[@]} -gt 0 ]; then
    environment arvenv "${AUTOROUND[@]}"
    run arvenv make_autoround.py "${autoround[@]}"
fi
if [ $# -eq 0 ] || [ ${#llmcompressor[@]} -gt 0 ]; then
    environment llmcvenv "${LLMCOMPRESSOR[@]}"
    run llmcvenv make_llmcompressor.py "${llmcompressor[@]}"
fi
