"""convert_to_flax: a checkpoint to a model's NNX state, tensor by tensor."""

import functools
import math
import os
from collections.abc import Callable, Mapping
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
from jaxbnb.convert.safetensors_files import layout
from jaxbnb.convert.weights import cast_whole, quantize_weight, sqnr
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.files import check_outside, resumable_folder
from jaxbnb.models._places import Place
from jaxbnb.models._stored import read_as
from jaxbnb.models.flax_folder import write_state
from jaxbnb.models.load import LoadPlan, merge, prepare

# All arrays of the model, until Orbax has them.
_STAGED: Final = "state.safetensors"


def convert_to_flax(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    progress: Progress | None = None,
    report: Callable[[TensorReport], object] | None = None,
) -> int:
    """Writes a model's NNX state as Orbax does, quantised or not.

    `load_pretrained` restores it without quantising anew, and `orbax.checkpoint` reads
    it as nested dicts of arrays. ``dst`` appears only when it is complete. Interrupted
    or killed, the same call goes on where it was: what it has encoded lies beside
    ``dst``, in ``.<name>.resume.partial``. At the end that is as large as the result,
    which is in memory while Orbax writes it; until then two tensors are.

    Args:
        src: what `load_pretrained` loads.
        dst: the folder to make; nothing, or an empty folder, is there.
        quant: as of `load_pretrained`, any format.
        dtype: as of `load_pretrained`.
        progress: called as ``progress(done_bytes, total_bytes, name)`` as bytes of the
            tensor ``name`` are encoded.
        report: called with the `jaxbnb.convert.TensorReport` of each tensor once it is
            encoded.

    Returns:
        The bytes of the model's arrays.

    Raises:
        FileExistsError: ``dst`` is there already.
        BlockingIOError: another process is writing it.
        CheckpointError: as of `load_pretrained`, or there are finite values beyond the
            range of ``dtype``.
        OSError: writing failed. Nothing is left behind.
        ValueError: as of `load_pretrained`, or ``dst`` is inside ``src``.

    Example:
        >>> convert_to_flax("SmolLM2-135M", "out", quant="nf4")  # doctest: +SKIP
        173650048
    """
    plan = prepare(src, quant, dtype)
    check_outside(src, dst)
    infos, header, starts = _layout(plan)
    pieces = _pieces(plan, infos, starts)
    options = {"to": "flax", "quant": plan.quant}
    mark = fingerprint(plan.checkpoint.path, header, options)
    with resumable_folder(dst, mark=mark, resumes=(_STAGED, JOURNAL)) as folder:
        staged = folder / _STAGED
        write_pieces(staged, header, pieces, progress, report)
        model = merge(plan.graphdef, _read(plan, infos, staged, starts))
        write_state(model, plan.checkpoint, folder)
        staged.unlink()
        (folder / JOURNAL).unlink()
    return sum(info.nbytes for info in infos.values())


def plan_to_flax(
    src: str | os.PathLike[str],
    *,
    quant: QuantConfig | str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> list[TensorReport]:
    """What `convert_to_flax` would do with each tensor; reads and writes no weights.

    Args:
        src: as of `convert_to_flax`; so are the others, and what is raised.
        quant: format of the linear layers.
        dtype: of the floating tensors.

    Example:
        >>> plan_to_flax("SmolLM2-135M", quant="int8")[0].place  # doctest: +SKIP
        'model.embed_tokens.embedding'
    """
    plan = prepare(src, quant, dtype)
    infos, _, starts = _layout(plan)
    return [piece.report for piece in _pieces(plan, infos, starts)]


def _layout(
    plan: LoadPlan,
) -> tuple[dict[str, TensorInfo], bytes, dict[str, int]]:
    """The arrays of a model, the header of a file of them, and where each starts."""
    infos = {
        name: TensorInfo(leaf.shape, np.dtype(leaf.dtype))
        for path, variable in plan.variables.items()
        for name, leaf in _leaves(path, variable.get_value()).items()
    }
    return infos, *layout(infos)


def _leaves(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The arrays of a variable, by their names in the file."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(value)
    return {".".join([*path, *(key.name for key in keys)]): x for keys, x in leaves}


def _pieces(
    plan: LoadPlan, infos: Mapping[str, TensorInfo], starts: Mapping[str, int]
) -> list[Piece]:
    pieces = []
    for name, info in plan.checkpoint.tensors.items():
        regions = [
            region
            for place in plan.places.get(name, ())
            for region in _regions(plan, infos, starts, place).values()
        ]
        where = plan.places.get(name)
        report = TensorReport(
            name=name,
            shape=info.shape,
            source=source_format(plan.checkpoint, name),
            result=_result(plan, where[0]) if where else LEFT_OUT,
            nbytes=sum(size for _, size in regions),
            note="" if where else "the config determines it",
            place=", ".join(map(_described, where or ())),
        )
        start = functools.partial(_start, plan, infos, starts, name)
        pieces.append(Piece(report, regions, start))
    return pieces


def _regions(
    plan: LoadPlan,
    infos: Mapping[str, TensorInfo],
    starts: Mapping[str, int],
    place: Place,
) -> dict[str, tuple[int, int]]:
    """The first byte and the size of one layer of each array of a variable."""
    regions = {}
    value = plan.variables[place.path].get_value()
    for name in _leaves(place.path, value):
        stack = infos[name].shape[: len(place.index)]
        size = infos[name].nbytes // max(1, math.prod(stack))
        number = int(np.ravel_multi_index(place.index, stack)) if stack else 0
        regions[name] = starts[name] + number * size, size
    return regions


def _result(plan: LoadPlan, place: Place) -> str:
    value: Any = plan.variables[place.path].get_value()
    if isinstance(value, QuantizedArray):
        return value.quant_type
    return np.dtype(value.dtype).name


def _described(place: Place) -> str:
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
    """Starts to make the layers that a tensor becomes."""
    places = plan.places.get(name, ())
    source, made, powers = plan.checkpoint, [], []
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
                layer = layer.T
        regions = _regions(plan, infos, starts, place)
        arrays = _leaves(place.path, layer)
        made += [(first, arrays[leaf]) for leaf, (first, _) in regions.items()]

    def finish(write: Write) -> float | None:
        for first, array in made:
            write(first, np.asarray(array))
        return sqnr(powers) if powers else None

    return finish


def _read(
    plan: LoadPlan,
    infos: Mapping[str, TensorInfo],
    staged: Path,
    starts: Mapping[str, int],
) -> dict[Any, nnx.Variable]:
    """The variables, with the values that were encoded."""
    variables = {}
    for path, variable in plan.variables.items():
        value = variable.get_value()
        arrays = [
            # Mapped: each page is read once, straight to where the array is.
            jnp.array(
                np.memmap(
                    staged,
                    np.uint8,
                    mode="r",
                    offset=starts[name],
                    shape=(infos[name].nbytes,),
                )
                .view(infos[name].dtype)
                .reshape(infos[name].shape)
            )
            for name in _leaves(path, value)
        ]
        restored = jax.tree.unflatten(jax.tree.structure(value), arrays)
        variables[path] = variable.replace(restored)
    return variables
