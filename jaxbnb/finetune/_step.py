"""The train step as a pure function of arrays, its compilation, and its memory."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32

from jaxbnb.core.compiling import compiler_options
from jaxbnb.finetune._data import Batch
from jaxbnb.finetune._loss import sum_token_losses
from jaxbnb.nnx import Remat
from jaxbnb.optim import fused_step

Step = Callable[..., tuple[Any, Any, Any]]
LossFn = Callable[[Any, Batch], tuple[Array, Array]]


def split_trainable(
    model: nnx.Module, wrt: Any = nnx.LoRAParam
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Splits a model into ``(graphdef, trainable, frozen)``; ``nnx.merge`` undoes it.

    Args:
        model: any NNX model.
        wrt: NNX filter that selects the variables to train, e.g. ``nnx.LoRAParam`` or
            ``nnx.Param``.

    Raises:
        ValueError: ``wrt`` selects nothing.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> _, trainable, frozen = jaxbnb.finetune.split_trainable(model, nnx.Param)
        >>> len(nnx.to_flat_state(trainable)), len(nnx.to_flat_state(frozen))
        (2, 0)
    """
    graphdef, trainable, frozen = nnx.split(model, wrt, ...)
    if not jax.tree.leaves(trainable):
        raise ValueError(
            f"{type(model).__name__} has no variables of {wrt} to train; "
            "jaxbnb.lora.add_adapter adds nnx.LoRAParam"
        )
    return graphdef, trainable, frozen


def train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    *,
    remat: bool | Remat = True,
) -> Step:
    """Makes the train step as a pure function.

    The function is
    ``step(trainable, opt_state, frozen, tokens) -> (trainable, opt_state, loss)``. The
    mask, the segment ids and the source of `next_token_loss` may follow. Compile it
    with `compile_train_step` or ``jax.jit``. The model is in training mode, as after
    ``model.train()``, so dropout is on. The random streams in ``frozen`` determine what
    it drops; `advance_rngs` advances them between steps.

    If the loss or a gradient is not finite, the step is not taken: the trainable
    variables and the optimizer's state stay as they are.

    With a leading axis, ``(accumulate, batch, seq)``, the arrays hold several batches.
    Their gradients are accumulated in float32, one batch at a time, and make one step.
    It is the step of one batch with all of the rows: the loss is the mean over all
    targets, however many each batch has.

    Args:
        graphdef: structure of the model, from `split_trainable`.
        tx: the optimizer. An elementwise one of jaxbnb takes its fused step. To train
            16-bit variables, wrap it in `jaxbnb.optim.stochastic_rounding`.
        remat: recompute each layer in the backward pass (gradient checkpointing);
            a `jaxbnb.nnx.Remat` says which inputs to keep, and where.

    Raises:
        TypeError: ``tx`` is not an Optax transformation.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.models import Llama, LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> graphdef, params, rest = jaxbnb.finetune.split_trainable(model, nnx.Param)
        >>> tx = jaxbnb.adamw8bit(1e-3)
        >>> step = jax.jit(jaxbnb.finetune.train_step(graphdef, tx))
        >>> tokens = jnp.arange(16)[None]
        >>> params, state, loss = step(params, tx.init(params), rest, tokens)
        >>> loss.shape
        ()
    """
    step_with_metrics = measured_step(graphdef, tx, make_loss(remat))

    def step(trainable, opt_state, frozen, tokens, *rest):
        trainable, opt_state, metrics = step_with_metrics(
            trainable, opt_state, frozen, tokens, *rest
        )
        return trainable, opt_state, metrics.loss

    return step


class Metrics(NamedTuple):
    """What a step measures.

    Attributes:
        loss: mean loss over the targets, before the update.
        grad_norm: norm of all gradients together, before clipping.
    """

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]


def make_loss(remat: bool | Remat) -> LossFn:
    """Makes the loss of a language model, in the form that `measured_step` takes."""

    def loss(model, batch):
        return sum_token_losses(
            model,
            batch.tokens,
            mask=batch.mask,
            segment_ids=batch.segment_ids,
            source_ids=batch.source_ids,
            source_mask=batch.source_mask,
            remat=remat,
        )

    return loss


def measured_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    max_grad_norm: float | None = None,
) -> Step:
    """Makes the step of `train_step` with any loss; it returns `Metrics`.

    Args:
        graphdef: structure of the model, from `split_trainable`.
        tx: the optimizer.
        loss_fn: ``loss_fn(model, batch) -> (sum, count)``: the sum of the losses of a
            `Batch`, and their number.
        max_grad_norm: norm that the gradients are scaled down to; None to leave them.

    Raises:
        TypeError: ``tx`` is not an Optax transformation.
    """
    check_optimizer(tx)

    def evaluate(trainable, frozen, batch):
        # Copied: dropout counts in its variables, inside this transformation.
        model = nnx.merge(graphdef, trainable, jax.tree.map(lambda x: x, frozen))
        model.train()
        return loss_fn(model, batch)

    def mean_gradients(trainable, frozen, batch):
        def mean(trainable):
            total, count = evaluate(trainable, frozen, batch)
            return total / count

        return jax.value_and_grad(mean)(trainable)

    def accumulated_gradients(trainable, frozen, batches):
        # Scaled by about the number of targets, so that 16 bits hold the gradients.
        scale = math.prod(batches.tokens.shape[1:])

        def part(trainable, frozen, batch):
            total, count = evaluate(trainable, frozen, batch)
            return total / scale, count

        def add(carry, batch):
            sums, total, count, frozen = carry
            (part_total, part_count), grads = jax.value_and_grad(part, has_aux=True)(
                trainable, frozen, batch
            )
            sums = jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads)
            frozen = advance_rngs(frozen)
            return (sums, total + part_total, count + part_count, frozen), None

        zeros = jax.tree.map(
            lambda x: jnp.zeros_like(
                x, jnp.float32 if x.dtype.itemsize < 4 else x.dtype
            ),
            trainable,
        )
        start = (zeros, jnp.float32(0), jnp.float32(0), frozen)
        (sums, total, count, _), _ = jax.lax.scan(add, start, batches)
        grads = jax.tree.map(
            lambda s, x: (s * (scale / count)).astype(x.dtype), sums, trainable
        )
        return total * (scale / count), grads

    def step(trainable, opt_state, frozen, tokens, mask=None, *rest):
        batch = Batch(tokens, mask, *rest)
        gradients = accumulated_gradients if tokens.ndim == 3 else mean_gradients
        loss, grads = gradients(trainable, frozen, batch)
        grad_norm = optax.tree.norm(grads).astype(jnp.float32)
        if max_grad_norm is not None:
            shrink = jnp.minimum(1.0, max_grad_norm / (grad_norm + 1e-6))
            grads = jax.tree.map(
                lambda g: (g.astype(jnp.float32) * shrink).astype(g.dtype), grads
            )
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        trainable, opt_state = fused_step(tx)(grads, opt_state, trainable, is_finite)
        return trainable, opt_state, Metrics(loss, grad_norm)

    return step


def check_optimizer(tx: Any) -> None:
    """Raises TypeError for what is not an Optax transformation."""
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        raise TypeError(
            "tx must be an optax.GradientTransformation, such as "
            f"jaxbnb.adamw8bit(1e-3) returns; got {type(tx).__name__}"
        )


def advance_rngs(frozen: nnx.State, number: int = 1) -> nnx.State:
    """Adds to the count of each random stream, which dropout draws from.

    Args:
        frozen: variables that a step takes and does not train.
        number: number to add: that of the batches that a step has accumulated.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> frozen = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
        >>> int(jaxbnb.finetune.advance_rngs(frozen)["rngs"]["count"][...])
        1
    """
    counts, rest = nnx.split_state(frozen, nnx.RngCount, ...)
    return nnx.merge_state(jax.tree.map(lambda count: count + number, counts), rest)


def compile_train_step(
    step: Step,
    trainable: nnx.State,
    opt_state: Any,
    frozen: nnx.State,
    batch_shape: tuple[int, ...],
    *,
    masked: bool = False,
    segmented: bool = False,
    source_shape: tuple[int, ...] | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> jax.stages.Compiled:
    """Compiles a step that updates the trainable variables and their state in place.

    On a mesh, the variables and their state stay divided among its devices as they are,
    so that the next call takes them. What is not on the mesh yet is copied to it.

    Args:
        step: step from `train_step`.
        trainable: arrays or their ``jax.ShapeDtypeStruct``; donated.
        opt_state: likewise; donated.
        frozen: likewise; not donated.
        batch_shape: shape ``(batch, seq)`` or ``(accumulate, batch, seq)`` of the int32
            tokens.
        masked: whether the step takes a mask too.
        segmented: whether the step takes a mask and segment ids too.
        source_shape: shape of the tokens that an encoder reads; the step takes a mask,
            None for segment ids, and the source and its mask. None for a decoder.
        batch_sharding: sharding of the tokens and the mask on a mesh; None without a
            mesh.

    Example:
        >>> import jax, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.models import Llama, LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        >>> graphdef, params, rest = jaxbnb.finetune.split_trainable(model, nnx.Param)
        >>> tx = jaxbnb.adamw8bit(1e-3)
        >>> compiled = jaxbnb.finetune.compile_train_step(
        ...     jaxbnb.finetune.train_step(graphdef, tx), params,
        ...     jax.eval_shape(tx.init, params), rest, batch_shape=(1, 16))
        >>> jaxbnb.finetune.peak_bytes(compiled) > jaxbnb.core.tree_nbytes(params)
        True
    """

    def describe(shape: tuple[int, ...], *dtypes: Any) -> list[Any]:
        return [
            jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)
            for dtype in dtypes
        ]

    if source_shape is not None:
        batch = describe(batch_shape, jnp.int32, jnp.bool_)
        batch = [*batch, None, *describe(source_shape, jnp.int32, jnp.bool_)]
    else:
        count = 3 if segmented else 2 if masked else 1
        batch = describe(batch_shape, *(jnp.int32, jnp.bool_, jnp.int32)[:count])
    arguments = _on_one_mesh((trainable, opt_state, frozen))
    # If XLA chose, the first step might return other shardings than it was called with.
    results = (*jax.tree.map(_get_sharding, arguments[:2]), None)
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=results)
    options = compiler_options(arguments)
    return jitted.lower(*arguments, *batch).compile(options)


def _on_one_mesh(tree: Any) -> Any:
    """Returns shapes on the mesh that arrays are on, and copies of others there."""
    homes = (_get_sharding(x) for x in jax.tree.leaves(tree))
    first = next((home for home in homes if home is not None), None)
    if first is None:
        return tree
    everywhere = NamedSharding(first.mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=_get_sharding(x) or everywhere
        ),
        tree,
    )


def _get_sharding(x: Any) -> NamedSharding | None:
    """Returns an array's sharding if it is on a mesh; None leaves the choice to XLA."""
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the memory that a compiled function needs, by XLA's memory analysis.

    Counts arguments, results and temporaries, in host and device memory together.
    Arrays that share memory count once.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbnb
        >>> x = jnp.ones((256, 1024))
        >>> jaxbnb.finetune.peak_bytes(jax.jit(lambda x: x + 1).lower(x).compile())
        2097152
    """
    m = compiled.memory_analysis()
    if m is None:
        raise NotImplementedError("this backend does not have a memory analysis")
    # Not peak_memory_in_bytes, which leaves out the temporaries on a CPU.
    device = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    host = (
        m.host_argument_size_in_bytes
        + m.host_output_size_in_bytes
        + m.host_temp_size_in_bytes
    )
    return device + host - m.alias_size_in_bytes - m.host_alias_size_in_bytes
