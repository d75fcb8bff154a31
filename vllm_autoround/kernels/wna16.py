"""Integer weights of 2 to 8 bits under 16-bit activations, in Triton: one layout and one formula for all widths.

Shapes: M rows of activations, N output rows, K input features, G groups of scales along K. With few rows of activations
the weight is unpacked in registers, between loading and multiplying; with many, a part of it at a time is unpacked to
memory for a plain matmul. Both round ``scale * (code - zero_point)`` once, to the type of the activations, and
accumulate in float32, so that they differ by no more than the order of a sum. Nothing here waits for the GPU, and what
is launched follows from shapes alone: it can be captured in a CUDA graph.

The layout, which `prepare` makes once after loading: 32/gcd(bits, 32) codes are a unit, the least that fills whole
words; 16 units side by side are a block. Slice j of a block, the j-th codes of its units, is 16 neighbouring features:
one step of a tensor core, and never in two groups, because group sizes are multiples of 16. Each thread shifts its own
words by amounts known at compile time: no code moves between threads, however it straddles words.
"""

# Arguments of kernels have no type that Python knows; those known at compile time are upper case, as usual in Triton.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_autoround.format import packing
from vllm_autoround.format.weights import Integer, QuantizedWeight

try:
    import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
except ImportError:  # the layout can be made without it
    triton = None

LANES = 16  # features of a slice: the depth of a tensor core's step, and the least group size
DTYPES = (torch.bfloat16, torch.float16)

# Estimates, to be measured (benchmarks/kernels.py):
FUSED_ROWS = 128  # rows of activations up to which the fused kernel runs
PROGRAMS = 528  # programs that fill a GPU, four for each of 132 multiprocessors; with fewer tiles K is cut too

UNPACKED_BYTES = 128 << 20  # of the weight, unpacked at a time; bounds memory


class Tile(NamedTuple):
    """What one program of the fused kernel computes, and how."""

    m: int  # rows of activations
    n: int  # output rows
    warps: int
    stages: int  # blocks in flight; their activations fill the shared memory


def choose_tile(rows: int, bits: int) -> Tile:
    """The fused kernel's tile for ``rows`` of activations; estimates, to be measured.

    Blocks of odd widths are long (512 features), so that fewer of them fit.
    """
    odd = bits % 2 == 1
    if rows <= 16:
        return Tile(m=16, n=64, warps=4, stages=2 if odd else 4)
    if rows <= 32 or odd:
        return Tile(m=32, n=64, warps=4, stages=2 if odd else 3)
    return Tile(m=64, n=64, warps=4, stages=3)


def unit(bits: int) -> tuple[int, int]:
    """(codes, words) of the shortest run of codes that fills whole words."""
    common = math.gcd(bits, 32)
    return 32 // common, bits // common


def prepare(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Bring an integer weight [N, K] into the kernel's layout; while it runs, its codes are in memory twice more.

    Returns:
        words [ceil(K/block), words of a unit, N, 16] int32: as large as the checkpoint's, the last block aside.
        affine [G, N] int32: the scale as float32, whose low 13 bits are 0, with the zero point in its low 8 bits; four
        bytes a group where the checkpoint has two or three, for one aligned load that can be made ahead.

    Raises:
        ValueError: a weight that the kernel does not take.
    """
    if not isinstance(weight.type, Integer):
        raise ValueError(f"the kernel takes integer weights, got {weight.type}")
    if weight.scale.dtype not in DTYPES:
        raise ValueError(f"scales must be bfloat16 or float16, got {weight.scale.dtype}")
    bits, (rows, columns) = weight.type.bits, weight.codes.shape
    group = min(weight.type.tile(rows, columns).columns, columns)
    if columns % group or tuple(weight.scale.shape) != (rows, columns // group):
        raise ValueError(
            f"a weight [{rows}, {columns}] with scales {list(weight.scale.shape)} has not whole groups of {weight.type}"
        )
    codes_per_unit, words_per_unit = unit(bits)
    block = LANES * codes_per_unit
    codes = torch.nn.functional.pad(weight.codes, (0, -columns % block))
    units = codes.reshape(rows, -1, codes_per_unit, LANES).permute(1, 0, 3, 2)  # [blocks, N, lane, code]
    words = packing.pack(units.reshape(-1, block), bits).view(-1, rows, LANES, words_per_unit)
    zero = int(weight.type.zero) if weight.zero_point is None else weight.zero_point.T.int()
    affine = weight.scale.T.float().contiguous().view(torch.int32) | zero
    return words.permute(0, 3, 1, 2).contiguous(), affine


def wna16_linear(x: Tensor, words: Tensor, affine: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for a weight from `prepare`; the fast twin of `reference.quantized_linear`.

    A torch operator, which torch.compile does not look into. No gradients.

    Args:
        x: [..., K] bfloat16 or float16.
        words, affine: from `prepare`.
        bias: [N] in the type of ``x``, or None.

    Returns:
        [..., N] in the type of ``x``.
    """
    result: Tensor = torch.ops.vllm_autoround.wna16_linear(x, words, affine, bits, bias)
    return result


def _linear(x: Tensor, words: Tensor, affine: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    if triton is None:
        raise RuntimeError("this kernel needs Triton, which is not installed; use kernels.reference")
    if x.dtype not in DTYPES:
        raise ValueError(f"activations must be bfloat16 or float16, got {x.dtype}")
    columns = x.shape[-1]
    if -(-columns // (LANES * unit(bits)[0])) != words.shape[0]:
        raise ValueError(f"the weight was prepared for another number of input features than {columns}")
    flat = x.reshape(-1, columns)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    if flat.shape[0] == 0:
        return _linear_fake(x, words, affine, bits, bias)
    run = fused if flat.shape[0] <= FUSED_ROWS else unpacked
    return run(flat, words, affine, bits, bias).view(*x.shape[:-1], words.shape[2])


def _linear_fake(x: Tensor, words: Tensor, affine: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[2])


def fused(x: Tensor, words: Tensor, affine: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N], unpacking in registers; a weight of few tiles is cut along K as well and summed after."""
    (rows, columns), (blocks, _, features, _) = x.shape, words.shape
    tile = choose_tile(rows, bits)
    n_tiles, m_tiles = -(-features // tile.n), -(-rows // tile.m)
    blocks_each = -(-blocks // max(1, PROGRAMS // (n_tiles * m_tiles)))
    parts = -(-blocks // blocks_each)
    out = x.new_empty(rows, features)
    sums = out if parts == 1 else x.new_empty(parts, rows, features, dtype=torch.float32)
    bias_here, bias_later = (bias, None) if parts == 1 else (None, bias)
    arguments = (x, words, affine, bias_here, sums, rows, features, columns, x.stride(0), blocks, blocks_each)
    _fused_kernel[(n_tiles, m_tiles, parts)](
        *arguments,
        **_constants(bits, columns, affine),
        M_TILE=tile.m,
        N_TILE=tile.n,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if parts > 1:
        parts_tile = 1 << (parts - 1).bit_length()
        size = max(16, 1024 // parts_tile)
        grid = (-(-out.numel() // size),)
        _sum_kernel[grid](sums, bias_later, out, out.numel(), features, parts, PARTS=parts_tile, SIZE=size)
    return out


def unpacked(x: Tensor, words: Tensor, affine: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] by matmuls with parts of the weight, unpacked one after the other."""
    columns, features = x.shape[1], words.shape[2]
    step = max(1, UNPACKED_BYTES // (2 * columns) // 64) * 64
    out = x.new_empty(x.shape[0], features)
    for begin in range(0, features, step):
        end = min(begin + step, features)
        weight = x.new_empty(end - begin, columns)
        grid = (-(-(end - begin) // 64), words.shape[0])
        constants = _constants(bits, columns, affine)
        _unpack_kernel[grid](words, affine, weight, begin, end, features, columns, **constants, N_TILE=64, num_warps=4)
        if bias is None:
            torch.mm(x, weight.T, out=out[:, begin:end])
        else:
            torch.addmm(bias[begin:end], x, weight.T, out=out[:, begin:end])
    return out


def _constants(bits: int, columns: int, affine: Tensor) -> dict[str, Any]:
    codes, _ = unit(bits)
    return {
        "BITS": bits,
        "CODES": codes,
        "FIELD": 1 << ((12 // bits).bit_length() - 1),  # codes that one shift puts in place: 12 bits at most
        "GROUP": 0 if affine.shape[0] == 1 else columns // affine.shape[0],
        "WHOLE": columns % (LANES * codes) == 0,
        "LANES": LANES,
    }


def _jit(*sizes: str) -> Callable[[Callable[..., Any]], Any]:
    """triton.jit, without another compilation for special values of ``sizes``; nothing where Triton is absent."""
    if triton is None:
        return lambda kernel: kernel
    decorator: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=sizes)
    return decorator


@_jit()
def _load_affine(pointers, live):
    """Exponent, fraction (signed, 1 to 2) and value of the scale, and the zero point, all of the pointers' shape.

    The bound on the exponent, which is in the way of no scale in use, keeps the compiler from working it out anew for
    every weight.
    """
    pair = tl.load(pointers, mask=live, other=0)
    exponent = tl.maximum(pair & 0x7F800000, 0x00800000)
    fraction = ((pair & -0x7F800100) | 0x3F800000).to(tl.float32, bitcast=True)
    return exponent, fraction, (pair & -256).to(tl.float32, bitcast=True), (pair & 255).to(tl.float32)


@_jit()
def _next_field(pointers, stride, live, word, BEGIN: tl.constexpr, SIZE: tl.constexpr):
    """Bits BEGIN to BEGIN + SIZE of every unit, at the top of a float32's mantissa, other bits around them.

    ``word`` [N_TILE, LANES] uint32 is the one in which the field before ended; returned is that of this field.
    """
    if BEGIN % 32 == 0:
        word = tl.load(pointers + BEGIN // 32 * stride, mask=live, other=0).to(tl.uint32, bitcast=True)
    if BEGIN % 32 + SIZE > 32:
        following = tl.load(pointers + (BEGIN // 32 + 1) * stride, mask=live, other=0).to(tl.uint32, bitcast=True)
        field = (word >> (BEGIN % 32 - 23 + SIZE)) | (following << (55 - SIZE - BEGIN % 32))
        word = following
    elif BEGIN % 32 + SIZE > 23:
        field = word >> (BEGIN % 32 - 23 + SIZE)
    else:
        field = word << (23 - SIZE - BEGIN % 32)
    return field, word


@_jit()
def _weight(field, exponent, fraction, scale, zero, TOP: tl.constexpr, BITS: tl.constexpr):
    """``scale * (code - zero)`` in float32, exactly; the code begins TOP bits below the top of the field's mantissa.

    Put beside the scale's own exponent it reads 2^exponent * (1 + code / 2^TOP): one logical operation a weight, and
    no conversion. Product and sum are exact, rounded together or apart: TOP + 1 bits, 13 at most, times 11 of scale.
    (Scales below 2^-126, and 0 among them, give weights that are off by less than 2^-110.)
    """
    mantissa = field & (((1 << BITS) - 1) << (23 - TOP))
    number = (mantissa | exponent[:, None].to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    return number * (fraction * (1 << TOP))[:, None] + (scale * (-(1 << TOP) - zero))[:, None]


@_jit("rows", "blocks", "blocks_each")
def _fused_kernel(
    x,
    words,
    affine,
    bias,
    out,
    rows,
    features,
    columns,
    x_stride,
    blocks,
    blocks_each,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    FIELD: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    LANES: tl.constexpr,
    M_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
):
    """One tile [N_TILE, M_TILE] of the transposed output, over the blocks of one part of K.

    The weight is the left operand, which a tensor core takes from registers, where it was unpacked.
    """
    n = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)
    m = tl.program_id(1) * M_TILE + tl.arange(0, M_TILE)
    part = tl.program_id(2)
    lane = tl.arange(0, LANES)
    n_live, m_live = n < features, (m < rows)[None, :]
    x += m[None, :] * x_stride + lane[:, None]
    words += n[:, None] * LANES + lane[None, :]
    affine += n
    total = tl.zeros((N_TILE, M_TILE), tl.float32)
    if GROUP == 0:
        exponent, fraction, scale, zero = _load_affine(affine, n_live)
    for block in range(part * blocks_each, tl.minimum((part + 1) * blocks_each, blocks)):
        pointers = words + block * (CODES * BITS // 32) * features * LANES
        word = tl.zeros((N_TILE, LANES), tl.uint32)
        for j in tl.static_range(CODES):
            k = (block * CODES + j) * LANES
            if GROUP > 0 and j * LANES % GROUP == 0:
                group = tl.minimum(k, columns - 1) // GROUP  # behind the last feature x is 0
                exponent, fraction, scale, zero = _load_affine(affine + group * features, n_live)
            if j % FIELD == 0:
                field, word = _next_field(pointers, features * LANES, n_live[:, None], word, j * BITS, FIELD * BITS)
            weight = _weight(field, exponent, fraction, scale, zero, (FIELD - j % FIELD) * BITS, BITS)
            x_live = m_live if WHOLE else m_live & (k + lane < columns)[:, None]
            total = tl.dot(weight.to(x.dtype.element_ty), tl.load(x + k, mask=x_live, other=0.0), total)
    if bias is not None:
        total += tl.load(bias + n, mask=n_live, other=0.0).to(tl.float32)[:, None]
    out += part * rows * features + m[None, :] * features + n[:, None]
    tl.store(out, total.to(out.dtype.element_ty), mask=n_live[:, None] & m_live)


@_jit("parts")
def _sum_kernel(sums, bias, out, size, features, parts, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """[parts, M, N] float32 -> [M, N], in a fixed order, so that the same input gives the same output."""
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    part = tl.arange(0, PARTS)[:, None]
    live = index < size
    pointers = sums + part * size + index[None, :]
    total = tl.sum(tl.load(pointers, mask=(part < parts) & live[None, :], other=0.0), axis=0)
    if bias is not None:
        total += tl.load(bias + index % features, mask=live, other=0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=live)


@_jit("begin", "end")
def _unpack_kernel(
    words,
    affine,
    weight,
    begin,
    end,
    features,
    columns,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    FIELD: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    LANES: tl.constexpr,
    N_TILE: tl.constexpr,
):
    """One block of N_TILE rows of weight [end - begin, K], which starts at output row ``begin``."""
    row = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)
    block = tl.program_id(1)
    lane = tl.arange(0, LANES)
    n_live = begin + row < end
    affine += begin + row
    words += (block * (CODES * BITS // 32) * features + begin + row[:, None]) * LANES + lane[None, :]
    word = tl.zeros((N_TILE, LANES), tl.uint32)
    if GROUP == 0:
        exponent, fraction, scale, zero = _load_affine(affine, n_live)
    for j in tl.static_range(CODES):
        k = (block * CODES + j) * LANES
        if GROUP > 0 and j * LANES % GROUP == 0:
            group = tl.minimum(k, columns - 1) // GROUP
            exponent, fraction, scale, zero = _load_affine(affine + group * features, n_live)
        if j % FIELD == 0:
            field, word = _next_field(words, features * LANES, n_live[:, None], word, j * BITS, FIELD * BITS)
        value = _weight(field, exponent, fraction, scale, zero, (FIELD - j % FIELD) * BITS, BITS)
        live = n_live[:, None] if WHOLE else n_live[:, None] & (k + lane < columns)[None, :]
        tl.store(weight + row[:, None] * columns + k + lane[None, :], value.to(weight.dtype.element_ty), mask=live)


if not hasattr(torch.ops.vllm_autoround, "wna16_linear"):  # importing this module anew keeps the first definition
    _library = torch.library.Library("vllm_autoround", "FRAGMENT")
    _library.define("wna16_linear(Tensor x, Tensor words, Tensor affine, int bits, Tensor? bias) -> Tensor")
    _library.impl("wna16_linear", _linear, "CompositeExplicitAutograd")
    torch.library.register_fake("vllm_autoround::wna16_linear", _linear_fake, lib=_library)
