"""The errors of checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message says why, and what to do."""


class MissingTensorError(CheckpointError):
    """A requested tensor, or one that the model needs, is missing."""


class UnsupportedCheckpointError(CheckpointError, NotImplementedError):
    """A checkpoint is in a form that jaxbnb does not read, although it may be sound."""


class QuantizedTensorError(UnsupportedCheckpointError):
    """A tensor holds codes of a quantised weight, in float8 or smaller.

    Their scales are stored elsewhere.

    Args:
        path: path of the file.
        name: name of the tensor.
        dtype: the file's name of its dtype.
    """

    def __init__(self, path: object, name: str, dtype: str):
        super().__init__(
            f"{path}: tensor {name!r} is in {dtype}, the codes of a quantised weight "
            "with scales that jaxbnb does not read. Load the original checkpoint, with "
            "quant= to quantise it, or save it in bfloat16 with the library that wrote "
            "it"
        )
