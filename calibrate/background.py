"""One thread beside the main one: while a block is tuned, the last one is written and the next one fetched."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

_AHEAD = 2  # pieces of work that may be waiting or under way


class Background:
    """Does one piece of work after the other; an error in one is raised by a later call of `submit` or `wait`."""

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[Future[Any]] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self.wait()

    def submit(self, work: Callable[[], Any]) -> None:
        """Have this done in its turn; it sees what the device has been told so far."""
        while len(self._pending) >= _AHEAD:
            self._pending.popleft().result()
        ready = None if self._stream is None else torch.cuda.current_stream().record_event()
        self._pending.append(self._pool.submit(self._do, work, ready))

    def wait(self) -> None:
        """Until nothing is left to do."""
        while self._pending:
            self._pending.popleft().result()

    def _do(self, work: Callable[[], Any], ready: torch.cuda.Event | None) -> None:
        if self._stream is None or ready is None:
            work()
            return
        with torch.cuda.stream(self._stream):  # also makes its device the current one of this thread
            self._stream.wait_event(ready)
            work()
            self._stream.synchronize()
