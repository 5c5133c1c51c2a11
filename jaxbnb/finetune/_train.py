"""train: a whole fine-tuning run, from files to files."""

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb import lora
from jaxbnb.convert import save_tokenizer
from jaxbnb.core import tree_nbytes
from jaxbnb.core.files import atomic_write
from jaxbnb.core.process_memory import peak_device_bytes
from jaxbnb.core.processes import any_of, check_shared, gather, on_first
from jaxbnb.core.units import format_bytes
from jaxbnb.data import TrainBatch
from jaxbnb.finetune._checkpoints import Checkpoints
from jaxbnb.finetune._checks import (
    CONFIG_FILE,
    check_same,
    list_formats,
)
from jaxbnb.finetune._config import TrainConfig, read_remat
from jaxbnb.finetune._data import Batch, flatten
from jaxbnb.finetune._display import Display
from jaxbnb.finetune._inputs import Inputs
from jaxbnb.finetune._loop import Loop, StepResult
from jaxbnb.finetune._metrics import (
    Logger,
    MetricsFile,
    make_logger,
    read_metrics,
)
from jaxbnb.finetune._neftune import embedding_noise
from jaxbnb.finetune._new_tokens import add_adapters, make_room
from jaxbnb.finetune._optimizer import make_optimizer, make_schedule
from jaxbnb.finetune._report import write_report
from jaxbnb.finetune._result import TrainResult, show_usage, summarize
from jaxbnb.finetune._samples import answer, is_chat
from jaxbnb.finetune._step import make_loss
from jaxbnb.models import CausalLM, load_pretrained, save_pretrained
from jaxbnb.sharding import place_rest


@dataclasses.dataclass
class _Progress:
    """What a run remembers besides its arrays and the position in its data."""

    step: int = 0
    taken: int = 0
    bad_in_row: int = 0
    seconds: float = 0.0
    tokens: int = 0
    loss: float = math.nan
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    ended_early: bool = False
    peak_bytes: int = 0
    before: list[str] = dataclasses.field(default_factory=list)


def train(
    config: TrainConfig,
    *,
    data: Iterable[Any] | None = None,
    eval_data: Iterable[Any] | None = None,
    loggers: Sequence[Logger] = (),
) -> TrainResult:
    """Fine-tunes a model on data, and writes all that comes of it to ``config.out``.

    The folder gets ``adapter`` in PEFT's format (with ``full``, ``model``), the same
    after the best evaluation as ``best``, ``metrics.jsonl`` (a JSON object for each
    step and each evaluation), ``loss.png``, ``report.html``, ``config.yaml`` and
    ``checkpoints``. `jaxbnb.finetune.TrainConfig` says what can be chosen.

    An interrupt (Ctrl-C) or SIGTERM ends the run after the current step, with a
    checkpoint. With ``resume``, a run goes on from its last checkpoint, however it
    ended; on a CPU, with the losses that it would have had, bit for bit.

    A step with a loss or gradients that are not finite is not taken. It is counted, and
    ``max_bad_steps`` of them in a row end the run.

    Under `jax.distributed`, all processes call this with the same config, on a folder
    that they share. Every device of every process gets the model and its part of each
    batch. Each process reads its part of the data and writes its part of a checkpoint,
    and process 0 writes everything else. The losses are those of one process, up to the
    order of sums. A signal to any process ends the run in all.

    Args:
        config: the run.
        data: rows to train on, instead of the file ``config.data``: see
            `load_dataset`.
        eval_data: held-out rows, instead of the file ``config.eval``.
        loggers: objects that get the figures of each step too, in process 0.

    Returns:
        What it came to, as a `TrainResult`.

    Raises:
        ConfigError: the config contradicts the model, the data, or the run in ``out``.
        DataError: the data cannot be read, or has nothing to train on.
        FileExistsError: ``out`` holds a run already, and ``resume`` is false.
        FloatingPointError: too many steps in a row were not finite.
        OSError: a file or a checkpoint cannot be read or written.
        ProcessError: another process has failed, has another config or other data, or
            does not see ``out``.

    Example:
        >>> from jaxbnb.finetune import TrainConfig, train
        >>> config = TrainConfig(
        ...     model="SmolLM2-135M-Instruct", data="chats.jsonl", out="run", steps=100)
        >>> result = train(config)  # doctest: +SKIP
        >>> result.loss  # doctest: +SKIP
        1.83
    """
    return _Run(config, data, eval_data, loggers).execute()


class _Run:
    """A run, from its inputs to its files: everything that its parts share."""

    def __init__(self, config, data, eval_data, loggers):
        self.config: TrainConfig = config
        self.out = Path(config.out)
        self.is_first = jax.process_index() == 0
        self.loggers: list[Logger] = list(loggers) if self.is_first else []
        self.inputs = Inputs(config, data, eval_data)
        self.total = self.inputs.total
        self.save_every = config.save_every or max(1, -(-self.total // 10))
        self.eval_every = config.eval_every or self.save_every
        self.progress = _Progress()
        self.read_bytes = 0
        # The signal that this process got, and the one that ends the run; 0 for none.
        self.signal = self.stopped_by = 0

    def execute(self) -> TrainResult:
        """Trains, and writes everything."""
        on_first(
            f"creating {self.out}",
            lambda: self.out.mkdir(parents=True, exist_ok=True),
        )
        check_shared(self.out)
        checkpoints = Checkpoints(self.out / "checkpoints", keep=self.config.keep)
        last = checkpoints.last_step
        are_prompts_new = False
        if last is not None:
            saved = checkpoints.restore_progress(last)
            check_same(self.config, saved["config"], self.inputs.identity(), saved)
            self.inputs.batches.set_state(saved["batches"])
            self.progress = _Progress(**saved["progress"])
            prompts = saved["config"]["prompts"]
            are_prompts_new = prompts != self.config.to_dict()["prompts"]
        on_first("writing the config", lambda: _write_config(self.config, self.out))
        with contextlib.ExitStack() as stack:
            stack.callback(checkpoints.close)
            stack.callback(self._close_logs)
            # Before minutes go into the weights: a service may want a login.
            gather("opening the logs", lambda: self._open_logs(last))
            model = self._load_model()
            display = Display(
                self.total, self.progress.step, is_quiet=not self.is_first
            )
            stack.callback(display.close)
            result, usage = self._run_model(
                model, checkpoints, last, are_prompts_new, display
            )
        for line in summarize(result, self.config, usage):
            display.say(line)
        return result

    def _run_model(
        self,
        model: CausalLM,
        checkpoints: Checkpoints,
        last: int | None,
        are_prompts_new: bool,
        display: Display,
    ) -> tuple[TrainResult, list[str]]:
        """Trains the model and writes it; also returns the commands to use it."""
        self.weight_bytes = tree_nbytes(model)
        self.formats = list_formats(model)
        if not self.config.full:
            add_adapters(model, self.config, self.inputs.new_ids)
        # The adapters have been made on one device.
        nnx.update(model, place_rest(nnx.state(model), self.inputs.mesh))
        schedule = make_schedule(self.config, self.total)
        self._announce(display, last)
        # The model is the one before training, also in a run that goes on.
        if last is None or are_prompts_new:
            if self.inputs.prompts:
                display.say("answering the prompts of the report, for later comparison")
            self.progress.before = answer(
                model, self.inputs.prompts, self.inputs.tokenizer
            )
        with embedding_noise(model, self.config.neftune_alpha, seed=self.config.seed):
            loop = Loop(
                model,
                make_optimizer(self.config, schedule),
                make_loss(read_remat(self.config.remat)),
                wrt=nnx.Param if self.config.full else nnx.LoRAParam,
                max_grad_norm=self.config.max_grad_norm,
                seed=self.config.seed,
            )
            display.say("compiling the step")
            loop.start(_empty_batch(self.config))
            if last is not None:
                loop.state = checkpoints.restore_state(last, loop.state)
            with self._signals(display):
                self._train(loop, model, checkpoints, schedule, display)
            loop.write_back()
        checkpoints.wait()
        result = self._make_result(loop)
        if not result.is_complete:
            return result, []
        self._save_model(model, "model" if self.config.full else "adapter")
        texts = [prompt.text for prompt in self.inputs.prompts]
        samples = zip(texts, self.progress.before, self._answer(model), strict=True)
        result = dataclasses.replace(result, samples=tuple(samples))
        usage = show_usage(
            self.config,
            is_chat=is_chat(self.inputs.dataset, self.inputs.encoder),
            vocab_size=model.config.vocab_size,
        )
        on_first("writing the report", lambda: self._report(result, usage))
        return result, usage

    def _answer(self, model: CausalLM) -> list[str]:
        return answer(model, self.inputs.prompts, self.inputs.tokenizer)

    def _open_logs(self, last: int | None) -> None:
        if self.is_first:
            metrics = MetricsFile(self.out, -1 if last is None else last)
            self.loggers.insert(0, metrics)
            for name in self.config.report_to:
                self.loggers.append(make_logger(name, self.config, self.progress.step))

    def _close_logs(self) -> None:
        for logger in self.loggers:
            logger.close()

    def _report(self, result: TrainResult, usage: list[str]) -> None:
        lines = read_metrics(self.out)
        data = self.inputs.describe()
        write_report(self.config, self.out, result, lines, data, usage)

    def _train(self, loop, model, checkpoints, schedule, display) -> None:
        """Takes the steps that are left."""
        progress = self.progress
        if progress.step == 0:
            self._evaluate(loop, model, display)
        while progress.step < self.total and not progress.ended_early:
            before = self.inputs.batches.statistics.tokens
            batch = next(self.inputs.batches)
            tokens = self.inputs.batches.statistics.tokens - before
            number = progress.step + 1
            result = loop.step(flatten(batch), f"the batch of step {number}")
            self._count(result, tokens, number)
            rate = float(schedule(progress.taken - result.is_taken))
            self._log(number, _measure(result, batch, tokens, rate))
            display.step(number, self._note(result), self._seconds_left())
            self._check_finite(result, batch, number, checkpoints, display)
            if number % self.eval_every == 0 or number == self.total:
                self._evaluate(loop, model, display)
            is_last = number == self.total or progress.ended_early
            # A signal may have reached one process only, or each in another step.
            self.stopped_by = any_of(self.signal)
            if is_last or number % self.save_every == 0 or self.stopped_by:
                self._save(loop, checkpoints)
            if self.stopped_by:
                break

    def _count(self, result: StepResult, tokens: int, number: int) -> None:
        progress = self.progress
        progress.step = number
        progress.seconds += result.seconds
        progress.tokens += tokens
        if result.is_taken:
            progress.loss = result.loss
            progress.taken += 1
            progress.bad_in_row = 0
        else:
            progress.bad_in_row += 1

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        for logger in self.loggers:
            logger.log(step, values)

    def _note(self, result: StepResult) -> str:
        progress = self.progress
        parts = [
            f"loss {result.loss:.4f}" if result.is_taken else "not taken",
            f"{progress.tokens / progress.seconds:.0f} tokens/s",
        ]
        if progress.eval_loss is not None:
            parts.append(f"held-out {progress.eval_loss:.4f}")
        memory = peak_device_bytes()
        if memory is not None:
            parts.append(f"memory {format_bytes(memory)}")
        return "  ".join(parts)

    def _seconds_left(self) -> float:
        progress = self.progress
        return progress.seconds / progress.step * (self.total - progress.step)

    def _check_finite(self, result, batch, number, checkpoints, display) -> None:
        """Reports a step that was not taken, and ends the run after several."""
        if result.is_taken:
            return
        problem = result.describe_problem(number)
        rows = sorted(set(batch.rows))
        places = ", ".join(self.inputs.dataset.describe(row) for row in rows[:5])
        if len(rows) > 5:
            places += f" and {len(rows) - 5} more"
        if self.progress.bad_in_row < self.config.max_bad_steps:
            display.say(f"{problem}, so the step was not taken. Its rows: {places}")
            return
        checkpoints.wait()
        last = checkpoints.last_step
        where = "" if last is None else f" The last checkpoint is of step {last}."
        raise FloatingPointError(
            f"{problem}; steps in a row that were not finite: "
            f"{self.progress.bad_in_row}. Lower the learning rate, or look at these "
            f"rows: {places}.{where}"
        )

    def _evaluate(self, loop, model, display) -> None:
        if self.inputs.eval_dataset is None:
            return
        progress = self.progress
        loss = loop.evaluate(
            Batch(batch.tokens[0], batch.mask[0], batch.segment_ids[0])
            for batch in self.inputs.make_eval_batches()
        )
        progress.eval_loss = loss
        values = {"eval_loss": loss, "eval_perplexity": _exp(loss)}
        self._log(progress.step, values)
        display.say(
            f"step {progress.step}: held-out loss {loss:.4f}, perplexity "
            f"{_exp(loss):.2f}"
        )
        if progress.best_eval_loss is None or loss < progress.best_eval_loss:
            progress.best_eval_loss, progress.best_step = loss, progress.step
            progress.evaluations_without_gain = 0
            if progress.step:
                loop.write_back()
                self._save_model(model, "best")
            return
        progress.evaluations_without_gain += 1
        patience = self.config.patience
        if patience is not None and progress.evaluations_without_gain >= patience:
            progress.ended_early = True
            display.say(
                f"no lower held-out loss in {patience} evaluations: the run ends early"
            )

    def _save(self, loop: Loop, checkpoints: Checkpoints) -> None:
        self.progress.peak_bytes = max(loop.peak_bytes, self.progress.peak_bytes)
        checkpoints.save(
            self.progress.step,
            loop.state,
            {
                "progress": dataclasses.asdict(self.progress),
                "batches": self.inputs.batches.get_state(),
                "config": self.config.to_dict(),
                **self.inputs.identity(),
            },
        )

    def _save_model(self, model: CausalLM, name: str) -> None:
        """Writes the model or its adapter to a folder, with a tokenizer that is new."""
        folder, source = self.out / name, self.config.model
        if self.config.full:
            on_first(f"replacing {folder}", lambda: _remove(folder))
            save_pretrained(model, folder, source=source)
        else:
            lora.save_adapter(model, folder, base_model_name_or_path=source)
        if self.inputs.new_ids:
            on_first(
                f"writing the tokenizer to {folder}",
                lambda: save_tokenizer(self.inputs.tokenizer, folder),
            )

    @contextlib.contextmanager
    def _signals(self, display: Display) -> Iterator[None]:
        """Lets Ctrl-C and SIGTERM end the run after the current step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number, _):
            self.signal = number
            display.say("stopping after this step; once more to stop at once")
            signal.signal(number, before[number])

        before = {
            number: signal.getsignal(number)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        for number in before:
            signal.signal(number, request)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _load_model(self) -> CausalLM:
        config = self.config
        dtype = jnp.dtype(config.dtype)

        def count(name: str, nbytes: int) -> None:
            self.read_bytes += nbytes

        model = load_pretrained(
            config.model,
            quant=config.quant_config(),
            dtype=dtype,
            mesh=self.inputs.mesh,
            on_read=count,
        )
        make_room(model, self.inputs.new_ids)
        return model

    def _announce(self, display: Display, last: int | None) -> None:
        config = self.config
        what = f"adapters of rank {config.rank}"
        if config.full or config.adapter:
            what = (
                f"the adapter {config.adapter}" if config.adapter else "all parameters"
            )
        frozen = f" over {' and '.join(self.formats)}" if self.formats else ""
        display.say(
            f"{config.model}: {format_bytes(self.weight_bytes)} of weights; trains "
            f"{what}{frozen} with {config.optimizer}"
        )
        if self.inputs.new_ids:
            new = zip(config.new_tokens or (), self.inputs.new_ids, strict=True)
            display.say(
                "new tokens: " + ", ".join(f"{token} ({id_})" for token, id_ in new)
            )
        rows = config.batch * config.accumulate
        display.say(
            f"{self.inputs.describe()}; steps: {self.total}, each of {rows} x "
            f"{config.seq} tokens"
        )
        if self.inputs.mesh is not None:
            axes = ", ".join(
                f"{name}={n}" for name, n in self.inputs.mesh.shape.items()
            )
            read = gather("counting what was read", lambda: self.read_bytes)
            display.say(
                f"processes: {len(read)}, with a mesh of {axes}; read of the weights: "
                + ", ".join(map(format_bytes, sorted({*read})))
            )
        if last is not None:
            display.say(f"goes on after step {last}")
        elif config.resume:
            display.say(f"no checkpoint in {self.out} yet: starts from the beginning")

    def _make_result(self, loop: Loop) -> TrainResult:
        progress, statistics = self.progress, self.inputs.batches.statistics
        is_complete = progress.step >= self.total or progress.ended_early
        return TrainResult(
            out=str(self.out),
            steps=progress.step,
            total_steps=self.total,
            loss=progress.loss,
            eval_loss=progress.eval_loss,
            best_eval_loss=progress.best_eval_loss,
            best_step=progress.best_step,
            is_complete=is_complete,
            ended_early=progress.ended_early,
            is_preempted=not is_complete and self.stopped_by == signal.SIGTERM,
            skipped_steps=progress.step - progress.taken,
            truncated_rows=statistics.truncated,
            skipped_rows=sum(statistics.skipped.values()),
            seconds=progress.seconds,
            tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
            efficiency=statistics.efficiency,
            weight_bytes=self.weight_bytes,
            trainable_bytes=loop.trainable_bytes,
            optimizer_bytes=loop.optimizer_bytes,
            peak_bytes=max(loop.peak_bytes, progress.peak_bytes),
        )


def _write_config(config: TrainConfig, out: Path) -> None:
    with atomic_write(out / CONFIG_FILE) as temporary:
        dataclasses.replace(config, resume=False).save(temporary.with_suffix(".yaml"))
        os.replace(temporary.with_suffix(".yaml"), temporary)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _measure(
    result: StepResult, batch: TrainBatch, tokens: int, rate: float
) -> dict[str, Any]:
    """Returns the figures of a step, for metrics.jsonl."""
    values: dict[str, Any] = {
        "loss": result.loss,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "targets": int(batch.mask[..., 1:].sum()),
        "tokens": tokens,
        "seconds": result.seconds,
        "tokens_per_second": tokens / result.seconds,
    }
    memory = peak_device_bytes()
    if memory is not None:
        values["memory_bytes"] = memory
    return values if result.is_taken else {**values, "skipped": True}


def _empty_batch(config: TrainConfig) -> Batch:
    shape = (config.batch, config.seq)
    zeros = np.zeros(shape, np.int32)
    return Batch(zeros, np.ones(shape, bool), zeros)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
