"""NF4 of every layout of a layer, compared with transformers and bitsandbytes."""

import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbnb.models import load_pretrained

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
made = types.SimpleNamespace(**runpy.run_path(str(GOLDENS / "make_families.py")))

# Rows are a multiple of 64, so both quantise the same blocks.
WIDTHS = {
    "gpt_neo": {"hidden_size": 64, "intermediate_size": 128},
    "bloom": {"hidden_size": 64, "n_head": 4},
    "falcon": {"hidden_size": 64, "ffn_hidden_size": 128},
    "falcon_40b": {"hidden_size": 64, "ffn_hidden_size": 128},
    "falcon_rw": {"hidden_size": 64, "ffn_hidden_size": 128},
    "gptj": {"n_embd": 64, "n_inner": 128},
    "gpt_bigcode": {"n_embd": 64, "n_inner": 128},
    "codegen": {"n_embd": 64, "n_inner": 128},
    "xglm": {"d_model": 64, "ffn_dim": 128},
}
for name, changes in WIDTHS.items():
    kind, options = made.FAMILIES[name]
    made.FAMILIES[name] = kind, options | changes


def load_theirs(folder):
    """The model in NF4, as transformers loads it."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu"
    )
    linears = find_linears(model)
    assert {type(linear) for linear in linears} == {bitsandbytes.nn.Linear4bit}
    for linear in linears:
        # In evaluation, it computes in bfloat16 on a CPU.
        linear.train()
    return model


def round_weights(model):
    """The same for Falcon, which transformers leaves as it is: its class is its own."""
    functional = bitsandbytes.functional
    for linear in find_linears(model):
        codes, state = functional.quantize_4bit(linear.weight.data, quant_type="nf4")
        linear.weight.data = functional.dequantize_4bit(codes, state)
    return model


def find_linears(model):
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]


@pytest.mark.parametrize("family", WIDTHS)
def test_logits(tmp_path, family):
    model, _ = made.toy(family, tmp_path)
    tokens = torch.tensor(made.TOKENS)
    with torch.no_grad():
        exact = model(tokens).logits.numpy()
        is_falcon = family.startswith("falcon")
        theirs = round_weights(model) if is_falcon else load_theirs(tmp_path)
        want = theirs(tokens).logits.numpy()
    ours = load_pretrained(tmp_path, quant="nf4")
    got = jax.jit(lambda: ours(jnp.asarray(made.TOKENS, jnp.int32)))()
    scale = np.abs(want).max()
    assert np.abs(got - want).max() < 1e-4 * scale
    # The quantisation error itself is far larger.
    assert np.abs(got - exact).max() > 1e-2 * scale
