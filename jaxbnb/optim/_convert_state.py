"""decode_state and encode_state: low-bit state to Optax's own in 32 bits, and back."""

import jax
import jax.numpy as jnp
import optax

from jaxbnb.optim._check_state import check_state
from jaxbnb.optim.state_layout import state_layout

_NOT_IN_32_BITS = (
    "Was it made by another transformation, or for other parameters? encode_state "
    "takes a state in 32 bits, as decode_state returns it"
)


def decode_state(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> optax.OptState:
    """The state of a low-bit optimizer as the same optimizer of Optax has it.

    Moments become float32 arrays in Optax's own types. The state of `adamw8bit` becomes
    one for ``optax.adamw``, and the state of ``quantize_state(tx)`` one for ``tx``. A
    paged state comes to the device. All other state stays as it is. The result is
    always a state for the same optimizer with ``state_bits=32``. (Only
    ``optax.rmsprop`` is another chain than `rmsprop8bit`.) The low-bit state may be
    anywhere in a chain, a mask, a partition, ``optax.MultiSteps`` and so on.

    The values are those that a step decodes. Nothing is lost, except for the ``count``
    where Optax's state has none: for `trace8bit`, for `scale_by_rss8bit`, and without
    ``bias_correction`` for `scale_by_rms8bit` and `scale_by_stddev8bit`.

    Args:
        tx: the low-bit transformation.
        state: its state.
        params: the parameters, or their shapes as ``jax.ShapeDtypeStruct``.

    Returns:
        The state of the same optimizer in 32 bits.

    Raises:
        StateMismatchError: the state belongs to another transformation or to other
            parameters.
        NotImplementedError: a wrapper in ``tx`` rebuilds the state that it wraps.

    Example:
        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> from jaxbnb.optim import decode_state
        >>> tx = jaxbnb.adamw8bit(1e-3)
        >>> params = {"kernel": jnp.ones((64, 1024))}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> state = decode_state(tx, state, params)
        >>> type(state[0]).__name__, state[0].mu["kernel"].dtype.name
        ('ScaleByAdamState', 'float32')
        >>> updates, state = optax.adamw(1e-3).update(params, state, params)
        >>> state[0].count.item()
        2

        ``nnx.Optimizer`` keeps its state in variables, which Flax can remove:

        >>> from flax import nnx
        >>> model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> params = nnx.state(model, nnx.Param)
        >>> state = decode_state(tx, nnx.as_pure(optimizer.opt_state), params)
        >>> state[0].mu["kernel"].dtype.name
        'float32'
    """
    layout = state_layout(tx, params, state)
    leaves = layout.flatten(state)
    values = [layout.read(leaves, k) for k in range(len(layout.places))]
    return jax.tree.unflatten(jax.tree.structure(layout.in_32_bits), values)


def encode_state(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    *,
    count: jax.typing.ArrayLike | None = None,
) -> optax.OptState:
    """The state of a low-bit optimizer from the state of the same optimizer of Optax.

    This is the inverse of `decode_state`: a state that it returned gives the same codes
    and absmax again, to the bit. So any low-bit state moves to another format, block
    size or ``min_quantized_size`` with one rounding. Other values are rounded as a step
    rounds them, and no positive second moment becomes zero.

    Two absmax that are neighbours in float32 may decode to the same values: in fp8, and
    in a block of almost nothing but zeros. Either may then come back. Values below
    float32's normal range (1.2e-38) are zero to XLA on a CPU, and do not come back as
    they were. Elements that small occur in blocks with an absmax below 2.2e-32 (Adam's
    first moment) or 3.7e-32 (its second).

    Args:
        tx: the low-bit transformation.
        state: state of the same optimizer in 32 bits, or what `decode_state` returned
            for another low-bit form of it.
        params: the parameters, or their shapes as ``jax.ShapeDtypeStruct``.
        count: steps taken, for the counts that Optax's state does not have; see
            `decode_state`. By default 1, or 0 if all moments are zero. Only the
            ``dampening`` of `trace8bit` depends on it, and only on the first step.

    Returns:
        The state of ``tx``. AdEMAMix's ``count_m2`` is taken to be ``count``.

    Raises:
        StateMismatchError: the state belongs to another optimizer or to other
            parameters.
        NotImplementedError: a wrapper in ``tx`` rebuilds the state that it wraps.
        ValueError: ``count`` is given, but the state has all counts.

    Example:
        >>> import jax.numpy as jnp, jaxbnb, optax
        >>> from jaxbnb.optim import decode_state, encode_state
        >>> params = {"kernel": jnp.ones((64, 1024))}
        >>> state = optax.adamw(1e-3).init(params)
        >>> eight, four = jaxbnb.adamw8bit(1e-3), jaxbnb.optim.adamw4bit(1e-3)
        >>> state = encode_state(eight, state, params)
        >>> state[0].mu["kernel"].dtype.name
        'uint8'
        >>> state = encode_state(four, decode_state(eight, state, params), params)
        >>> state[0].codes.mu["kernel"].shape
        (64, 512)
    """
    layout = state_layout(tx, params, state)
    check_state(state, layout.in_32_bits, _NOT_IN_32_BITS)
    if count is not None and not layout.counts:
        raise ValueError("the state has all counts; leave count out")
    leaves = jax.tree.leaves(layout.low_bit)
    values = jax.tree.leaves(state)
    for k, value in enumerate(values):
        layout.write(leaves, k, value)
    for position, moments in layout.counts.items():
        steps = count
        if steps is None:
            stepped = [jnp.any(values[k] != 0) for k in moments]
            steps = jnp.any(jnp.asarray(stepped, bool))
        leaves[position] = jnp.asarray(steps).astype(jnp.int32)
    # The absmax of what is not quantised is zero.
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            leaves[k] = jnp.zeros(leaf.shape, leaf.dtype)
    return layout.unflatten(leaves)
