"""``python -m tests.e2e.engine_main JSON``: the process behind `tests.e2e.engine.run_engine`.

A module of its own because vLLM pickles the probe by reference: it must come from an importable module.
"""

import json
import sys

from tests.e2e.engine import MARK, generate

if __name__ == "__main__":
    print(MARK + json.dumps(generate(json.loads(sys.argv[1]))))  # noqa: T201
