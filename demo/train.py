"""Train the demo model: a 2.6 M parameter Llama that solves `demo.problems`, in minutes on one GPU.

    python -m demo.train OUT            # writes config, weights (bf16), tokenizer and training.json
    python -m demo.evaluate OUT         # accuracy on held-out problems

The tokenizer is a byte-level BPE with single-digit numbers. Training windows of 1,024 tokens begin with BOS at the
start of a problem and run over several problems, so the model knows both zero-shot and few-shot prompts. Answer
tokens weigh 1 in the loss and question tokens 0.1: what is asked for is random, what is answered is not.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.problems import as_text, generate

WINDOW = 1024
QUESTION_WEIGHT = 0.1
BOS, EOS = "<s>", "</s>"


def model_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def _problem_chunk(job: tuple[int, int]) -> list[tuple[str, str]]:
    seed, count = job
    texts = [as_text(problem) for problem in generate("train", count, seed)]
    return [(head + "Answer:", tail + "\n\n") for head, _, tail in (text.partition("Answer:") for text in texts)]


def token_stream(tokenizer: PreTrainedTokenizerFast, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [T] int16, loss weights [T] float16 and the start of each problem [P] int64, for ``count`` problems."""
    workers = os.cpu_count() or 1
    jobs = [(seed, count // (4 * workers)) for seed in range(4 * workers)]
    with multiprocessing.Pool(workers) as pool:
        parts = [part for chunk in pool.map(_problem_chunk, jobs) for part in chunk]
    encode = tokenizer.backend_tokenizer.encode_batch
    heads = encode([head for head, _ in parts], add_special_tokens=False)
    tails = encode([tail for _, tail in parts], add_special_tokens=False)
    ids, weights, starts, position = [], [], [], 0
    for head, tail in zip(heads, tails, strict=True):
        starts.append(position)
        position += len(head.ids) + len(tail.ids)
        ids.append(np.asarray(head.ids + tail.ids, dtype=np.int16))
        weights.append(np.repeat(np.asarray([QUESTION_WEIGHT, 1.0], dtype=np.float16), [len(head.ids), len(tail.ids)]))
    return (
        torch.from_numpy(np.concatenate(ids)),
        torch.from_numpy(np.concatenate(weights)),
        torch.tensor([start for start in starts if start + WINDOW < position]),
    )


def train(
    model: LlamaForCausalLM,
    stream: tuple[Tensor, Tensor, Tensor],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> None:
    """AdamW with warm-up and a cosine to a twentieth; fp32 parameters under bf16 autocast."""
    device = model.device
    ids, weights, starts = (tensor.to(device) for tensor in stream)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps))),
    )
    generator = torch.Generator(device).manual_seed(seed)
    offsets = torch.arange(WINDOW - 1, device=device)
    forward = torch.compile(model) if device.type == "cuda" else model
    begin = time.perf_counter()
    for step in range(steps):
        picked = starts[torch.randint(len(starts), (batch,), generator=generator, device=device)]
        windows = picked[:, None] + offsets
        tokens = F.pad(ids[windows].long(), (1, 0), value=model.config.bos_token_id)
        weight = weights[windows].float()
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(input_ids=tokens[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (losses * weight.flatten()).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 500 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - begin:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=6000, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=128, help="windows a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=1_000_000, help="training problems (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    begin = time.perf_counter()
    torch.manual_seed(args.seed)
    texts = [as_text(problem) for problem in generate("train", min(args.problems, 20_000), seed=args.seed)]
    tokenizer = train_tokenizer(texts, args.vocab_size)
    stream = token_stream(tokenizer, args.problems)
    print(f"{stream[0].numel() / 1e6:.0f} M tokens of text in {time.perf_counter() - begin:.0f} s", flush=True)
    model = LlamaForCausalLM(model_config(len(tokenizer))).to(args.device)
    train(model, stream, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed)
    trained = time.perf_counter() - begin

    model = model.to(torch.bfloat16).eval()
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": args.steps * args.batch * WINDOW,
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "device")},
        "train_seconds": round(trained, 1),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
