"""Family: how to read the checkpoints of one kind of model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int


class Sizes(Protocol):
    """The fields of a `DecoderConfig` that decide how fused tensors are divided."""

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
    """The names of config fields and tensors in one family of models.

    The rest of jaxbnb uses one set of names, Llama's; see `CausalLM`. To add a family
    with layers that `DecoderConfig` can describe, write a `Family` and list it in
    `FAMILIES`.

    Attributes:
        read_config: turns the fields of ``config.json`` into those of `DecoderConfig`,
            or of the config that ``kind`` says.
        prefix: start of all names except the head's; files of the bare decoder leave it
            out.
        layers: path that the decoder layers are numbered under.
        names: the family's name for each of our modules, where they differ. A module
            inside a layer is named from the layer on; "{}" stands for an expert's
            number. In a model with several stacks, it has its whole path, and "{}"
            stands for the layer's number. An encoder's names are whole, too.
        fused: pairs of modules that share a tensor in files, and a function that
            returns the rows of each.
        renamed: other starts that names may have, as regular expressions, and their
            replacements.
        in_memory: starts of names in files, as regular expressions, and what they are
            in a model of transformers, and so in PEFT's files; only where these differ.
        ignored: regular expression for names of tensors that do not hold weights.
        transposed: whether files hold kernels as ``(out, in)``, like
            ``torch.nn.Linear``.
        kind: "decoder", "encoder-decoder", "encoder" or "image-decoder".
        vary: function from a config to the family with the names of that variant; None
            if all variants have the same names.
        stacked_experts: whether all experts of a layer share a tensor, with kernels as
            ``(experts, in, out)``, and without ".weight" in its name.
        head: name of the output head in adapters' files. transformers 5 has one name
            for almost all families, whatever the name in checkpoints.
        is_tied_by_file: whether transformers decides by the tensors in a file if the
            embedding is the head, whatever its config says.
    """

    read_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    prefix: str = "model."
    layers: str = "model.layers"
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: tuple[tuple[tuple[str, ...], Rows], ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    in_memory: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: str = r".*\.rotary_emb\.inv_freq"
    transposed: bool = True
    kind: str = "decoder"
    vary: "Callable[[Any], Family] | None" = None
    stacked_experts: bool = False
    head: str = "lm_head"
    is_tied_by_file: bool = False

    def find_rows(self, module: str, config: Sizes) -> tuple[Any, int] | None:
        """Returns a module's rows in a fused tensor and how many that has, or None."""
        for modules, rows in self.fused:
            if module in modules:
                parts = rows(config)
                return parts[modules.index(module)], sum(map(len, parts))
        return None


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def in_order(*sizes: int) -> list[Int[np.ndarray, " rows"]]:
    """Returns the rows of tensors of these sizes, one after the other.

    Example:
        >>> [rows.tolist() for rows in in_order(2, 1)]
        [[0, 1], [2]]
    """
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def by_group(config: Sizes) -> list[Int[np.ndarray, " rows"]]:
    """Finds the rows of q, k and v if each head of keys follows its queries.

    In a file, each group is the queries that share a head of keys, then that head, then
    its head of values.
    """
    groups, dim = config.num_key_value_heads, config.head_dim
    heads = config.num_attention_heads // groups + 2
    rows = np.arange(groups * heads * dim).reshape(groups, heads, dim)
    return [part.ravel() for part in (rows[:, :-2], rows[:, -2], rows[:, -1])]


def qkv_sizes(config: Sizes) -> tuple[int, int, int]:
    """Returns the numbers of rows of queries, keys and values."""
    keys = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, keys, keys
