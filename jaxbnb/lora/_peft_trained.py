"""What an adapter trains besides factors, in PEFT's files: modules, tokens, biases."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from flax import nnx

from jaxbnb.core import QuantizedArray
from jaxbnb.core.paths import matches
from jaxbnb.core.processes import fetch
from jaxbnb.lora._base import Embedding, get_bias, get_param, get_stack
from jaxbnb.lora._config import LoraConfig
from jaxbnb.lora._layer import LoraLayer, LoraLinear
from jaxbnb.lora._targets import (
    find_adapted,
    find_linears,
    find_modules,
    find_stacks,
    find_tied_head,
    number,
)
from jaxbnb.lora._tokens import TrainedTokens
from jaxbnb.lora._trained import TrainedModule
from jaxbnb.lora.file_names import (
    BASE,
    BASE_BIAS,
    BIAS,
    PREFIX,
    RESIZED,
    TOKENS,
    TOKENS_BASE,
    WEIGHT,
    FileLayer,
    NamesLayers,
    Tensors,
    find_file_layers,
    parse_key,
)

_LEAVES: Final = {"kernel": WEIGHT, "scale": WEIGHT, "embedding": WEIGHT}


class Part(NamedTuple):
    """A trained variable of one layer, and where it goes in a tensor of PEFT's.

    Attributes:
        variable: the variable, of one layer or of a stack.
        place: index in the stack.
        axes: permutation that puts the outputs of the layer's value first; None to keep
            it.
        layer: the file's module.
        base: base's variable of the same kind; None if it does not matter.
    """

    variable: nnx.Variable[Any]
    place: tuple[int, ...]
    axes: tuple[int, ...] | None
    layer: FileLayer
    base: nnx.Variable[Any] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of this layer's value, with outputs first."""
        shape = tuple(self.variable.shape)[len(self.place) :]
        return shape if self.axes is None else tuple(shape[i] for i in self.axes)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the file, which may hold several layers."""
        total = self.layer.total
        return self.shape if total is None else (total, *self.shape[1:])

    def read(self, variable: nnx.Variable[Any]) -> np.ndarray:
        """Returns this layer's value of a variable, with outputs first."""
        value: Any = variable.get_value()
        if isinstance(value, QuantizedArray):
            value = value.dequantize()
        value = fetch(value)[self.place]
        return value if self.axes is None else value.transpose(self.axes)


def find_parts(model: nnx.Module, name: str) -> dict[str, list[Part]]:
    """Returns the parts of each tensor besides factors, by the tensor's name."""
    parts: dict[str, list[Part]] = {}
    adapted = _find_adapted_files(model, name)
    stacks = find_stacks(model)
    for path, module in find_modules(model):
        numbers, stack = number(path, stacks)
        if isinstance(module, LoraLinear) and name in module.biases:
            base = get_bias(module.base)
            for file, index in _files(model, numbers, stack):
                kind = BASE_BIAS if file.name in adapted else BIAS
                part = Part(module.biases[name], index, None, file, base)
                parts.setdefault(f"{file.name}.{kind}", []).append(part)
        adapter = module.adapters.get(name)
        if isinstance(adapter, TrainedTokens):
            ((file, index),) = _files(model, numbers, stack)
            part = Part(adapter.tokens, index, None, FileLayer(file.name))
            parts.setdefault(f"{file.name}.{TOKENS}", []).append(part)
        if isinstance(module, TrainedModule) and name in module.adapters:
            for leaf, part in _find_leaves(model, path, module.adapters[name], stacks):
                parts.setdefault(leaf, []).append(part)
    return parts


def _find_adapted_files(model: nnx.Module, name: str) -> set[str]:
    """Returns the modules in files that have factors, and keep their bias apart."""
    names = [
        layer
        for each in find_adapted(model, name)
        for layer, rank in zip(each.names, each.layer.adapters[name].ranks, strict=True)
        if rank
    ]
    return {layer.name for layer in find_file_layers(model, names).values()}


def _files(
    model: nnx.Module, numbers: Sequence[str], stack: tuple[int, ...]
) -> Iterator[tuple[FileLayer, tuple[int, ...]]]:
    """Yields the module in files, and the index in the stack, of each layer."""
    files = find_file_layers(model, numbers)
    for name, index in zip(numbers, np.ndindex(*stack), strict=True):
        yield files[name], index


def _find_leaves(
    model: nnx.Module, path: str, copy: nnx.Module, stacks: dict[str, int]
) -> Iterator[tuple[str, Part]]:
    """Yields each trained variable of a module's copy, for each layer of a stack."""
    owners = dict(nnx.iter_modules(copy))
    for inner, variable in nnx.to_flat_state(nnx.state(copy, nnx.LoRAParam)):
        *above, leaf = inner
        owner = owners[tuple(above)]
        numbers, stack = number(".".join(map(str, (path, *above))), stacks)
        is_kernel = isinstance(owner, nnx.Linear) and leaf == "kernel"
        is_named = is_kernel or leaf != "kernel"
        kind = _LEAVES.get(str(leaf), str(leaf)) if is_named else str(leaf)
        for file, index in _files(model, numbers, stack):
            axes = (1, 0) if is_kernel else None
            yield f"{file.name}.{kind}", Part(variable, index, axes, file)


def _is_flipped(model: nnx.Module, part: Part) -> bool:
    """Whether the file holds a kernel as ``(in, out)``; the head is never so."""
    is_flipped = isinstance(model, NamesLayers) and model.is_transposed_in_files()
    return is_flipped and part.axes is not None and bool(part.place)


def make_tensors(model: nnx.Module, name: str) -> Tensors:
    """Makes the tensors besides factors, under PEFT's names.

    Raises:
        ValueError: a file's module is several layers here, and only some are trained.
    """
    tensors: Tensors = {}
    for key, parts in find_parts(model, name).items():
        whole = np.empty(parts[0].whole_shape, parts[0].read(parts[0].variable).dtype)
        rows = [part.layer.rows for part in parts]
        if parts[0].layer.total is not None:
            known = np.concatenate([np.asarray(r) for r in rows if r is not None])
            if len(known) < parts[0].layer.total:
                _fill_biases(model, parts[0], whole, key)
        for part, own in zip(parts, rows, strict=True):
            whole[... if own is None else own] = part.read(part.variable)
        if _is_flipped(model, parts[0]):
            whole = whole.T
        tensors[f"{PREFIX}{key}"] = np.ascontiguousarray(whole)
    for _, module in find_modules(model):
        if isinstance(module, TrainedModule) and name in module.heads:
            # PEFT's file has the head as well, with the same values.
            (file,) = find_file_layers(model, find_tied_head(model)).values()
            value = fetch(module.adapters[name].embedding.get_value())
            tensors[f"{PREFIX}{file.name}.{WEIGHT}"] = value
    return tensors


def _fill_biases(model: nnx.Module, part: Part, whole: np.ndarray, key: str) -> None:
    """Fills a module's bias with the base's, because only some layers train theirs."""
    if part.base is None:
        raise ValueError(
            f"{key} is several layers here, and modules_to_save names only some of "
            "them; name all"
        )
    for linear in find_linears(model):
        bias = get_bias(linear.base)
        stack = get_stack(linear.base)
        for file, index in _files(model, linear.names, stack):
            if file.name == part.layer.name and bias is not None:
                whole[file.rows] = fetch(bias.get_value())[index]


class Table(NamedTuple):
    """The weight or bias of an embedding or of a head, and its names in files.

    Attributes:
        variable: the weight or bias.
        is_kernel: whether it is a kernel, which files hold transposed.
        module: the file's module.
        kind: kind of the tensor, which depends on the adapter of the module.
    """

    variable: nnx.Variable[Any]
    is_kernel: bool
    module: str
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in files."""
        shape = tuple(self.variable.shape)
        return shape[::-1] if self.is_kernel else shape


def make_base_tensors(model: nnx.Module, name: str, known: Tensors) -> Tensors:
    """Makes the tensors of an embedding and a head that were resized.

    What an adapter trains in full is left out: the file has only one such tensor.
    """
    tensors: Tensors = {}
    for table in _find_tables(model, name):
        key = f"{PREFIX}{table.module}.{table.kind}"
        if table.variable.get_metadata().get(RESIZED) and key not in known:
            value: Any = table.variable.get_value()
            if isinstance(value, QuantizedArray):
                value = value.dequantize()
            value = fetch(value)
            tensors[key] = np.ascontiguousarray(value.T if table.is_kernel else value)
    return tensors


def _find_tables(model: nnx.Module, name: str) -> list[Table]:
    tables = []
    for linear in find_linears(model):
        base, module = linear.base, linear.module
        is_kernel = not isinstance(base, Embedding)
        if is_kernel and (not matches(linear.path, ["lm_head"]) or get_stack(base)):
            continue
        (file,) = find_file_layers(model, linear.names).values()
        adapter = module.adapters.get(name) if isinstance(module, LoraLayer) else None
        kind = WEIGHT if adapter is None else BASE
        kind = TOKENS_BASE if isinstance(adapter, TrainedTokens) else kind
        tables.append(Table(get_param(base), is_kernel, file.name, kind))
        bias = get_bias(base) if is_kernel else None
        if bias is not None:
            kind = BIAS if adapter is None else BASE_BIAS
            tables.append(Table(bias, False, file.name, kind))
    return tables


def make_trained_fields(
    model: nnx.Module, config: LoraConfig, name: str
) -> dict[str, Any]:
    """Makes the fields of ``adapter_config.json`` about what else is trained."""
    ids: Any = config.trainable_token_indices
    if isinstance(ids, dict):
        ids = {}
        for path, module in find_modules(model):
            adapter = module.adapters.get(name)
            if isinstance(adapter, TrainedTokens):
                (file,) = find_file_layers(model, [path]).values()
                ids[file.name] = list(adapter.token_indices)
    saved = _name_saved(model, config, name)
    # PEFT opens a reward head with the model that has one.
    is_reward = any(matches(path, ["score"]) for path in saved or ())
    task = model.peft_task() if isinstance(model, NamesLayers) else "CAUSAL_LM"
    return {
        "bias": config.bias,
        "ensure_weight_tying": config.ensure_weight_tying,
        "modules_to_save": saved,
        "task_type": "SEQ_CLS" if is_reward else task,
        "trainable_token_indices": ids if ids is None else _to_json(ids),
    }


def _to_json(ids: Any) -> Any:
    return ids if isinstance(ids, dict) else list(ids)


def _name_saved(model: nnx.Module, config: LoraConfig, name: str) -> list[str] | None:
    """Names the modules that are trained in full, so that PEFT finds no others.

    PEFT takes every module with a path that ends in the name: "norm" is also the end of
    "input_layernorm".
    """
    if not config.modules_to_save:
        return None
    saved: set[str] = set()
    stacks = find_stacks(model)
    for path, module in find_modules(model):
        numbers, _ = number(path, stacks)
        if not isinstance(module, TrainedModule) or name not in module.adapters:
            continue
        if not config.saves(path, *numbers) and name not in module.heads:
            continue
        copy = module.adapters[name]
        for inner, _ in nnx.to_flat_state(nnx.state(copy, nnx.LoRAParam)):
            leaf = ".".join(map(str, (path, *inner[:-1])))
            files = find_file_layers(model, number(leaf, stacks)[0]).values()
            depth = len(inner) - 1
            saved.update(_cut(file.name, depth) for file in files)
    every = {
        ".".join(parts[:n])
        for file in _find_files(model)
        for parts in [file.split(".")]
        for n in range(1, len(parts) + 1)
    }
    others = every - saved
    shortest = set()
    for path in saved:
        parts = path.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        free = (end for end in ends if not any(p.endswith(end) for p in others))
        shortest.add(next(free, path))
    return sorted(shortest)


def _cut(name: str, depth: int) -> str:
    return name.rsplit(".", depth)[0] if depth else name


def _find_files(model: nnx.Module) -> dict[str, list[tuple[str, str]]]:
    """Returns the path and the numbered path of the modules in each module of files.

    Only modules that have variables of their own are in it.
    """
    files: dict[str, list[tuple[str, str]]] = {}
    stacks = find_stacks(model)
    for path, module in [*nnx.iter_modules(model)]:
        has_own = any(isinstance(v, nnx.Variable) for v in vars(module).values())
        inside = {"adapters", "biases"} & {*map(str, path)}
        if not has_own or inside or not path:
            continue
        ours = ".".join(str(part) for part in path if part != "base")
        numbered, _ = number(ours, stacks)
        for each, file in find_file_layers(model, numbered).items():
            files.setdefault(file.name, []).append((ours, each))
    return files


def drop_tied_head(model: nnx.Module, tensors: Tensors, config: LoraConfig) -> Tensors:
    """Leaves out the weight of a head that the model does not have apart.

    PEFT saves it if the embedding was resized, or is trained as the head, too.
    """
    heads = find_tied_head(model)
    if not heads:
        return tensors
    names = {layer.name for layer in find_file_layers(model, heads).values()}
    ids: Any = config.trainable_token_indices
    kinds = set()
    is_saved = any(head.endswith(tuple(config.modules_to_save or ())) for head in names)
    if not is_saved or config.ensure_weight_tying:
        kinds.add(WEIGHT)
    if not isinstance(ids, dict) or len(ids) > 1:
        kinds |= {TOKENS, TOKENS_BASE}
    dropped = {(head, kind) for head in names for kind in kinds}
    return {
        key: tensor
        for key, tensor in tensors.items()
        if parse_key(model, key) not in dropped
    }


def drop_wrapped(tensors: Tensors) -> Tensors:
    """Leaves out what PEFT saves a second time, under the names of its own modules."""
    wrappers = (".original_module.", ".modules_to_save.")
    return {k: x for k, x in tensors.items() if not any(w in k for w in wrappers)}


def rename_trained(
    model: nnx.Module, tensors: Tensors, config: LoraConfig
) -> LoraConfig:
    """Returns the configuration with our names for what is trained besides factors.

    The tensors decide, because PEFT's names also mean modules that end in them.
    """
    files = _find_files(model)
    ids: Any = config.trainable_token_indices
    if isinstance(ids, dict):
        ids = {
            next((ours[0][0] for f, ours in files.items() if matches(f, [n])), n): each
            for n, each in ids.items()
        }
    saved: dict[str, None] = {}
    stored = {parse_key(model, key)[0] for key in tensors}
    for key in tensors:
        file, kind = parse_key(model, key)
        names = config.modules_to_save or ()
        parts = file.split(".")
        above = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        found = next((path for path in above if path.endswith(tuple(names))), None)
        is_saved = names and kind in (WEIGHT, BIAS, "")
        if is_saved and found is not None and file in files:
            depth = len(parts) - len(found.split("."))
            for ours, numbered in files[file]:
                is_whole = all(
                    other in stored
                    for other, members in files.items()
                    if any(path == ours for path, _ in members)
                )
                saved[_cut(ours if is_whole else numbered, depth)] = None
    return dataclasses.replace(
        config, modules_to_save=list(saved) or None, trainable_token_indices=ids
    )


class Take(Protocol):
    """Function that returns a tensor by its name, if it has this shape."""

    def __call__(self, key: str, shape: tuple[int, ...], hint: str = "") -> np.ndarray:
        """Returns the tensor; the error about another shape ends with ``hint``."""
        ...


def match_trained(
    model: nnx.Module, name: str, tensors: Mapping[str, np.ndarray], take: Take
) -> list[tuple[nnx.Variable[Any], np.ndarray]]:
    """Finds the values of what is trained besides factors, and of resized tables.

    Args:
        model: a model with the adapter.
        name: name of the adapter.
        tensors: tensors of the files.
        take: function that returns a tensor by its name, checked for its shape.
    """
    stored = {}
    for key in tensors:
        module, kind = parse_key(model, key)
        stored[f"{module}.{kind}" if kind else module] = key
    values: dict[int, tuple[nnx.Variable[Any], np.ndarray]] = {}
    found = find_parts(model, name)
    for key, parts in found.items():
        is_flipped = _is_flipped(model, parts[0])
        shape = parts[0].whole_shape
        whole = take(
            stored.get(key, f"{PREFIX}{key}"), shape[::-1] if is_flipped else shape
        )
        whole = whole.T if is_flipped else whole
        for part in parts:
            own = whole if part.layer.rows is None else whole[part.layer.rows]
            own = own if part.axes is None else own.transpose(part.axes)
            variable = part.variable
            if id(variable) not in values:
                empty = np.empty(variable.shape, np.float32)
                values[id(variable)] = variable, empty
            values[id(variable)][1][part.place] = own
    for table in _find_tables(model, name):
        key = f"{table.module}.{table.kind}"
        if key not in stored or key in found or table.kind == BASE:
            # The caller takes the base of what has factors.
            continue
        value = take(stored[key], table.shape, _advise(tensors[stored[key]], table))
        if not isinstance(table.variable.get_value(), QuantizedArray):
            value = value.T if table.is_kernel else value
            values[id(table.variable)] = table.variable, value
    return list(values.values())


def _advise(tensor: np.ndarray, table: Table) -> str:
    """Says what to do about a table of another size."""
    rows = tensor.shape[0] if tensor.ndim else 0
    if rows <= table.shape[0]:
        return ""
    return (
        "; the adapter has more tokens than the model, so first call "
        f"jaxbnb.models.resize_token_embeddings(model, {rows})"
    )
