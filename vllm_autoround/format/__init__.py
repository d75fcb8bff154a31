"""The shared core: what a checkpoint means. Knows neither vLLM nor transformers."""
