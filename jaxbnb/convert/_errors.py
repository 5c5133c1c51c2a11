"""What is wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: the file, what was found, what to do."""


class MissingTensorError(CheckpointError):
    """A tensor that was asked for, or that the model needs, is not there."""


class UnsupportedCheckpointError(CheckpointError, NotImplementedError):
    """A checkpoint that may well be sound, in a form that jaxbnb does not read."""
