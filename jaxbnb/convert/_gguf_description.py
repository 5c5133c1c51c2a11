"""What a model in a GGUF file consists of: its config, modules and shapes.

Names on the left of the tables are GGUF's, names on the right Hugging Face's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

# How rows are reordered: split into an array of three axes with these sizes, two of
# the axes change places.
RowOrder = tuple[tuple[int, int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Description:
    """A model in a GGUF file.

    Attributes:
        config: fields that ``config.json`` would have.
        sizes: sizes of the axes that `SHAPES` names.
        outer: GGUF's names of the modules outside the layers -> Hugging Face's.
        layers: Hugging Face's name of the list of layers.
        inner: GGUF's names of the modules of a layer -> Hugging Face's, with "{}" in
            place of an expert's number.
        biases: modules that have a bias.
        orders: how to bring the rows of a module into Hugging Face's order.
        is_norm_plus_one: whether norms are stored with 1 added.
        transposed: modules that Hugging Face stores as ``(in, out)``.
        shapes: exceptions from `SHAPES`.
    """

    config: dict[str, Any]
    sizes: Mapping[str, int]
    outer: Mapping[str, str]
    layers: str
    inner: Mapping[str, str]
    biases: frozenset[str] = frozenset()
    orders: Mapping[str, RowOrder] = dataclasses.field(default_factory=dict)
    is_norm_plus_one: bool = False
    transposed: frozenset[str] = frozenset()
    shapes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """The number of layers in the metadata."""
        return self.config.get("num_hidden_layers") or self.config["n_layer"]

    def weight_shape(self, module: str) -> tuple[int, ...]:
        """Returns the shape of a module's weight in the file.

        The bias has the size of its first axis.
        """
        axes = self.shapes.get(module, SHAPES[module])
        return tuple(self.sizes[axis] for axis in axes.split())


SHAPES: Final = {
    "token_embd": "vocab hidden",
    "token_embd_norm": "hidden",
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

# The modules of Llama, which most architectures share.
OUTER: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ATTENTION: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
MLP: Final = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORMS: Final = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
EXPERTS: Final = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
QKV: Final = frozenset({"attn_q", "attn_k", "attn_v"})

# Modules outside the layers of GPT-2, and modules of its layers.
GPT2_OUTER: Final = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
GPT2_INNER: Final = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
# The same for BLOOM.
BLOOM_OUTER: Final = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
BLOOM_INNER: Final = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
# The same for GPT-NeoX.
GPT_NEOX_OUTER: Final = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}
GPT_NEOX_INNER: Final = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
