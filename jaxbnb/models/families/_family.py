"""Family: how the checkpoints of one kind of model are read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int


class Sizes(Protocol):
    """The fields of a `DecoderConfig` that fused tensors are divided by."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...


Rows = Callable[[Sizes], list[Int[np.ndarray, " rows"]]]


@dataclasses.dataclass(frozen=True)
class Family:
    """What ``config.json`` and the tensors of a family of models are called.

    The rest of jaxbnb has one set of names, Llama's; see `CausalLM`. To add a family
    whose layers `DecoderConfig` can describe, write one of these and list it in
    `FAMILIES`.

    Attributes:
        read_config: turns the fields of ``config.json`` into those of `DecoderConfig`.
        prefix: of all names but the head's; files of the bare decoder leave it out.
        layers: where the decoder layers are numbered.
        names: our name of a module to theirs, where they differ. A module of a layer
            is named from the layer on, and its experts are numbered where "{}" is.
        fused: modules whose tensors are one in files, to what gives the rows of each.
        renamed: what else names may begin with, as regular expressions, to what they
            stand for.
        ignored: a regular expression for names of tensors that hold no weights.
        transposed: whether files have kernels as ``(out, in)``, as ``torch.nn.Linear``.
    """

    read_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    prefix: str = "model."
    layers: str = "model.layers"
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: tuple[tuple[tuple[str, ...], Rows], ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: str = r".*\.rotary_emb\.inv_freq"
    transposed: bool = True

    def find_rows(self, module: str, config: Sizes) -> tuple[Any, int] | None:
        """Which rows of a fused tensor are a module's, and of how many; else None."""
        for modules, rows in self.fused:
            if module in modules:
                parts = rows(config)
                return parts[modules.index(module)], sum(map(len, parts))
        return None


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def in_order(*sizes: int) -> list[Int[np.ndarray, " rows"]]:
    """The rows of tensors of these sizes, one after the other.

    Example:
        >>> [rows.tolist() for rows in in_order(2, 1)]
        [[0, 1], [2]]
    """
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def qkv_sizes(config: Sizes) -> tuple[int, int, int]:
    """The rows of queries, keys and values."""
    keys = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, keys, keys
