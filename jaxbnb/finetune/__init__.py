"""Fine-tuning: packed text, the loss, the train step, and its memory."""

from jaxbnb.data import (
    Batches,
    DataError,
    Dataset,
    Encoder,
    Example,
    Statistics,
    TrainBatch,
    load_dataset,
    show_example,
)
from jaxbnb.finetune._data import pack
from jaxbnb.finetune._fit import FitResult, fit
from jaxbnb.finetune._loss import next_token_loss, perplexity
from jaxbnb.finetune._step import (
    advance_rngs,
    compile_train_step,
    peak_bytes,
    split_trainable,
    train_step,
)

__all__ = [
    "Batches",
    "DataError",
    "Dataset",
    "Encoder",
    "Example",
    "FitResult",
    "Statistics",
    "TrainBatch",
    "advance_rngs",
    "compile_train_step",
    "fit",
    "load_dataset",
    "next_token_loss",
    "pack",
    "peak_bytes",
    "perplexity",
    "show_example",
    "split_trainable",
    "train_step",
]
