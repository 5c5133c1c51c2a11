"""Which leaves hold 8-bit moments, and one step of a leaf of either kind."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, UInt8

from jaxbnb.core.formats import check_block_size
from jaxbnb.optim._exact import encode_exactly
from jaxbnb.optim._sharding import (
    automatic_sharding,
    explicit_spec,
    on_shards,
    place,
    uncut_spec,
)
from jaxbnb.optim.rules import flatten_with_paths, keep_32_bits, refuse_quantized
from jaxbnb_kernels import _blocks
from jaxbnb_kernels.codebooks import DYNAMIC8_SIGNED
from jaxbnb_kernels.update_8bit import (
    Moment,
    Rule,
    absmax_shape,
    block_layout,
    reference,
    update_8bit,
)

# The code of one in both dynamic maps.
_ONE_CODE = 255


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which leaves are quantised, and in blocks of what size."""

    block_size: int = 256
    min_quantized_size: int = 4096

    def __post_init__(self):
        check_block_size(self.block_size)
        if self.min_quantized_size < 0:
            raise ValueError(
                f"min_quantized_size must be at least 0; got {self.min_quantized_size}"
            )

    def quantizes(self, leaf: Any) -> bool:
        """Whether the moments of a parameter are held in 8 bits, by its size."""
        return leaf.ndim > 0 and math.prod(leaf.shape) >= max(
            self.min_quantized_size, 1
        )

    def init(
        self, params: Any, signed: bool, initial: jax.typing.ArrayLike = 0.0
    ) -> tuple[Any, Any]:
        """A moment of each parameter: trees of its codes and of its absmax.

        Or of its float32 values and of one zero, where it is not quantised: it is
        small, or declares ``state_bits=32``. (Orbax saves no array without elements.)
        On a mesh, each device has the state of its own part of a parameter.

        Args:
            params: arrays or ``jax.ShapeDtypeStruct``, boxed or not.
            signed: of which map the codes are.
            initial: the value of every element.
        """
        refuse_quantized(params)
        paths, leaves, treedef = flatten_with_paths(params)

        def leaf(path, p, kept):
            if not jnp.issubdtype(p.dtype, jnp.floating):
                is_complex = jnp.issubdtype(p.dtype, jnp.complexfloating)
                raise TypeError(
                    f"8-bit optimizers need floating parameters; for {path!r} got "
                    f"{p.dtype} of shape {p.shape}. "
                    + (
                        "Wrap the optimizer: optax.contrib.split_real_and_imaginary(tx)"
                        if is_complex
                        else "Leave it out: optax.masked, optax.partition"
                    )
                )
            value = jnp.asarray(initial, jnp.float32)
            spec, home = explicit_spec(p), automatic_sharding(p)
            if kept or not self.quantizes(p):
                no_absmax = jnp.zeros((1,) * p.ndim, jnp.float32)
                values = jnp.full(p.shape, value, device=home)
                return place(values, spec), no_absmax
            code = jnp.where(value > 0, _ONE_CODE, reference.ZERO_CODE[signed])
            codes = jnp.full(p.shape, code.astype(jnp.uint8), device=home)
            if home is not None:
                blocks = uncut_spec(p.shape, home.spec, self.block_size, home.mesh)
                home = NamedSharding(home.mesh, blocks)
            shape = absmax_shape(p.shape, self.block_size)
            absmax = jnp.full(shape, value, device=home)
            if spec is None:
                return codes, absmax
            blocks = uncut_spec(p.shape, spec, self.block_size)
            return place(codes, spec), place(absmax, blocks)

        kept = keep_32_bits(params)
        pairs = [leaf(*of) for of in zip(paths, leaves, kept, strict=True)]
        return tuple(treedef.unflatten([pair[i] for pair in pairs]) for i in (0, 1))

    def decode(
        self, codes: UInt8[Array, "*shape"], absmax: Float32[Array, "*blocks"], signed
    ) -> Float32[Array, "*shape"]:
        """The values of a quantised moment."""

        def decode(codes, absmax):
            layout = block_layout(codes.shape, self.block_size)
            rows = codes.reshape(*codes.shape[: layout.axis], -1)
            blocks = _blocks.split(rows, layout.size)
            values = reference.decode(blocks, absmax.reshape(blocks.shape[:-1]), signed)
            return _blocks.join(values, rows.shape[-1]).reshape(codes.shape)

        spec = explicit_spec(codes)
        if spec is None:
            return decode(codes, absmax)
        blocks = uncut_spec(codes.shape, spec, self.block_size)
        return on_shards(decode, (blocks, blocks), blocks, spec)(codes, absmax)

    def encode(
        self, values: Float32[Array, "*shape"], signed: bool
    ) -> tuple[UInt8[Array, "*shape"], Float32[Array, "*blocks"]]:
        """A quantised moment; of values out of `decode` what they were decoded from."""

        def encode(values):
            layout = block_layout(values.shape, self.block_size)
            rows = values.reshape(*values.shape[: layout.axis], -1)
            codes, absmax = encode_exactly(
                _blocks.split(rows, layout.size),
                lambda codes, absmax: reference.decode(codes, absmax, signed),
                encode_blocks,
                [(encode_blocks, -float(DYNAMIC8_SIGNED[0]))] if signed else [],
            )
            codes = _blocks.join(codes, rows.shape[-1]).reshape(values.shape)
            return codes, absmax.reshape(layout.absmax_shape)

        def encode_blocks(blocks, absmax):
            return reference.encode(blocks, absmax, signed), absmax

        spec = explicit_spec(values)
        if spec is None:
            return encode(values)
        blocks = uncut_spec(values.shape, spec, self.block_size)
        return on_shards(encode, (blocks,), (blocks, blocks), (spec, blocks))(values)

    def update(
        self,
        rule: Rule,
        scalars: Any,
        grad: jax.Array,
        moments: Sequence[tuple[jax.Array, jax.Array, bool]],
        param: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """One step of a leaf.

        Args:
            rule: what happens to an element.
            scalars: for the rule.
            grad: of any floating dtype.
            moments: ``(codes or float32 values, absmax, signed)`` of each.
            param: the parameter, for a step that writes it.

        Returns:
            The update in the dtype of ``grad``, or the new parameter in its own; each
            moment; then each absmax.
        """
        if holds_codes(moments[0][0]):
            step = functools.partial(update_8bit, rule, block_size=self.block_size)
            spec = explicit_spec(grad)
            if spec is not None:
                step = _on_shards(step, grad.shape, spec, self.block_size)
            held = tuple(Moment(*moment) for moment in moments)
            result, new = step(scalars, grad, held, param)
            return (result, *(m.codes for m in new), *(m.absmax for m in new))
        values = tuple(value for value, _, _ in moments)
        for value in values:
            if (value.shape, value.dtype) != (grad.shape, jnp.float32):
                raise ValueError(
                    f"a gradient of shape {grad.shape} has float32 moments of that "
                    f"shape; the state has {value.dtype} of shape {value.shape}. Was "
                    "it made for another parameter or block_size?"
                )
        grad32 = grad.astype(jnp.float32)
        if param is None:
            result, kept = rule.apply(scalars, grad32, values)
        else:
            param32 = param.astype(jnp.float32)
            result, kept = rule.apply_to(scalars, grad32, values, param32)
        dtype = (grad if param is None else param).dtype
        return (result.astype(dtype), *kept, *(absmax for _, absmax, _ in moments))


def holds_codes(moment: Any) -> bool:
    """Whether a moment is quantised. ``init`` decides, and steps go by its dtype."""
    return moment.dtype == jnp.uint8


def _on_shards(step, shape, spec: Any, block_size):
    """A step of which each device does the blocks that it has."""
    blocks: Any = uncut_spec(shape, spec, block_size)

    def call(scalars, grad, moments, param):
        inside = [Moment(blocks, blocks, m.signed) for m in moments]
        outside = [Moment(spec, blocks, m.signed) for m in moments]
        return on_shards(
            step,
            (PartitionSpec(), blocks, tuple(inside), blocks),
            (blocks, tuple(inside)),
            (spec, tuple(outside)),
        )(scalars, grad, moments, param)

    return call


def map_leaves(fn: Callable[..., tuple], num_results: int, tree: Any, *rest: Any):
    """`jax.tree.map` of a function with several results: a tree for each."""
    leaves, treedef = jax.tree.flatten(tree)
    columns = [treedef.flatten_up_to(other) for other in rest]
    results = [fn(*row) for row in zip(leaves, *columns, strict=True)]
    return tuple(
        treedef.unflatten([result[i] for result in results]) for i in range(num_results)
    )
