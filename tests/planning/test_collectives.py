"""Bytes of collectives, counted in the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxbnb.planning import collective_bytes

# As XLA writes it for GPUs, where collectives start and end apart.
STARTED = """\
%body (x: f32[4]) -> f32[4] {
  %a = (bf16[2,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%x), dimensions={0}
  %b = ((f32[16]), (f32[2])) reduce-scatter-start(%x), replica_groups=[1,8]<=[8]
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4] while(%p), body=%body, config={"known_trip_count":{"n":"3"}}
  %s = f32[1] reduce-scatter(%w), replica_groups=mesh['x'=1,'y'=2] {'y'}
  ROOT %r = (f32[4]{0}, pred[]) all-reduce(%w, %w), replica_groups={{0,1}}
}
"""


def test_started_collectives():
    want = {"all-gather": 3 * 128, "all-reduce": 17, "reduce-scatter": 3 * 64 + 8}
    assert collective_bytes(STARTED) == want


def test_an_unknown_number_of_iterations():
    text = STARTED.replace("known_trip_count", "other")
    with pytest.raises(ValueError, match=r"loop with \['all-gather', 'reduce-scatter'"):
        collective_bytes(text)


def test_a_compiled_program():
    """Eight devices add up their parts of ten vectors, and gather them."""
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))

    def total(x):
        sums = jax.lax.scan(lambda c, y: (c, jax.lax.psum(y, "x")), 0, x)[1]
        return jax.lax.all_gather(sums, "x")

    mapped = jax.shard_map(
        total, mesh=mesh, in_specs=P(None, "x"), out_specs=P("x"), check_vma=False
    )
    compiled = jax.jit(mapped).lower(jnp.ones((10, 64), jnp.bfloat16)).compile()
    got = collective_bytes(compiled)
    # CPUs may send sums and halves as float32.
    assert got["all-gather"] in (8 * 10 * 8 * 2, 8 * 10 * 8 * 4)
    assert got["all-reduce"] in (10 * 8 * 2, 10 * 8 * 4)
