"""A decoder that reads images, compared with transformers at a toy size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxbnb
from jaxbnb.finetune import next_token_loss
from jaxbnb.models import VisionLM, generate, load_pretrained, save_pretrained
from jaxbnb.models._vision import place_patches

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE = 5
TEXT = {
    "model_type": "llama",
    "vocab_size": 41,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
# Three images of 9 patches' squares; the first row has padding and one image.
ROWS = [
    [0] * 9 + [1, 2] + [IMAGE] * 9 + [3, 4],
    [7] + [IMAGE] * 9 + [8] + [IMAGE] * 9 + [9, 10],
]
MASK = np.arange(22) >= np.array([[9], [0]])
TOKENS = jnp.asarray(ROWS, jnp.int32)
PIXELS = np.random.default_rng(0).standard_normal((3, 3, 24, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a model of transformers, and the model."""
    config = transformers.SmolVLMConfig(
        text_config=TEXT, vision_config=VISION, image_token_id=IMAGE, scale_factor=2
    )
    torch.manual_seed(0)
    model = transformers.SmolVLMForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases too, which are ones and zeros at first.
            parameter.normal_(float("norm" in name and "weight" in name), 0.2)
    folder = tmp_path_factory.mktemp("smolvlm")
    model.save_pretrained(folder)
    return folder, model


def their_inputs():
    # An image of zeros is padding.
    pixels = np.stack([[PIXELS[0], np.zeros_like(PIXELS[0])], PIXELS[1:]])
    return {
        "input_ids": torch.tensor(np.asarray(TOKENS)).long(),
        "attention_mask": torch.tensor(MASK.astype(np.int64)),
        "pixel_values": torch.tensor(pixels),
    }


def error(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def test_logits_and_tokens(made):
    folder, theirs = made
    with torch.no_grad():
        want = theirs(**their_inputs()).logits.numpy()
    ours = load_pretrained(folder)
    assert type(ours) is VisionLM

    @jax.jit
    def run(pixels):
        return ours.with_images(pixels)(TOKENS, attention_mask=jnp.asarray(MASK))

    got = np.asarray(run(PIXELS))
    assert error(got[MASK], want[MASK]) < 1e-4
    # Without its images, a text is another.
    assert error(np.asarray(run(0 * PIXELS))[MASK], want[MASK]) > 1e-2
    continued = theirs.generate(
        **their_inputs(), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    seen = ours.with_images(PIXELS)
    tokens = generate(seen, np.asarray(TOKENS), 6, attention_mask=MASK)
    np.testing.assert_array_equal(tokens, continued[:, 22:].numpy())
    with pytest.raises(ValueError, match=r"image_token_id 5 27 times, .* are 9 tokens"):
        ours.with_images(PIXELS[:1])(TOKENS)
    with pytest.raises(ValueError, match=r"\(3, 24, 24\) after the first; got \(3, 3,"):
        ours.with_images(PIXELS[..., :12])


def test_the_language_part_in_nf4(made, tmp_path):
    """Its layers are quantised, adapters train over images, the rest is as it was."""
    folder, _ = made
    model = load_pretrained(folder, quant="nf4")
    kernels = nnx.to_flat_state(nnx.state(model, jaxbnb.nnx.QuantParam))
    assert len(kernels) == 7
    assert all(path[:2] == ("model", "layers") for path, _ in kernels)
    decoded = nnx.clone(model)
    jaxbnb.nnx.dequantize_model(decoded)
    save_pretrained(decoded, tmp_path / "out", source=folder)
    got, want = (load_file(x / "model.safetensors") for x in (tmp_path / "out", folder))
    assert got.keys() == want.keys()
    for name in want:
        if "text_model.layers" not in name:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    config = jaxbnb.lora.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    jaxbnb.lora.add_adapter(model, config, rngs=nnx.Rngs(0))
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(adapters):
        model = nnx.merge(graphdef, adapters, rest)
        return next_token_loss(model.with_images(jnp.asarray(PIXELS)), TOKENS)

    @jax.jit
    def train(adapters):
        def step(adapters, _):
            value, grads = jax.value_and_grad(loss)(adapters)
            return jax.tree.map(lambda p, g: p - 0.5 * g, adapters, grads), value

        return jax.lax.scan(step, adapters, length=6)[1]

    losses = train(adapters)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("side", [6, 14, 27, 32])
def test_positions_of_patches(side):
    """As transformers finds them: by rounding, 27 patches do not have 27 positions."""
    embeddings = transformers.models.smolvlm.modeling_smolvlm.SmolVLMVisionEmbeddings
    config = transformers.models.smolvlm.SmolVLMVisionConfig(
        hidden_size=2, num_attention_heads=1, image_size=side, patch_size=1
    )
    module = embeddings(config)
    with torch.no_grad():
        module.patch_embedding.weight.zero_()
        module.patch_embedding.bias.zero_()
        numbers = torch.arange(side**2, dtype=torch.float32)
        module.position_embedding.weight.copy_(numbers[:, None].expand(-1, 2))
        got = module(
            torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool)
        )
    np.testing.assert_array_equal(place_patches(side), got[0, :, 0].numpy())
