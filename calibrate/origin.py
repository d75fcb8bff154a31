"""What an exporter knows of the model it writes, beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibrate.config import CalibrationError

Shapes = Mapping[str, tuple[int, int]]  # [rows, columns] of each quantized layer by full name


@dataclass(frozen=True, slots=True)
class Origin:
    """A model's folder, and its config.json without anything about quantization."""

    folder: Path
    config: Mapping[str, Any]


def exactly(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A matrix of finite values in another dtype, without rounding.

    Raises:
        CalibrationError: names the first value that ``dtype`` cannot hold.
    """
    converted = values.to(dtype)
    if torch.equal(converted.float(), values.float()):
        return converted
    row, column = (converted.float() != values.float()).nonzero()[0].tolist()
    raise CalibrationError(
        f"{what} {values[row, column].item():.9g} of row {row}, group {column} is not a "
        f"{str(dtype).removeprefix('torch.')} number, and rounding it would change the weights"
    )
