"""The steps of a block's tuning: gather samples, forward, loss, backward, update; on a GPU one CUDA graph, if possible.

Whatever a step needs to know, and whatever it leaves behind, is in device memory that stays where it is: the order of
the samples, learning rates, losses, the number of the step. So the same graph serves every step, and every later block
that is loaded into the same memory; nothing waits for the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from calibrate.blocks import run_block
from calibrate.input_scales import InputScale
from calibrate.layer_state import LayerState
from calibrate.workbench import Loss, Samples, WorkingBlock, loss_of_block

GRAPHED = True  # where every layer can be recorded; False for measurements

_WARM_UPS = 3  # steps before recording: kernels are compiled, libraries get their workspaces
_AHEAD = 4  # steps that the host may be ahead of the device, so that progress can be shown and nothing waits


class Steps:
    """All steps of one block's tuning, repeatable for the next block."""

    def __init__(
        self,
        working: WorkingBlock,
        layers: Sequence[LayerState],
        inputs: Tensor,
        outputs: Tensor,
        real: Tensor | None,
        loss: Loss,
        shape: tuple[int, int, int],
        scales: Sequence[InputScale] = (),
    ) -> None:
        """Steps over samples of ``inputs`` and ``outputs`` [S, T, H], on the device or pinned.

        Args:
            real: [S, T] bool on the device, the tokens that count; None: all.
            shape: steps, batches a step, samples a batch.
            scales: static ones of the layers' inputs, learned with them.
        """
        device = working.device
        self._scales = scales
        self._working, self._layers, self._loss, self._real = working, layers, loss, real
        self._step = working.step
        self._order = torch.zeros(shape, dtype=torch.long, device=device)
        # Filled up to 16 bytes a layer, or Triton would compile for two alignments.
        self._rates = torch.zeros(shape[0], len(layers), 4, device=device)
        self.losses = torch.zeros(shape[0], device=device)
        near = inputs.device == device
        self._feed = (
            _Gather(inputs, outputs, self._order, self._step) if near else _Stage(inputs, outputs, shape, device)
        )
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}  # by variant
        self._graphed = GRAPHED and all(layer.recordable for layer in layers)

    @torch.enable_grad()
    def run(self, order: Tensor, rates: Tensor, on_step: Callable[[], None], variant: str = "") -> None:
        """Tune the layers from their start; `losses` [steps] are to be read when all is done.

        Args:
            order: [steps, batches, B] sample numbers.
            rates: [steps, layers, 3], of offsets and clips (see `calibrate.rounding.sign_step`) and ``scales``.
            on_step: called after every step.
            variant: of the block's forward; what was recorded for one serves no other.
        """
        for scale in self._scales:
            scale.load()
        with self._learning():
            self._run(order, rates, on_step, variant)

    def restart(self) -> None:
        """Everything that is learned back to its start."""
        for layer in self._layers:
            layer.restart()
        for scale in self._scales:
            scale.restart()

    @contextmanager
    def _learning(self) -> Iterator[list[Tensor]]:
        """With gradients for what is learned inside the context; the weights."""
        weights: list[Tensor] = [layer.module.weight for layer in self._layers]
        learned = [*weights, *(scale.scale for scale in self._scales)]
        for tensor in learned:
            tensor.requires_grad_(True)
        try:
            yield weights
        finally:
            for tensor in learned:
                tensor.requires_grad_(False)

    def _run(self, order: Tensor, rates: Tensor, on_step: Callable[[], None], variant: str) -> None:
        if self._graphed and variant not in self._graphs:
            self._feed.start(order)
            self._graphs.clear()  # each has memory for a whole step
            self._graphs[variant] = self._record()
        graph = self._graphs.get(variant)
        self.restart()
        self._order.copy_(order)
        self._rates[..., :3] = rates
        self.losses.zero_()
        self._step.zero_()
        self._feed.start(order)
        launched: deque[torch.cuda.Event] = deque()
        for step in range(len(order)):
            self._feed.ready(step)
            if graph is None:
                self._one_step()
            else:
                graph.replay()
                launched.append(torch.cuda.Event(blocking=True))
                launched[-1].record()
            if graph is None or len(launched) > _AHEAD:
                _wait_for_oldest(launched)
                on_step()
        while launched:
            _wait_for_oldest(launched)
            on_step()

    @torch.enable_grad()
    def gradients(self, picked: Tensor, *, compiled: bool) -> list[Tensor]:
        """Of the layers' weights as they are, from the samples numbered ``picked`` [B].

        Args:
            compiled: by the code that a step runs, which is compiled for it if the block is; else by PyTorch's own.
        """
        real = None if self._real is None else self._real.index_select(0, picked.to(self._real.device))
        block = self._working
        samples = self._feed.samples(picked)
        with self._learning() as weights:
            if compiled:
                error = block.loss_of(self._loss, samples, real)
            else:
                error = loss_of_block(run_block, block.module, block.arguments, self._loss, samples, real)
            return list(torch.autograd.grad(error, weights))

    def _one_step(self) -> None:
        for batch, share in enumerate(self._shares()):
            samples, counted = self._feed.batch(batch), self._counted(batch)
            error = self._working.loss_of(self._loss, samples, counted) * share
            error.backward()
            self.losses.index_add_(0, self._step, error.detach().reshape(1))
        rates = self._rates.index_select(0, self._step)[0]
        for layer, rate in zip(self._layers, rates[:, :2], strict=True):
            layer.step(rate)
            layer.module.weight.grad = None
        for scale in self._scales:
            scale.step(rates[0, 2])
            scale.scale.grad = None
        self._step += 1

    def _counted(self, batch: int) -> Tensor | None:
        """Which tokens of the current step's batch count, [B, T] bool."""
        if self._real is None:
            return None
        return self._real.index_select(0, self._order.index_select(0, self._step)[0, batch])

    def _shares(self) -> Sequence[float | Tensor]:
        """Of each batch in the mean over the current step's tokens that count."""
        batches = self._order.shape[1]
        if self._real is None:
            return [1 / batches] * batches
        tokens = torch.stack([cast(Tensor, self._counted(batch)).sum() for batch in range(batches)])
        return list((tokens / tokens.sum()).unbind())

    def _record(self) -> torch.cuda.CUDAGraph:
        """The graph of a step; leaves the layers in the middle of nowhere. `restart` has to follow."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step.zero_()
                self._feed.ready(0)
                self._one_step()
        torch.cuda.current_stream().wait_stream(stream)
        self._step.zero_()
        graph = torch.cuda.CUDAGraph()
        # The last block's thread may be writing, and copy from the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._one_step()
        return graph


class _Gather:
    """Samples that are on the device, by numbers that are there too."""

    def __init__(self, inputs: Tensor, outputs: Tensor, order: Tensor, step: Tensor) -> None:
        self._inputs, self._outputs, self._order, self._step = inputs, outputs, order, step

    def start(self, order: Tensor) -> None:
        """Nothing to prepare."""

    def ready(self, step: int) -> None:
        """Nothing to wait for."""

    def samples(self, picked: Tensor) -> Samples:
        """Those numbered ``picked`` [B]."""
        return Samples(self._inputs, self._outputs, picked.to(self._order.device))

    def batch(self, number: int) -> Samples:
        """Those of the current step's batch."""
        return Samples(self._inputs, self._outputs, self._order.index_select(0, self._step)[0, number])


class _Stage:
    """Samples in pinned host memory: those of the next step are copied while a step runs."""

    def __init__(self, inputs: Tensor, outputs: Tensor, shape: tuple[int, int, int], device: torch.device) -> None:
        self._sources = (inputs, outputs)
        size = (*shape[1:], *inputs.shape[1:])
        self._next, self._current = (
            [torch.zeros(size, dtype=source.dtype, device=device) for source in self._sources] for _ in range(2)
        )
        self._stream = torch.cuda.Stream(device)
        self._order = torch.empty(0)

    def start(self, order: Tensor) -> None:
        """Fetch the first step's samples."""
        self._order = order.cpu()
        self._fetch(0)

    def ready(self, step: int) -> None:
        """Have the samples of ``step``, which were fetched, in place, and fetch those of the one after it."""
        torch.cuda.current_stream().wait_stream(self._stream)
        for current, fetched in zip(self._current, self._next, strict=True):
            current.copy_(fetched)
        self._fetch((step + 1) % len(self._order))

    def samples(self, picked: Tensor) -> Samples:
        """Those numbered ``picked`` [B]."""
        device = self._next[0].device
        return Samples(*(source[picked.cpu()].to(device) for source in self._sources))

    def batch(self, number: int) -> Samples:
        """Those of the current step's batch."""
        inputs, outputs = self._current
        return Samples(inputs[number], outputs[number])

    def _fetch(self, step: int) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for source, fetched in zip(self._sources, self._next, strict=True):
                for row, sample in zip(fetched.flatten(0, 1), self._order[step].flatten().tolist(), strict=True):
                    row.copy_(source[sample], non_blocking=True)


def _wait_for_oldest(launched: deque[torch.cuda.Event]) -> None:
    if launched:
        launched.popleft().synchronize()
