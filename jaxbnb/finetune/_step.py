"""The train step as a pure function of arrays, its compilation, and its memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array

from jaxbnb.finetune._loss import next_token_loss
from jaxbnb.nnx import Remat

Step = Callable[..., tuple[Any, Any, Array]]


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
    mask of `next_token_loss` may follow as a fifth argument. Compile it with
    `compile_train_step` or ``jax.jit``. If the loss is not finite, the trainable
    variables do not change. The model is in training mode, as after ``model.train()``,
    so dropout is on. The random streams in ``frozen`` determine what it drops;
    `advance_rngs` advances them between steps.

    Args:
        graphdef: structure of the model, from `split_trainable`.
        tx: the optimizer.
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
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        raise TypeError(
            "tx must be an optax.GradientTransformation, such as "
            f"jaxbnb.adamw8bit(1e-3) returns; got {type(tx).__name__}"
        )

    def step(trainable, opt_state, frozen, tokens, mask=None):
        def loss_fn(trainable):
            # Copied: dropout counts in its variables, inside this transformation.
            model = nnx.merge(graphdef, trainable, jax.tree.map(lambda x: x, frozen))
            model.train()
            return next_token_loss(model, tokens, mask=mask, remat=remat)

        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trained = optax.apply_updates(trainable, updates)
        # A loss that is not finite teaches nothing.
        is_finite = jnp.isfinite(loss)
        trained = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old), trained, trainable
        )
        return trained, opt_state, loss

    return step


def advance_rngs(frozen: nnx.State) -> nnx.State:
    """Increments the count of each random stream, which dropout draws from.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> frozen = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
        >>> int(jaxbnb.finetune.advance_rngs(frozen)["rngs"]["count"][...])
        1
    """
    counts, rest = nnx.split_state(frozen, nnx.RngCount, ...)
    return nnx.merge_state(jax.tree.map(lambda count: count + 1, counts), rest)


def compile_train_step(
    step: Step,
    trainable: nnx.State,
    opt_state: Any,
    frozen: nnx.State,
    batch_shape: tuple[int, int],
    *,
    masked: bool = False,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> jax.stages.Compiled:
    """Compiles a step that updates the trainable variables and their state in place.

    On a mesh, the variables and their state stay divided among its devices as they are.

    Args:
        step: step from `train_step`.
        trainable: arrays or their ``jax.ShapeDtypeStruct``; donated.
        opt_state: likewise; donated.
        frozen: likewise; not donated.
        batch_shape: shape ``(batch, seq)`` of the int32 tokens.
        masked: whether the step takes a mask too.
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
    tokens, mask = (
        jax.ShapeDtypeStruct(batch_shape, dtype, sharding=batch_sharding)
        for dtype in (jnp.int32, jnp.bool_)
    )
    # If XLA chose, the first step might return other shardings than it was called with.
    results = (*jax.tree.map(_on_mesh, (trainable, opt_state)), None)
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=results)
    batch = (tokens, mask) if masked else (tokens,)
    return jitted.lower(trainable, opt_state, frozen, *batch).compile()


def _on_mesh(x: Any) -> NamedSharding | None:
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
