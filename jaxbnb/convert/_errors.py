"""What is wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: the file, what was found, what to do."""


class MissingTensorError(CheckpointError):
    """A tensor that was asked for, or that the model needs, is not there."""


class UnsupportedCheckpointError(CheckpointError, NotImplementedError):
    """A checkpoint that may well be sound, in a form that jaxbnb does not read."""


class QuantizedTensorError(UnsupportedCheckpointError):
    """Codes of a quantised weight, in float8 or less, with scales stored elsewhere.

    Args:
        path: the file.
        name: name of the tensor.
        dtype: its dtype, as the file calls it.
    """

    def __init__(self, path: object, name: str, dtype: str):
        super().__init__(
            f"{path}: tensor {name!r} is in {dtype}, the codes of a quantised weight "
            "with scales that jaxbnb does not read. Load the checkpoint that it was "
            "made from, with quant= to quantise it, or save it in bfloat16 with the "
            "library that made it"
        )
