#!/usr/bin/env bash
# Reads exported checkpoints with the formats' own readers, each in an environment of its own.
#
#   tests/exporters.sh [PYTEST OPTION ...]
#
# Makes the environments where they are not there yet, then runs the tests that need them; without this script those
# tests are skipped. Everything lives in .readers/ (remove the folder to start afresh; about 6 GB with CUDA's torch):
#   transformers/   transformers with compressed-tensors that packs densely, auto-round, GPTQModel (GPTQ and AWQ)
#   llamacpp/       llama.cpp, built from source: needs a C++ compiler and cmake, and takes minutes
#
# Environment: PYTHON (default python3, 3.11 or newer); READERS, another folder than .readers/; TORCH_INDEX_URL, an
# additional package index that has CPU builds of torch 2.14.1 or newer, which GPTQModel wants.
set -euo pipefail
cd "$(dirname "$0")/.."

export READERS=${READERS:-$PWD/.readers}
# Found: transformers 5.23.0 loads no compressed-tensors checkpoint with zero points, llm-compressor's neither.
TRANSFORMERS=(transformers==5.20.2 compressed-tensors==0.20.0 auto-round==0.16.1 gptqmodel==7.7.0 optimum==2.3.0)
LLAMACPP=(llama-cpp-python==0.3.36)

environment() { # environment NAME PACKAGE...
    local venv=$READERS/$1
    shift
    local stamp="${CMAKE_ARGS:-} $*"
    if [ "$(cat "$venv/made" 2>/dev/null)" = "$stamp" ]; then return; fi
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "$@"
    echo "$stamp" >"$venv/made"
}

mkdir -p "$READERS"
if [ "$READERS" = "$PWD/.readers" ]; then echo '*' >"$READERS/.gitignore"; fi
environment transformers setuptools wheel "${TRANSFORMERS[@]}"
# Not for this very processor: some virtual machines tell of instructions that they do not let programs use. Nor from
# pip's cache, which may have it from before.
CMAKE_ARGS=-DGGML_NATIVE=OFF environment llamacpp --no-cache-dir "${LLAMACPP[@]}"
"${VENV:-.venv}/bin/python" -m pytest tests/calibrate/test_readers.py "$@"
