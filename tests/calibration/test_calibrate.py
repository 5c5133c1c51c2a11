"""calibrate: which layers, what it captures as they run, and what it leaves alone."""

import contextlib
import functools
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbnb
from jaxbnb.calibration import (
    _capture,
    _linear_layers,
    _matrix,
    _moments,
    compare,
    merge_calibrated,
    tune,
)
from jaxbnb.calibration._batches import hidden_states, read_text, sampled_loss
from jaxbnb.core import files
from jaxbnb.data import TrainBatch
from jaxbnb.models import (
    CausalLM,
    DecoderConfig,
    EncoderDecoderConfig,
    EncoderDecoderLM,
)
from jaxbnb.nnx import LayerStack, QuantLinear

NF4 = jaxbnb.QuantConfig("nf4", block_size=32)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def fill(make):
    """A module without its initializers, which take longest to compile."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)

    def draw(x):
        scale = x.shape[-2] ** -0.5 if len(x.shape) > 1 else 1.0
        return jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype)

    return nnx.merge(graphdef, jax.tree.map(draw, state))


@pytest.fixture(scope="module")
def language_model():
    """Shared, so not to be changed: see `copy`."""
    return fill(lambda: CausalLM(DecoderConfig(**SIZES), rngs=nnx.Rngs(0)))


def copy(model):
    return nnx.merge(*nnx.split(model))


def tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 61, (4, 32)).astype(np.int32) for _ in range(count)]


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(8, 8, rngs=rngs)


class Tower(nnx.Module):
    """A stack of layers between two others. The last one is used twice."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.stack = LayerStack(Layer, 3, rngs=rngs)
        self.twice = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        x = self.stack(lambda layer, x, i: jnp.tanh(layer.inner(x)), x)
        return self.twice(jnp.tanh(self.twice(x)))


def apply(model, x):
    return model(x)


def loss(model, x, key):
    return jnp.sum(jnp.sin(model(x)))


def by_hand(model, x):
    """Inputs of the captured layers, and the gradients of their results."""

    def run(added):
        inputs, places = [x], iter(added)

        def layer(kernel, bias):
            y = inputs[-1] @ kernel + bias + next(places)
            inputs.append(jnp.tanh(y))

        inner = model.stack.layer.inner
        layer(model.first.kernel[...], model.first.bias[...])
        for i in range(3):
            layer(inner.kernel[i], inner.bias[i])
        last = model.twice
        return jnp.sum(jnp.sin(last(jnp.tanh(last(inputs[-1]))))), inputs[:-1]

    zeros = [jnp.zeros((len(x), 8)) for _ in range(4)]
    gradients, inputs = jax.grad(run, has_aux=True)(zeros)
    return inputs, gradients


def test_moments_and_gradients_are_those_of_the_model():
    model = fill(lambda: Tower(nnx.Rngs(0)))
    batches = [
        jnp.asarray(np.random.default_rng(i).standard_normal((5, 8)), jnp.float32)
        for i in range(2)
    ]
    found = _capture.find_layers(model, apply, batches[0])
    assert {layer.path for layer in found} == {"first", "stack.layer.inner"}
    norms, tiles = _capture.capture_gradients(
        model, found, apply, loss, batches, 0, None, lambda _: None, has_tiles=True
    )
    again, nothing = _capture.capture_gradients(
        model, found, apply, loss, batches, 0, None, lambda _: None
    )
    assert nothing is None
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), norms, again)
    hands, totals = [], [0.0] * 4
    for got, x in zip(norms, batches, strict=True):
        inputs, gradients = by_hand(model, x)
        want = [np.linalg.norm(g, axis=-1) for g in gradients]
        hands.append((inputs, want))
        stacked = np.concatenate([got["first"][None], got["stack.layer.inner"]])
        np.testing.assert_allclose(stacked, want, rtol=1e-5)
        for number, (g, norm) in enumerate(zip(gradients, want, strict=True)):
            totals[number] += (g / norm[:, None]).T @ g
    stacked = np.concatenate([tiles["first"][None], tiles["stack.layer.inner"]])
    assert stacked.shape == (4, 1, 32, 32)
    assert not stacked[..., 8:].any()
    np.testing.assert_allclose(stacked[:, 0, :8, :8], totals, rtol=1e-4, atol=1e-6)
    task = _moments.Task(apply, loss, batches, None, found)
    for number, part in enumerate(
        _moments.stream_moments(model, task, "kronecker", 0, None, None)
    ):
        # The layer outside of the stack comes first.
        assert (part.number or 0) == max(0, number - 1)
        np.testing.assert_array_equal(part.tiles, stacked[number])
    for weights in (None, norms):
        moments = [
            moment
            for _, _, moment in _capture.stream_moments(
                model, found, apply, batches, weights
            )
        ]
        assert len(moments) == 4
        for number, moment in enumerate(moments):
            want = sum(
                (x[number] * (1 if weights is None else a[number][:, None])).T
                @ x[number]
                for x, a in hands
            )
            np.testing.assert_allclose(moment, want, rtol=1e-4, atol=1e-5)
        diagonals = _capture.stream_moments(
            model, found, apply, batches, weights, is_diagonal=True
        )
        for moment, (*_, diagonal) in zip(moments, diagonals, strict=True):
            np.testing.assert_allclose(diagonal, np.diagonal(moment), rtol=1e-5)


def test_other_models_and_layers_that_cannot_be_captured():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(16, 32, rngs=rngs)
            self.tower = nnx.Linear(32, 32, rngs=rngs)
            self.twice = nnx.Linear(32, 32, rngs=rngs)
            self.heads = nnx.LinearGeneral(32, (2, 16), rngs=rngs)
            self.unused = nnx.Linear(32, 8, rngs=rngs)

        def __call__(self, tokens):
            x = jnp.tanh(self.tower(self.embed(tokens)))
            x = self.twice(jnp.tanh(self.twice(x)))
            return self.heads(x).reshape(*x.shape)

    model = fill(lambda: Model(nnx.Rngs(0)))
    kernels = {"embed": model.embed.embedding[...], "unused": model.unused.kernel[...]}
    reports = jaxbnb.calibrate(
        model,
        [jnp.arange(16)],
        NF4,
        rules=[(["embed"], jaxbnb.QuantConfig("int8", block_size=32))],
        apply=apply,
    )
    assert {r.path: r.method for r in reports} == {
        "tower": "guided",
        "embed": "mse",
        "heads": "guided",
        "twice": "mse",
        "unused": "mse",
    }
    assert all(report.error <= report.absmax_error for report in reports)
    assert isinstance(model.embed, jaxbnb.nnx.QuantEmbed)
    assert isinstance(model.heads, jaxbnb.nnx.QuantLinearGeneral)
    decoded = model.embed.embedding[...].dequantize()
    np.testing.assert_allclose(decoded, kernels["embed"], atol=0.01)
    decoded = model.unused.kernel[...].dequantize()
    assert jnp.mean((decoded - kernels["unused"]) ** 2) < 0.01
    assert np.isfinite(model(jnp.arange(16))).all()


def test_a_language_model(language_model):
    """Each way is better than the one before, and kronecker than mse without inputs."""
    plain = copy(language_model)
    jaxbnb.nnx.quantize_model(plain, NF4)
    held_out = tokens(4, seed=1)
    divergences = [compare(plain, language_model, held_out).kl]
    for text, method in (
        (None, "mse"),
        (tokens(4), "mse"),
        (tokens(4), "guided"),
        (tokens(4), "kronecker"),
    ):
        model, seen = copy(language_model), []
        reports = jaxbnb.calibrate(
            model,
            text,
            NF4,
            method=method,
            progress=lambda *state, seen=seen: seen.append(state),
        )
        assert seen[-1][:2] == (14, 14)
        assert {(x.path, x.number) for x in reports} == {
            (x.path, i) for x in reports for i in range(2)
        }
        assert all(report.error < report.absmax_error for report in reports)
        divergences.append(compare(model, language_model, held_out).kl)
    assert divergences[:-1] == sorted(divergences[:-1], reverse=True)
    # These gradients are random, and hardly correlated.
    assert divergences[-1] < divergences[1]
    # The model that was given is as before.
    assert type(language_model.model.layers.layer.mlp.up_proj) is nnx.Linear


class Heads(nnx.Module):
    """Projections to heads and back, as those of attention."""

    def __init__(self, rngs, is_general):
        self.is_general = is_general
        if is_general:
            self.split = nnx.LinearGeneral(32, (2, 16), rngs=rngs)
            self.join = nnx.LinearGeneral((2, 16), 32, axis=(-1, 1), rngs=rngs)
        else:
            self.split, self.join = (nnx.Linear(32, 32, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        x = jnp.tanh(self.split(x).reshape(*x.shape[:2], 2, 16))
        # The joined axes need not be the last ones, nor in their order.
        x = x.transpose(0, 2, 1, 3)
        if not self.is_general:
            x = x.transpose(0, 2, 1, 3).reshape(len(x), -1, 32)
        return jnp.tanh(self.join(x))


class Attending(nnx.Module):
    def __init__(self, rngs, is_general):
        self.outer = Heads(rngs, is_general)
        self.stack = LayerStack(
            functools.partial(Heads, is_general=is_general), 2, rngs=rngs
        )

    def __call__(self, x):
        return self.stack(lambda layer, x, i: layer(x), self.outer(x))


@pytest.mark.parametrize("method", ["kronecker", "guided", "gptq", "mse"])
def test_general_layers_have_the_codes_of_the_same_matrix(method):
    plain = fill(lambda: Attending(nnx.Rngs(0), is_general=False))
    general = Attending(nnx.Rngs(0), is_general=True)
    for (_, new), (_, old) in zip(
        nnx.to_flat_state(nnx.state(general, nnx.Param)),
        nnx.to_flat_state(nnx.state(plain, nnx.Param)),
        strict=True,
    ):
        new.set_value(old[...].reshape(new.shape))
    x = jax.random.normal(jax.random.key(1), (3, 8, 32))
    reports, errors = {}, {}
    for name, model in (("plain", plain), ("general", general)):
        found = jaxbnb.calibrate(model, [x], NF4, method=method, apply=apply)
        reports[name] = [r[:3] for r in found]
        errors[name] = [r.error for r in found]
    assert reports["general"] == reports["plain"]
    assert {method} == {each for *_, each in reports["general"]}
    assert len(reports["general"]) == 6
    # XLA adds up the squares of a gradient in another order: 32 roundings of 2**-24.
    np.testing.assert_allclose(errors["general"], errors["plain"], rtol=2**-18)
    for path in ("outer", "stack.layer"):
        for name in ("split", "join"):
            ours, want = (
                getattr(_linear_layers.child(model, path), name).kernel.get_raw_value()
                for model in (general, plain)
            )
            np.testing.assert_array_equal(ours.codes, want.codes)
            np.testing.assert_allclose(ours.absmax, want.absmax, rtol=2**-18)


def test_experts_are_not_captured():
    """Their stack lies in the stack of layers, which alone is streamed."""
    config = DecoderConfig(
        **SIZES, model_type="mixtral", num_experts=4, num_experts_per_tok=2
    )
    model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    found = _capture.find_layers(model, hidden_states, read_text(tokens(1), model)[0])
    assert {(x.stack, x.inner) for x in found} == {
        ("model.layers", f"self_attn.{name}_proj") for name in "qkvo"
    }


def test_the_seed_decides_the_labels(language_model):
    graphdef, state = nnx.split(language_model)
    (text,) = read_text(tokens(1), language_model)

    @jax.jit
    def total(state, seed):
        return sampled_loss(nnx.merge(graphdef, state), text, jax.random.key(seed))

    first, again, other = (float(total(state, seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_padding_does_not_count(language_model):
    """Batches of Batches: what follows the text changes nothing."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 61, (1, 2, 16)).astype(np.int32)
    codes = []
    for padding in (0, 7):
        row = np.full((1, 2, 16), padding, np.int32)
        both = np.concatenate([text, row], axis=-1)
        is_text = np.arange(32) < 16
        batch = TrainBatch(
            both,
            np.broadcast_to(is_text & (np.arange(32) > 0), both.shape),
            np.broadcast_to(np.where(is_text, 1, 2), both.shape).astype(np.int32),
            (0,),
        )
        model = copy(language_model)
        jaxbnb.calibrate(model, [batch], NF4, method="gptq")
        codes.append(nnx.state(model.model.layers))
    jax.tree.map(np.testing.assert_array_equal, *codes)


@pytest.mark.parametrize(
    ("method", "count_gradients"), [("guided", 2), ("kronecker", 1)]
)
def test_it_resumes_with_the_same_result(
    tmp_path, monkeypatch, method, count_gradients
):
    """Stopped at random moments, always just before a file is complete."""
    monkeypatch.setattr(files, "_sync", lambda path: None)
    tower = fill(lambda: Tower(nnx.Rngs(0)))
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)

    def run(folder, stop=None, batches=x, config=NF4):
        """Calibrates, up to a number of new files; returns all that it solved."""
        model, solved, left = copy(tower), [], stop
        replace, solve = os.replace, _matrix.minimize_error

        def rename(*paths):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left = None if left is None else left - 1
            replace(*paths)

        def note(*problem):
            solved.append(problem)
            return solve(*problem)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", rename)
            patch.setattr(_matrix, "minimize_error", note)
            with contextlib.suppress(KeyboardInterrupt):
                reports = jaxbnb.calibrate(
                    model,
                    batches,
                    config,
                    method=method,
                    apply=apply,
                    resume_dir=folder,
                )
                return model, reports, solved
        return None, None, solved

    def weights(model):
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(nnx.state(model))]

    model, reports, solved = run(None)
    assert len(solved) == 4
    rng, count, stops = random.Random(0), 0, []
    resumed = None
    while resumed is None:
        stops.append(rng.randrange(1, 4))
        resumed, again, solved = run(tmp_path, stops[-1])
        count += len(solved)
    assert weights(resumed) == weights(model)
    # All but the time and the peak of memory.
    assert [x[:-2] for x in again] == [x[:-2] for x in reports]
    # At each stop, at most the matrix that was to be kept is lost.
    assert len(stops) > 2
    assert 4 <= count < 4 + len(stops)
    # Damage is noticed.
    (shared,) = tmp_path.iterdir()
    assert len([*shared.glob("*/[!.]*")]) == count_gradients + 4 + 1
    (damaged,) = shared.glob("*/stack.layer.inner.1.npz")
    damaged.write_bytes(damaged.read_bytes()[:-40])
    resumed, _, solved = run(tmp_path)
    assert len(solved) == 1
    assert weights(resumed) == weights(model)
    # Another format uses the same gradients, and another text begins anew.
    assert len([*shared.iterdir()]) == 2
    other, _, solved = run(tmp_path, config="int4")
    assert len(solved) == 4
    assert len([*shared.iterdir()]) == 3
    assert len([*shared.glob("*/gradients.*")]) == count_gradients
    assert weights(other) == weights(run(None, config="int4")[0])
    run(tmp_path, 0, batches=-x)
    assert len([*tmp_path.iterdir()]) == 2


def test_batches_on_a_mesh(monkeypatch):
    """Each device has its own rows in every layer; the sums differ by rounding."""
    mesh = jax.sharding.Mesh(jax.devices(), "data")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)
    batches = [x, x[::-1]]
    model, shapes = fill(lambda: Tower(nnx.Rngs(0))), []
    put = jax.device_put

    def note(x, where):
        """Notes the shapes of a device's parts."""
        y = put(x, where)
        shapes.append(y.addressable_shards[0].data.shape)
        return y

    divided = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batches]
    everywhere = NamedSharding(mesh, P())
    placed = nnx.merge(
        *nnx.split(model)[:1],
        jax.tree.map(lambda x: jax.device_put(x, everywhere), nnx.state(model)),
    )
    found = _capture.find_layers(model, apply, x)
    results = []
    monkeypatch.setattr(jax, "device_put", note)
    for tower, text in ((model, batches), (placed, divided)):
        norms, tiles = _capture.capture_gradients(
            tower, found, apply, loss, text, 0, None, lambda _: None, has_tiles=True
        )
        moments = [
            np.asarray(moment)
            for *_, moment in _capture.stream_moments(tower, found, apply, text, norms)
        ]
        results.append([*moments, *tiles.values()])
    # Sums of 32 products, each with up to 4 roundings of float32.
    for one, many in zip(*results, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)
    # The inputs of three layers, of each batch.
    assert shapes == [(16, 8)] * 6 + [(2, 8)] * 6
    monkeypatch.undo()
    reports = jaxbnb.calibrate(placed, divided, NF4, method="gptq", apply=apply)
    assert all(report.error <= report.absmax_error for report in reports)
    kernel = placed.stack.layer.inner.kernel.get_raw_value()
    assert kernel.codes.sharding.is_equivalent_to(everywhere, 3)


def test_a_model_that_reads_a_source():
    """It has the methods of a language model, and tokens alone are not enough."""
    fields = {"model_type": "t5", "vocab_size": 61, "d_model": 32, "d_kv": 16}
    fields |= {"d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = EncoderDecoderConfig.from_huggingface(fields)
    model = fill(lambda: EncoderDecoderLM(config, rngs=nnx.Rngs(0)))
    message = "not a language model .* EncoderDecoderLM"
    with pytest.raises(TypeError, match=f"{message}; give apply="):
        jaxbnb.calibrate(model, tokens(1), NF4)
    with pytest.raises(TypeError, match=message):
        merge_calibrated(model, tokens(1), NF4)
    with pytest.raises(TypeError, match=message):
        tune(model, model, tokens(1))
    with pytest.raises(TypeError, match=message):
        compare(model, model, tokens(1))

    def apply(model, batch):
        source = model.model.encode(batch)
        return model.logits(model.model(batch, source=source))

    reports = jaxbnb.calibrate(model, tokens(1), NF4, method="gptq", apply=apply)
    assert all(report.error <= report.absmax_error for report in reports)
    assert type(model.model.decoder.layers.layer.cross_attn.q_proj) is QuantLinear


def test_errors_leave_the_model_alone(language_model):
    model = copy(language_model)
    with pytest.raises(ValueError, match="needs batches of data"):
        jaxbnb.calibrate(model)
    with pytest.raises(ValueError, match="batches are empty"):
        jaxbnb.calibrate(model, [])
    with pytest.raises(ValueError, match="token 61 of row 0, position 2, is outside"):
        jaxbnb.calibrate(model, [np.array([[1, 2, 61]])])
    with pytest.raises(TypeError, match="batch 0: its tokens are of type float"):
        jaxbnb.calibrate(model, [np.ones((1, 2))])
    with pytest.raises(ValueError, match="method must be one of"):
        jaxbnb.calibrate(model, tokens(1), method="awq")
    with pytest.raises(ValueError, match="codes can be chosen for nf4, fp4"):
        jaxbnb.calibrate(model, tokens(1), "llm_int8")
    with pytest.raises(TypeError, match=r"not a language model .* Dict; give apply="):
        jaxbnb.calibrate(nnx.Dict(a=nnx.Linear(2, 2, rngs=nnx.Rngs(0))), [1])
    adapted = copy(language_model)
    jaxbnb.lora.add_adapter(adapted, jaxbnb.lora.LoraConfig(r=2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"has adapters\. Calibrate it before"):
        jaxbnb.calibrate(adapted, tokens(1), method="gptq")
    kernel = model.model.layers.layer.mlp.up_proj.kernel
    scale = model.model.layers.layer.post_attention_layernorm.scale
    for variable, message in (
        (kernel, r"up_proj, layer 1: its weights are not finite"),
        (scale, r"layer [01]: its inputs or gradients are not finite"),
    ):
        before = variable[...]
        variable.set_value(before.at[1].set(jnp.nan))
        with pytest.raises(FloatingPointError, match=message):
            jaxbnb.calibrate(model, tokens(1), NF4, method="gptq")
        variable.set_value(before)
    assert type(model.model.layers.layer.mlp.up_proj) is nnx.Linear
