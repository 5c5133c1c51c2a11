"""Specs of weights, adapters and moments, and errors before anything is compiled."""

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb import QuantConfig
from jaxbnb.core import tree_nbytes
from jaxbnb.sharding import (
    device_bytes,
    partition_specs,
    propose_mesh,
    sharding_table,
)

LAYER = ("model", "layers", "layer")


def mesh(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def get(specs, *path):
    for part in path:
        specs = specs[part]
    return specs.get_value() if hasattr(specs, "get_value") else specs


# q_proj and down_proj have blocks along heads: codes are (out, in / 2).
CASES = {
    "fsdp": ({"fsdp": 4}, P(None, "fsdp", None), P(None, "fsdp", None)),
    "tensor": ({"tensor": 4}, P(None, "tensor", None), P(None, None, "tensor")),
    "fsdp+tensor": (
        {"fsdp": 2, "tensor": 4},
        P(None, ("tensor", "fsdp"), None),
        P(None, "fsdp", "tensor"),
    ),
}


@pytest.mark.parametrize("preset", CASES)
def test_presets(make, preset):
    sizes, q_proj, down_proj = CASES[preset]
    model = make.llama(is_abstract=True)
    for data in ({}, {"data": 2}):
        specs = partition_specs(model, mesh(**data, **sizes), preset)
        assert str(specs) == str(partition_specs(model, mesh(**data, **sizes)))
    for name, want in (("self_attn.q_proj", q_proj), ("mlp.down_proj", down_proj)):
        weight = get(specs, *LAYER, *name.split("."), "base", "kernel")
        assert (weight.codes, weight.absmax) == (want, want)
    # Adapters have the axes of their weight. A rank of two is not divided by four.
    lora_b = get(specs, *LAYER, "self_attn", "q_proj", "adapters", "default", "lora_b")
    assert lora_b[-1] == q_proj[1] or lora_b == P(None, "fsdp", q_proj[1][0])
    assert get(specs, "model", "norm", "scale") == P(None)


def test_the_only_axis_of_a_mesh_has_any_name(make):
    model = make.llama(is_abstract=True)
    for preset in ("fsdp", "tensor"):
        named = partition_specs(model, mesh(**{preset: 4}))
        renamed = partition_specs(model, mesh(x=4), preset)
        assert str(renamed).replace("'x'", f"'{preset}'") == str(named)


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_moments_follow_their_parameter(make, name):
    model = make.llama(quant=None, rank=0, is_abstract=True, intermediate_size=2048)
    params = nnx.state(model, nnx.Param)
    tx = getattr(jaxbnb, name)(1e-3)
    state = jax.eval_shape(tx.init, params)
    weights = partition_specs(params, mesh(fsdp=4))
    moments = partition_specs(state, mesh(fsdp=4))
    leaf = (*LAYER, "mlp", "up_proj", "kernel")
    want = get(weights, *leaf)
    assert want == P(None, "fsdp", None)
    assert get(moments[0].mu, *leaf) == get(moments[0].mu_absmax, *leaf) == want
    # The head of a trained model is not divided through blocks of its moments.
    assert get(weights, "lm_head", "kernel") == P("fsdp", None)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_bytes_fall_with_the_number_of_devices(make, count):
    model = make.llama(is_abstract=True, rank=8, num_attention_heads=16)
    _, trained, _ = nnx.split(model, nnx.LoRAParam, ...)
    state = jax.eval_shape(jaxbnb.adamw8bit(1e-3).init, trained)
    tree = nnx.state(model), state
    got = device_bytes(tree, mesh(fsdp=count))
    assert got < 1.05 * tree_nbytes(tree) / count
    total = sharding_table(model, mesh(fsdp=count)).splitlines()[-1]
    assert total.startswith("total")


def test_rules(make):
    model = make.llama(is_abstract=True, rank=0, num_experts=4, num_experts_per_tok=2)
    up = (*LAYER, "mlp", "experts", "layer", "up_proj", "kernel")
    # A pair of names and a spec: of a layer, or of its stack.
    for spec in (P("expert"), P("expert", None, None), P(None, "expert", None, None)):
        found = partition_specs(model, mesh(expert=4), [(["up_proj.kernel"], spec)])
        codes = get(found, *up).codes
        assert codes == P(
            None, *((None, None, "expert") if len(spec) < 2 else ("expert", None, None))
        )
    # Logical axes.
    found = partition_specs(model, mesh(a=2, b=4), {"mlp": ("a",), "expert": "b"})
    assert get(found, *up).codes == P(None, "b", "a", None)
    assert get(found, "lm_head", "kernel") == P(None, None)


def test_an_odd_number_of_blocks(make):
    """Four devices share nine blocks of codes, each with all absmax."""
    w = jax.ShapeDtypeStruct((9 * 64, 32), "float32")
    q = {"kernel": jaxbnb.quantize(w, "nf4", axis=-2)}
    found = partition_specs(q, mesh(x=4), [(["kernel"], P("x"))])["kernel"]
    assert (found.codes, found.absmax) == (P(None, "x"), P(None, None))
    # A preset divides the other axis, with whole blocks.
    assert partition_specs(q, mesh(fsdp=4))["kernel"].codes == P("fsdp", None)


BAD = {
    "preset": ({"fsdp": 4}, "zero", "must be one of 'fsdp', 'tensor', 'fsdp.tensor'"),
    "missing": ({"fsdp": 4}, "fsdp+tensor", r"does not have \['tensor'\]"),
    "idle": ({"fsdp": 2, "tensor": 2}, "fsdp", r"would leave idle \['tensor'\]"),
    "unknown": ({"fsdp": 2, "x": 2}, "fsdp", r"has the unknown \['x'\]"),
    "logical": ({"x": 4}, {"width": "x"}, "logical axes are embed, mlp.*'width'"),
    "axis": ({"x": 4}, {"mlp": "y"}, r"divided along 'y'.*\('x',\)"),
    "rows": (
        {"fsdp": 7},
        "fsdp",
        r"(?s)cannot be divided among 7 .*of rows .* 4 devices would fit.*and \d+ more",
    ),
    "blocks": ({"tensor": 16}, None, r"8 blocks along its axis 'mlp'.*are 1, 2, 4, 8;"),
    "heads": ({"tensor": 8}, None, r"8 devices.*num_key_value_heads=4; .* \[1, 2, 4\]"),
    "experts": ({"expert": 3}, None, r"3 devices.*num_experts=4; .* are \[1, 2, 4\]"),
    "mapped": ({"x": 8}, {"heads": "x"}, r"\('x',\) have 8 .*num_key_value_heads=4"),
    "no experts": ({"expert": 2}, {"expert": "expert"}, "num_experts, and it has none"),
    "type": ({"x": 4}, 3, "preset's name, a mapping"),
}


@pytest.mark.parametrize(("sizes", "sharding", "message"), BAD.values(), ids=BAD)
def test_bad_input(make, sizes, sharding, message):
    changes = {
        # Enough heads, so that blocks are what does not fit.
        16: {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 8},
        3: {"num_experts": 4},
    }.get(next(iter(sizes.values())), {})
    model = make.llama(is_abstract=True, rank=0, **changes)
    error = TypeError if sharding == 3 else ValueError
    with pytest.raises(error, match=message):
        partition_specs(model, mesh(**sizes), sharding)


def test_propose_mesh(make):
    tree = make.llama(is_abstract=True)
    whole = device_bytes(tree, mesh(data=8))
    for part, want in ((1, (8, 1)), (0.5, (2, 4)), (0.3, (2, 4))):
        assert propose_mesh(tree, int(part * whole), 8).axis_sizes == want
    with pytest.raises(ValueError, match=r"divided among 8 of 8 devices.*KiB on each"):
        propose_mesh(tree, 1000, 8)


def test_double_quantisation(make):
    model = make.llama(is_abstract=True, quant=QuantConfig("nf4", double_quant=True))
    specs = partition_specs(model, mesh(fsdp=8))
    weight = get(specs, *LAYER, "mlp", "up_proj", "base", "kernel")
    assert weight.codes == weight.absmax == P(None, "fsdp", None)
    # A few bytes, which belong to whole matrices.
    assert weight.nested_absmax == P(None, None)
