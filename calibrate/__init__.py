"""Offline calibrator: a Hugging Face causal LM in, a low-bit checkpoint for vLLM out."""

from typing import TYPE_CHECKING, Any

from calibrate.config import CalibrationConfig, CalibrationError

if TYPE_CHECKING:
    from calibrate.pipeline import calibrate

__all__ = ["CalibrationConfig", "CalibrationError", "calibrate"]


def __getattr__(name: str) -> Any:
    """Import `calibrate`, and with it torch and transformers, only when it is asked for: ``--help`` must be quick."""
    if name != "calibrate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from calibrate.pipeline import calibrate  # noqa: PLC0415

    return calibrate
