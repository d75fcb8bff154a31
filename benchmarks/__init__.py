"""Measurements behind every figure that this project claims; one file a question, run from the repository root."""
