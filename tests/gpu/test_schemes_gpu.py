"""Every scheme family in real vLLM on a GPU, against transformers on the weights that the checkpoint stands for.

The truth is float32, with the activations quantized if the kernel does so. The budget is twice the error of the same
model in bfloat16 that rounds what the kernel is known to round besides (see `_emulate`). Errors are those of all tokens
but the worst hundredth: at 3 bits the log-probability of one token in 1,670 moves by anything from .01 to .3 with the
draw of bfloat16's rounding (150 draws, each tensor rounded under a random factor), and a mean of squares is then that
token's; a kernel that is wrong moves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from demo.problems import as_text, generate
from tests.checkpoints import EMBEDDING, HEAD, linear_layers, write_rtn_checkpoint
from tests.conftest import DEMO_MODEL
from tests.gpu.scores import scores_of
from vllm_autoround.format.grids import E4M3
from vllm_autoround.format.manifest import KVCache, Manifest
from vllm_autoround.format.reader import dequantized_state_dict, quantized_layers, read_manifest, read_tensors
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Float8, Integer, QuantizedWeight

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

HEAD_DIM = 64
DEVICE = "cuda"
UNIFORM = [
    *(f"W{bits}A16G64" for bits in (2, 3, 4, 5, 8)),
    *(f"W{bits}A16_ASYMG64" for bits in (2, 3, 4, 8)),
    *("W4A8_FP8", "FP8", "FP8_STATIC", "FP8_DYNAMIC", "FP8_BLOCK"),
    *("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16"),
]
MIXED = {  # one scheme a projection: every fused module is mixed, one shard is not quantized
    "q_proj": "W4A16G64",
    "v_proj": "W8A16G64",
    "o_proj": "FP8_DYNAMIC",
    "gate_proj": "W3A16_ASYMG64",
    "up_proj": "NVFP4A16",
    "down_proj": "FP8_STATIC",
}


@dataclass(frozen=True)
class Case:
    """A checkpoint, and how vLLM is started with it."""

    schemes: Mapping[str, QuantScheme]
    kv_cache: KVCache | None = None
    settings: Mapping[str, Any] | None = None


def _cases() -> dict[str, Case]:
    layers = linear_layers(DEMO_MODEL)
    mixed = {
        layer: QuantScheme.parse(MIXED[layer.rpartition(".")[2]])
        for layer in layers
        if layer.rpartition(".")[2] in MIXED
    }
    outside = {HEAD: QuantScheme.parse("W8A16G64"), EMBEDDING: QuantScheme.parse("W4A16_ASYMG64")}
    w4 = dict.fromkeys(layers, QuantScheme.parse("W4A16G64"))
    return {
        **{name: Case(dict.fromkeys(layers, QuantScheme.parse(name))) for name in UNIFORM},
        "mixed": Case(mixed),
        "head-and-embedding": Case(w4 | outside),
        "everything-compiled": Case(mixed | outside, settings={"enforce_eager": False}),
        "kv-per-tensor": Case(w4, kv_cache="fp8"),
        "kv-per-head": Case(w4, kv_cache="fp8_per_head"),
    }


CASES = _cases()


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Token ids of word problems with their answers."""
    tokenizer = tf.AutoTokenizer.from_pretrained(DEMO_MODEL)
    return [tokenizer(as_text(problem)).input_ids for problem in generate("test", 16, seed=2)]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = tf.AutoTokenizer.from_pretrained(DEMO_MODEL)
    return [tokenizer(f"Question: {p['question']}\nAnswer:").input_ids for p in generate("test", 8, seed=3)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("schemes")
    return {
        name: write_rtn_checkpoint(DEMO_MODEL, folder / name, case.schemes, kv_cache=case.kv_cache)
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def scores(checkpoints: dict[str, Path], texts: list[list[int]], prompts: list[list[int]]) -> dict[str, dict[str, Any]]:
    common = {"quantization": "autoround", "dtype": "bfloat16"}
    requests = [
        {"model": str(checkpoints[name]), "settings": {**common, **(case.settings or {})}}
        for name, case in CASES.items()
    ]
    return dict(zip(CASES, scores_of(requests, texts, prompts), strict=True))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logprobs_and_greedy_tokens(
    name: str,
    checkpoints: dict[str, Path],
    scores: dict[str, dict[str, Any]],
    texts: list[list[int]],
    prompts: list[list[int]],
) -> None:
    result = scores[name]
    assert "error" not in result, result["error"]
    kernels = {kernel for names in result["kernels"].values() for kernel in names}
    kernels_of = _by_layer(result["kernels"])
    truth = _model(checkpoints[name], torch.float32, kernels_of, None)
    emulation = _model(checkpoints[name], torch.bfloat16, kernels_of, CASES[name].kv_cache)

    exact, emulated = (torch.cat([_logprobs(model, ids) for ids in texts]) for model in (truth, emulation))
    served = torch.tensor([value for values in result["logprobs"] for value in values], dtype=torch.float64)
    error, budget = _typical(served - exact), 2 * _typical(emulated - exact)
    print(f"{name}: error {error:.5f}, budget {budget:.5f}, kernels {sorted(kernels)}")  # noqa: T201
    assert error <= budget, (sorted(kernels), error, budget)

    # A greedy token is the truth's best, or so near to it that errors of this size can turn the order.
    worst = 2 * max((emulated - exact).abs().max().item(), (served - exact).abs().max().item())
    for ids, answer in zip(prompts, result["tokens"], strict=True):
        scores_of_all = _distribution(truth, ids + answer)[len(ids) - 1 : -1]
        gap = scores_of_all.amax(-1) - scores_of_all[torch.arange(len(answer)), torch.tensor(answer)]
        assert gap.max() <= worst, (gap.max().item(), worst)


def test_kernels_that_were_meant(scores: dict[str, dict[str, Any]]) -> None:
    """The plugin's own kernel where vLLM's choice deviates, CUTLASS for FP8, and mixed layers in several calls."""

    def names(case: str, layer: str = "model.layers.0.mlp.down_proj") -> list[str]:
        return list(scores[case]["kernels"][layer])

    for name in ("FP8", "FP8_STATIC", "FP8_DYNAMIC"):
        assert "FP8" in names(name)[0].upper()
    assert len(names("mixed", "model.layers.0.self_attn.qkv_proj")) == 3
    assert len(names("mixed", "model.layers.0.mlp.gate_up_proj")) == 2
    assert "lm_head" in scores["head-and-embedding"]["kernels"]


def test_scales_per_head_are_those_of_the_file(scores: dict[str, dict[str, Any]], checkpoints: dict[str, Path]) -> None:
    for name, tensor in read_tensors(checkpoints["kv-per-head"], ("_scale",)):
        attention, _, scale = name.rpartition(".")
        if scale in ("k_scale", "v_scale", "q_scale"):
            heads = tensor.flatten().view(2, -1).amax(1)  # of queries: the largest of each key-value head's
            assert scores["kv-per-head"]["scales"][f"{attention}.attn"][scale[0]] == heads.tolist()


# --- the reference --------------------------------------------------------------------------------------------------


def _by_layer(kernels: Mapping[str, list[str]]) -> Callable[[str], str]:
    """Layer of the checkpoint -> the kernels of the vLLM layer that it is in, as one text."""
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}

    def of(layer: str) -> str:
        parent, _, name = layer.rpartition(".")
        return "; ".join(kernels.get(f"{parent}.{fused.get(name, name)}" if parent else layer, []))

    return of


def _model(folder: Path, dtype: torch.dtype, kernels_of: Callable[[str], str], emulated_kv: KVCache | None) -> Any:
    """The checkpoint in transformers, with activations quantized where the kernels of vLLM do so.

    In bfloat16 it also rounds what kernels are known to round besides.
    """
    emulate = dtype is torch.bfloat16
    config = tf.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = tf.LlamaForCausalLM(config).to(dtype).to(DEVICE).eval()
    manifest = read_manifest(folder)
    state = dequantized_state_dict(folder, torch.float32)
    if emulate:
        for layer, weight in quantized_layers(folder, manifest):
            state[f"{layer}.weight"] = _emulate(weight, kernels_of(layer))
    missing, unexpected = model.load_state_dict(
        {name: tensor.to(dtype) for name, tensor in state.items()}, strict=False
    )
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    _quantize_activations(model, folder, manifest, kernels_of)
    if emulated_kv:
        _round_attention(model, folder)
    return model


def _quantize_activations(
    model: torch.nn.Module, folder: Path, manifest: Manifest, kernels_of: Callable[[str], str]
) -> None:
    scales = dict(read_tensors(folder, ("input_scale", "input_global_scale")))
    for name, module in model.named_modules():
        scheme = manifest.schemes.get(name)
        if scheme is None or scheme.activations is None or "weight-only" in kernels_of(name):
            continue
        acting = scheme.activations
        static = scales[f"{name}.{acting.static}"].to(DEVICE) if acting.static else None

        def quantize(_: Any, inputs: tuple[Tensor, ...], acting: Any = acting, static: Tensor | None = static) -> Any:
            return (acting.fake_quantize(inputs[0], static).to(inputs[0].dtype),)

        module.register_forward_pre_hook(quantize)


def _emulate(weight: QuantizedWeight, kernels: str) -> Tensor:
    """The weight as a kernel rounds it before it multiplies."""
    if isinstance(weight.type, Integer) and "CutlassW4A8" in kernels:
        # E4M3 scales of groups under a float32 scale per row, and E4M3 products of scale and code in a table.
        scale = weight.scale.float()
        per_row = scale.abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3.highest
        rounded = E4M3.round(E4M3.round(scale / per_row) / 8)
        values = weight.type.tile(*weight.codes.shape).split(weight.codes.float() - weight.type.zero)
        products = E4M3.round(rounded[:, None, :, None] * values) * (8 * per_row)[:, :, None, None]
        return weight.type.tile(*weight.codes.shape).merge(products, weight.codes.shape)
    if weight.type == Float8(strategy="block") and ("DeepGemm" in kernels or "DeepGEMM" in kernels):
        # DeepGEMM as vLLM configures it: the scales of blocks are rounded up to powers of two, the codes again.
        exact = weight.dequantize()
        scale = torch.exp2(torch.log2(weight.scale.float()).ceil())
        tile = weight.type.tile(*weight.codes.shape)
        codes = E4M3.round(tile.split(exact) / scale[:, None, :, None])
        return tile.merge(codes * scale[:, None, :, None], weight.codes.shape)
    return weight.dequantize()


def _round_attention(model: torch.nn.Module, folder: Path) -> None:
    """Round queries, keys and values to E4M3 with the checkpoint's scales; before RoPE, which keeps their size."""
    scales = dict(read_tensors(folder, ("_scale",)))
    for name, module in model.named_modules():
        attention, _, projection = name.rpartition(".")
        if projection not in ("q_proj", "k_proj", "v_proj"):
            continue
        scale = scales[f"{attention}.{projection[0]}_scale"].flatten().to(DEVICE)[:, None]

        def rounded(_: Any, __: Any, output: Tensor, scale: Tensor = scale) -> Tensor:
            heads = output.unflatten(-1, (-1, HEAD_DIM)).float()
            return (E4M3.round(heads / scale) * scale).flatten(-2).to(output.dtype)

        module.register_forward_hook(rounded)


def _distribution(model: Any, ids: list[int]) -> Tensor:
    """Log-probabilities [positions, vocabulary] float64 on the CPU."""
    logits = model(torch.tensor([ids], device=DEVICE)).logits[0]
    return logits.double().log_softmax(-1).cpu()


def _logprobs(model: Any, ids: list[int]) -> Tensor:
    """Of each token but the first, given those before it."""
    return _distribution(model, ids)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def _typical(errors: Tensor) -> float:
    """Root mean square of all but the worst hundredth."""
    squares = errors.double().square().sort().values
    return squares[: len(squares) - len(squares) // 100].mean().sqrt().item()
