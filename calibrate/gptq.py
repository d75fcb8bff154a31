"""Rounding without tuning: GPTQ on fixed scales (arXiv:2210.17323), then coordinate descent on the same objective.

With X [T, K] the layer's inputs and H = X^T X, the squared error of the layer's output is, for each row e of W^ - W,

    e H e^T

GPTQ rounds one input feature after the other and lets the features that are left make up for the error. Coordinate
descent goes over the features again: given all others, the best value of feature j is w_j - (e H)_j / H_jj + e_j,
rounded. With the damping that is added to H, it never makes the error larger. Features are taken by falling H_jj, in
both; the scales are those that the search found, so that their order on disk does not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibrate.rounding import Rounding, Target, grid_of

DAMPING = 0.01  # of the mean of H's diagonal, added to it: GPTQ's own
_BLOCK = 128  # features whose effect on the others is applied at once
_SWEEPS = 4  # of coordinate descent at most, to bound the time


@torch.no_grad()
def gptq(target: Target, start: Rounding, hessian: Tensor) -> Tensor:
    """Values q [N, K] of the grid with s (q - z) near to W in the metric of ``hessian``, for `freeze`.

    Args:
        start: whose scales and zero points are kept.
        hessian: H [K, K] float32, symmetric.

    Raises:
        ValueError: H plus damping is not positive definite, so not what X^T X can be.
    """
    order = hessian.diagonal().argsort(descending=True)
    h = hessian[order][:, order].double()
    h.diagonal().add_(DAMPING * h.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    factor, info = torch.linalg.cholesky_ex(h)
    if info.item():
        raise ValueError("the inputs' second moments are not positive definite")
    # Upper factor of the inverse: row j says what an error of feature j is worth in the features after it.
    h = h.float()
    inverse = torch.cholesky_inverse(factor)
    del factor  # 8 bytes K^2
    inverse = torch.linalg.cholesky(inverse, upper=True).float()

    grid = grid_of(target, start)
    scale, zero, weight = (t[:, order] for t in (grid.scale, grid.zero, target.weight.float()))
    values = torch.empty_like(weight)
    wanted = weight.clone()
    for first, last in _blocks(weight.shape[1]):
        errors = torch.empty_like(wanted[:, first:last])
        for j in range(first, last):
            values[:, j] = target.type.round(wanted[:, j] / scale[:, j], zero[:, j])
            error = (wanted[:, j] - scale[:, j] * (values[:, j] - zero[:, j])) / inverse[j, j]
            wanted[:, j:last] -= error[:, None] * inverse[j, j:last]
            errors[:, j - first] = error
        wanted[:, last:] -= errors @ inverse[first:last, last:]

    error = scale * (values - zero) - weight
    for _ in range(_SWEEPS):
        changed = _sweep(target, weight, scale, zero, values, error, h)
        if not changed:
            break
    return values[:, order.argsort()]


def _sweep(
    target: Target, weight: Tensor, scale: Tensor, zero: Tensor, values: Tensor, error: Tensor, h: Tensor
) -> bool:
    """One round of coordinate descent over ``values`` and their ``error``, in place; whether anything changed."""
    changed = torch.zeros((), dtype=torch.bool, device=weight.device)
    for first, last in _blocks(weight.shape[1]):
        slopes = error @ h[:, first:last]  # e H, kept up to date inside the block
        for j in range(first, last):
            best = weight[:, j] + error[:, j] - slopes[:, j - first] / h[j, j]
            value = target.type.round(best / scale[:, j], zero[:, j])
            moved = scale[:, j] * (value - values[:, j])
            values[:, j] = value
            error[:, j] += moved
            slopes += moved[:, None] * h[j, first:last]
            changed |= moved.any()
    return bool(changed)


def _blocks(columns: int) -> list[tuple[int, int]]:
    return [(first, min(first + _BLOCK, columns)) for first in range(0, columns, _BLOCK)]
