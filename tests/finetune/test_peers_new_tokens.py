"""PEFT opens what a run with new tokens has saved, and computes the same."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxbnb
from jaxbnb.convert import load_tokenizer
from jaxbnb.finetune import TrainConfig, train
from jaxbnb.lora import load_adapter, saved_vocab_size
from jaxbnb.models import resize_token_embeddings
from tests.finetune import toy

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# The model has 260 rows, and its tokenizer 258 tokens.
NEW = ("<|sum|>", "<|is|>", "<|end|>")
TEXT = "<|sum|>1+2<|is|>3<|end|>"


def write_folder(folder, is_tied):
    toy.write_folder(folder)
    if is_tied:
        return
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file(tensors, path, metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("is_tied", "modules_to_save"),
    [(True, None), (False, None), (False, ("lm_head",))],
    ids=["tied", "untied", "trained head"],
)
def test_an_adapter(tmp_path, is_tied, modules_to_save):
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder(folder, is_tied)
    config = TrainConfig(
        model=str(folder),
        out=str(tmp_path / "run"),
        steps=2,
        batch=1,
        accumulate=1,
        seq=32,
        quant=None,
        dtype="float32",
        rank=2,
        lr=1e-2,
        prompts=(),
        modules_to_save=modules_to_save,
        new_tokens=NEW,
    )
    train(config, data=[{"text": TEXT}] * 2)
    adapter = tmp_path / "run/adapter"

    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    tokens = tokenizer(TEXT)["input_ids"]
    assert tokens == load_tokenizer(adapter).encode(TEXT)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits.numpy()

    ours = jaxbnb.load_pretrained(folder)
    assert saved_vocab_size(ours, adapter) == len(tokenizer) == 261
    resize_token_embeddings(ours, 261)
    load_adapter(ours, adapter)
    got = np.asarray(ours(jnp.asarray([tokens])))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    rows = {"model.embed_tokens": [258, 259, 260], "lm_head": [258, 259, 260]}
    if modules_to_save:
        del rows["lm_head"]
    fields = json.loads((adapter / "adapter_config.json").read_text())
    indices = fields["trainable_token_indices"]
    assert indices == ([258, 259, 260] if is_tied else rows)
