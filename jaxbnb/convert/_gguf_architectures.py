"""How to describe the GGUF files of each architecture in Hugging Face's terms.

llama.cpp changes the tensors of some families as it writes them: it reorders rows, and
adds 1 to Gemma's norms. The descriptions say how to undo that.

References:
    https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from jaxbnb.convert._errors import UnsupportedCheckpointError
from jaxbnb.convert._gguf_description import (
    ATTENTION,
    BLOOM_INNER,
    BLOOM_OUTER,
    EXPERTS,
    GPT2_INNER,
    GPT2_OUTER,
    GPT_NEOX_INNER,
    GPT_NEOX_OUTER,
    MLP,
    OUTER,
    QK_NORMS,
    QKV,
    Description,
)
from jaxbnb.convert._gguf_fields import Fields, read_field
from jaxbnb.convert._gguf_rope import read_rope_scaling, undo_interleaving

# Architectures that may rotate only a part of each head.
_PARTLY_ROTATED: Final = ("gptneox", "phi3")


def _describe_llama(fields: Fields) -> Description:
    """Describes Llama, and also Mistral and, with experts, Mixtral."""
    tensors = fields.gguf.tensors
    config, sizes = _read_common(fields, "llama", "Llama")
    has_attention_bias = "blk.0.attn_q.bias" in tensors
    has_mlp_bias = "blk.0.ffn_up.bias" in tensors
    config |= {"attention_bias": has_attention_bias, "mlp_bias": has_mlp_bias}
    inner, biases = ATTENTION | MLP, frozenset[str]()
    if has_attention_bias:
        biases |= QKV | {"attn_output"}
    if has_mlp_bias:
        biases |= frozenset(MLP)
    window = fields.count("attention.sliding_window")
    if window:
        config |= _name_class("mistral", "Mistral") | {"sliding_window": window}
    if fields.count("expert_count"):
        sizes["experts"] = fields.size("expert_count")
        config |= _name_class("mixtral", "Mixtral")
        config["num_local_experts"] = sizes["experts"]
        config["num_experts_per_tok"] = fields.size("expert_used_count")
        config["sliding_window"] = window or None
        inner = ATTENTION | EXPERTS
    orders = undo_interleaving(config)
    return _describe(fields, config, sizes, inner, biases, orders=orders)


def _describe_smollm3(fields: Fields) -> Description:
    config, sizes = _read_common(fields, "smollm3", "SmolLM3", has_window=False)
    # Files do not contain this value; llama.cpp assumes it.
    config["no_rope_layer_interval"] = 4
    orders = undo_interleaving(config)
    return _describe(fields, config, sizes, ATTENTION | MLP, orders=orders)


def _describe_qwen2(fields: Fields) -> Description:
    config, sizes = _read_common(fields, "qwen2", "Qwen2", has_window=False)
    return _describe(fields, config, sizes, ATTENTION | MLP, QKV)


def _describe_qwen3(fields: Fields) -> Description:
    config, sizes = _read_common(fields, "qwen3", "Qwen3", has_window=False)
    return _describe(fields, config, sizes, ATTENTION | MLP | QK_NORMS)


def _read_gemma(
    fields: Fields,
) -> tuple[dict[str, Any], dict[str, int], dict[str, str]]:
    """Returns what Gemma 2 and 3 share: config, sizes, and modules of a layer."""
    kinds = {"gemma2": ("gemma2", "Gemma2"), "gemma3": ("gemma3_text", "Gemma3")}
    config, sizes = _read_common(fields, *kinds[fields.architecture])
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    # Files do not contain the scale of attention. Models divide by the root of a head's
    # size, except for the two 27B models, recognised by their number of layers.
    is_27b = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}.get(
        fields.architecture
    )
    config |= {
        "hidden_activation": config.pop("hidden_act"),
        "query_pre_attn_scalar": hidden // heads if is_27b else config["head_dim"],
        "sliding_window": fields.count("attention.sliding_window") or None,
    }
    inner = {
        **ATTENTION,
        **MLP,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    return config, sizes, inner


def _describe_gemma2(fields: Fields) -> Description:
    config, sizes, inner = _read_gemma(fields)
    # The first files left these out, as every Gemma 2 has the same values.
    config["attn_logit_softcapping"] = fields.positive("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = fields.positive("final_logit_softcapping", 30.0)
    config["sliding_window"] = fields.size("attention.sliding_window", 4096)
    return _describe(fields, config, sizes, inner, is_norm_plus_one=True)


def _describe_gemma3(fields: Fields) -> Description:
    config, sizes, inner = _read_gemma(fields)
    config["sliding_window_pattern"] = fields.size(
        "attention.sliding_window_pattern", 6
    )
    config["rope_local_base_freq"] = fields.positive("rope.freq_base_swa", 10000.0)
    if fields.has("final_logit_softcapping"):
        config["final_logit_softcapping"] = fields.positive("final_logit_softcapping")
    inner |= QK_NORMS
    return _describe(fields, config, sizes, inner, is_norm_plus_one=True)


def _describe_phi3(fields: Fields) -> Description:
    config, sizes = _read_common(fields, "phi3", "Phi3")
    config["sliding_window"] = fields.count("attention.sliding_window") or None
    key = "rope.scaling.original_context_length"
    if fields.has(key):
        config["original_max_position_embeddings"] = fields.size(key)
    inner = {k: v for k, v in (ATTENTION | MLP).items() if k not in QKV}
    inner |= {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    del inner["ffn_gate"]
    shapes = {"ffn_up": "gate_up hidden"}
    return _describe(fields, config, sizes, inner, shapes=shapes)


def _describe_gpt2(fields: Fields) -> Description:
    transposed = frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"})
    config = _name_class("gpt2", "GPT2LMHead", suffix="Model")
    return _describe_gpt2_like(fields, config, transposed)


def _describe_starcoder(fields: Fields) -> Description:
    # llama.cpp knows no other StarCoder.
    key = "attention.head_count_kv"
    fields.refuse(key, fields.size(key, 1), 1)
    config = _name_class("gpt_bigcode", "GPTBigCode")
    return _describe_gpt2_like(fields, config, frozenset())


def _describe_gpt2_like(
    fields: Fields, config: dict[str, Any], transposed: frozenset[str]
) -> Description:
    """Describes GPT-2, or a model with its names."""
    sizes = _read_sizes(fields)
    config |= {
        "vocab_size": sizes["vocab"],
        "n_positions": sizes["positions"],
        "n_embd": sizes["hidden"],
        "n_layer": fields.size("block_count"),
        "n_head": fields.size("attention.head_count"),
        "n_inner": sizes["ffn"],
        "layer_norm_epsilon": fields.positive("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        **_read_general(fields),
    }
    return Description(
        config=config,
        sizes=sizes,
        outer=_select_outer(fields, GPT2_OUTER),
        layers="transformer.h",
        inner=GPT2_INNER,
        biases=frozenset({*GPT2_INNER, "output_norm"}),
        transposed=transposed,
    )


def _describe_bloom(fields: Fields) -> Description:
    sizes, heads = _read_sizes(fields), fields.size("attention.head_count")
    fields.refuse("feed_forward_length", sizes["ffn"], 4 * sizes["hidden"])
    config = {
        **_name_class("bloom", "Bloom"),
        "vocab_size": sizes["vocab"],
        "seq_length": sizes["positions"],
        "hidden_size": sizes["hidden"],
        "n_layer": fields.size("block_count"),
        "n_head": heads,
        "layer_norm_epsilon": fields.positive("attention.layer_norm_epsilon"),
        **_read_general(fields),
    }
    return Description(
        config=config,
        sizes=sizes,
        outer=_select_outer(fields, BLOOM_OUTER),
        layers="transformer.h",
        inner=BLOOM_INNER,
        biases=frozenset({*BLOOM_INNER, "token_embd_norm", "output_norm"}),
        # Files have all queries first; Hugging Face goes head by head.
        orders={"attn_qkv": ((3, heads, -1), (0, 1))},
    )


def _describe_gpt_neox(fields: Fields) -> Description:
    sizes = _read_sizes(fields)
    heads, head = fields.size("attention.head_count"), sizes["head"]
    rotated = fields.size("rope.dimension_count", head)
    config = {
        **_name_class("gpt_neox", "GPTNeoX"),
        "vocab_size": sizes["vocab"],
        "max_position_embeddings": sizes["positions"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": heads,
        "layer_norm_eps": fields.positive("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "use_parallel_residual": fields.get("use_parallel_residual", bool, True),
        "rotary_pct": rotated / head,
        "rotary_emb_base": fields.positive("rope.freq_base", 10000.0),
        **read_rope_scaling(fields, rotated),
        **_read_general(fields),
    }
    return Description(
        config=config,
        sizes=sizes,
        outer=_select_outer(fields, GPT_NEOX_OUTER),
        layers="gpt_neox.layers",
        inner=GPT_NEOX_INNER,
        biases=frozenset({*GPT_NEOX_INNER, "output_norm"}),
        # Files have all queries first; Hugging Face goes head by head.
        orders={"attn_qkv": ((3, heads, -1), (0, 1))},
    )


ARCHITECTURES: Final[Mapping[str, Callable[[Fields], Description]]] = {
    "bloom": _describe_bloom,
    "gemma2": _describe_gemma2,
    "gemma3": _describe_gemma3,
    "gpt2": _describe_gpt2,
    "gptneox": _describe_gpt_neox,
    "llama": _describe_llama,
    "phi3": _describe_phi3,
    "qwen2": _describe_qwen2,
    "qwen3": _describe_qwen3,
    "smollm3": _describe_smollm3,
    "starcoder": _describe_starcoder,
}


def _describe(
    fields: Fields,
    config: dict[str, Any],
    sizes: Mapping[str, int],
    inner: Mapping[str, str],
    biases: frozenset[str] = frozenset(),
    **options: Any,
) -> Description:
    """Describes a model that has Llama's names outside the layers."""
    return Description(
        config=config,
        sizes=sizes,
        outer=_select_outer(fields, OUTER),
        layers="model.layers",
        inner=inner,
        biases=biases,
        **options,
    )


def _select_outer(fields: Fields, outer: Mapping[str, str]) -> dict[str, str]:
    """Returns the modules outside the layers; no output head where it is tied."""
    is_tied = "output.weight" not in fields.gguf.tensors
    return {k: v for k, v in outer.items() if k != "output" or not is_tied}


def _read_common(
    fields: Fields, model_type: str, name: str, *, has_window: bool = True
) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the config of a model that has Llama's field names, and the sizes.

    Args:
        fields: metadata of the file.
        model_type: Hugging Face's ``model_type``.
        name: start of the name of Hugging Face's class.
        has_window: whether attention may have a sliding window.
    """
    sizes = _read_sizes(fields)
    head = sizes["head"]
    rotated = fields.size("rope.dimension_count", head)
    is_allowed = rotated == head or fields.architecture in _PARTLY_ROTATED
    if head % 2 or rotated % 2 or not is_allowed:
        raise UnsupportedCheckpointError(
            f"{fields.gguf.path} rotates {rotated} of {head} dimensions a head; jaxbnb "
            "reads only files that rotate all dimensions, an even number of them"
        )
    if fields.architecture != "llama":
        fields.refuse("expert_count", fields.count("expert_count"), 0)
    if not has_window:
        window = fields.count("attention.sliding_window")
        fields.refuse("attention.sliding_window", window, 0)
    heads = fields.size("attention.head_count")
    config = {
        **_name_class(model_type, name),
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size("attention.head_count_kv", heads),
        "head_dim": head,
        "vocab_size": sizes["vocab"],
        "max_position_embeddings": sizes["positions"],
        "rope_theta": fields.positive("rope.freq_base", 10000.0),
        "rms_norm_eps": fields.positive("attention.layer_norm_rms_epsilon"),
        "hidden_act": "gelu_pytorch_tanh" if "gemma" in model_type else "silu",
        **read_rope_scaling(fields, rotated),
        **_read_general(fields),
    }
    if rotated != head:
        config["partial_rotary_factor"] = rotated / head
    return config, sizes


def _name_class(
    model_type: str, name: str, suffix: str = "ForCausalLM"
) -> dict[str, Any]:
    return {"architectures": [f"{name}{suffix}"], "model_type": model_type}


def _read_sizes(fields: Fields) -> dict[str, int]:
    hidden = fields.size("embedding_length")
    heads = fields.size("attention.head_count")
    rotated = fields.size("rope.dimension_count", max(1, hidden // heads))
    # Where only a part of a head is rotated, only the width tells a head's size.
    is_partly_rotated = fields.architecture in _PARTLY_ROTATED
    default = max(1, hidden // heads) if is_partly_rotated else rotated
    head = fields.size("attention.key_length", default)
    fields.refuse(
        "attention.value_length", fields.size("attention.value_length", head), head
    )
    keys = fields.size("attention.head_count_kv", heads) * head
    embedding = fields.gguf.tensors.get("token_embd.weight")
    vocab = embedding.shape[0] if embedding and embedding.shape else None
    ffn = fields.size("feed_forward_length")
    return {
        "vocab": fields.size("vocab_size", vocab),
        "positions": fields.size("context_length"),
        "hidden": hidden,
        "head": head,
        "queries": heads * head,
        "keys": keys,
        "qkv": heads * head + 2 * keys,
        "ffn": ffn,
        "gate_up": 2 * ffn,
    }


def _read_general(fields: Fields) -> dict[str, Any]:
    """Returns fields that do not depend on the layers: dtype, tying, special tokens."""
    embedding = fields.gguf.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "tie_word_embeddings": "output.weight" not in fields.gguf.tensors,
        "torch_dtype": embedding.block.dtype.name if embedding else "float32",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = read_field(fields.gguf, f"tokenizer.ggml.{key}_token_id", int, -1)
        config[f"{name}_token_id"] = token if token >= 0 else None
    return config
