"""Offline calibrator: a Hugging Face causal LM in, a low-bit checkpoint for vLLM out."""

from calibrate.config import CalibrationConfig, CalibrationError
from calibrate.pipeline import calibrate

__all__ = ["CalibrationConfig", "CalibrationError", "calibrate"]
