"""What the GGUF files of each architecture hold, in Hugging Face's terms.

How llama.cpp's conversion changes the tensors of a family on their way into a file is
undone here: the order of rows, the 1 that is added to Gemma's norms.

References:
    https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from jaxbnb.convert._errors import UnsupportedCheckpointError
from jaxbnb.convert._gguf_fields import Fields, field

# Rows as an array of three axes, of which two change places.
Order = tuple[tuple[int, int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Description:
    """A model in a GGUF file.

    Attributes:
        config: what ``config.json`` would say.
        sizes: of the axes that `SHAPES` names.
        outer: GGUF's names of the modules outside the layers, to Hugging Face's.
        layers: where those inside are numbered.
        inner: GGUF's names of the modules of a layer, to Hugging Face's; experts are
            numbered where "{}" is.
        biases: which of all these have biases.
        orders: how the rows of some are brought into Hugging Face's order.
        is_norm_plus_one: whether norms are stored with 1 added.
        transposed: which Hugging Face has as ``(in, out)``.
        shapes: those that differ from `SHAPES`.
    """

    config: dict[str, Any]
    sizes: Mapping[str, int]
    outer: Mapping[str, str]
    layers: str
    inner: Mapping[str, str]
    biases: frozenset[str] = frozenset()
    orders: Mapping[str, Order] = dataclasses.field(default_factory=dict)
    is_norm_plus_one: bool = False
    transposed: frozenset[str] = frozenset()
    shapes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def shape(self, module: str) -> tuple[int, ...]:
        """Of a module's weight in the file; a bias has the first axis of it."""
        axes = self.shapes.get(module, SHAPES[module])
        return tuple(self.sizes[axis] for axis in axes.split())


SHAPES: Final = {
    "token_embd": "vocab hidden",
    "position_embd": "positions hidden",
    "output_norm": "hidden",
    "output": "vocab hidden",
    "attn_norm": "hidden",
    "attn_q": "queries hidden",
    "attn_k": "keys hidden",
    "attn_v": "keys hidden",
    "attn_qkv": "qkv hidden",
    "attn_q_norm": "head",
    "attn_k_norm": "head",
    "attn_output": "hidden queries",
    "post_attention_norm": "hidden",
    "ffn_norm": "hidden",
    "ffn_gate": "ffn hidden",
    "ffn_up": "ffn hidden",
    "ffn_down": "hidden ffn",
    "post_ffw_norm": "hidden",
    "ffn_gate_inp": "experts hidden",
    "ffn_gate_exps": "experts ffn hidden",
    "ffn_up_exps": "experts ffn hidden",
    "ffn_down_exps": "experts hidden ffn",
}

_OUTER: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_MLP: Final = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS: Final = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_EXPERTS: Final = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QKV: Final = frozenset({"attn_q", "attn_k", "attn_v"})


def _llama(fields: Fields) -> Description:
    """Llama, and what llama.cpp takes for one: Mistral and, with experts, Mixtral."""
    tensors = fields.gguf.tensors
    config, sizes = _common(fields, "llama", "Llama")
    attention_bias = "blk.0.attn_q.bias" in tensors
    mlp_bias = "blk.0.ffn_up.bias" in tensors
    config |= {"attention_bias": attention_bias, "mlp_bias": mlp_bias}
    inner, biases = _ATTENTION | _MLP, frozenset[str]()
    if attention_bias:
        biases |= _QKV | {"attn_output"}
    if mlp_bias:
        biases |= frozenset(_MLP)
    window = fields.count("attention.sliding_window")
    if window:
        config |= _kind("mistral", "Mistral") | {"sliding_window": window}
    if fields.count("expert_count"):
        sizes["experts"] = fields.size("expert_count")
        config |= _kind("mixtral", "Mixtral")
        config["num_local_experts"] = sizes["experts"]
        config["num_experts_per_tok"] = fields.size("expert_used_count")
        config["sliding_window"] = window or None
        inner = _ATTENTION | _EXPERTS
    return _described(fields, config, sizes, inner, biases, orders=_interleaved(config))


def _smollm3(fields: Fields) -> Description:
    config, sizes = _common(fields, "smollm3", "SmolLM3", no_window=True)
    # No file says so, and llama.cpp takes it for granted.
    config["no_rope_layer_interval"] = 4
    inner = _ATTENTION | _MLP
    return _described(fields, config, sizes, inner, orders=_interleaved(config))


def _qwen2(fields: Fields) -> Description:
    config, sizes = _common(fields, "qwen2", "Qwen2", no_window=True)
    return _described(fields, config, sizes, _ATTENTION | _MLP, _QKV)


def _qwen3(fields: Fields) -> Description:
    config, sizes = _common(fields, "qwen3", "Qwen3", no_window=True)
    return _described(fields, config, sizes, _ATTENTION | _MLP | _QK_NORMS)


def _gemma(fields: Fields) -> tuple[dict[str, Any], dict[str, int], dict[str, str]]:
    kinds = {"gemma2": ("gemma2", "Gemma2"), "gemma3": ("gemma3_text", "Gemma3")}
    config, sizes = _common(fields, *kinds[fields.architecture])
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    # Files have no scale of attention; the 27B of both, known by their layers, divide
    # by another size than that of a head.
    is_27b = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}.get(
        fields.architecture
    )
    config |= {
        "hidden_activation": config.pop("hidden_act"),
        "query_pre_attn_scalar": hidden // heads if is_27b else config["head_dim"],
        "sliding_window": fields.count("attention.sliding_window") or None,
    }
    inner = {
        **_ATTENTION,
        **_MLP,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    return config, sizes, inner


def _gemma2(fields: Fields) -> Description:
    config, sizes, inner = _gemma(fields)
    # The first files left these out, as every Gemma 2 has the same.
    config["attn_logit_softcapping"] = fields.positive("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = fields.positive("final_logit_softcapping", 30.0)
    config["sliding_window"] = fields.size("attention.sliding_window", 4096)
    return _described(fields, config, sizes, inner, is_norm_plus_one=True)


def _gemma3(fields: Fields) -> Description:
    config, sizes, inner = _gemma(fields)
    config["sliding_window_pattern"] = fields.size(
        "attention.sliding_window_pattern", 6
    )
    config["rope_local_base_freq"] = fields.positive("rope.freq_base_swa", 10000.0)
    if fields.has("final_logit_softcapping"):
        config["final_logit_softcapping"] = fields.positive("final_logit_softcapping")
    inner |= _QK_NORMS
    return _described(fields, config, sizes, inner, is_norm_plus_one=True)


def _phi3(fields: Fields) -> Description:
    config, sizes = _common(fields, "phi3", "Phi3", is_partly_rotated=True)
    config["sliding_window"] = fields.count("attention.sliding_window") or None
    key = "rope.scaling.original_context_length"
    if fields.has(key):
        config["original_max_position_embeddings"] = fields.size(key)
    inner = {k: v for k, v in (_ATTENTION | _MLP).items() if k not in _QKV}
    inner |= {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    del inner["ffn_gate"]
    shapes = {"ffn_up": "gate_up hidden"}
    return _described(fields, config, sizes, inner, shapes=shapes)


def _gpt2(fields: Fields) -> Description:
    sizes = _sizes(fields)
    config = {
        **_kind("gpt2", "GPT2LMHead", suffix="Model"),
        "vocab_size": sizes["vocab"],
        "n_positions": sizes["positions"],
        "n_embd": sizes["hidden"],
        "n_layer": fields.size("block_count"),
        "n_head": fields.size("attention.head_count"),
        "n_inner": sizes["ffn"],
        "layer_norm_epsilon": fields.positive("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        **_tail(fields),
    }
    inner = {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }
    outer = {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    }
    return Description(
        config=config,
        sizes=sizes,
        outer=_with_head(fields, outer),
        layers="transformer.h",
        inner=inner,
        biases=frozenset({*inner, "output_norm"}),
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    )


def _gpt_neox(fields: Fields) -> Description:
    sizes = _sizes(fields)
    heads, head = fields.size("attention.head_count"), sizes["head"]
    config = {
        **_kind("gpt_neox", "GPTNeoX"),
        "vocab_size": sizes["vocab"],
        "max_position_embeddings": sizes["positions"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": heads,
        "layer_norm_eps": fields.positive("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "use_parallel_residual": fields.get("use_parallel_residual", bool, True),
        "rotary_pct": fields.size("rope.dimension_count", head) / head,
        "rotary_emb_base": fields.positive("rope.freq_base", 10000.0),
        **_rope_scaling(fields, fields.size("rope.dimension_count", head)),
        **_tail(fields),
    }
    inner = {
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    }
    outer = {
        "token_embd": "gpt_neox.embed_in",
        "output_norm": "gpt_neox.final_layer_norm",
        "output": "embed_out",
    }
    return Description(
        config=config,
        sizes=sizes,
        outer=_with_head(fields, outer),
        layers="gpt_neox.layers",
        inner=inner,
        biases=frozenset({*inner, "output_norm"}),
        # All queries first in the file; head by head at Hugging Face.
        orders={"attn_qkv": ((3, heads, -1), (0, 1))},
    )


ARCHITECTURES: Final[Mapping[str, Callable[[Fields], Description]]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "gptneox": _gpt_neox,
    "llama": _llama,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
}


def _kind(model_type: str, name: str, suffix: str = "ForCausalLM") -> dict[str, Any]:
    return {"architectures": [f"{name}{suffix}"], "model_type": model_type}


def _sizes(fields: Fields) -> dict[str, int]:
    hidden = fields.size("embedding_length")
    heads = fields.size("attention.head_count")
    rope = fields.size("rope.dimension_count", max(1, hidden // heads))
    # Where a part of each head is rotated, only the width tells how long heads are.
    default = max(1, hidden // heads) if fields.architecture in _PARTLY else rope
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


_PARTLY: Final = ("gptneox", "phi3")


def _common(
    fields: Fields,
    model_type: str,
    name: str,
    *,
    no_window: bool = False,
    is_partly_rotated: bool = False,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The config of what has Llama's field names, and the sizes."""
    sizes = _sizes(fields)
    head = sizes["head"]
    rope = fields.size("rope.dimension_count", head)
    if head % 2 or rope % 2 or (rope != head and not is_partly_rotated):
        raise UnsupportedCheckpointError(
            f"{fields.gguf.path} rotates {rope} of {head} dimensions a head; jaxbnb "
            "reads files that rotate all of an even number"
        )
    if fields.architecture != "llama":
        fields.refuse("expert_count", fields.count("expert_count"), 0)
    if no_window:
        window = fields.count("attention.sliding_window")
        fields.refuse("attention.sliding_window", window, 0)
    heads = fields.size("attention.head_count")
    config = {
        **_kind(model_type, name),
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
        **_rope_scaling(fields, rope),
        **_tail(fields),
    }
    if rope != head:
        config["partial_rotary_factor"] = rope / head
    return config, sizes


def _tail(fields: Fields) -> dict[str, Any]:
    """What says nothing of the layers."""
    embedding = fields.gguf.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "tie_word_embeddings": "output.weight" not in fields.gguf.tensors,
        "torch_dtype": embedding.block.dtype.name if embedding else "float32",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = field(fields.gguf, f"tokenizer.ggml.{key}_token_id", int, -1)
        config[f"{name}_token_id"] = token if token >= 0 else None
    return config


# Tensors of the scaling of rope, which belong to the config here.
ROPE_TENSORS: Final = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)


def _rope_scaling(fields: Fields, rotated: int) -> dict[str, Any]:
    """The field ``rope_scaling``, if there is one."""
    key = "rope.scaling.type"
    kind = fields.get(key, str, "none")
    freqs, long, short = ROPE_TENSORS
    tensors = fields.gguf.tensors
    original = fields.size(
        "rope.scaling.original_context_length", fields.size("context_length")
    )
    if long in tensors and short in tensors:
        fields.refuse(key, kind, "none", "longrope")
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": fields.factors(long, rotated // 2),
            "short_factor": fields.factors(short, rotated // 2),
            "original_max_position_embeddings": original,
        }
        if fields.has("rope.scaling.attn_factor"):
            factor = fields.positive("rope.scaling.attn_factor")
            scaling["attention_factor"] = factor
        return {"rope_scaling": scaling}
    if freqs in tensors:
        # What Llama 3's scaling comes to, frequency by frequency. The type that takes
        # any factors is longrope, of which both lists are then the same.
        fields.refuse(key, kind, "none")
        factors = fields.factors(freqs, rotated // 2)
        scaling = {
            "rope_type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "original_max_position_embeddings": original,
            "attention_factor": 1.0,
        }
        return {"rope_scaling": scaling}
    fields.refuse(key, kind, "none", "linear", "yarn")
    if kind == "none":
        return {}
    factor = fields.positive("rope.scaling.factor")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
            name = f"rope.scaling.{name}"
            fields.refuse(name, fields.positive(name, 1.0), 1.0)
        name = "rope.scaling.yarn_log_multiplier"
        fields.refuse(name, fields.get(name, float, 0.0), 0.0)
        scaling |= {
            "original_max_position_embeddings": original,
            "beta_fast": fields.positive("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": fields.positive("rope.scaling.yarn_beta_slow", 1.0),
        }
    return {"rope_scaling": scaling}


def _interleaved(config: Mapping[str, Any]) -> dict[str, Order]:
    """Rows of queries and keys, which llama.cpp orders for a rope of its own.

    Rope rotates pairs of dimensions of a head. Hugging Face pairs i with i + d/2, these
    files have the two of a pair side by side, as 2 i and 2 i + 1.
    """
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    return {"attn_q": ((heads, -1, 2), (1, 2)), "attn_k": ((keys, -1, 2), (1, 2))}


def _with_head(fields: Fields, outer: Mapping[str, str]) -> dict[str, str]:
    """The modules outside the layers; the output head only where it is not tied."""
    is_tied = "output.weight" not in fields.gguf.tensors
    return {k: v for k, v in outer.items() if k != "output" or not is_tied}


def _described(
    fields: Fields,
    config: dict[str, Any],
    sizes: Mapping[str, int],
    inner: Mapping[str, str],
    biases: frozenset[str] = frozenset(),
    **options: Any,
) -> Description:
    """A description of what has Llama's names outside the layers."""
    return Description(
        config=config,
        sizes=sizes,
        outer=_with_head(fields, _OUTER),
        layers="model.layers",
        inner=inner,
        biases=biases,
        **options,
    )
