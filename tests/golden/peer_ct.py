"""What a compressed-tensors checkpoint means, by the word of that library itself (both environments have it)."""

import json
from functools import partial
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor, format, nvfp4
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VERSION = compressed_tensors.__version__
HOW = (
    f"compressed_tensors {VERSION}: apply_quantization_config on the model, then decompress() of the registered "
    "compressor on every quantized layer; integer and float8 layers with their scales cast to float32 first, "
    "FP4 layers with unpack_fp4_from_uint8(dtype=float32), so that nothing is rounded to bfloat16"
)
FP4 = {"nvfp4-pack-quantized", "mxfp4-pack-quantized"}


def dequantize(folder: Path) -> dict[str, Tensor]:
    """Dequantize every quantized layer to [N, K] float32."""
    nvfp4.base.unpack_fp4_from_uint8 = partial(nvfp4.helpers.unpack_fp4_from_uint8, dtype=torch.float32)
    text = json.loads((folder / "config.json").read_text())
    config = QuantizationConfig.model_validate(text["quantization_config"])
    source = AutoConfig.from_pretrained(folder)
    del source.quantization_config
    model = AutoModelForCausalLM.from_config(source)
    apply_quantization_config(model, config)
    stored = load_file(folder / "model.safetensors")
    weights = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None or not isinstance(module, torch.nn.Linear):
            continue
        kind = scheme.format or format.infer_module_format(type(module), scheme)
        kind = str(getattr(kind, "value", kind))
        state = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        if f"{name}.weight_scale" not in stored:
            continue  # the config claims a layer that its maker left alone
        if kind not in FP4:
            state = {key: value.float() if "scale" in key else value for key, value in state.items()}
        state = BaseCompressor.get_value_from_registry(kind).decompress(state, scheme)
        weights[name] = state["weight"].float().contiguous()
    return weights
