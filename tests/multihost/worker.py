"""One process of several: saves, converts and disagrees together with the others.

Called as ``python -m tests.multihost.worker HOST:PORT COUNT INDEX MODEL OUT``. The
files that it writes are compared with those of one process; see `__main__`.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb import QuantConfig, lora, models
from jaxbnb.core import processes
from jaxbnb.core.processes import ProcessError

QUANT = QuantConfig("int8", block_size=16)
ADAPTERS = lora.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
# Rules that leave some variables whole and divide others.
RULES = [
    (["q_proj.kernel", "up_proj.kernel", "gate_proj.kernel"], P(None, "data")),
    (["embed_tokens.embedding"], P("data")),
]


def load(folder, mesh=None):
    return jaxbnb.load_pretrained(
        folder, quant=QUANT, mesh=mesh, rules=RULES if mesh else ()
    )


def with_adapters(model):
    lora.add_adapter(model, ADAPTERS, rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "lora_b":
            value = variable.get_value()
            ramp = np.arange(value.size, dtype=np.float32).reshape(value.shape)
            variable.set_value(jnp.asarray(ramp / value.size, value.dtype))
    return model


def divide_adapters(model, mesh):
    """Puts adapters on the mesh: divided where they can be, otherwise as copies."""
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        value = variable.get_value()
        spec = P(None, "data") if value.shape[1] % mesh.size == 0 else P()
        sharding = jax.sharding.NamedSharding(mesh, spec)
        variable.set_value(processes.put(value, sharding))


def expect(message, function):
    with pytest.raises(ProcessError, match=message):
        function()


def check_errors(out):
    index = jax.process_index()
    expect(
        "is not shared: process 1 of",
        lambda: processes.check_shared(out if index != 1 else out / "elsewhere"),
    )
    expect(
        "lr is 2 in process 1 and 1 in process 0",
        lambda: processes.check_same("the config", {"lr": 1 + (index == 1), "b": 1}),
    )

    def fail():
        if index == 1:
            raise OSError("the disk is full")

    kind, message = ProcessError, "process 1 failed in writing: OSError: the disk is"
    if index == 1:
        kind, message = OSError, "^the disk is full"
    with pytest.raises(kind, match=message):
        processes.gather("writing", fail)


def main():
    coordinator, count, index, folder, out = sys.argv[1:]
    folder, out = Path(folder), Path(out)
    if int(count) > 1:
        jax.distributed.initialize(
            coordinator,
            int(count),
            int(index),
            heartbeat_timeout_seconds=30,
            shutdown_timeout_seconds=5,
        )
        check_errors(out)
    mesh = jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    model = load(folder, mesh)
    models.save_pretrained(model, out / "model", source=folder)
    with_adapters(model)
    divide_adapters(model, mesh)
    lora.save_adapter(model, out / "adapter")
    models.convert_to_flax(folder, out / "flax", quant=QUANT)
    restored = models.load_pretrained(out / "flax", mesh=mesh, rules=RULES)
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(m)) for m in (restored, load(folder, mesh))),
        strict=True,
    ):
        np.testing.assert_array_equal(processes.fetch(a), processes.fetch(b))


if __name__ == "__main__":
    main()
