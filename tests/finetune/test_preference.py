"""Losses of pairs: TRL's values, gradients and runs, and what cannot be compared."""

import functools
import json
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbnb
from jaxbnb.finetune import (
    PreferenceBatch,
    add_reward_head,
    completion_log_probs,
    compute_rewards,
    dpo_loss,
    dpo_losses,
    fit,
    make_preference_batch,
    reward_loss,
    reward_losses,
)
from jaxbnb.lora import load_adapter, save_adapter
from jaxbnb.lora.file_names import PREFIX

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_preference.py")))
WANT = json.loads((GOLDENS / "preference.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("preference")
    made.write_model(parent / "dpo")
    made.write_model(parent / "reward", reward=True)
    return parent


@pytest.fixture(scope="module")
def batch():
    prompts, chosen, rejected = (
        [list(x) for x in texts] for texts in zip(*made.PAIRS, strict=True)
    )
    chosen, rejected = ([[*x, made.EOS] for x in y] for y in (chosen, rejected))
    return make_preference_batch(prompts, chosen, rejected, pad_token_id=made.PAD)


def load(folders, *names, reward=False):
    folder = folders / ("reward" if reward else "dpo")
    model = jaxbnb.load_pretrained(folder)
    if reward:
        add_reward_head(model, rngs=nnx.Rngs(0))
    for name in names:
        load_adapter(model, folder / "adapter", name=name)
    return model


def value_and_grad(model, loss):
    """The result and the gradients of the adapter, by PEFT's names."""
    graphdef, params, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def compute(params, rest):
        def mean(params):
            pairs = loss(nnx.merge(graphdef, params, rest))
            return jnp.mean(pairs.losses), pairs

        return jax.value_and_grad(mean, has_aux=True)(params)

    (_, pairs), grads = compute(params, rest)
    return pairs, grads


def assert_same_grads(grads, want, folders, tmp_path, *, reward=False, slope=1):
    """Compares gradients in the form of a file, for which they pose as an adapter.

    Sums of about 60 float32 numbers, in other orders, and times the loss's slope.
    """
    from safetensors.numpy import load_file

    model = load(folders, "default", reward=reward)
    nnx.update(model, grads)
    save_adapter(model, tmp_path)
    got = load_file(tmp_path / "adapter_model.safetensors")
    want = {name.replace("modules_to_save.", ""): x for name, x in want.items()}
    assert got.keys() == want.keys()
    assert any(name.startswith(PREFIX) for name in got)
    for name in want:
        np.testing.assert_allclose(
            got[name], want[name], rtol=0, atol=1e-5 * slope, err_msg=name
        )


@pytest.mark.parametrize(
    ("case", "slope"),
    # The derivative by a log-ratio is 2 (delta - 1), and delta -0.5 for one pair.
    [("sigmoid", 1), ("ipo", 3)],
)
def test_gradients_are_trls(folders, batch, tmp_path, case, slope):
    loss = functools.partial(dpo_losses, batch=batch, beta=made.BETA, loss_type=case)
    _, grads = value_and_grad(load(folders, "default"), loss)
    assert_same_grads(grads, WANT["dpo"][case]["grads"], folders, tmp_path, slope=slope)


def jitted(model, function):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state: function(nnx.merge(graphdef, state)))(state)


def test_losses_are_trls(folders, batch):
    swapped = PreferenceBatch(*(np.roll(x, len(x) // 2, axis=0) for x in batch))
    compute = functools.partial(dpo_losses, beta=made.BETA)

    def compute_all(model):
        kinds = {
            kind: compute(model, batch, loss_type=kind)
            for kind in ("sigmoid", "hinge", "ipo")
        }
        smooth = {"label_smoothing": 0.1}
        kinds["robust"] = compute(model, batch, loss_type="robust", **smooth)
        kinds["swapped"] = compute(model, swapped)
        kinds["smooth"] = compute(model, batch, **smooth)
        kinds["log_probs"] = completion_log_probs(model, *map(jnp.asarray, batch))
        return kinds, model(jnp.asarray(batch.tokens))

    got, logits = jitted(load(folders, "default"), compute_all)
    for kind in ("sigmoid", "hinge", "ipo", "robust"):
        metrics = {name: float(x) for name, x in got[kind].metrics().items()}
        for name, value in WANT["dpo"][kind]["first"].items():
            assert metrics[name] == pytest.approx(value, abs=1e-5), (kind, name)
    # Smoothing is the mean over both labels.
    want = 0.9 * got["sigmoid"].losses + 0.1 * got["swapped"].losses
    np.testing.assert_allclose(got["smooth"].losses, want, rtol=1e-5)
    # Log-probabilities are those of the logits: sums of at most 5 numbers of size 4.
    logits = jax.nn.log_softmax(logits)
    rows = np.arange(len(batch.tokens))[:, None]
    each = logits[rows, np.arange(batch.tokens.shape[1] - 1), batch.tokens[:, 1:]]
    want = jnp.sum(jnp.where(batch.mask[:, 1:], each, 0.0), axis=1)
    np.testing.assert_allclose(got["log_probs"], want, rtol=0, atol=1e-5)


def run(model, loss_fn, batch):
    # Small parameters have float32 state, so this is torch's AdamW.
    tx = jaxbnb.adamw8bit(made.RATE, weight_decay=0.0)
    return fit(model, tx, [batch] * made.STEPS, loss_fn=loss_fn).losses


def test_a_run_of_dpo_is_trls(folders, batch):
    loss = functools.partial(dpo_loss, beta=made.BETA)
    losses = run(load(folders, "default"), loss, batch)
    np.testing.assert_allclose(losses, WANT["dpo"]["sigmoid"]["losses"], atol=1e-4)


def test_a_run_with_an_adapter_as_reference_is_trls(folders, batch):
    model = load(folders, "default", "ref")
    loss = functools.partial(dpo_loss, beta=made.BETA, reference="ref")
    losses = run(model, loss, batch)
    np.testing.assert_allclose(losses, WANT["dpo"]["ref"]["losses"], atol=1e-4)
    # The reference has had no gradient, and the policy is active again.
    again = load(folders, "default", "ref")
    for x, y in zip(*map(ref_arrays, (model, again)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert model.model.layers.layer.self_attn.q_proj.active == ("default",)


def ref_arrays(model):
    return jax.tree.leaves(nnx.state(model, jaxbnb.lora.adapter_params("ref")))


def test_a_reward_model_is_trls(folders, batch, tmp_path):
    model = load(folders, "default", reward=True)
    margins = jnp.asarray(made.MARGINS)
    loss = functools.partial(reward_losses, batch=batch, margins=margins)
    pairs, grads = value_and_grad(model, loss)
    want = WANT["reward"]
    assert float(jnp.mean(pairs.losses)) == pytest.approx(want["losses"][0], abs=1e-5)
    assert_same_grads(grads, want["grads"], folders, tmp_path / "grads", reward=True)
    losses = run(model, functools.partial(reward_loss, margins=margins), batch)
    np.testing.assert_allclose(losses, want["losses"], atol=1e-4)
    # The head is saved with the adapter, and loaded with it.
    save_adapter(model, tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (fields["task_type"], fields["modules_to_save"]) == ("SEQ_CLS", ["score"])
    again = load(folders, reward=True)
    load_adapter(again, tmp_path / "adapter")
    got, want = (
        jitted(m, lambda m: reward_losses(m, batch).chosen_rewards)
        for m in (again, model)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
def test_peft_opens_a_reward_model(folders, batch, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ours = load(folders, "default", reward=True)
    save_adapter(ours, tmp_path)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folders / "reward", num_labels=1
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        want = theirs(torch.tensor(batch.tokens)).logits[:, 0].numpy()
    got = jitted(ours, lambda m: compute_rewards(m, *map(jnp.asarray, batch)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss_type": "kto"}, "loss_type must be one of .*'ipo'.*; got 'kto'"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, r"must be in \[0, 0\.5\)"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "is for 'sigmoid' and 'rob"),
        ({"reference": "first"}, "has the adapters .*; got .*'first'"),
    ],
)
def test_arguments_that_make_no_sense(folders, batch, options, match):
    with pytest.raises(ValueError, match=match):
        dpo_losses(load(folders, "default"), batch, **options)


def test_models_and_batches_that_do_not_fit(folders, batch):
    model = load(folders)
    with pytest.raises(ValueError, match="no adapters, so it would be its own refer"):
        dpo_losses(model, batch)
    with pytest.raises(ValueError, match=r"no reward head; .*add_reward_head"):
        reward_losses(model, batch)
    add_reward_head(model, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has a reward head already"):
        add_reward_head(model, rngs=nnx.Rngs(0))
    odd = PreferenceBatch(batch.tokens[1:], batch.mask[1:])
    with pytest.raises(ValueError, match=r"as many rejected ones; got .*\(7, "):
        reward_losses(model, odd)
    with pytest.raises(ValueError, match=r"margins must have shape \(4,\).*got \(1,\)"):
        reward_losses(model, batch, margins=jnp.zeros(1))


@pytest.mark.parametrize(
    ("texts", "options", "match"),
    [
        (([[1]], [[2]], []), {}, "got 1, 1 and 0"),
        (([], [], []), {}, "at least one"),
        (([[]], [[2]], [[3]]), {}, r"prompts\[0\] must have a token"),
        (([[1]], [[2]], [[]]), {}, r"rejected\[0\] must have a token"),
        (([[1, 1]], [[2]], [[3]]), {"length": 2}, "at least 3, .*; got 2"),
    ],
)
def test_texts_that_make_no_pairs(texts, options, match):
    with pytest.raises(ValueError, match=match):
        make_preference_batch(*texts, **options)
