"""Triton's interpreter without most of its waste."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Have `triton.language` be patched once a launch for functions that see the same of it, not at each call.

    The interpreter patches it when a kernel is launched, undoes this at its end, and patches it once more at every call
    of a jitted function in between, where all is patched already: half of the time. For processes that interpret.
    """
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[tuple[bool, ...]] = set()

    def patch_lang(fn: FunctionType) -> Any:
        modules = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        seen = tuple(lang in modules for lang in (tl, tl.core))
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return patch(fn)

    def forget(scope: Any) -> None:
        patched.clear()
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_lang, forget
