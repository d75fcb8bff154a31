"""The errors of the format; this module imports nothing, so that a command line starts quickly."""


class SchemeError(ValueError):
    """A scheme that does not exist, or does not fit the layer it is meant for."""


class ManifestError(ValueError):
    """A quantization_config, or the tensors beside it, that cannot be read with certainty."""
