"""Greedy accuracy of a model on held-out word problems, with plain transformers.

python -m demo.evaluate demo/model --count 1000 --shots 0 5
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo.problems import as_text, generate

MAX_NEW_TOKENS = 256  # lm-eval's default; a five-step answer takes up to 200


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int, shots: int, seed: int) -> float:
    """Share of ``count`` held-out problems whose greedy answer ends in the right number."""
    examples = "".join(as_text(problem) + "\n\n" for problem in generate("train", shots, seed=10**6))
    tokenizer.padding_side = "left"
    problems, right = list(generate("test", count, seed)), 0
    for begin in range(0, count, 250):
        part = problems[begin : begin + 250]
        prompts = [f"{examples}Question: {problem['question']}\nAnswer:" for problem in part]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for problem, answer in zip(part, answers, strict=True):
            expected = problem["answer"].rpartition("#### ")[2]
            given = answer.partition("Question:")[0].partition("#### ")[2].split("\n")[0].strip()
            right += given == expected
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="held-out problems (default: %(default)s)")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 5], help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    figures: dict[str, float | int | str] = {"problems": args.count, "torch": torch.__version__, "device": args.device}
    for shots in args.shots:
        figures[f"accuracy_{shots}_shot"] = accuracy(model, tokenizer, count=args.count, shots=shots, seed=1)
    (args.model / "accuracy.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
