"""What the makers of golden checkpoints share: tiny Llamas with random weights, a tokenizer, calibration text, the run.

Nothing here comes from a hub, and everything follows from SEED. Each peer imports this module in its own environment.
"""
# ruff: noqa: T201 - the makers talk to whoever runs them

import argparse
import json
import multiprocessing
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 42
HERE = Path(__file__).parent
# Kept in the repository; everything else is made on demand and lands in MADE.
MADE = HERE / ".made"
CHARACTERS = [" ", ".", *"abcdefghijklmnopqrstuvwxyz0123456789"]
SPECIAL = ["<unk>", "<s>", "</s>"]
VOCAB = 64


def build_model(hidden: int = 64, ffn: int = 128, layers: int = 2) -> LlamaForCausalLM:
    """Build a Llama whose weights have outliers, spread and skew, so that zero points leave the midpoint."""
    generator = torch.Generator().manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(skewed(module.weight.shape, generator))
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
            elif isinstance(weight := getattr(module, "weight", None), nn.Parameter):
                weight.copy_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
    return model.to(torch.bfloat16).eval()


def skewed(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Normal weights with a long right tail, a log-normal scale per row and a few outlier columns."""
    rows, columns = shape
    z = torch.randn(rows, columns, generator=generator)
    z = z + 0.25 * (z.square() - 1)
    spread = torch.exp(0.3 * torch.randn(rows, 1, generator=generator))
    outliers = 1 + 3 * (torch.rand(1, columns, generator=generator) < 0.03)
    return z * spread * outliers * columns**-0.5


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: enough for calibration and for serving a prompt."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def calibration_text(samples: int = 8, length: int = 160) -> list[str]:
    """Text of random words, the same for every peer."""
    generator = torch.Generator().manual_seed(SEED + 1)
    letters = torch.randint(0, len(CHARACTERS), (samples, length), generator=generator)
    return ["".join(CHARACTERS[i] for i in row) for row in letters.tolist()]


def save_source(folder: Path, *, hidden: int = 64, ffn: int = 128) -> Path:
    """Write the source model and its tokenizer, as a user would have them on disk."""
    build_model(hidden, ffn).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def finish(folder: Path, record: dict[str, object], weights: dict[str, Tensor], original: dict[str, Tensor]) -> None:
    """Write golden.json and, where readers shall agree, expected.safetensors; drop what the peers leave behind.

    The distance to the source model tells a checkpoint that means what its maker meant from one that does not.
    """
    if record["expect"] == "equal":
        halves = {name: weight.bfloat16() for name, weight in weights.items()}
        exact = all(torch.equal(half.float(), weights[name].float()) for name, half in halves.items())
        save_file(halves if exact else weights, folder / "expected.safetensors")
    errors = {}
    for name, weight in weights.items():
        source = original[f"{name}.weight"].float()
        errors[name] = round(float((weight.float() - source).norm() / source.norm()), 4)
    record["relative_error_to_source"] = {"worst": max(errors.values()), "best": min(errors.values())}
    record["tensors"] = tensors(folder, layer="model.layers.0.") | tensors(folder, layer="lm_head")
    (folder / "golden.json").write_text(json.dumps(record, indent=2) + "\n")
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
    for name in ("generation_config.json", "recipe.yaml", "quantization_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def target(name: str, *, keep: bool) -> Path:
    """Return the empty folder that the checkpoint `name` goes to."""
    for parent in (HERE, MADE):
        shutil.rmtree(parent / name, ignore_errors=True)
    folder = (HERE if keep else MADE) / name
    folder.mkdir(parents=True)
    return folder


def tensors(folder: Path, layer: str) -> dict[str, str]:
    """Name, dtype and shape of the tensors of a layer."""
    found = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - a safe_open handle is no dict
            if key.startswith(layer):
                piece = file.get_slice(key)
                found[key] = f"{piece.get_dtype()}{piece.get_shape()}"
    return found


def attempt(make: Callable[[str], None], name: str) -> None:
    """Make one checkpoint; leave nothing but an error line behind where the peer cannot."""
    try:
        make(name)
    except BaseException as error:  # noqa: BLE001 - whatever the peer raises goes on record
        traceback.print_exc()
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.rmtree(MADE / name, ignore_errors=True)
        MADE.mkdir(exist_ok=True)
        line = " ".join(f"{type(error).__name__}: {error}".split())
        with (MADE / "errors.txt").open("a") as log:
            log.write(f"{name}: {line}\n")
        raise SystemExit(1) from None
    print(f"made {name}", flush=True)


def main(cases: Mapping[str, object], make: Callable[[str], None], description: str | None) -> None:
    """Make the named checkpoints, each in a process of its own, so that no global state leaks between them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names and leave")
    options = parser.parse_args()
    if options.list:
        print(*cases, sep="\n")
        return
    if unknown := set(options.names) - set(cases):
        parser.error(f"no such checkpoint: {', '.join(sorted(unknown))}")
    context = multiprocessing.get_context("fork")
    failed = []
    for name in options.names or cases:
        process = context.Process(target=attempt, args=(make, name))
        process.start()
        process.join()
        failed += [name] * bool(process.exitcode)
    print(f"not made: {', '.join(failed) or 'none'}")
