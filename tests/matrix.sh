#!/usr/bin/env bash
# Runs the layer tests of the plugin against several releases of vLLM, on the CPU and without a GPU.
#
#   tests/matrix.sh [VERSION ...]      default: 0.26.0 0.30.0 0.33.0
#
# tests/format is not among them: it has no vLLM, and `make test` runs it with the same torch and compressed-tensors.
#
# Prints one line per version, and the whole log of a version that failed; exits 1 if any failed.
#
# vLLM comes from its source distribution, built with VLLM_TARGET_DEVICE=empty: Python only, in seconds. Its layers,
# weight loaders and configs are the real ones; there is no platform, so LLM() does not work.
#
# Everything lives in .matrix/ and is used again by the next run (remove the folder to start afresh):
#   deps/      virtual environment with torch and what vLLM imports, shared by all versions (about 2 GB)
#   wheels/    the wheels of vLLM
#   VERSION/   virtual environment with that vLLM and this project, on top of deps/
#
# Environment: PYTHON (default python3, 3.11 or newer); TORCH_INDEX_URL, an additional package index that has CPU builds
# of torch (https://download.pytorch.org/whl/cpu), without it torch comes from where pip looks anyway; PARALLEL, how
# pytest-xdist spreads the tests (default: one worker a core).
set -euo pipefail
cd "$(dirname "$0")/.."

# vLLM 0.26 pins torch 2.11, 0.30 pins 2.13, 0.33 pins 2.14. Found: the layers of all three import and pass under 2.13.
TORCH=torch==2.13.0
# What these layers import, of vLLM's long list. Ranges that suit every version here: 0.26 to 0.33 pin
# compressed-tensors 0.17.0, 0.33 wants transformers 5.16.1 to 5.20.
IMPORTED=(
    "transformers>=5.16.1,<5.21" "huggingface-hub>=1.31" numpy packaging regex pydantic psutil cbor2 pyzmq urllib3
    aiohttp requests oss-harmony openai pillow pybase64 cachetools msgspec cloudpickle uvloop py-cpuinfo
    prometheus_client xgrammar fastapi partial_json_parser llguidance einops loguru safetensors
)
BUILD=("setuptools>=78.1.1,<81" setuptools-scm setuptools-rust cmake ninja jinja2 wheel)
TEST=("pytest>=8" "pytest-xdist>=3.7" "hypothesis>=6")

versions=("$@")
[ $# -gt 0 ] || versions=(0.26.0 0.30.0 0.33.0)

matrix=$PWD/.matrix
deps=$matrix/deps
mkdir -p "$matrix/wheels"
echo '*' >"$matrix/.gitignore"

make_deps() {
    [ -x "$deps/bin/pip" ] || "${PYTHON:-python3}" -m venv --clear "$deps"
    local pip=("$deps/bin/python" -m pip --disable-pip-version-check)
    # torch first and with its index, so that nothing below brings another build of it.
    "${pip[@]}" install -q --no-deps "$TORCH" ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"}
    "${pip[@]}" install -q "$TORCH" "${IMPORTED[@]}" "${BUILD[@]}" "${TEST[@]}"
    "${pip[@]}" install -q --no-deps compressed-tensors==0.17.0
    # Builds for another torch break the import of transformers ("operator torchvision::nms does not exist").
    "${pip[@]}" uninstall -q -y torchvision torchaudio 2>/dev/null
    touch "$deps/ready"
}

make_wheel() { # VERSION
    VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$1 "$deps/bin/python" -m pip --disable-pip-version-check wheel -q \
        --no-deps --no-binary vllm --no-build-isolation --wheel-dir "$matrix/wheels" "vllm==$1"
}

make_environment() { # VERSION
    local venv=$matrix/$1
    if [ ! -e "$venv/vllm" ]; then
        rm -rf "$venv"
        "$deps/bin/python" -m venv --without-pip "$venv"
        local site='import sysconfig; print(sysconfig.get_path("purelib"))'
        "$deps/bin/python" -c "$site" >"$("$venv/bin/python" -c "$site")/deps.pth"
        "$deps/bin/python" -m pip --python "$venv" install -q --no-deps "$matrix/wheels/vllm-$1-"*.whl
        touch "$venv/vllm"
    fi
    if [ ! "$venv/project" -nt pyproject.toml ]; then # its entry points are what the tests look for
        "$deps/bin/python" -m pip --python "$venv" install -q --no-deps --no-build-isolation --editable .
        touch "$venv/project"
    fi
}

run_version() { # VERSION
    compgen -G "$matrix/wheels/vllm-$1-*.whl" >/dev/null || make_wheel "$1"
    make_environment "$1"
    "$matrix/$1/bin/python" -m pytest tests/plugin -q -p no:cacheprovider ${PARALLEL:--n logical}
}

# Runs a command with its output in a log, which is shown if it fails; sets `status` and succeeds. It must not be part of
# a condition (`logged ... || ...`), because that turns `set -e` off inside of the command.
logged() { # LOG COMMAND...
    local log=$1
    shift
    set +e
    (set -e; "$@") >"$log" 2>&1
    status=$?
    set -e
    if [ $status -ne 0 ]; then cat "$log"; fi
}

if [ ! "$deps/ready" -nt tests/matrix.sh ]; then # the lists above
    logged "$matrix/deps.log" make_deps
    [ $status -eq 0 ] || exit 1
fi

failed=0
for version in "${versions[@]}"; do
    logged "$matrix/$version.log" run_version "$version"
    verdict=ok
    if [ $status -ne 0 ]; then verdict=FAILED failed=1; fi
    # Not the last line: pytest's workers may log after it.
    echo "vLLM $version: $verdict, $(grep -E ' in [0-9.]+s' "$matrix/$version.log" | tail -n 1)"
done
exit $failed
