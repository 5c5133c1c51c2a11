"""Adapters of fused modules, which are one module in files and several layers here.

PEFT adapts transformers' modules. One of them may be several layers here, such as
GPT-2's ``c_attn``. Reading splits its adapter into one for each layer, and all share
``lora_a``. Writing joins the layers' adapters into one, and its rank is the sum of
their ranks, block by block: ``[A_q; A_k; A_v]`` and ``diag(B_q, B_k, B_v)``. Both are
exact.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from flax import nnx
from jaxtyping import Float

from jaxbnb.lora._config import FROM_WEIGHT, LoraConfig
from jaxbnb.lora._targets import Linear, find_linears
from jaxbnb.lora.file_names import (
    BASE,
    EMBED_A,
    EMBED_B,
    MAGNITUDE,
    PREFIX,
    A,
    B,
    FileLayer,
    Piece,
    Tensors,
    find_file_layers,
    is_plain,
    parse_key,
)

# The tensors that this module splits and joins. BASE is a head's, which is not fused.
_FACTORS: Final = (A, B, MAGNITUDE, EMBED_A, EMBED_B, BASE)


def join(
    pieces: Sequence[Piece], layers: Mapping[str, FileLayer], config: LoraConfig
) -> tuple[dict[str, Piece], dict[str, list[int]]]:
    """Joins the adapters of layers into those of the modules in files.

    Returns:
        A `Piece` for each module, by its name, and the ranks that were added up, in the
        order of ``layers``, for each module that needed it.

    Raises:
        ValueError: a fused module has DoRA in only some of its layers, or adapters that
            started from their layers' weights.
    """
    members: dict[str, list[str]] = {}
    for name, layer in layers.items():
        members.setdefault(layer.name, []).append(name)
    by_name = {piece.name: piece for piece in pieces}
    joined, summands = {}, {}
    for file, names in members.items():
        found = [by_name[name] for name in names if name in by_name]
        if not found:
            continue
        first, total = found[0], layers[names[0]].total
        if total is None:
            joined[file] = first._replace(name=file)
            continue
        _check_start(config, file, names, ValueError)
        if config.use_dora and len(found) < len(names):
            raise ValueError(
                f"{file} is {names} in one; with use_dora it is adapted as a whole, "
                f"and only {[piece.name for piece in found]} have adapters"
            )
        rows = {name: layers[name].rows for name in names}
        joined[file], is_sum = _stack_pieces(file, found, rows, total, len(names))
        if is_sum:
            summands[file] = [by_name[n].rank if n in by_name else 0 for n in names]
    return joined, summands


def _stack_pieces(
    file: str,
    found: Sequence[Piece],
    rows: Mapping[str, Any],
    total: int,
    members: int,
) -> tuple[Piece, bool]:
    """Stacks the adapters of a module's layers; returns whether their ranks add up."""
    first = found[0]
    is_shared = len(found) == members and all(
        piece.scale == first.scale
        and np.array_equal(piece.tensors[A], first.tensors[A])
        for piece in found
    )
    ends = np.cumsum([piece.rank for piece in found])
    b = np.zeros((total, first.rank if is_shared else ends[-1]), np.float32)
    tensors = {A: first.tensors[A], B: b}
    # A module has one scale. B absorbs the ratio of each layer's scale to it.
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


def split(
    model: nnx.Module,
    tensors: Tensors,
    config: LoraConfig,
    summands: Mapping[str, Sequence[int]],
) -> tuple[Tensors, LoraConfig]:
    """Splits the tensors and configuration of modules in files into those of layers.

    A tensor that does not belong to a layer, or does not fit it, keeps its name. The
    caller checks for these.

    Raises:
        NotImplementedError: an adapter of a fused module started from its weight.
    """
    found = find_linears(model)
    layers = find_file_layers(
        model, [name for linear in found for name in linear.names]
    )
    if is_plain(layers):
        return tensors, config
    members: dict[str, list[str]] = {}
    for name, layer in layers.items():
        members.setdefault(layer.name, []).append(name)
    split_tensors, ranks, alphas = {}, {}, {}
    for key, tensor in tensors.items():
        file, kind = parse_key(model, key)
        names = members.get(file, []) if kind in _FACTORS else []
        is_fit = bool(names) and (
            layers[names[0]].total is None
            or kind == A
            or tensor.shape[:1] == (layers[names[0]].total,)
        )
        if not is_fit:
            split_tensors[key] = tensor
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
            # Without summands, take all of it. The caller checks its rank.
            columns = slice(ends[i] - rank, ends[i]) if has_parts else slice(None)
            part = _take_part(tensor, kind, layers[name].rows, columns)
            split_tensors[f"{PREFIX}{name}.{kind}"] = part
            ranks[name] = int(rank)
            share = rank / whole
            alpha = config.alpha_of(file)
            if has_parts:
                alpha *= math.sqrt(share) if config.use_rslora else share
            alphas[name] = float(f"{alpha:.6g}")
    return split_tensors, _rename_layers(config, found, ranks, alphas)


def _take_part(
    tensor: np.ndarray, kind: str, rows: Any, columns: slice
) -> Float[np.ndarray, "..."]:
    if kind == A:
        return tensor[columns]
    tensor = tensor if rows is None else tensor[rows]
    return tensor[:, columns] if kind == B and tensor.ndim == 2 else tensor


def _rename_layers(
    config: LoraConfig,
    found: Sequence[Linear],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> LoraConfig:
    """Returns the configuration with our names for layers."""
    targets: list[str] = []
    for linear in found:
        chosen = [name for name in linear.names if name in ranks]
        targets += [linear.path] if len(chosen) == len(linear.names) else chosen
    fields = {**vars(config), "target_modules": tuple(dict.fromkeys(targets))}
    # The tensors already say which layers are adapted.
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
    # Without any tensors, the names in the file make a better error message.
    fields["target_modules"] = fields["target_modules"] or config.target_modules
    return LoraConfig(**fields)


def _check_start(
    config: LoraConfig, file: str, names: Sequence[str], error: type[Exception]
) -> None:
    if config.init_lora_weights in FROM_WEIGHT:
        raise error(
            f"{file} is {list(names)} in one, and init_lora_weights="
            f"{config.init_lora_weights!r} starts from a weight. It takes something "
            "else out of the whole than out of its parts. Merge the adapter into its "
            "base model"
        )
