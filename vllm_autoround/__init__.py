"""vLLM plugin: serves AutoRound checkpoints under the quantization method ``autoround``."""


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: make ``--quantization autoround`` known to vLLM.

    vLLM calls this in every process it starts; registering twice is harmless.
    """
    # Imported here because merely importing this package must not pull in vLLM.
    from vllm_autoround.plugin.config import register_autoround  # noqa: PLC0415

    register_autoround()
