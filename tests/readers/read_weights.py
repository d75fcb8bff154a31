"""What a format's own reader takes checkpoints for: run by the tests in the reader's environment (tests/exporters.sh).

    python read_weights.py < JSON

The JSON is a list of objects with ``folder``, ``out``, ``dtype`` and ``columns`` (layer -> K). Each folder is loaded
with transformers, which leaves it to the package that the checkpoint calls for; with ``loader`` "gptqmodel" it is
loaded with that. Into the safetensors file ``out`` go each layer's weight [N, K], found by feeding it the identity, and
the ``logits`` of tokens 0 to 19. Prints a JSON object: folder -> the class that held the first layer, or the error.
"""

import json
import sys
import traceback
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig, GPTQConfig

# GPTQModel would compile kernels for this CPU; those written in torch are what its results are measured against.
BACKENDS = {"gptq": (GPTQConfig, "gptq_torch"), "awq": (AwqConfig, "torch_awq")}


def load(folder: str, dtype: torch.dtype, loader: str) -> nn.Module:
    if loader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        model = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=dtype)
        return model.model
    options = {}
    method = AutoConfig.from_pretrained(folder).quantization_config["quant_method"]
    if method in BACKENDS:
        config, backend = BACKENDS[method]
        options["quantization_config"] = config(bits=4, backend=backend)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **options)


@torch.no_grad()
def read(case: dict[str, Any]) -> str:
    dtype = getattr(torch, case["dtype"])
    model = load(case["folder"], dtype, case.get("loader", "transformers"))
    tensors = {"logits": model(torch.arange(20)[None]).logits}
    for name, columns in case["columns"].items():
        module = model.get_submodule(name)
        inputs = torch.eye(columns, dtype=dtype)
        tensors[name] = (module(inputs) - module(torch.zeros_like(inputs))).T.contiguous()
    save_file({name: tensor.float() for name, tensor in tensors.items()}, case["out"])
    first = type(model.get_submodule(next(iter(case["columns"]))))
    return f"{first.__module__}.{first.__qualname__}"


if __name__ == "__main__":
    results = {}
    for case in json.load(sys.stdin):
        try:
            results[case["folder"]] = read(case)
        except Exception:  # noqa: BLE001 - one that cannot be read must not keep the others from it
            results[case["folder"]] = f"error: {traceback.format_exc()}"
    print("\n" + json.dumps(results))  # noqa: T201
