"""A toy Llama, and folders of safetensors written without our own name table."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxbnb.models import Llama, LlamaConfig

LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
NORMS = ("input_layernorm", "post_attention_layernorm")

TOY = {
    "vocab_size": 89,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def make_model(seed=0, *, dtype=None, param_dtype=jnp.float32, **changes):
    """A random model, from NumPy: its initializers would take seconds to compile."""
    config = LlamaConfig(**TOY | changes)
    options = {"dtype": dtype, "param_dtype": param_dtype}
    model = nnx.eval_shape(lambda: Llama(config, **options, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        noise = rng.standard_normal(variable.shape)
        # Norms and biases as training leaves them, not the ones and zeros of the start.
        value = {
            "scale": lambda noise: 1 + 0.2 * noise,
            "bias": lambda noise: 0.2 * noise,
            "embedding": lambda noise: noise / noise.shape[-1] ** 0.5,
            "kernel": lambda noise: noise / noise.shape[-2] ** 0.5,
        }[path[-1]](noise)
        variable.set_value(jnp.asarray(value, param_dtype))
    nnx.update(model, state)
    return model


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, tokens, mask, cache):
    return nnx.merge(graphdef, state)(tokens, attention_mask=mask, cache=cache)


def run(model, tokens, *, attention_mask=None, cache=None):
    """``model(...)``, compiled once for all tests."""
    return _run(*nnx.split(model), tokens, attention_mask, cache)


def get(model, path):
    for name in path.split("."):
        model = getattr(model, name)
    return model


def huggingface_tensors(model):
    """Every tensor that transformers would have written, spelled out."""
    body = model.model
    tensors = {
        "model.embed_tokens.weight": body.embed_tokens.embedding[...],
        "model.norm.weight": body.norm.scale[...],
    }
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.lm_head.kernel[...].T
    for i in range(model.config.num_hidden_layers):
        for name in LINEARS:
            linear = get(body.layers.layer, name)
            tensors[f"model.layers.{i}.{name}.weight"] = linear.kernel[i].T
            if linear.bias is not None:
                tensors[f"model.layers.{i}.{name}.bias"] = linear.bias[i]
        for name in NORMS:
            scale = get(body.layers.layer, name).scale[i]
            tensors[f"model.layers.{i}.{name}.weight"] = scale
    # Writing takes contiguous arrays.
    return {name: np.array(value, order="C") for name, value in tensors.items()}


def huggingface_config(model, **changes):
    fields = {name: getattr(model.config, name) for name in TOY}
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "rms_norm_eps"):
        fields[name] = getattr(model.config, name)
    rope = {"rope_type": "default", "rope_theta": model.config.rope_theta}
    return {"model_type": "llama", "rope_parameters": rope, **fields, **changes}


def save(model, folder, *, change=lambda tensors: None, **config):
    """Writes a folder; ``change`` may alter the tensors, ``config`` the config."""
    folder.mkdir(exist_ok=True)
    tensors = huggingface_tensors(model)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(huggingface_config(model, **config)))
    return folder


@pytest.fixture(scope="session")
def toy():
    """The builders above, which importlib's import mode cannot import."""

    class Toy:
        fields = TOY
        model = staticmethod(make_model)
        run = staticmethod(run)
        save = staticmethod(save)
        tensors = staticmethod(huggingface_tensors)

        @staticmethod
        def tokens(*shape, seed=0):
            rng = np.random.default_rng(seed)
            return jnp.asarray(rng.integers(0, TOY["vocab_size"], shape), jnp.int32)

    return Toy


@pytest.fixture(scope="session")
def model(toy):
    """Shared, so not to be changed."""
    return toy.model()


@pytest.fixture(scope="module")
def toys(request, tmp_path_factory):
    """``toys(family)``: a folder, with the model of transformers in it, made once.

    The module's ``made`` is a script of tests/goldens.
    """
    folders = {}

    def make(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            request.module.made.toy(family, folders[family])
        return folders[family]

    return make
