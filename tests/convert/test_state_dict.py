"""A user's own model by a mapping that the user writes."""

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

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
    with pytest.raises(ValueError, match="no regular expression"):
        convert.load_state_dict(model, found(), [("(", "x")])

    def fail(array):
        raise RuntimeError("mine")

    with pytest.raises(convert.CheckpointError, match="becomes RuntimeError: mine"):
        convert.load_state_dict(model, found(), [(".*0.bias", "layers.0.bias", fail)])


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
