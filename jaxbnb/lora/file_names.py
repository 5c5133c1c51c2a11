"""Adapters under the names, and in the fused layers, of the base model's own files.

PEFT adapts the modules that transformers has. Where one of them is several layers here,
such as GPT-2's ``c_attn``, its adapter is read as one for each of them, which share
``lora_a``; and adapters of theirs are written as one whose rank is the sum of theirs,
block by block: ``[A_q; A_k; A_v]`` and ``diag(B_q, B_k, B_v)``. Both are exact.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from jaxbnb.lora._config import FROM_WEIGHT, LoraConfig
from jaxbnb.lora._targets import Linear, head_name, linears

PREFIX = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
# The weight of an adapted head, which PEFT saves with the adapter.
BASE = "base_layer.weight"

Tensors = dict[str, np.ndarray]


class FileLayer(NamedTuple):
    """What a layer is in the base model's files.

    Attributes:
        name: of the module, numbered.
        rows: which of its outputs are the layer's; None for all.
        total: how many outputs it has; None where ``rows`` is.
    """

    name: str
    rows: Int[np.ndarray, " rows"] | None = None
    total: int | None = None


@runtime_checkable
class NamesLayers(Protocol):
    """A model that knows what its layers are called in files of its family."""

    def file_layer(self, name: str) -> FileLayer:
        """Of a linear layer by its dotted path, numbered."""
        ...

    def file_name(self, name: str) -> str:
        """The name in files, of one that other versions of transformers use."""
        ...

    def is_transposed_in_files(self) -> bool:
        """Whether its modules are ``Conv1D``, which have kernels as ``(in, out)``."""
        ...


class Piece(NamedTuple):
    """The adapter of one layer, as PEFT has its tensors."""

    name: str
    tensors: Mapping[str, np.ndarray]
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.tensors[A])


def file_layers(model: nnx.Module, names: Sequence[str]) -> dict[str, FileLayer]:
    """What each layer is in files, its own name where the model knows no other."""
    if isinstance(model, NamesLayers):
        return {name: model.file_layer(name) for name in names}
    return {name: FileLayer(name) for name in names}


def is_plain(layers: Mapping[str, FileLayer]) -> bool:
    """Whether files have all layers as they are here."""
    return all(name == layer.name for name, layer in layers.items())


def join(
    pieces: Sequence[Piece], layers: Mapping[str, FileLayer], config: LoraConfig
) -> tuple[dict[str, Piece], dict[str, list[int]]]:
    """The adapters of layers as those of the modules in files.

    Returns:
        One `Piece` for each module, by its name; and, of those whose rank is a sum, the
        summands, in the order of ``layers``.

    Raises:
        ValueError: a fused module is adapted in part and with DoRA, or started from its
            layers' own weights.
    """
    members: dict[str, list[str]] = {}
    for name, layer in layers.items():
        members.setdefault(layer.name, []).append(name)
    given = {piece.name: piece for piece in pieces}
    joined, summands = {}, {}
    for file, names in members.items():
        found = [given[name] for name in names if name in given]
        if not found:
            continue
        first, total = found[0], layers[names[0]].total
        if total is None:
            joined[file] = first._replace(name=file)
            continue
        _check_start(config, file, names, ValueError)
        if config.use_dora and len(found) < len(names):
            raise ValueError(
                f"{file} is {names} in one; with use_dora it is adapted whole, and "
                f"adapters are on {[piece.name for piece in found]}"
            )
        rows = {name: layers[name].rows for name in names}
        joined[file], is_sum = _stack(file, found, rows, total, len(names))
        if is_sum:
            summands[file] = [given[n].rank if n in given else 0 for n in names]
    return joined, summands


def _stack(
    file: str,
    found: Sequence[Piece],
    rows: Mapping[str, Any],
    total: int,
    members: int,
) -> tuple[Piece, bool]:
    first = found[0]
    is_shared = len(found) == members and all(
        piece.scale == first.scale
        and np.array_equal(piece.tensors[A], first.tensors[A])
        for piece in found
    )
    ends = np.cumsum([piece.rank for piece in found])
    b = np.zeros((total, first.rank if is_shared else ends[-1]), np.float32)
    tensors = {A: first.tensors[A], B: b}
    # A module has one scale; by what its layers' differ from it, B does.
    scale = max((piece.scale for piece in found), key=abs)
    for piece, end in zip(found, ends, strict=True):
        columns = slice(None) if is_shared else slice(end - piece.rank, end)
        share = np.float32(piece.scale / scale if scale else 1.0)
        b[rows[piece.name], columns] = piece.tensors[B] * share
    if not is_shared:
        tensors[A] = np.concatenate([piece.tensors[A] for piece in found])
    if MAGNITUDE in first.tensors:
        tensors[MAGNITUDE] = np.empty(total, np.float32)
        for piece in found:
            tensors[MAGNITUDE][rows[piece.name]] = piece.tensors[MAGNITUDE]
    return Piece(file, tensors, scale), not is_shared


def alpha_of(piece: Piece, config: LoraConfig) -> float:
    """The ``lora_alpha`` that gives a piece its scale."""
    rank = math.sqrt(piece.rank) if config.use_rslora else piece.rank
    # A float32 that was meant to be a decimal.
    return float(f"{piece.scale * rank:.6g}")


def has_head(model: nnx.Module, tensors: Tensors) -> bool:
    """Whether any tensor is for the head that a tied model would have of its own."""
    names = head_name(model)
    if not names or not isinstance(model, NamesLayers):
        return False
    heads = {model.file_layer(name).name for name in names}
    return any(_parsed(model, key)[0] in heads for key in tensors)


def split(
    model: nnx.Module,
    tensors: Tensors,
    config: LoraConfig,
    summands: Mapping[str, Sequence[int]],
) -> tuple[Tensors, LoraConfig]:
    """Tensors and configuration of modules in files as those of layers.

    What belongs to no layer, or does not fit it, keeps its name, for who checks them.

    Raises:
        NotImplementedError: a fused module starts from its weight.
    """
    found = linears(model)
    layers = file_layers(model, [name for linear in found for name in linear.names])
    if is_plain(layers):
        return tensors, config
    members: dict[str, list[str]] = {}
    for name, layer in layers.items():
        members.setdefault(layer.name, []).append(name)
    new, ranks, alphas = {}, {}, {}
    for key, tensor in tensors.items():
        file, kind = _parsed(model, key)
        names = members.get(file, [])
        is_good = bool(names) and (
            layers[names[0]].total is None
            or kind == A
            or tensor.shape[:1] == (layers[names[0]].total,)
        )
        if not is_good:
            new[key] = tensor
            continue
        if len(names) > 1:
            _check_start(config, file, names, NotImplementedError)
        whole = config.rank_of(file)
        parts = summands.get(file, ())
        has_parts = len(parts) == len(names) and sum(parts) == whole and min(parts) >= 0
        ends = np.cumsum(parts) if has_parts else [whole] * len(names)
        for i, name in enumerate(names):
            rank = parts[i] if has_parts else whole
            if not rank:
                continue
            # Without summands all of it, of whatever rank, for who checks it.
            columns = slice(ends[i] - rank, ends[i]) if has_parts else slice(None)
            part = _part(tensor, kind, layers[name].rows, columns)
            new[f"{PREFIX}{name}.{kind}"] = part
            ranks[name] = int(rank)
            share = rank / whole
            alpha = config.alpha_of(file)
            if has_parts:
                alpha *= math.sqrt(share) if config.use_rslora else share
            alphas[name] = float(f"{alpha:.6g}")
    return new, _renamed(config, found, ranks, alphas)


def _part(
    tensor: np.ndarray, kind: str, rows: Any, columns: slice
) -> Float[np.ndarray, "..."]:
    if kind == A:
        return tensor[columns]
    tensor = tensor if rows is None else tensor[rows]
    return tensor[:, columns] if kind == B and tensor.ndim == 2 else tensor


def _parsed(model: nnx.Module, key: str) -> tuple[str, str]:
    """The module in files, and which tensor of its adapter."""
    name = key.removeprefix(PREFIX)
    for kind in (A, B, MAGNITUDE, BASE):
        if name.endswith(f".{kind}"):
            assert isinstance(model, NamesLayers)
            return model.file_name(name.removesuffix(f".{kind}")), kind
    return name, ""


def _renamed(
    config: LoraConfig,
    found: Sequence[Linear],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> LoraConfig:
    """The configuration with layers by their names here."""
    targets: list[str] = []
    for linear in found:
        chosen = [name for name in linear.names if name in ranks]
        targets += [linear.path] if len(chosen) == len(linear.names) else chosen
    fields = {**vars(config), "target_modules": tuple(dict.fromkeys(targets))}
    # The tensors themselves say it already.
    fields |= dict.fromkeys(("exclude_modules", "layers_to_transform"))
    fields["layers_pattern"] = None
    fields["rank_pattern"] = {
        re.escape(name): rank for name, rank in ranks.items() if rank != config.r
    }
    fields["alpha_pattern"] = {
        re.escape(name): alpha
        for name, alpha in alphas.items()
        if alpha != config.lora_alpha
    }
    # Where there are no tensors, what is wrong is told by their names.
    fields["target_modules"] = fields["target_modules"] or config.target_modules
    return LoraConfig(**fields)


def _check_start(
    config: LoraConfig, file: str, names: Sequence[str], error: type[Exception]
) -> None:
    if config.init_lora_weights in FROM_WEIGHT:
        raise error(
            f"{file} is {list(names)} in one, and init_lora_weights="
            f"{config.init_lora_weights!r} starts from a weight: of the whole it takes "
            "something else than of its parts. Merge the adapter into its base model"
        )
