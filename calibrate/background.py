"""One thread beside the main one: a block is packed and written while the next one is tuned."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch


class Background:
    """Does one piece of work at a time; an error in it is raised by the next call of `submit` or `wait`."""

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._running: Future[Any] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()

    def submit(self, work: Callable[[], Any]) -> None:
        """Wait for the work before, then begin this; it sees what the device has been told so far.

        ``work`` must not leave anything for the device to do when it returns.
        """
        self.wait()
        ready = None if self._stream is None else torch.cuda.current_stream().record_event()
        self._running = self._pool.submit(self._do, work, ready)

    def wait(self) -> None:
        """Until nothing is left to do."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _do(self, work: Callable[[], Any], ready: torch.cuda.Event | None) -> None:
        if self._stream is None or ready is None:
            work()
            return
        with torch.cuda.stream(self._stream):  # also makes its device the current one of this thread
            self._stream.wait_event(ready)
            work()
            self._stream.synchronize()
