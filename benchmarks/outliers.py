"""A copy of a Llama whose linear layers see outlier channels, and which computes what it did.

    python -m benchmarks.outliers MODEL OUT --factor 256

Some channels of the norms' outputs become larger by the factor, and the weights that read them as much smaller. With a
power of two that changes no product, so whatever `benchmarks.quality --model OUT` finds, the outliers did.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_CHANNELS = [3, 100]
_READERS = {  # of the outputs of a block's norms
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}


@torch.no_grad()
def plant(model: PreTrainedModel, factor: float) -> None:
    """Plant the outliers in every block of a Llama, in place.

    Args:
        factor: a power of two.
    """
    for block in model.get_submodule("model.layers").children():
        for norm, readers in _READERS.items():
            block.get_submodule(norm).get_parameter("weight")[_CHANNELS] *= factor
            for reader in readers:
                block.get_submodule(reader).get_parameter("weight")[:, _CHANNELS] /= factor


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outliers", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the original")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the copy")
    parser.add_argument("--factor", type=int, required=True, metavar="F", help="a power of two")
    args = parser.parse_args()
    if args.factor < 1 or args.factor & (args.factor - 1):
        parser.error(f"--factor {args.factor}: not a power of two")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    plant(model, args.factor)
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
