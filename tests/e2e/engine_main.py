"""``python -m tests.e2e.engine_main``: the process behind `tests.e2e.engine.run_engine`.

Imports vLLM, which takes longer than all else that an engine does here, then answers each request, a line of JSON, in a
fork of itself, and prints its exit status. Nothing has a thread before the fork. A fork is as new as a process that has
just imported vLLM: plugins are loaded, and the environment is read, by the engine.

A module of its own because vLLM pickles the probe by reference: it must come from an importable module.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.e2e.engine import generate


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM may log to standard output
    import vllm.entrypoints.llm  # noqa: F401 - not above, for a worker process imports this module too

    for line in sys.stdin:
        request = json.loads(line)
        child = 0 if request["alone"] else os.fork()
        if not child:
            return answer(request)  # and leave as a process does, with all that is to be done at its end
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    return None


def answer(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(request["environment"])
    Path(request["result"]).write_text(json.dumps(generate(request)))


if __name__ == "__main__":
    main()
