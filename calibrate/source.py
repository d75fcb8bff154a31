"""The model to quantize: a local folder or a Hub id, as files and as a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from calibrate.config import CalibrationError

FOREIGN_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "consolidated*")
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
    def revision(self) -> str | None:
        """The Hub commit, None for a local folder; it names the folder in the Hub's cache."""
        return None if Path(self.name).is_dir() else self.folder.name


def load_source(name: str, *, trust_remote_code: bool) -> Source:
    """Load a causal LM and its tokenizer, in the checkpoint's own dtype.

    Raises:
        CalibrationError: it cannot be found or loaded, lacks tensors, is quantized already, is more than a causal LM,
            or has an unsupported dtype.
    """
    folder = _folder(name)
    try:
        config, _ = PreTrainedConfig.get_config_dict(folder)
        text_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "unknown method")
            raise CalibrationError(f"{name} is quantized already ({method}); calibrate the original model")
        # Only the eager implementation caps the attention logits, as vLLM does; SDPA leaves the cap out silently.
        attention = "eager" if getattr(text_config, "attn_logit_softcapping", None) else None
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except CalibrationError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CalibrationError(f"{name} cannot be loaded: {type(error).__name__}: {reason}") from error
    _check_loaded(name, config, model, loading)
    return Source(name, folder, config, model.eval(), tokenizer)


def _check_loaded(name: str, config: dict[str, Any], model: PreTrainedModel, loading: dict[str, Any]) -> None:
    problems = []
    # transformers fills missing tensors with random numbers and drops unexpected ones, and only logs it.
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := sorted(map(str, loading[kind])):
            problems.append(f"{name}: {len(keys)} {kind.replace('_keys', ' tensors')}, the first is {keys[0]}")
    architecture = type(model).__name__
    if architecture not in config.get("architectures", [architecture]):
        problems.append(
            f"{name} is a {', '.join(config['architectures'])}, of which only the part {architecture} could be "
            "calibrated; extract and save that part first"
        )
    if model.dtype not in _DTYPES:
        problems.append(f"{name} has weights of {model.dtype}; supported are {', '.join(map(str, _DTYPES))}")
    if problems:
        raise CalibrationError("\n".join(problems))


def _folder(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, ignore_patterns=[*FOREIGN_WEIGHTS, "original/*"]))
        except Exception as error:
            raise CalibrationError(
                f"model {name} is neither a folder nor to be had from the Hub: {type(error).__name__}: {error}"
            ) from error
    if not (folder / "config.json").is_file():
        raise CalibrationError(f"{name} is a folder without config.json")
    if not any(folder.glob("*.safetensors")):
        raise CalibrationError(f"{name} has no safetensors files; convert its weights first")
    return folder
