"""What a run reads before its weights: data and tokenizer, opened and checked."""

from collections.abc import Iterable
from typing import Any

import jax

from jaxbnb.convert import Tokenizer
from jaxbnb.core.processes import check_same as check_processes
from jaxbnb.core.processes import gather
from jaxbnb.data import Batches, Dataset, Encoder
from jaxbnb.finetune._checks import (
    check_folder,
    check_length,
    check_model,
    check_packages,
    check_rows,
    describe_processes,
    open_data,
)
from jaxbnb.finetune._config import ConfigError, TrainConfig
from jaxbnb.finetune._mesh import make_mesh
from jaxbnb.finetune._new_tokens import find_ids
from jaxbnb.finetune._samples import choose_prompts


class Inputs:
    """The data of a run, in batches, with its tokenizer.

    Attributes:
        mesh: mesh of the run; None for a single device.
        dataset: rows to train on.
        eval_dataset: held-out rows; None without any.
        tokenizer: tokenizer, with the new tokens.
        new_ids: ids of the new tokens.
        encoder: what makes tokens and targets of a row.
        prompts: prompts that the report answers.
        batches: batches to train on.
        total: number of steps in the run.

    Args:
        config: the run's config.
        data: rows to train on, instead of the file of the config.
        eval_data: held-out rows, likewise.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Iterable[Any] | None,
        eval_data: Iterable[Any] | None,
    ):
        self._config = config
        # Without collectives, so that a mistake in one process ends them all.
        gather("opening the data", lambda: self._open(data, eval_data))
        check_processes(
            "the config",
            describe_processes(config, self.dataset, self.eval_dataset),
        )
        self.batches = self._make_batches(self.dataset, config.epochs)
        self.total = config.steps or self.batches.count_steps(config.epochs or 1)
        # Bad data is found before the model is loaded.
        if config.steps is not None:
            next(self._make_batches(self.dataset, 1))
        if self.eval_dataset is not None:
            next(self.make_eval_batches())

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run goes on, besides its config."""
        return {"data_fingerprint": self.dataset.fingerprint, "total": self.total}

    def describe(self) -> str:
        """Says how many rows there are, and how full their windows."""
        text = f"rows: {len(self.dataset):,}"
        if self.dataset.num_errors:
            text += f" (left out: {self.dataset.num_errors:,})"
        if self.eval_dataset is not None:
            text += f", {len(self.eval_dataset):,} held out"
        statistics = self.batches.statistics
        if statistics.positions:
            text += f"; windows are {statistics.efficiency:.1%} full"
        return text

    def _make_batches(self, dataset: Dataset, epochs: int | None) -> Batches:
        config = self._config
        return Batches(
            dataset,
            self.encoder,
            batch_size=config.batch,
            accumulate=config.accumulate,
            seq_length=config.seq,
            packing=config.packing,
            seed=config.seed,
            epochs=None if config.steps else epochs or 1,
            truncation=config.truncation,
            is_shared=True,
        )

    def make_eval_batches(self) -> Batches:
        """Makes the held-out batches of an evaluation."""
        config = self._config
        assert self.eval_dataset is not None
        return Batches(
            self.eval_dataset,
            self.encoder,
            batch_size=config.batch,
            seq_length=config.seq,
            packing=config.packing,
            shuffle=False,
            epochs=1,
            truncation=config.truncation,
            is_shared=True,
        )

    def _open(self, data: Any, eval_data: Any) -> None:
        """Opens everything that the run reads, except for the weights."""
        config = self._config
        if jax.process_index() == 0:
            check_packages(config)
        check_folder(config)
        self.mesh = make_mesh(config.mesh)
        check_rows(config, self.mesh)
        self.dataset = open_data("data", config.data, data, config)
        self.eval_dataset = None
        if config.eval is not None or eval_data is not None:
            self.eval_dataset = open_data("eval", config.eval, eval_data, config)
            if self.eval_dataset.shares_source(self.dataset):
                raise ConfigError(
                    "eval holds training data, so its loss would say nothing about new "
                    "text: give rows that are not in data"
                )
        longest = check_length(config)
        self.tokenizer: Tokenizer = config.load_tokenizer()
        self.new_ids = find_ids(config, self.tokenizer)
        vocab_size = check_model(config, self.new_ids)
        self.encoder = Encoder(
            self.tokenizer, loss_on=config.loss_on, vocab_size=vocab_size
        )
        self.prompts = choose_prompts(
            config.prompts, self.eval_dataset or self.dataset, self.encoder, longest
        )
