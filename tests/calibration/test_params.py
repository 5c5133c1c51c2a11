"""calibrate_params: Linen models, and what it captures under Flax's transforms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb.calibration import (
    _matrix,
    _params,
    _prepare,
    _solver,
    calibrate_params,
    search_scales,
)
from jaxbnb.calibration._batches import sample_losses
from jaxbnb.calibration._matrix import FROM_GRADIENTS
from jaxbnb.calibration._prepare import shrink_tiles

NF4 = jaxbnb.QuantConfig("nf4", block_size=32)


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.float32)


def fill(model, *args):
    """Normal variables: compiling initializers takes longest."""
    variables = jax.eval_shape(model.init, jax.random.key(0), *args)
    return jax.tree.map(lambda x: normal(*x.shape, seed=x.size) / 4, variables)


def capture(model, variables, calls, method, **options):
    """The moments of each layer, by path."""
    params = _params._flatten(variables)
    kernels = {}
    for path, layer in _params.trace_layers(model, variables, calls[0], {}).items():
        if layer.axes is not None:
            matrices = layer.axes.to_matrices(_params.take_out(params[layer.key]))
            kernels[path] = _params._Kernel(layer, matrices, None)
    get_logits = options.get("get_logits")
    run = _params._Run(model, variables, calls, {}, method, get_logits, 0)
    return {path: x for path, *x in _params._stream_moments(run, kernels)}


@pytest.mark.parametrize(
    ("layer", "shape", "out"),
    [
        (nn.Dense(6), (2, 5, 8), (2,)),
        (nn.DenseGeneral((2, 3)), (2, 5, 8), (2, 3)),
        (nn.DenseGeneral(6, axis=(-2, -1)), (2, 5, 2, 4), (2,)),
        (nn.DenseGeneral((2, 3), batch_dims=(0,)), (2, 5, 8), (2, 3)),
        (nn.Einsum((2, 8, 3), "btd,hdk->bhkt"), (2, 5, 8), (1, 2)),
    ],
    ids=["Dense", "heads", "of heads", "batch", "Einsum"],
)
@pytest.mark.parametrize("method", ["mse", "gptq", "guided", "kronecker"])
def test_moments_of_every_layer(layer, shape, out, method):
    x = normal(*shape)
    variables = fill(layer, x)
    ((moment, tiles),) = capture(layer, variables, [(x,)], method).values()
    weight = jnp.ones(shape[:2])
    has_batch = getattr(layer, "batch_dims", ()) != ()
    if method in FROM_GRADIENTS:
        key = jax.random.fold_in(jax.random.key(0), 0)
        y = layer.apply(variables, x)
        g = jax.grad(lambda y: jnp.sum(sample_losses(y, key)))(y)
        weight = jnp.sqrt(jnp.sum(g**2, axis=out))
    if method == "kronecker":
        g = jnp.moveaxis(g, out, range(-len(out), 0)).reshape(*shape[:2], 6)
        g = jnp.pad(g, [(0, 0), (0, 0), (0, 26)])
        letters = "b" if has_batch else ""
        want = jnp.einsum(f"bti,bt,btj->{letters}ij", g, 1 / weight, g)
        np.testing.assert_allclose(
            tiles, want[..., None, :, :], rtol=1e-5, atol=1e-6 * jnp.max(want)
        )
    else:
        assert tiles is None
    rows = x.reshape(*shape[:2], 8)
    want = jnp.einsum("btn,bt,btm->bnm", rows, weight, rows)
    want = want if has_batch else want.sum(0)
    if method == "mse":
        want = jnp.diagonal(want, axis1=-2, axis2=-1)
    # Sums of 5 or 10 products of float32.
    np.testing.assert_allclose(moment, want, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(16, name="inner")(x)), None


class Model(nn.Module):
    """Kernels that are boxed, stacked, reused, of experts, and without a use."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 16, name="embed")(tokens)
        boxed = nn.with_partitioning(nn.initializers.normal(), (None, "mlp"))
        x = jnp.tanh(nn.Dense(16, kernel_init=boxed, name="first")(x))
        scan = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scan(name="stack")(x, None)
        twice = nn.Dense(16, name="twice")
        x = twice(jnp.tanh(twice(x)))
        nn.Dense(4, name="unused")(x)
        experts = nn.DenseGeneral(8, batch_dims=(0,), name="experts")
        return {"logits": nn.Dense(16, name="lm_head")(experts(jnp.stack([x, -x])))}


def get_logits(result):
    return result["logits"]


def test_moments_under_transforms():
    """Those of the same products, written by hand, over two batches."""
    tokens = jnp.arange(12).reshape(2, 6) % 7
    variables = fill(Model(), tokens)
    calls = [(tokens,), (tokens + 3,)]
    params = nn.unbox(variables)["params"]

    def by_hand(tokens, key):
        def run(added):
            inputs, places = [], iter(added)

            def layer(x, kernel, bias):
                inputs.append(x)
                return x @ kernel + bias + next(places)

            x = params["embed"]["embedding"][tokens].reshape(-1, 16)
            x = jnp.tanh(layer(x, **params["first"]))
            for i in range(3):
                one = jax.tree.map(lambda x, i=i: x[i], params["stack"]["inner"])
                x = jnp.tanh(layer(x, **one))
            for last in (False, True):
                x = layer(x, **params["twice"])
                x = x if last else jnp.tanh(x)
            experts, head = params["experts"], params["lm_head"]
            both = jnp.einsum("etd,edf->etf", jnp.stack([x, -x]), experts["kernel"])
            both = (both + experts["bias"][:, None]).reshape(2, *tokens.shape, 8)
            logits = both @ head["kernel"]
            losses = sample_losses(logits + head["bias"], key)
            return jnp.sum(losses), inputs

        zeros = [jnp.zeros((tokens.size, 16)) for _ in range(6)]
        gradients, inputs = jax.grad(run, has_aux=True)(zeros)
        return [
            (x * jnp.linalg.norm(g, axis=-1, keepdims=True)).T @ x
            for x, g in zip(inputs, gradients, strict=True)
        ]

    key = jax.random.key(0)
    keys = [jax.random.fold_in(key, i) for i in range(2)]
    parts = [by_hand(call[0], key) for call, key in zip(calls, keys, strict=True)]
    want = [sum(moments) for moments in zip(*parts, strict=True)]
    got = capture(Model(), variables, calls, "guided", get_logits=get_logits)
    layers = ["first", "stack.inner", "twice"]
    expected = [want[0], jnp.stack(want[1:4]), want[4] + want[5]]
    for path, moment in zip(layers, expected, strict=True):
        np.testing.assert_allclose(got[path][0], moment, rtol=1e-4, atol=1e-5)


def test_a_model(tmp_path, monkeypatch):
    tokens = jnp.arange(32).reshape(4, 8) % 16
    variables = fill(Model(), tokens)
    solved, solve = [], _matrix.minimize_error
    monkeypatch.setattr(
        _matrix, "minimize_error", lambda *x: solved.append(x) or solve(*x)
    )
    seen, results = [], []
    for _ in range(2):
        new, reports = calibrate_params(
            Model(),
            variables,
            [tokens, tokens[::-1]],
            NF4,
            rules=[(["embed"], "int8")],
            get_logits=get_logits,
            resume_dir=tmp_path,
            progress=lambda *state: seen.append(state[:2]),
        )
        assert len(solved) == 1 + 3 + 1 + 2
        results.append(new)
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert seen == [(i, 9) for i in range(1, 10)] * 2
    assert [(r.path, r.number, r.method) for r in reports] == [
        ("first", None, "guided"),
        *[("stack.inner", i, "guided") for i in range(3)],
        ("twice", None, "guided"),
        *[("experts", i, "guided") for i in range(2)],
        ("embed", None, "mse"),
        ("unused", None, "mse"),
    ]
    assert all(r.error <= r.absmax_error for r in reports)
    plain, _ = jaxbnb.linen.quantize_params(
        Model(), variables, tokens, config=NF4, rules=[(["embed"], "int8")]
    )
    # The same tree, boxes, shapes and dtypes.
    assert jax.tree.structure(new) == jax.tree.structure(plain)
    assert jax.tree.leaves(jax.tree.map(jax.typeof, new)) == jax.tree.leaves(
        jax.tree.map(jax.typeof, plain)
    )

    @jax.jit
    def apply(variables):
        with jaxbnb.linen.use_quantized():
            return Model().apply(variables, tokens)["logits"]

    exact = Model().apply(variables, tokens)["logits"]
    errors = [jnp.mean((apply(x) - exact) ** 2) for x in (new, plain)]
    assert errors[0] < errors[1]


def test_outputs_of_every_layer_make_up_for_each_other(tmp_path, monkeypatch):
    # The kernels have 8 and 16 outputs.
    monkeypatch.setattr(_prepare, "GROUP", 4)
    _solver._minimize.clear_cache()
    tokens = jnp.arange(32).reshape(4, 8) % 16
    variables = fill(Model(), tokens)
    options = {"get_logits": get_logits, "resume_dir": tmp_path}
    found = {
        method: calibrate_params(
            Model(), variables, [tokens], NF4, method=method, **options
        )
        for method in ("guided", "kronecker")
    }
    (_, alone), (_, together) = found.values()
    assert [r[:2] for r in alone] == [r[:2] for r in together]
    assert [r.method for r in together] == [*["kronecker"] * 7, "mse"]
    assert all(r.error < r.absmax_error for r in together[:7])
    _solver._minimize.clear_cache()
    calls, kernel = [(tokens,)], variables["params"]["experts"]["kernel"]
    got = capture(Model(), variables, calls, "kronecker", get_logits=get_logits)
    moments, tiles = got["experts"]
    reports = [r for r in together if r.path == "experts"]
    for i, report in enumerate(reports):
        gradients = shrink_tiles(tiles[i], 8)
        errors = [
            _solver.output_error(
                kernel[i],
                jax.tree.map(lambda x, i=i: x[i], x["params"]["experts"]["kernel"]),
                moments[i],
                gradients,
            )
            for x, _ in found.values()
        ]
        np.testing.assert_allclose(report.error, errors[1], rtol=1e-4)
        assert errors[1] < errors[0]


def test_a_search_with_and_without_inputs():
    layer, x = nn.Dense(4), normal(3, 8) * jnp.arange(8.0)
    variables = fill(layer, x)
    kernel = variables["params"]["kernel"]
    for batch, squares in (
        (x, jnp.mean(x**2, axis=0)),
        (jax.ShapeDtypeStruct(x.shape, x.dtype), None),
    ):
        new, (report,) = calibrate_params(layer, variables, [batch], NF4, method="mse")
        q, expected = new["params"]["kernel"], search_scales(kernel, NF4, squares)
        np.testing.assert_array_equal(q.codes, expected.codes)
        # Squares are summed in another order.
        np.testing.assert_allclose(q.absmax, expected.absmax, rtol=1e-6)
        assert (report.path, report.method) == ("", "mse")


def test_errors():
    x = normal(3, 8)
    model = nn.Dense(4)
    variables = fill(model, x)
    with pytest.raises(ValueError, match="batches are empty"):
        calibrate_params(model, variables, [])
    with pytest.raises(ValueError, match="method must be one of"):
        calibrate_params(model, variables, [x], method="awq")
    with pytest.raises(ValueError, match="codes can be chosen for nf4, fp4"):
        calibrate_params(model, variables, [x], "llm_int8")
    with pytest.raises(TypeError, match=r"use jaxbnb\.calibrate\(model, batches\)"):
        calibrate_params(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), variables, [x])
    with pytest.raises(FloatingPointError, match="its inputs or gradients"):
        calibrate_params(model, variables, [x * jnp.nan], method="gptq")
    tokens = jnp.arange(6)[None]
    with pytest.raises(TypeError, match="result of a call is a dict; give get_logits"):
        calibrate_params(Model(), fill(Model(), tokens), [tokens])
