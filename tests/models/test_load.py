import dataclasses
import json
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import jaxbnb
from jaxbnb import QuantConfig, cli, convert, models
from jaxbnb.models import _insert, _load_plan, load_pretrained
from jaxbnb.models._stored import cut_columns


def leaves(model):
    flat = nnx.to_flat_state(nnx.state(model))
    return {path: jax.tree.leaves(variable) for path, variable in flat}


def assert_same(a, b):
    assert nnx.graphdef(a) == nnx.graphdef(b)
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        for x, y in zip(a[path], b[path], strict=True):
            assert x.dtype == y.dtype, path
            np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_hidden_layers": 1},
    ],
)
def test_what_was_saved_is_loaded(toy, tmp_path, changes):
    model = toy.model(**changes)
    assert_same(load_pretrained(toy.save(model, tmp_path / "toy")), model)


def test_the_dtype_is_the_checkpoints_own(toy, tmp_path):
    dtype = jnp.bfloat16
    model = toy.model(param_dtype=dtype)
    folder = toy.save(model, tmp_path / "toy")
    assert_same(load_pretrained(folder), model)
    wide = load_pretrained(folder, dtype=jnp.float32)
    for path, (leaf,) in leaves(wide).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf.astype(dtype), leaves(model)[path][0])


def test_mixed_dtypes_become_float32(toy, tmp_path):
    def change(tensors):
        name = "model.norm.weight"
        tensors[name] = tensors[name].astype(np.float16)

    loaded = load_pretrained(toy.save(toy.model(), tmp_path / "toy", change=change))
    assert {leaf.dtype for (leaf,) in leaves(loaded).values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [
        ("int8", None),
        ("llm_int8", jnp.bfloat16),
        (jaxbnb.QuantConfig("nf4", compute_dtype=jnp.bfloat16), jnp.bfloat16),
        (jaxbnb.QuantConfig("fp4", block_size=32, double_quant=True), None),
    ],
)
def test_quantising_while_loading_changes_no_bit(toy, tmp_path, quant, dtype):
    folder = toy.save(toy.model(attention_bias=True), tmp_path / "toy")
    afterwards = load_pretrained(folder, dtype=dtype)
    config = jaxbnb.QuantConfig(quant) if isinstance(quant, str) else quant
    jaxbnb.nnx.quantize_model(afterwards, config)
    assert_same(load_pretrained(folder, quant=quant, dtype=dtype), afterwards)


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_one_unquantised_tensor_at_a_time(toy, tmp_path, monkeypatch, quant):
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    folder = toy.save(toy.model(**shape), tmp_path / "toy")
    load_pretrained(folder, quant=quant)  # Compiling takes memory of its own.
    live = []
    before = sum(array.nbytes for array in jax.live_arrays())

    def open_watched(path):
        checkpoint = convert.open_checkpoint(path)

        def read(name):
            live.append(sum(array.nbytes for array in jax.live_arrays()) - before)
            if len(live) == 1:
                tracemalloc.start()
            return checkpoint.reader(name)

        return dataclasses.replace(checkpoint, reader=read)

    monkeypatch.setattr(_load_plan, "open_checkpoint", open_watched)
    try:
        model = load_pretrained(folder, quant=quant)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    checkpoint = convert.open_checkpoint(folder)
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    assert len(live) == len(checkpoint.tensors)
    # When a tensor is about to be read, none of those before it is left.
    assert max(live) <= result + 1024
    # NumPy's arrays: this tensor, and a few before it. JAX lets go of an array on a
    # thread of its own, some calls later on a busy machine. All of them are far more.
    assert peak < 4.2 * largest < checkpoint.nbytes / 4
    if quant:
        assert result < checkpoint.nbytes / 4


def test_stacks_are_filled_in_place():
    stack = jnp.zeros((8, 64, 32))
    tensor = np.ones((32, 64), np.float32)
    arguments = (stack, tensor, (np.int32(3),), None, True, None)
    memory = _insert._insert.lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes == stack.nbytes
    assert memory.temp_size_in_bytes <= tensor.nbytes


def test_every_problem_is_listed_at_once(toy, tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((96, 63), np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((96, 64), np.uint8)
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((96, 64), np.float32)

    folder = toy.save(toy.model(), tmp_path / "toy", change=change)
    with pytest.raises(convert.MissingTensorError) as caught:
        load_pretrained(folder)
    head, *lines = str(caught.value).split("\n  ")
    assert str(folder) in head
    assert sorted(lines) == [
        "dtype: model.layers.0.mlp.up_proj.weight is uint8, which is not floating",
        "missing: model.layers.1.mlp.up_proj.weight",
        "missing: model.norm.weight",
        "shape: model.layers.2.mlp.up_proj.weight is (96, 63), the model has (96, 64)",
        "unexpected: model.layers.3.mlp.up_proj.weight, of shape (96, 64)",
    ]


def test_wrong_but_not_missing(toy, tmp_path):
    def change(tensors):
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)

    folder = toy.save(toy.model(), tmp_path / "toy", change=change)
    with pytest.raises(
        convert.CheckpointError, match=r"unexpected: .*q_norm"
    ) as caught:
        load_pretrained(folder)
    assert not isinstance(caught.value, convert.MissingTensorError)


def test_what_the_config_determines_is_ignored(toy, tmp_path):
    # Its float32 frequencies do not make a bfloat16 checkpoint a mixed one.
    model = toy.model(tie_word_embeddings=True, param_dtype=jnp.bfloat16)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        inverse = np.ones(8, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = inverse

    assert_same(
        load_pretrained(toy.save(model, tmp_path / "toy", change=change)), model
    )


def test_layers_that_cannot_be_there_are_not_counted(toy, model, tmp_path):
    folder = toy.save(model, tmp_path / "toy", num_hidden_layers=10_000)
    message = "has 30 tensors; its config describes 10000 layers"
    with pytest.raises(convert.MissingTensorError, match=message):
        load_pretrained(folder)


def test_a_lone_surrogate_is_written_as_it_was(toy, model, tmp_path):
    """JSON has an escape for it, and UTF-8 has nothing."""
    folder = toy.save(model, tmp_path / "toy", note="\ud800 \u00e9")
    convert.convert_checkpoint(folder, tmp_path / "converted", dtype="bfloat16")
    models.convert_to_flax(folder, tmp_path / "flax")
    models.save_pretrained(model, tmp_path / "saved", source=folder)
    for name in ("converted", "flax", "saved"):
        text = (tmp_path / name / "config.json").read_text(encoding="utf-8")
        assert json.loads(text)["note"] == "\ud800 \u00e9"
        assert "\u00e9" in text


def test_an_untied_head_must_be_there(toy, tmp_path):
    folder = toy.save(
        toy.model(tie_word_embeddings=True), tmp_path / "toy", tie_word_embeddings=False
    )
    with pytest.raises(convert.MissingTensorError, match=r"missing: lm_head\.weight$"):
        load_pretrained(folder)


def test_another_model_is_named_with_its_path(toy, tmp_path):
    folder = toy.save(toy.model(), tmp_path / "toy", model_type="mamba")
    with pytest.raises(NotImplementedError, match="'mamba'") as caught:
        load_pretrained(folder)
    assert str(folder) in caught.value.__notes__[0]


def test_a_quantised_checkpoint(toy, tmp_path):
    quantization = {"quant_method": "bitsandbytes"}
    folder = toy.save(toy.model(), tmp_path / "toy", quantization_config=quantization)
    with pytest.raises(NotImplementedError, match="is quantised already"):
        load_pretrained(folder)


def test_an_unknown_format(toy, tmp_path):
    folder = toy.save(toy.model(), tmp_path / "toy")
    with pytest.raises(ValueError, match="quant_type 'nf5' is not known"):
        load_pretrained(folder, quant="nf5")


def test_a_dtype_that_is_not_floating(toy, tmp_path):
    folder = toy.save(toy.model(), tmp_path / "toy")
    with pytest.raises(TypeError, match=r"dtype must be floating.* got int8; quant= "):
        load_pretrained(folder, dtype="int8")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(convert.CheckpointError):
        load_pretrained(tmp_path)


def test_a_flax_folder_is_the_same_model(toy, tmp_path, capsys):
    folder = toy.save(toy.model(), tmp_path / "toy")
    quant = QuantConfig("int8", block_size=32, double_quant=True)
    nbytes = models.convert_to_flax(
        folder, tmp_path / "flax", quant=quant, dtype=jnp.bfloat16
    )
    want = load_pretrained(folder, quant=quant, dtype=jnp.bfloat16)
    got = load_pretrained(tmp_path / "flax")
    leaves = jax.tree.leaves(nnx.state(want))
    assert nbytes == sum(leaf.nbytes for leaf in leaves)
    assert jax.tree.structure(nnx.state(got)) == jax.tree.structure(nnx.state(want))
    for mine, theirs in zip(jax.tree.leaves(nnx.state(got)), leaves, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert cli.main(["inspect", str(tmp_path / "flax")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'flax'}: llama, the state of an NNX model\n")
    assert jaxbnb.summary(want) in out
    assert out.endswith("jaxbnb.load_pretrained loads it\n")
    with pytest.raises(ValueError, match="leave out quant and dtype"):
        load_pretrained(tmp_path / "flax", quant="nf4")
    (tmp_path / "flax" / "flax.json").write_text("{}")
    with pytest.raises(convert.CheckpointError, match="not what jaxbnb wrote"):
        load_pretrained(tmp_path / "flax")


@pytest.mark.parametrize("quant_type", ["nf4", "llm_int8"])
def test_what_is_stored_quantised_is_loaded_as_it_is(toy, tmp_path, quant_type):
    folder = toy.save(
        toy.model(hidden_size=64, intermediate_size=128), tmp_path / "toy"
    )
    convert.convert_checkpoint(folder, tmp_path / "q", quant=quant_type)
    models.check_pretrained(tmp_path / "q")
    got = load_pretrained(tmp_path / "q")
    want = load_pretrained(folder, quant=quant_type)
    for mine, theirs in zip(
        jax.tree.leaves(nnx.state(got)), jax.tree.leaves(nnx.state(want)), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(
        ValueError, match=r"is quantised already, .*; leave out quant, got 'fp4'$"
    ):
        load_pretrained(tmp_path / "q", quant="fp4")
    # Only one layer is quantised, but a stack has one format.
    name = "model.layers.1.mlp.up_proj"
    convert.convert_checkpoint(
        folder,
        tmp_path / "mixed",
        quant=quant_type,
        skip=["lm_head", "embed_tokens", name],
    )
    with pytest.raises(NotImplementedError, match="the same of other layers differ"):
        load_pretrained(tmp_path / "mixed")


DOUBLE = QuantConfig("nf4", double_quant=True)


@pytest.mark.parametrize("quant", [None, "nf4", DOUBLE, "stored", "flax"])
def test_a_mesh(toy, tmp_path, quant):
    """The same values, each device holding its share."""
    folder = toy.save(toy.model(intermediate_size=128), tmp_path / "toy")
    if quant == "stored":
        convert.convert_checkpoint(folder, tmp_path / "q", quant="nf4")
        folder, quant = tmp_path / "q", None
    elif quant == "flax":
        models.convert_to_flax(folder, tmp_path / "q")
        folder, quant = tmp_path / "q", None
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    rules = [
        (["gate_proj.kernel", "up_proj.kernel"], PartitionSpec(None, "tensor")),
        (["down_proj.kernel"], PartitionSpec("tensor", None)),
        (["lm_head.kernel"], PartitionSpec("tensor")),
    ]
    model = load_pretrained(folder, quant=quant, mesh=mesh, sharding=rules)
    assert_same(model, load_pretrained(folder, quant=quant))
    for layer, shards in (("up_proj", 2), ("down_proj", 2)):
        kernel = getattr(model.model.layers.layer.mlp, layer).kernel[...]
        # The absmax of the absmax and its offset are on every device.
        for i, leaf in enumerate(jax.tree.leaves(kernel)):
            assert {s.data.nbytes for s in leaf.addressable_shards} == {
                leaf.nbytes // (shards if i < 2 else 1)
            }
            assert len(leaf.addressable_shards) == 2
    scale = model.model.norm.scale[...]
    assert {s.data.nbytes for s in scale.addressable_shards} == {scale.nbytes}


def test_a_preset(toy, tmp_path):
    """One name divides a model; no mesh divides single heads."""
    folder = toy.save(toy.model(num_hidden_layers=1), tmp_path / "toy")
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    for sharding in ("fsdp", None):
        model = load_pretrained(folder, quant="nf4", mesh=mesh, sharding=sharding)
        codes = model.model.layers.layer.mlp.up_proj.kernel[...].codes
        assert codes.sharding.spec == PartitionSpec(None, "fsdp", None)
    assert_same(model, load_pretrained(folder, quant="nf4"))
    with jax.set_mesh(mesh):
        explicit = load_pretrained(folder, quant="nf4", mesh=mesh)
    assert_same(explicit, model)
    leaves_of_both = (jax.tree.leaves(nnx.state(m)) for m in (explicit, model))
    for x, y in zip(*leaves_of_both, strict=True):
        assert (x.sharding.mesh, x.sharding.spec) == (mesh, y.sharding.spec)
    mesh = jax.make_mesh((8,), ("tensor",))
    message = r"'tensor'.* have 8 devices.*num_attention_heads=4.*\[1, 2, 4\]"
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder, mesh=mesh, sharding="tensor")


@pytest.mark.parametrize("quant", [None, "nf4", "stored"])
def test_a_device_receives_its_own_part(toy, tmp_path, monkeypatch, quant):
    """A device gets its own part of each tensor, to stack and to quantise it."""
    folder = toy.save(toy.model(intermediate_size=1024), tmp_path / "toy")
    if quant == "stored":
        convert.convert_checkpoint(folder, tmp_path / "q", quant="nf4")
        folder, quant = tmp_path / "q", None
    insert, calls = _insert._insert, []

    def spy(*arguments):
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            arguments[:2],
        )
        calls.append((*abstract, *arguments[2:]))
        return insert(*arguments)

    monkeypatch.setattr(_insert, "_insert", spy)
    mesh = jax.make_mesh((8,), ("tensor",))
    rules = [(["up_proj.kernel"], PartitionSpec(None, "tensor"))]
    load_pretrained(folder, quant=quant, mesh=mesh, sharding=rules)

    def own(x):
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    divided = []
    for call in calls:
        leaves = jax.tree.leaves(call[1])
        if own(leaves[0]) < leaves[0].size * leaves[0].dtype.itemsize:
            divided.append(call)
            assert [8 * own(x) for x in leaves] == [
                x.size * x.dtype.itemsize for x in leaves
            ]
    assert len(divided) == 3  # A layer each.
    compiled = insert.lower(*divided[0]).compile()
    assert "all-gather" not in compiled.as_text()
    memory, (stack, tensor, *_) = compiled.memory_analysis(), divided[0]
    # Plus the four bytes of the index.
    arguments = sum(map(own, jax.tree.leaves((stack, tensor))))
    assert memory.argument_size_in_bytes == arguments + 4
    assert memory.alias_size_in_bytes == sum(map(own, jax.tree.leaves(stack)))
    assert memory.temp_size_in_bytes <= own(jax.tree.leaves(tensor)[0])


@pytest.mark.parametrize(
    ("names", "spec", "message"),
    [
        (["nothing"], PartitionSpec(), "no variable is named"),
        (["norm.scale"], PartitionSpec(None, "tensor"), "has 1 axes"),
        (["embedding"], PartitionSpec("tensor"), "is not divisible by"),
        (["norm.scale"], PartitionSpec("data"), "'data'. not found in mesh"),
    ],
)
def test_rules_that_do_not_fit(toy, tmp_path, names, spec, message):
    folder = toy.save(toy.model(), tmp_path / "toy")
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder, mesh=mesh, sharding=[(names, spec)])
    with pytest.raises(ValueError, match="give the mesh too"):
        load_pretrained(folder, sharding=[(names, spec)])


@pytest.mark.parametrize("double_quant", [False, True])
def test_layers_are_cut_out_of_a_quantised_tensor(double_quant):
    # 4 absmax a column, so that 64 columns share one of the nested.
    x = np.random.default_rng(0).standard_normal((256, 192), np.float32)
    q = jaxbnb.quantize(jnp.asarray(x), "nf4", axis=-2, double_quant=double_quant)
    whole, stored = q.dequantize(), jax.tree.map(np.asarray, q)
    for columns in (np.arange(64, 192), np.r_[128:192, 0:64], np.arange(64, 100)):
        cut = jax.tree.map(jnp.asarray, cut_columns(stored, columns))
        np.testing.assert_array_equal(cut.dequantize(), whole[:, columns])
    across = np.arange(32, 96)
    if not double_quant:
        np.testing.assert_array_equal(
            cut_columns(stored, across).dequantize(), whole[:, across]
        )
        return
    with pytest.raises(convert.UnsupportedCheckpointError, match="blocks of 256"):
        cut_columns(stored, across)
