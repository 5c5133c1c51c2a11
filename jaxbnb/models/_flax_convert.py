"""convert_to_flax: converts a checkpoint to a model's NNX state, tensor by tensor."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbnb.convert import TensorInfo, TensorReport
from jaxbnb.convert.journal import NAME as JOURNAL
from jaxbnb.convert.journal import fingerprint
from jaxbnb.convert.pieces import Finish, Piece, Progress, Write, write_pieces
from jaxbnb.convert.plan import LEFT_OUT, source_format
from jaxbnb.convert.safetensors_files import layout, write_bytes
from jaxbnb.convert.weights import cast_whole, quantize_weight, sqnr
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.files import check_outside, resumable_folder
from jaxbnb.core.processes import check_shared, gather, on_first
from jaxbnb.models._load_plan import LoadPlan, merge, prepare
from jaxbnb.models._places import Place
from jaxbnb.models._stored import read_as
from jaxbnb.models.flax_folder import write_state

# Holds all arrays of the model until Orbax has written them.
_STAGED: Final = "state.safetensors"
# Bytes to copy at once.
_CHUNK: Final = 2**24


def convert_to_flax(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    progress: Progress | None = None,
    report: Callable[[TensorReport], object] | None = None,
) -> int:
    """Writes a model's NNX state with Orbax, quantised or not.

    `load_pretrained` restores it without quantising again, and `orbax.checkpoint` reads
    it as nested dicts of arrays. ``dst`` appears only when it is complete. If the call
    is interrupted or killed, the same call resumes where it stopped: everything encoded
    so far lies next to ``dst``, in ``.<name>.resume.partial``. This folder grows to the
    size of the result. Two tensors are in memory at a time, and at the end the entire
    result, while Orbax writes it.

    Under `jax.distributed`, all processes call this. Each reads and encodes its share
    of the tensors, and process 0 writes the result.

    Args:
        src: path of anything that `load_pretrained` loads.
        dst: folder to create, shared by all processes; it must be absent or empty.
        quant: format of the linear layers, any; see `load_pretrained`.
        dtype: see `load_pretrained`.
        progress: called as ``progress(done_bytes, total_bytes, name)`` as bytes of the
            tensor ``name`` are encoded.
        report: called with the `jaxbnb.convert.TensorReport` of each tensor once it is
            encoded. Like ``progress``, it hears of this process' tensors only.

    Returns:
        The number of bytes in the model's arrays.

    Raises:
        FileExistsError: ``dst`` exists.
        BlockingIOError: another process is writing it.
        CheckpointError: see `load_pretrained`, or finite values exceed the range of
            ``dtype``.
        OSError: writing failed. Nothing is left behind.
        ProcessError: another process failed, or the folder of ``dst`` is not shared.
        ValueError: see `load_pretrained`, or ``dst`` is inside ``src``.

    Example:
        >>> convert_to_flax("SmolLM2-135M", "out", quant="nf4")  # doctest: +SKIP
        173650048
    """
    plan = prepare(src, quant, dtype)
    check_outside(src, dst)
    infos, header, starts = _lay_out(plan)
    pieces = _make_pieces(plan, infos, starts)
    count = jax.process_count()
    options = {"to": "flax", "quant": plan.quant}
    if count > 1:
        options["processes"] = count
    mark = fingerprint(plan.checkpoint.path, header, options)
    # Each process has a file of its own: two hosts must not write the same one.
    names = [_number(_STAGED, i) for i in range(count)]
    journals = [_number(JOURNAL, i) for i in range(count)]
    what = f"converting to {os.fspath(dst)}"
    with contextlib.ExitStack() as stack:
        folder = on_first(
            what,
            lambda: stack.enter_context(
                resumable_folder(dst, mark=mark, resumes=(*names, *journals))
            ),
        )
        check_shared(folder)
        index = jax.process_index()
        ours = pieces[index::count]
        gather(
            what,
            lambda: write_pieces(
                folder / names[index], header, ours, progress, report, journals[index]
            ),
        )

        def finish() -> None:
            staged = folder / _STAGED
            for number in range(1, count):
                _copy(folder / names[number], staged, pieces[number::count])
            model = merge(plan.graphdef, _read(plan, infos, staged, starts))
            write_state(model, plan.checkpoint, folder)
            for name in (*names, *journals):
                (folder / name).unlink()

        on_first(what, finish)
        publish = stack.pop_all()
        on_first(what, publish.close)
    return sum(info.nbytes for info in infos.values())


def _number(name: str, process: int) -> str:
    """Returns the name of a process' own file; that of process 0 has no number."""
    return name if process == 0 else f"{process}.{name}"


def _copy(src: Path, dst: Path, pieces: Sequence[Piece]) -> None:
    """Copies the parts of a file that some pieces fill."""
    with src.open("rb") as source, dst.open("r+b", buffering=0) as target:
        # Its last region may be another process'.
        for first, size in (region for piece in pieces for region in piece.regions):
            source.seek(first)
            target.seek(first)
            while size:
                data = source.read(min(size, _CHUNK))
                if not data:
                    raise OSError(f"{src} ends before byte {first + size}")
                write_bytes(target, data)
                size -= len(data)


def plan_to_flax(
    src: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> list[TensorReport]:
    """Reports what `convert_to_flax` would do, without reading or writing weights.

    Args:
        src: see `convert_to_flax`, also for the others and the errors.
        quant: format of the linear layers.
        dtype: dtype of the floating tensors.

    Example:
        >>> plan_to_flax("SmolLM2-135M", quant="int8")[0].place  # doctest: +SKIP
        'model.embed_tokens.embedding'
    """
    plan = prepare(src, quant, dtype)
    infos, _, starts = _lay_out(plan)
    return [piece.report for piece in _make_pieces(plan, infos, starts)]


def _lay_out(
    plan: LoadPlan,
) -> tuple[dict[str, TensorInfo], bytes, dict[str, int]]:
    """Returns the arrays of a model, a file's header for them, and their offsets."""
    infos = {
        name: TensorInfo(leaf.shape, np.dtype(leaf.dtype))
        for path, variable in plan.variables.items()
        for name, leaf in _get_leaves(path, variable.get_value()).items()
    }
    return infos, *layout(infos)


def _get_leaves(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Returns the arrays of a variable, by their names in the file."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(value)
    return {".".join([*path, *(key.name for key in keys)]): x for keys, x in leaves}


def _make_pieces(
    plan: LoadPlan, infos: Mapping[str, TensorInfo], starts: Mapping[str, int]
) -> list[Piece]:
    pieces = []
    for name, info in plan.checkpoint.tensors.items():
        regions = [
            region
            for place in plan.places.get(name, ())
            for region in _find_regions(plan, infos, starts, place).values()
        ]
        where = plan.places.get(name)
        report = TensorReport(
            name=name,
            shape=info.shape,
            source=source_format(plan.checkpoint, name),
            result=_name_result(plan, where[0]) if where else LEFT_OUT,
            nbytes=sum(size for _, size in regions),
            note="" if where else "the config determines it",
            place=", ".join(map(_describe, where or ())),
        )
        start = functools.partial(_start, plan, infos, starts, name)
        pieces.append(Piece(report, regions, start))
    return pieces


def _find_regions(
    plan: LoadPlan,
    infos: Mapping[str, TensorInfo],
    starts: Mapping[str, int],
    place: Place,
) -> dict[str, tuple[int, int]]:
    """Returns the first byte and size of one layer, for each array of a variable."""
    regions = {}
    value = plan.variables[place.path].get_value()
    for name in _get_leaves(place.path, value):
        stack = infos[name].shape[: len(place.index)]
        size = infos[name].nbytes // max(1, math.prod(stack))
        number = int(np.ravel_multi_index(place.index, stack)) if stack else 0
        regions[name] = starts[name] + number * size, size
    return regions


def _name_result(plan: LoadPlan, place: Place) -> str:
    value: Any = plan.variables[place.path].get_value()
    if isinstance(value, QuantizedArray):
        return value.quant_type
    return np.dtype(value.dtype).name


def _describe(place: Place) -> str:
    index = f"[{', '.join(map(str, place.index))}]" if place.index else ""
    changes = []
    if place.is_kernel and not place.is_flipped:
        changes.append("transposed")
    if place.rows is not None:
        changes.append(f"{len(place.rows)} rows")
    return ".".join(place.path) + index + (f" ({', '.join(changes)})" * bool(changes))


def _start(
    plan: LoadPlan,
    infos: Mapping[str, TensorInfo],
    starts: Mapping[str, int],
    name: str,
) -> Finish:
    """Starts to encode the layers that a tensor becomes; returns what finishes it."""
    places = plan.places.get(name, ())
    source, encoded, powers = plan.checkpoint, [], []
    tensor = read_as(source, name, plan.variables[places[0].path]) if places else None
    for place in places:
        value: Any = plan.variables[place.path].get_value()
        layer = place.part(tensor)
        if not isinstance(layer, QuantizedArray):
            layer = cast_whole(source, name, layer, np.dtype(value.dtype))
            if isinstance(value, QuantizedArray):
                assert plan.quant is not None
                layer, power = quantize_weight(layer, plan.quant)
                powers.append(power)
            elif place.is_kernel:
                layer = place.flip(layer)
        regions = _find_regions(plan, infos, starts, place)
        arrays = _get_leaves(place.path, layer)
        encoded += [(first, arrays[leaf]) for leaf, (first, _) in regions.items()]

    def finish(write: Write) -> float | None:
        for first, array in encoded:
            write(first, np.asarray(array))
        return sqnr(powers) if powers else None

    return finish


def _read(
    plan: LoadPlan,
    infos: Mapping[str, TensorInfo],
    staged: Path,
    starts: Mapping[str, int],
) -> dict[Any, nnx.Variable]:
    """Returns the variables with the values that were encoded."""
    variables = {}
    for path, variable in plan.variables.items():
        value = variable.get_value()
        arrays = [
            # Mapped, so that each page is read once.
            np.memmap(
                staged,
                np.uint8,
                mode="r",
                offset=starts[name],
                shape=(infos[name].nbytes,),
            )
            .view(infos[name].dtype)
            .reshape(infos[name].shape)
            for name in _get_leaves(path, value)
        ]
        if jax.process_count() == 1:
            arrays = [jnp.array(x) for x in arrays]
        restored = jax.tree.unflatten(jax.tree.structure(value), arrays)
        variables[path] = variable.replace(restored)
    return variables
