"""Where blocks are worked on: block after block of the same make is loaded into one module on the device.

Two blocks are of one make if their modules and arguments differ in the values of tensors only. What was made for the
first, from its memory to a recorded CUDA graph of its tuning step, then serves all of them. The CPU has no graphs to
save, and does the same all the same: one way to go wrong, and tests that need no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from threading import Lock
from types import FunctionType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calibrate.activations import QuantizedInput, with_scales
from calibrate.blocks import Block, copy_arguments, run_block, to_device
from calibrate.chain import advance
from calibrate.compilation import compiled
from calibrate.fp8_matmul import Fp8Products, is_exact, takes_dither, tensor_scale
from calibrate.linear import fp8_matmuls, make_working, quantized_inputs
from calibrate.rounding import MOST_CLIP
from vllm_autoround.format.scheme import QuantScheme

_Kept = TypeVar("_Kept")

# Output and target [B, T, H], and which tokens count [B, T] bool, None if all do -> mean over them, scalar float32.
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_COMPILED_WEIGHTS = 100_000_000  # in a block; compiling took 15 s on an H200, and saves the more the larger a block is
# Times its own size that tuning a block may take beside the samples, and another block. Of Llama-3-8B's shape, in steps
# of two samples, 9.0 GiB less 4.0 of samples were 12 times its .41 (`default` in benchmarks/results/tuning.json).
_TUNING_BLOCKS = 16
_MAKES = 2  # remembered at once: models that alternate between two kinds of attention have as many


class Samples(NamedTuple):
    """What goes into a block, and what should come out, [B, T, H]."""

    inputs: Tensor
    targets: Tensor
    picked: Tensor | None = None  # [B] the numbers of those that are meant, if there are more; compiled, none is copied


class WorkingBlock:
    """A module on the device with the values of one of the model's blocks, and what belongs to it."""

    def __init__(
        self,
        block: Block,
        arguments: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        *,
        compile: bool = False,
    ) -> None:
        self.module = make_working(to_device(block, device, dtype))
        self.arguments = copy_arguments(arguments, device)  # what its forward takes beside the hidden states
        # [N, K] what each linear layer is to come near: its weight as loaded, or as `calibrate.input_noise` made it.
        self.wanted: dict[str, Tensor] = {}
        self.compiled = compile
        self._forward = compiled(run_block) if compile else run_block
        self._kept: tuple[Any, Any] | None = None  # key and value
        self._scales: dict[str, Tensor] = {}  # static ones of the layers' inputs
        self._products: dict[tuple[str, bool, bool], Fp8Products] = {}  # by layer, and how it multiplies
        self.step = torch.zeros(1, dtype=torch.long, device=device)  # of its tuning, the number of the one that runs
        self._load_wanted(block)

    @property
    def device(self) -> torch.device:
        """Where everything of it is."""
        return next(self.module.parameters()).device

    def run(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, H] -> [B, T, H]; compiled code, if any, does not see hooks."""
        return self._forward(self.module, hidden, self.arguments)

    def loss_of(self, loss: Loss, samples: Samples, real: Tensor | None = None) -> Tensor:
        """`loss_of_block` as fast as can be: a plain function is compiled with the block."""
        if self.compiled and isinstance(loss, FunctionType):
            return cast(Tensor, compiled(loss_of_block)(run_block, self.module, self.arguments, loss, samples, real))
        return loss_of_block(self._forward, self.module, self.arguments, loss, samples, real)

    def advance(self, hidden: Tensor) -> None:
        """`calibrate.chain.advance` through this block."""
        advance(self.module, hidden, self.arguments, self._forward)

    @torch.no_grad()
    def load(self, block: Block, arguments: dict[str, Any], fetched: Mapping[str, Tensor] | None = None) -> None:
        """Take over the values of a block of the same make; ``fetched`` are its tensors, nearer than the block's."""
        theirs = fetched or dict(_tensors(block.module))
        for name, tensor in _tensors(self.module):
            tensor.data.copy_(theirs[name])
            if theirs[name].is_cuda:
                theirs[name].record_stream(torch.cuda.current_stream())  # whose memory is another stream's
        for mine, new in zip(pytree.tree_leaves(self.arguments), pytree.tree_leaves(arguments), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)
        self._load_wanted(block)

    def release(self) -> None:
        """Forget what was kept, which holds on to this block, and so to memory that nothing else would free."""
        self._kept = None

    def keep(self, key: Any, make: Callable[[], _Kept]) -> _Kept:
        """What the last call made, if the key is the same; else what ``make`` makes now."""
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # its memory is free before more is taken
            self._kept = (key, make())
        return cast(_Kept, self._kept[1])

    @contextmanager
    def quantized_inputs(self, inputs: Mapping[str, QuantizedInput]) -> Iterator[None]:
        """`calibrate.linear.quantized_inputs`, with static scales in memory that stays where it is."""
        with quantized_inputs(self.module, with_scales(inputs, self._hold)):
            yield

    @contextmanager
    def fp8_matmuls(self, schemes: Mapping[str, QuantScheme]) -> Iterator[None]:
        """`calibrate.linear.fp8_matmuls` for these layers, in memory that stays where it is."""
        products = {}
        for name, scheme in schemes.items():
            rows = MOST_CLIP * self.wanted[name].abs().amax(1, keepdim=True).float()
            step = self.step if takes_dither(scheme) else None
            made = Fp8Products(is_exact(scheme), rows, tensor_scale(rows.amax()), step)
            held = self._products.setdefault((name, made.exact, step is not None), made)
            held.row_most.copy_(made.row_most)
            held.scale.copy_(made.scale)
            products[name] = held
        with fp8_matmuls(self.module, products):
            yield

    def _hold(self, name: str, scale: Tensor) -> Tensor:
        return self._scales.setdefault(name, scale.clone()).copy_(scale)

    def _load_wanted(self, block: Block) -> None:
        for name, layer in block.linears().items():
            weight = layer.weight.detach()
            mine = cast(nn.Linear, self.module.get_submodule(name)).weight.detach()
            if name not in self.wanted:
                self.wanted[name] = torch.empty_like(mine, dtype=weight.dtype)
            self.wanted[name].copy_(mine if mine.dtype == weight.dtype else weight)


def loss_of_block(
    forward: Callable[[nn.Module, Tensor, dict[str, Any]], Tensor],
    module: nn.Module,
    arguments: dict[str, Any],
    loss: Loss,
    samples: Samples,
    real: Tensor | None,
) -> Tensor:
    """The loss of a block's output for some samples, scalar float32.

    Args:
        real: [B, T] bool, the tokens that count; None: all.
    """
    inputs, targets, picked = samples
    if picked is not None:
        inputs, targets = inputs.index_select(0, picked), targets.index_select(0, picked)
    return loss(forward(module, inputs, arguments), targets, real)


class Workbench:
    """Loads blocks, into the memory of earlier ones where that is possible."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, compile: bool | None = None) -> None:
        """Args:
        compile: run compiled blocks; None: on a GPU, those large enough to pay for it.
        """
        self._device, self._dtype, self._compile = device, dtype, compile
        # Oldest use first.
        self._made: dict[Any, WorkingBlock] = {}
        self._staging: dict[str, Tensor] = {}  # pinned
        self._loaded: Block | None = None
        self._fetched: tuple[Block, dict[str, Tensor]] | None = None
        self._handing_over = Lock()  # what is loaded, and what was fetched

    def close(self) -> None:
        """Free everything."""
        for working in self._made.values():
            working.release()
        self._made.clear()
        self._staging.clear()
        self._fetched = None

    def fetch(self, block: Block) -> None:
        """Copy the block that is loaded next to the device, or, where that has little room, into pinned memory.

        May run in another thread; a block that is not there when it is loaded is taken from where it is.
        """
        if self._device.type == "cuda":
            with suppress(RuntimeError):  # some systems have little memory that can be pinned
                fetched = self._stage(dict(_tensors(block.module)))
                if self._has_room(sum(tensor.nbytes for tensor in fetched.values())):
                    fetched = {name: tensor.to(self._device, non_blocking=True) for name, tensor in fetched.items()}
                    torch.cuda.current_stream(self._device).synchronize()
                with self._handing_over:
                    if block is not self._loaded:  # or this took too long
                        self._fetched = block, fetched

    def _stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in pinned memory, in that of the last block as far as it fits: to pin more stalls the device."""
        staged = {}
        for name, tensor in tensors.items():
            place = self._staging.get(name)
            if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
                place = torch.empty_like(tensor, memory_format=torch.contiguous_format, pin_memory=True)
            staged[name] = place.copy_(tensor.detach())
        self._staging = staged
        return staged

    def _has_room(self, size: int) -> bool:
        """For a block more of so many bytes, beside what tuning one takes."""
        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + unused >= _TUNING_BLOCKS * size

    def load(self, block: Block, arguments: dict[str, Any]) -> WorkingBlock:
        """``block`` ready to run on the device, with what its forward takes beside the hidden states."""
        make = (_make_of_module(block.module), _make_of_arguments(arguments))
        with self._handing_over:
            fetched, self._fetched, self._loaded = self._fetched, None, block
        if make in self._made:
            working = self._made.pop(make)
            working.load(block, arguments, fetched[1] if fetched is not None and fetched[0] is block else None)
        else:
            fetched = None  # its memory is free before more is taken
            if len(self._made) == _MAKES:
                self._made.pop(next(iter(self._made))).release()  # the one that was not used for longest
            working = WorkingBlock(block, arguments, self._device, self._dtype, compile=self._compiles(block))
        self._made[make] = working
        return working

    def _compiles(self, block: Block) -> bool:
        if self._compile is not None:
            return self._compile
        weights = sum(layer.weight.numel() for layer in block.linears().values())
        return self._device.type == "cuda" and weights >= _COMPILED_WEIGHTS


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _make_of_module(module: nn.Module) -> tuple[Any, ...]:
    """Classes, plain attributes and the shapes of tensors; objects that blocks share count by identity."""
    return tuple(
        (
            name,
            type(part),
            tuple((key, _plain(value)) for key, value in vars(part).items() if _matters(key)),
            tuple((key, tensor.shape, tensor.dtype) for key, tensor in _tensors(part)),
        )
        for name, part in module.named_modules()
    )


def _matters(attribute: str) -> bool:
    # The number of the layer chooses its place in a KV cache, and there is none.
    return not attribute.startswith("_") and attribute not in ("layer_idx", "training")


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple | dict | set | partial):
        return repr(value)
    return value if isinstance(value, int | float | str | None) else id(value)


def _make_of_arguments(arguments: dict[str, Any]) -> tuple[Any, ...]:
    leaves, structure = pytree.tree_flatten(arguments)
    described = ((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else _plain(leaf) for leaf in leaves)
    return (repr(structure), *described)
