"""torch.compile for the quantizer, where there is no kernel of our own."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def compiled(function: Any) -> Any:
    """``function`` compiled for each shape that it meets: a layer shape costs a compilation."""
    # A model with several schemes has several times four of them.
    return torch._dynamo.config.patch(recompile_limit=256)(torch.compile(function, dynamic=False))
