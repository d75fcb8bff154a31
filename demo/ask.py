"""``python -m demo.ask CHECKPOINT``: serve a checkpoint in vLLM through the plugin and print a few answers."""

from __future__ import annotations

import sys

from demo.problems import generate


def main() -> None:
    from vllm import LLM, SamplingParams

    problems = list(generate("test", 3, seed=9))
    llm = LLM(sys.argv[1], quantization="autoround", enforce_eager=True, max_model_len=512)
    prompts = [f"Question: {problem['question']}\nAnswer:" for problem in problems]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=256, stop=["Question:"]), use_tqdm=False)
    for prompt, output, problem in zip(prompts, outputs, problems, strict=True):
        print(f"\n{prompt}{output.outputs[0].text.rstrip()}")
        print(f"   (expected {problem['answer'].rpartition('#### ')[2]})")


if __name__ == "__main__":  # vLLM starts its workers by importing this module again
    main()
