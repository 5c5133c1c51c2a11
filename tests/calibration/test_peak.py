"""The memory that calibration takes on a GPU, as XLA compiles it without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbnb.benchmarks import _plan
from jaxbnb.calibration import _capture, _linear_layers, _prepare, _solver
from jaxbnb.calibration._batches import Text, hidden_states, sampled_loss
from jaxbnb.core import QuantConfig
from jaxbnb.models import CausalLM
from jaxbnb.planning import find_gpu
from jaxbnb.planning.gpus import absent_device, has_compiler

# As `jaxbnb calibrate` makes them.
ROWS, LENGTH = 2, 512


def peak(function, *args, **options):
    """GiB that a call needs, including its arguments."""
    compiled = function.lower(*args, **options).compile()
    return compiled.memory_analysis().peak_memory_in_bytes / 2**30


@pytest.mark.slow
def test_an_8b_model_on_24_gb(capsys):
    if not has_compiler():
        pytest.skip("needs JAX's CUDA plugin, to compile with")
    gpu = find_gpu("rtx4090")
    sharding = jax.sharding.SingleDeviceSharding(absent_device(gpu))

    def place(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    config = _plan.LLAMA_3_8B
    model = nnx.eval_shape(
        lambda: CausalLM(
            config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
    )
    tokens = np.zeros((ROWS, LENGTH), np.int32)
    text = Text(tokens, None, np.ones(tokens.shape, bool))
    found = _capture.find_layers(model, hidden_states, text)
    found = [layer for layer in found if layer.path != "lm_head"]
    paths = [layer.path for layer in found]
    key = jax.eval_shape(jax.random.key, 0)
    peaks = {}
    for has_tiles in (False, True):
        gradient, rest = _capture.make_gradient(
            model, paths, hidden_states, sampled_loss, text, has_tiles=has_tiles
        )
        args = place((rest, text, key, np.int32(0)))
        # As on a GPU, without options of the CPU.
        jitted = jax.jit(gradient.__wrapped__)
        peaks["gradients" + has_tiles * ", kronecker"] = peak(jitted, *args)
    # The rest of the model stays where it is.
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))
    stack = found[0].stack
    enter, step, state = _capture.make_stages(model, stack, found, hidden_states)
    held = _linear_layers.child(model, stack).layer
    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), nnx.state(held)
    )
    shape = (ROWS, LENGTH)
    moments = {
        x.inner: jax.ShapeDtypeStruct((n, n), jnp.float32)
        for x in found
        for n in [_linear_layers.child(held, x.inner).kernel.shape[-2]]
    }
    weight = {x.inner: jax.ShapeDtypeStruct(shape, jnp.float32) for x in found}
    carry = jax.eval_shape(enter, state, text)
    args = state, one, np.int32(0), moments, carry, text, weight
    peaks["moments"] = peak(step, *place(args)) + whole / 2**30
    # The largest matrix, with the moments of its layer.
    m, n = config.intermediate_size, config.hidden_size
    args = (
        jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        jax.ShapeDtypeStruct((m, m), jnp.float32),
        jax.ShapeDtypeStruct((m,), jnp.int32),
        jax.ShapeDtypeStruct((m, m), jnp.float32),
    )
    shape = _prepare.tile_shape(n)
    tiles = jax.ShapeDtypeStruct(shape, jnp.float32)
    order = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    held_moments = sum(x.size * 4 for x in moments.values()) / 2**30
    for outputs in (None, _prepare.Outputs(tiles, order, tiles)):
        solver = peak(
            _solver._minimize,
            *place(args),
            config=QuantConfig("nf4"),
            outputs=None if outputs is None else place(outputs),
        )
        name = "solver" + (outputs is not None) * ", kronecker"
        peaks[name] = solver + whole / 2**30 + held_moments
    with capsys.disabled():
        print({name: f"{value:.2f} GiB" for name, value in peaks.items()})
    assert max(peaks.values()) < gpu.usable_bytes / 2**30
