"""preference.json: what TRL's trainers compute for pairs, at toy size.

To make it again, install the extra `peers` and trl 1.16.0, and run

    python tests/goldens/make_preference.py

The tests use `write_model`, which needs neither.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

VOCAB, HIDDEN, LAYERS, RANK, STEPS = 32, 16, 2, 2, 20
RATE = 1e-2
BETA = 0.5
# Words are token ids, and TRL adds the end-of-text token, 1.
PAIRS = [
    ([2, 3, 4], [5, 6, 7], [8]),
    ([9], [10, 11], [12, 13, 14, 15]),
    ([16, 17], [18], [19]),
    ([20, 21, 22, 23], [24, 25], [26, 27]),
]
EOS, PAD = 1, 0
MARGINS = [0.5, 0.0, 1.0, -0.25]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}
ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
}


def write_model(folder, *, reward=False):
    """Writes a model and, in ``adapter``, an adapter of it, with or without a head."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)

    def draw(*shape, scale=0.4):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": draw(VOCAB, HIDDEN),
        "lm_head.weight": draw(VOCAB, HIDDEN),
        "model.norm.weight": 1 + draw(HIDDEN),
    }
    adapter = {}
    sizes = {
        "self_attn.q_proj": (16, HIDDEN),
        "self_attn.k_proj": (8, HIDDEN),
        "self_attn.v_proj": (8, HIDDEN),
        "self_attn.o_proj": (HIDDEN, 16),
        "mlp.gate_proj": (24, HIDDEN),
        "mlp.up_proj": (24, HIDDEN),
        "mlp.down_proj": (HIDDEN, 24),
    }
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{start}.{norm}.weight"] = 1 + draw(HIDDEN)
        for name, (rows, columns) in sizes.items():
            tensors[f"{start}.{name}.weight"] = draw(rows, columns)
            if name.endswith(("q_proj", "v_proj")):
                key = f"base_model.model.{start}.{name}"
                adapter[f"{key}.lora_A.weight"] = draw(RANK, columns)
                adapter[f"{key}.lora_B.weight"] = draw(rows, RANK)
    fields = dict(ADAPTER)
    if reward:
        adapter["base_model.model.score.weight"] = draw(1, HIDDEN)
        fields |= {"modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    folder = pathlib.Path(folder)
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")


def make_tokenizer():
    import tokenizers
    import transformers

    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCAB)}
    model = tokenizers.models.WordLevel(words, unk_token="<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    )


def run(folder, kind, steps, **options):
    """Returns the logs of a trainer's steps, and the first gradients."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    def text(ids):
        return " ".join(f"w{i}" for i in ids)

    rows = {
        "prompt": [text(prompt) for prompt, _, _ in PAIRS],
        "chosen": [" " + text(chosen) for _, chosen, _ in PAIRS],
        "rejected": [" " + text(rejected) for _, _, rejected in PAIRS],
    }
    reference = options.pop("reference", None)
    if kind == "dpo":
        load = transformers.AutoModelForCausalLM.from_pretrained
        make, config = trl.DPOTrainer, trl.DPOConfig
        if reference is None:
            options["ref_model"] = load(folder)
    else:

        def load(folder):
            return transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=1
            )

        make, config = trl.RewardTrainer, trl.RewardConfig
        rows["margin"] = MARGINS
    model = peft.PeftModel.from_pretrained(
        load(folder), pathlib.Path(folder) / "adapter", is_trainable=True
    )
    trainer_options = {k: options.pop(k) for k in ("ref_model",) if k in options}
    trainer = make(
        model,
        args=config(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=len(PAIRS),
            max_steps=steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            **options,
        ),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=make_tokenizer(),
        **trainer_options,
    )
    grads = {}

    def keep(name):
        def hook(grad):
            grads.setdefault(name, grad.detach().clone())

        return hook

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(keep(name.replace(".default", "")))
    torch.manual_seed(0)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return logs, {name: grad.tolist() for name, grad in grads.items()}


def main():
    import trl

    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
    names += ("rewards/accuracies",)
    results = {"trl": trl.__version__, "dpo": {}}
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent, "model")
        write_model(folder)
        cases = {
            "sigmoid": {},
            "hinge": {"loss_type": "hinge"},
            "ipo": {"loss_type": "ipo"},
            "robust": {"loss_type": "robust", "label_smoothing": 0.1},
        }
        for case, options in cases.items():
            steps = STEPS if case == "sigmoid" else 1
            logs, grads = run(folder, "dpo", steps, beta=BETA, **options)
            results["dpo"][case] = {
                "first": {name: logs[0][name] for name in names},
                "losses": [log["loss"] for log in logs],
                "grads": grads,
            }
        # The reference is the adapter as it was.
        logs, _ = run(folder, "dpo", STEPS, beta=BETA, reference="ref")
        results["dpo"]["ref"] = {"losses": [log["loss"] for log in logs]}
        folder = pathlib.Path(parent, "reward")
        write_model(folder, reward=True)
        logs, grads = run(folder, "reward", STEPS)
        results["reward"] = {
            "losses": [log["loss"] for log in logs],
            "grads": grads,
        }
    path = pathlib.Path(__file__).with_name("preference.json")
    path.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    sys.exit(main())
