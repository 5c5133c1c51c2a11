"""A small Llama of bytes as a Hugging Face folder, and a short run over it."""

import json
from pathlib import Path

import numpy as np

from tests.goldens.gradients import near_normal

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# The same chats, with the assistant's text marked.
MARKED_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 256,
}
LAYERS = {
    "input_layernorm": (32,),
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "post_attention_layernorm": (32,),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}


def write_folder(folder: Path, template: str = TEMPLATE) -> None:
    """Writes the model's config and weights, and its tokenizer."""
    from safetensors.numpy import save_file

    shapes = {"model.embed_tokens": (CONFIG["vocab_size"], 32), "model.norm": (32,)}
    for number in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{n}": s for n, s in LAYERS.items()}
    arrays = {
        f"{name}.weight": np.float32(0.25) * near_normal(seed, shape)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder, template)


def write_tokenizer(folder: Path, template: str) -> None:
    """Writes a tokenizer with a token for each byte, and ``<pad>`` and ``</s>``."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([], trainer)
    made.add_special_tokens(["<pad>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def write_adapter(folder: Path, rank: int) -> None:
    """Writes an untrained adapter of all linear layers, as PEFT does.

    ``lora_a`` is small and random, ``lora_b`` zero.
    """
    from safetensors.numpy import save_file

    arrays = {}
    linear = {name: shape for name, shape in LAYERS.items() if len(shape) == 2}
    for number in range(CONFIG["num_hidden_layers"]):
        for index, (name, (rows, columns)) in enumerate(linear.items()):
            prefix = f"base_model.model.model.layers.{number}.{name}"
            a = near_normal(1000 + 100 * number + index, (rank, columns))
            arrays[f"{prefix}.lora_A.weight"] = np.float32(0.1) * a
            arrays[f"{prefix}.lora_B.weight"] = np.zeros((rows, rank), np.float32)
    folder.mkdir()
    save_file(arrays, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in linear],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


# A short run, for `TrainConfig`.
RUN = {
    "batch": 2,
    "seq": 32,
    "dtype": "float32",
    "rank": 4,
    "dropout": 0.1,
    "save_every": 2,
    "prompts": (),
    "lr": 1e-2,
}


class StopError(Exception):
    pass


class StopAfter:
    """A logger that ends a run after a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    def log(self, step, metrics):
        if step == self.step and "loss" in metrics:
            raise StopError

    def close(self):
        pass


def read_lines(config):
    """Returns the lines of a run's metrics."""
    text = (Path(config.out) / "metrics.jsonl").read_text(encoding="utf-8")
    return list(map(json.loads, text.splitlines()))
