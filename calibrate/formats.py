"""The formats that a checkpoint can be written in; imports nothing, so that a command line starts quickly."""

FORMATS = (
    "compressed-tensors",  # vLLM and transformers, with or without the plugin
    "auto_round",
    "auto_gptq",
    "auto_awq",
    "gguf:q4_0",  # llama.cpp, symmetric
    "gguf:q4_1",  # llama.cpp, with zero points
)


def subfolder(name: str) -> str:
    """The folder of a format where several are written at once."""
    return name.replace(":", "-")
