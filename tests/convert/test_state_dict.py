"""A user's own model by a mapping that the user writes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import jaxbnb
from jaxbnb import convert

RULES = [
    (r"net\.(\d)\.weight", r"layers.\1.kernel", np.transpose),
    (r"net\.(\d)\.bias", r"layers.\1.bias"),
    (r".*steps", None),
]


@pytest.fixture
def model():
    return nnx.Sequential(
        nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 2, rngs=nnx.Rngs(1))
    )


def found(**changes):
    rng = np.random.default_rng(0)
    shapes = {"net.0.weight": (5, 3), "net.0.bias": (5,), "net.1.weight": (2, 5)}
    shapes["net.1.bias"] = (2,)
    tensors = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    tensors["net.steps"] = np.array(3)
    tensors |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in tensors.items() if value is not None}


@pytest.mark.parametrize("from_file", [False, True])
def test_every_tensor_is_where_the_rules_say(model, tmp_path, from_file):
    tensors = source = found()
    if from_file:
        source = tmp_path / "x.safetensors"
        save_file(tensors, source)
    report = convert.load_state_dict(model, source, RULES)
    for i in range(2):
        kernel = tensors[f"net.{i}.weight"].T
        np.testing.assert_array_equal(model.layers[i].kernel[...], kernel)
        np.testing.assert_array_equal(
            model.layers[i].bias[...], tensors[f"net.{i}.bias"]
        )
    assert report.mapped["net.1.weight"] == "layers.1.kernel"
    assert report.reshaped == {
        "net.0.weight": ((5, 3), (3, 5)),
        "net.1.weight": ((2, 5), (5, 2)),
    }
    assert (report.ignored, report.untouched) == (["net.steps"], [])


def test_all_errors_at_once_and_nothing_changed(model):
    before = np.array(model.layers[0].bias[...])
    ones = np.ones((5, 3), np.float32)
    tensors = found(
        net__0__weight=ones.T,
        more=ones,
        net__1__bias=np.ones(2, int),
        net__7__bias=ones,
    )
    rules = [(r"net\.1\.weight", "layers.0.bias"), *RULES]
    with pytest.raises(convert.MissingTensorError) as error:
        convert.load_state_dict(model, tensors, rules)
    lines = str(error.value).split("\n  ")
    assert sorted(lines[1:]) == [
        "dtype: net.1.bias is int64, which is not floating",
        "missing: nothing goes to layers.1.bias",
        "missing: nothing goes to layers.1.kernel",
        "no rule: more, of shape (5, 3)",
        "no variable: net.7.bias goes to layers.7.bias",
        "shape: net.0.weight becomes (5, 3); layers.0.kernel has (3, 5)",
        "twice: net.1.weight and net.0.bias both go to layers.0.bias",
    ]
    np.testing.assert_array_equal(model.layers[0].bias[...], before)


def test_variables_that_nothing_goes_to(model):
    tensors = found(net__1__bias=None)
    with pytest.raises(convert.MissingTensorError, match=r"to layers\.1\.bias"):
        convert.load_state_dict(model, tensors, RULES)
    report = convert.load_state_dict(model, tensors, RULES, strict=False)
    assert report.untouched == ["layers.1.bias"]


def test_rules_that_are_none(model):
    with pytest.raises(ValueError, match="not a regular expression"):
        convert.load_state_dict(model, found(), [("(", "x")])

    def fail(array):
        raise RuntimeError("mine")

    with pytest.raises(convert.CheckpointError, match="becomes RuntimeError: mine"):
        convert.load_state_dict(model, found(), [(".*0.bias", "layers.0.bias", fail)])


@pytest.mark.parametrize(
    "rules", [{"net.0.weight": "up.kernel"}, "up", [("net.0.weight",)], ["ab"], None]
)
def test_rules_in_another_form(model, rules):
    with pytest.raises(TypeError, match=r"^rules are \(pattern, path\) pairs or"):
        convert.load_state_dict(model, found(), rules)


@pytest.mark.peers
def test_a_module_instead_of_its_state_dict(model):
    module = pytest.importorskip("torch").nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"got Linear\. Give module\.state_dict\(\)$"):
        convert.load_state_dict(model, module, RULES)
    with pytest.raises(TypeError, match=r"got list$"):
        convert.load_state_dict(model, [], RULES)


@pytest.mark.parametrize("strict", [False, True])
def test_an_abstract_variable_has_no_value_to_keep(model, strict):
    tensors = found(net__1__bias=None)
    abstract = nnx.eval_shape(lambda: model)
    missing = r"to layers\.1\.bias, which is a shape without a value$"
    with pytest.raises(convert.MissingTensorError, match=missing):
        convert.load_state_dict(abstract, tensors, RULES, strict=strict)
    shapes = {"params": {"up": jax.ShapeDtypeStruct((2,), jnp.float32)}}
    missing = r"to params\.up, which is a shape without a value$"
    with pytest.raises(convert.MissingTensorError, match=missing):
        convert.load_variables(shapes, {}, [], strict=strict)
    # With all its tensors it is a model as any other.
    convert.load_state_dict(abstract, found(), RULES, strict=strict)
    np.testing.assert_array_equal(abstract.layers[1].bias[...], found()["net.1.bias"])


@pytest.mark.parametrize(
    "library", ["numpy", pytest.param("torch", marks=pytest.mark.peers)]
)
def test_codes_without_their_scales_are_refused(model, library):
    codes = np.ones((5, 3), ml_dtypes.float8_e4m3fn)
    if library == "torch":
        torch = pytest.importorskip("torch")
        codes = torch.ones(5, 3).to(torch.float8_e4m3fn)
    message = "dtype: w is float8_e4m3fn, the codes of a quantised weight; multiply"
    with pytest.raises(convert.CheckpointError, match=message):
        convert.load_state_dict(
            model, {"w": codes}, [("w", "layers.0.kernel", np.transpose)]
        )


@pytest.mark.peers
def test_tensors_of_torch(model):
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    rules = [(pattern.replace("net", ""), *rest) for pattern, *rest in RULES]
    rules = [(p.removeprefix(r"\."), *rest) for p, *rest in rules]
    convert.load_state_dict(model, net.to(torch.bfloat16).state_dict(), rules)
    x = np.ones((1, 3), np.float32)
    want = net.float()(torch.from_numpy(x)).detach().numpy()
    # float32 sums of 3 and of 5 products.
    np.testing.assert_allclose(model(x), want, rtol=1e-5, atol=1e-6)


# --- Variables of every type, and collections.

NORM = {
    "norm.weight": np.array([1.5, -0.5, 2.0], np.float32),
    "norm.bias": np.array([0.25, 0.0, -1.0], np.float32),
    "norm.running_mean": np.array([3.0, -2.0, 0.5], np.float32),
    "norm.running_var": np.array([4.0, 0.25, 9.0], np.float32),
    "norm.num_batches_tracked": np.array(7),
}


class Norm(nnx.Module):
    """One variable of each kind: trained, running, of the user's, and no weights."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, epsilon=1e-5, use_running_average=True, rngs=rngs)
        self.steps = nnx.Variable(jnp.array(0, jnp.int32))
        self.noise = nnx.Dropout(0.5, rngs=rngs)
        self.keys = nnx.Cache(jnp.zeros(2))


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale_init = nn.with_partitioning(nn.initializers.ones, ("data",))
        return nn.BatchNorm(True, epsilon=1e-5, scale_init=scale_init, name="norm")(x)


def norm_rules(params="", stats=""):
    return [
        (r"norm\.weight", f"{params}norm.scale"),
        (r"norm\.bias", f"{params}norm.bias"),
        (r"norm\.running_(mean|var)", rf"{stats}norm.\1"),
    ]


NNX_RULES = [*norm_rules(), (r".*num_batches_tracked", "steps")]
LINEN_RULES = [*norm_rules("params.", "batch_stats."), (r".*_tracked", None)]


def normalised(x, axis=-1):
    shape = [1] * x.ndim
    shape[axis] = 3
    mean, var, scale, bias = (
        NORM[f"norm.{name}"].reshape(shape)
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / np.sqrt(var + np.float32(1e-5)) * scale + bias


def loaded_norms(tensors=NORM):
    """The function of each API's norm, with these tensors in it."""
    model = Norm(nnx.Rngs(0))
    convert.load_state_dict(model, tensors, NNX_RULES)
    shapes = jax.eval_shape(LinenNorm().init, jax.random.key(0), jnp.ones((1, 3)))
    variables, _ = convert.load_variables(shapes, tensors, LINEN_RULES)
    assert variables["params"]["norm"]["scale"].names == ("data",)
    return model, lambda x: LinenNorm().apply(variables, x)


# Six roundings, of numbers below 12.
BOUND = 6 * 2**-24 * 12


def test_running_statistics_and_variables_of_any_type():
    model, linen = loaded_norms()
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_allclose(model.norm(x), normalised(x), rtol=0, atol=BOUND)
    np.testing.assert_allclose(linen(x), normalised(x), rtol=0, atol=BOUND)
    assert (int(model.steps[...]), model.steps[...].dtype) == (7, jnp.int32)


def test_running_statistics_that_are_left_out_are_named():
    tensors = {k: v for k, v in NORM.items() if "running" not in k}
    with pytest.raises(convert.MissingTensorError, match=r"to norm\.mean"):
        convert.load_state_dict(Norm(nnx.Rngs(0)), tensors, NNX_RULES)
    loaded = nn.unbox(LinenNorm().init(jax.random.key(0), jnp.ones((1, 3))))
    with pytest.raises(convert.MissingTensorError, match=r"to batch_stats\.norm\.var"):
        convert.load_variables(loaded, tensors, LINEN_RULES)
    report = convert.load_state_dict(
        Norm(nnx.Rngs(0)), tensors, NNX_RULES, strict=False
    )
    # Neither the random state nor what a call leaves behind.
    assert report.untouched == ["norm.mean", "norm.var"]
    variables, report = convert.load_variables(
        loaded, tensors, LINEN_RULES, strict=False
    )
    assert report.untouched == ["batch_stats.norm.mean", "batch_stats.norm.var"]
    assert variables["batch_stats"] == loaded["batch_stats"]


def test_a_kind_of_dtype_that_a_variable_does_not_hold():
    for value, found in [
        (np.array(2.0), "float64, which is not integer"),
        (np.array(2**40), "values that int32 cannot hold"),
    ]:
        model = Norm(nnx.Rngs(0))
        tensors = {**NORM, "norm.num_batches_tracked": value}
        with pytest.raises(convert.CheckpointError, match=found):
            convert.load_state_dict(model, tensors, NNX_RULES)
        assert float(model.norm.mean[0]) == 0


def test_the_other_api_is_named(model):
    with pytest.raises(TypeError, match="load_variables"):
        convert.load_state_dict({"params": {}}, NORM, [])
    with pytest.raises(TypeError, match="load_state_dict"):
        convert.load_variables(model, NORM, [])


@pytest.mark.parametrize("quant", ["nf4", "llm_int8"])
def test_quantised_variables_take_their_format(quant):
    """As quantising after loading, bit for bit; also the kernel of heads."""
    rng = np.random.default_rng(0)
    tensors = {
        "up": rng.standard_normal((64, 32)).astype(np.float32),
        "heads": rng.standard_normal((64, 4, 8)).astype(np.float32),
    }

    def make():
        heads = nnx.LinearGeneral(64, (4, 8), use_bias=False, rngs=nnx.Rngs(1))
        up = nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0))
        return nnx.Dict(up=up, heads=heads)

    rules = [("(.*)", r"\1.kernel")]
    before, after = make(), make()
    convert.load_state_dict(before, tensors, rules)
    jaxbnb.nnx.quantize_model(before, quant)
    jaxbnb.nnx.quantize_model(after, quant)
    convert.load_state_dict(after, tensors, rules)
    held = nnx.state(after)["up"]["kernel"].get_raw_value()
    variables, _ = convert.load_variables(
        {"params": {"up": {"kernel": held}}},
        {"up": tensors["up"]},
        [("up", "params.up.kernel")],
    )
    want = jax.tree.leaves(nnx.state(before))
    for a, b in zip(want, jax.tree.leaves(nnx.state(after)), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(held), strict=True):
        np.testing.assert_array_equal(a, b)


def test_tensors_go_where_the_variable_lies(model):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    kernel = model.layers[1].kernel
    kernel.set_value(jax.device_put(kernel.get_value(), sharding))
    convert.load_state_dict(model, found(), RULES)
    assert model.layers[1].kernel[...].sharding == sharding


@pytest.mark.peers
@pytest.mark.parametrize("ndim", [1, 2])
def test_batch_norm_of_torch(ndim):
    torch = pytest.importorskip("torch")
    kind = torch.nn.BatchNorm1d if ndim == 1 else torch.nn.BatchNorm2d
    net = torch.nn.ModuleDict({"norm": kind(3)})
    net.load_state_dict({k: torch.tensor(v) for k, v in NORM.items()})
    shape = (5, 3) if ndim == 1 else (2, 3, 4, 6)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    want = net.eval()["norm"](torch.from_numpy(x)).detach().numpy()
    model, linen = loaded_norms(net.state_dict())
    # Channels are torch's second axis, and Flax's last.
    for norm in (model.norm, linen):
        y = np.moveaxis(norm(np.moveaxis(x, 1, -1)), -1, 1)
        np.testing.assert_allclose(y, want, rtol=0, atol=BOUND)
