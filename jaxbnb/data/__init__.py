"""Data to train on: rows, the tokens that are targets, and batches that resume."""

from jaxbnb.data._batches import Batches, TrainBatch
from jaxbnb.data._dataset import Dataset, load_dataset
from jaxbnb.data._encoder import Encoder, Example, Prompt
from jaxbnb.data._errors import DataError
from jaxbnb.data._files import BadRow
from jaxbnb.data._reader import Statistics
from jaxbnb.data._show import show_example

__all__ = [
    "BadRow",
    "Batches",
    "DataError",
    "Dataset",
    "Encoder",
    "Example",
    "Prompt",
    "Statistics",
    "TrainBatch",
    "load_dataset",
    "show_example",
]
