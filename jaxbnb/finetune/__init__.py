"""Fine-tuning: packed text, the loss, the train step, and its memory."""

from jaxbnb.core.processes import ProcessError
from jaxbnb.data import (
    Batches,
    DataError,
    Dataset,
    Encoder,
    Example,
    Prompt,
    Statistics,
    TrainBatch,
    load_dataset,
    show_example,
)
from jaxbnb.finetune._checkpoints import RunCheckpointError
from jaxbnb.finetune._config import (
    ConfigError,
    TrainConfig,
    mesh_sizes,
    read_config,
    read_remat,
)
from jaxbnb.finetune._data import pack
from jaxbnb.finetune._fit import FitResult, fit
from jaxbnb.finetune._loss import next_token_loss, perplexity
from jaxbnb.finetune._metrics import Logger
from jaxbnb.finetune._optimizer_names import find_optimizer
from jaxbnb.finetune._preference import (
    PairLosses,
    PreferenceBatch,
    add_reward_head,
    completion_log_probs,
    compute_rewards,
    dpo_loss,
    dpo_losses,
    make_preference_batch,
    reward_loss,
    reward_losses,
)
from jaxbnb.finetune._result import TrainResult
from jaxbnb.finetune._step import (
    advance_rngs,
    compile_train_step,
    peak_bytes,
    split_trainable,
    train_step,
)
from jaxbnb.finetune._train import train

__all__ = [
    "Batches",
    "ConfigError",
    "DataError",
    "Dataset",
    "Encoder",
    "Example",
    "FitResult",
    "Logger",
    "PairLosses",
    "PreferenceBatch",
    "ProcessError",
    "Prompt",
    "RunCheckpointError",
    "Statistics",
    "TrainBatch",
    "TrainConfig",
    "TrainResult",
    "add_reward_head",
    "advance_rngs",
    "compile_train_step",
    "completion_log_probs",
    "compute_rewards",
    "dpo_loss",
    "dpo_losses",
    "find_optimizer",
    "fit",
    "load_dataset",
    "make_preference_batch",
    "mesh_sizes",
    "next_token_loss",
    "pack",
    "peak_bytes",
    "perplexity",
    "read_config",
    "read_remat",
    "reward_loss",
    "reward_losses",
    "show_example",
    "split_trainable",
    "train",
    "train_step",
]
