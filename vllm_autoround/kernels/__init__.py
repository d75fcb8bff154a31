"""Tensors in, tensors out: kernels know the format, and neither vLLM nor the calibrator."""
