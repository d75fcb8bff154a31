"""What llama.cpp takes a GGUF file for: run by the tests in llama.cpp's environment (tests/exporters.sh).

    python read_gguf.py FILE OUT TEXT

Writes to OUT, as JSON, the ``tokens`` of TEXT and the ``logits`` of tokens 0 to 19.
"""

import json
import sys

import llama_cpp


def main(file: str, out: str, text: str) -> None:
    model = llama_cpp.Llama(file, n_ctx=64, logits_all=True, verbose=False)
    tokens = model.tokenize(text.encode(), add_bos=False)
    model.eval(list(range(20)))
    with open(out, "w") as result:
        json.dump({"tokens": tokens, "logits": model.scores[:20].tolist()}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
