"""The model to quantize: a local folder or a Hub id, as files and as a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from calibrate.config import CalibrationError

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Source:
    """A model as found: its folder, its raw config.json, and the loaded model (on the CPU) and tokenizer."""

    name: str
    folder: Path
    config: dict[str, Any]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, which is also that of the scales on disk."""
        return self.model.dtype


def load_source(name: str, *, trust_remote_code: bool) -> Source:
    """Load a causal LM and its tokenizer, in the checkpoint's own dtype.

    Raises:
        CalibrationError: it cannot be found, is quantized already, or has an unsupported dtype.
    """
    folder = _folder(name)
    config, _ = PreTrainedConfig.get_config_dict(folder)
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise CalibrationError(f"{name} is quantized already ({method}); calibrate the original model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code).eval()
    if model.dtype not in _DTYPES:
        raise CalibrationError(f"{name} has weights of {model.dtype}; supported are {', '.join(map(str, _DTYPES))}")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return Source(name, folder, config, model, tokenizer)


def _folder(name: str) -> Path:
    local = Path(name)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise CalibrationError(f"{name} is a folder without config.json")
        return local
    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "original/*"]))
    except Exception as error:  # offline, gated, misspelt: the library raises unrelated types
        raise CalibrationError(
            f"model {name} is neither a folder nor to be had from the Hub: {type(error).__name__}: {error}"
        ) from error
