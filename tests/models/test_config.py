import dataclasses
import random

import pytest

from jaxbnb.models import LlamaConfig
from jaxbnb.models._encoder_decoder_config import read_model_config
from jaxbnb.models._rope import rope_frequencies
from jaxbnb.models.families import FAMILIES

# As transformers 4 writes SmolLM2-135M's, but for fields that change nothing.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def read(**changes):
    fields = {name: v for name, v in (SMOLLM2 | changes).items() if v != "absent"}
    return LlamaConfig.from_huggingface(fields)


def test_transformers_4():
    assert read() == LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rope_theta=100000,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def test_transformers_5():
    rope = {"rope_type": "default", "rope_theta": 100000}
    assert read(rope_theta="absent", rope_parameters=rope, head_dim=64) == read()


def test_what_older_files_leave_out():
    config = read(
        num_key_value_heads=None,
        rope_theta="absent",
        rms_norm_eps="absent",
        max_position_embeddings="absent",
        tie_word_embeddings="absent",
        attention_bias="absent",
    )
    assert config.num_key_value_heads == 9
    assert config.rope_theta == 10000.0
    assert config.rms_norm_eps == 1e-6
    assert config.max_position_embeddings == 2048
    assert not config.tie_word_embeddings
    assert not config.attention_bias


def test_head_dim_need_not_divide_hidden_size():
    assert read(head_dim=80).head_dim == 80


def test_missing_fields_are_all_named():
    message = r"lacks \['hidden_size', 'num_attention_heads'\]; it has .*'vocab_size'"
    with pytest.raises(ValueError, match=message):
        read(hidden_size="absent", num_attention_heads=None)


GPT_NEO = {"model_type": "gpt_neo", "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba"},
            r"'mamba' is not implemented; jaxbnb has .*'bloom', .*'llama'.*A family .*"
            "in jaxbnb/models/families",
        ),
        ({"model_type": "absent"}, "None is not implemented"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'.* jaxbnb has .*'silu'"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "type 'ntk'"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_parameters of type 'ntk'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates 0.5 of each"),
        (
            {"model_type": "gemma2", "layer_types": ["linear_attention"] * 30},
            r"layer_types \['linear_attention'\] are not implemented",
        ),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "'gemma2'"),
        (
            {"model_type": "opt", "ffn_dim": 8, "word_embed_proj_dim": 9},
            "word_embed_proj_dim 9 is not implemented for 'opt'; jaxbnb has 576",
        ),
        (
            {
                "model_type": "bloom",
                "apply_residual_connection_post_layernorm": True,
            },
            "post_layernorm True is not implemented for 'bloom'; jaxbnb has False",
        ),
        (
            {
                "model_type": "falcon",
                "new_decoder_architecture": True,
                "parallel_attn": False,
            },
            "parallel_attn False is not implemented for 'falcon'",
        ),
        (
            {"model_type": "falcon", "num_ln_in_parallel_attn": 2},
            "num_ln_in_parallel_attn 2 is not implemented for 'falcon'; jaxbnb has 1",
        ),
        (
            {"model_type": "gptj"},
            "tie_word_embeddings True is not implemented for 'gptj'; jaxbnb has False",
        ),
        (
            {"model_type": "gpt_bigcode", "add_cross_attention": True},
            "add_cross_attention True is not implemented for 'gpt_bigcode'",
        ),
        (
            GPT_NEO | {"attention_types": [[["global", "linear"], 1]]},
            r"attention_types \['linear'\] are not implemented; jaxbnb has 'global'",
        ),
        (
            {
                "model_type": "xglm",
                **dict.fromkeys(("d_model", "ffn_dim"), 8),
                **dict.fromkeys(("num_layers", "attention_heads"), 2),
                "pad_token_id": 5,
            },
            "pad_token_id 5 is not implemented for 'xglm'; jaxbnb has 0 and 1",
        ),
    ],
)
def test_what_is_not_implemented_is_named(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        read(**changes)


def longrope(**changes):
    rope = {
        "type": "longrope",
        "short_factor": [1.0] * 32,
        "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 64,
    }
    return rope | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 0},
            "hidden_size must be a multiple|hidden_size must be a pos",
        ),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be a positive int"),
        ({"num_hidden_layers": 2**14 + 1}, "more than 16384; is the config damaged"),
        ({"head_dim": 10**400}, "head_dim must be a positive number, got 1000"),
        ({"head_dim": 2**21}, "9 heads of 2097152 features are more than 16777216"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive float, got 1000"),
        ({"rope_theta": 1e-320}, "rope_theta must be a positive float"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings must be"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 1e30}},
            "max_position_embeddings must be a positive int, at most 2147483647",
        ),
        ({"num_hidden_layers": True}, "positive int, got True"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive float"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive float"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be True or False"),
        ({"num_key_value_heads": 2}, "9 must be a multiple of num_key_value_heads 2"),
        ({"hidden_size": 577}, "hidden_size must be a multiple of num_attention_heads"),
        ({"head_dim": 63}, "head_dim must be even"),
        ({"rope_scaling": 2.0}, "rope_scaling must be an object or null"),
        ({"rope_scaling": {"type": "linear"}}, "factor of rope of type 'linear' must"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "longrope needs 32 short and long factors.* got 1 and 0",
        ),
        (
            {"rope_scaling": longrope(short_factor=3)},
            "short_factor of rope must be a list, got 3",
        ),
        (
            {"rope_scaling": longrope(long_factor=[0.0] * 32)},
            "each long_factor of rope must be a positive number, got 0.0",
        ),
        (
            {"rope_scaling": longrope(original_max_position_embeddings=1)},
            "must be at least 2",
        ),
        (
            {"rope_scaling": longrope(original_max_position_embeddings="64")},
            "original_max_position_embeddings must be a positive number, got '64'",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0},
            "yarn needs a rope_theta above 1",
        ),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "low_freq_factor of rope must be less than high_freq_factor, got 4.0",
        ),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "a list of 30"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "9 is more than"),
        ({"model_type": "gpt_neox", "rotary_pct": 0.02}, "rotary_dim must be even"),
        ({"model_type": "gpt_neo"}, r"lacks \['num_layers', 'num_heads'\]"),
        (GPT_NEO, "attention_types must be pairs .* for 2 layers; got .*'local'.* 12"),
        (GPT_NEO | {"attention_types": [[["local"], 1]]}, "are 1 layers, .* has 2"),
        (GPT_NEO | {"attention_types": "local"}, "must be pairs .* got 'local'"),
        (
            {
                "model_type": "codegen",
                **dict.fromkeys(("n_layer", "n_head"), 2),
                "n_embd": 6,
                "tie_word_embeddings": False,
            },
            "n_embd of a codegen must be a multiple of 4.* got 6",
        ),
    ],
)
def test_nonsense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_norm": True}, "shared_norm needs parallel_residual"),
        ({"head_bias": True}, "head_bias needs a head of its own, and tie_word_emb"),
        ({"positions": "none"}, r"positions must be one of \('rope', .* got 'none'"),
        (
            {"positions": "alibi", "sliding_window": 8},
            "positions 'alibi' do not go with a sliding_window, got 8",
        ),
    ],
)
def test_fields_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(read(), **changes)


# With SMOLLM2's, the fields of all families.
FIELDS = {
    **dict.fromkeys(("n_embd", "ffn_dim"), 576),
    **dict.fromkeys(("n_layer", "n_head", "attention_heads"), 9),
    "attention_types": [[["global", "local"], 4], [["local"], 1]],
    "window_size": 128,
    "rotary_dim": 64,
    "new_decoder_architecture": True,
    "num_kv_heads": 3,
    "layer_types": ["full_attention"] * 30,
    "no_rope_layers": [1] * 30,
    "no_rope_layer_interval": 4,
    "use_sliding_window": True,
    "max_window_layers": 28,
    "sliding_window": 128,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default"},
    "rope_local_base_freq": 1e4,
    "partial_rotary_factor": 1.0,
    "activation_function": "gelu",
    "hidden_activation": "gelu",
    **{"text_config": {}, "vision_config": {}, "scale_factor": 1, "image_token_id": 3},
    **dict.fromkeys(("d_model", "d_ff", "encoder_ffn_dim"), 576),
    **dict.fromkeys(("encoder_layers", "encoder_attention_heads"), 9),
    **dict.fromkeys(("decoder_start_token_id", "pad_token_id"), 0),
    **dict.fromkeys(("num_layers", "num_heads"), 9),
    **{"d_kv": 64, "decoder_start_token_id": 2, "pad_token_id": 1},
    **{f"{x}_{y}": 9 for x in ("encoder", "decoder") for y in ("layers", "ffn_dim")},
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 9),
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "scale_decoder_outputs": True,
}
JUNK = [
    *(None, True, False, 0, 1, -1, 2.5, 10**30, float("nan"), float("inf"), "", "x"),
    *(10**400, 2**63, 2**31, 2**24, 1e308, 1e-320, "\ud800", "x" * 5000),
    *([], [1], [0.0], ["a"], [None], {}, {"a": 1}, {"rope_type": {}}),
    *({"type": kind, "factor": 2.0} for kind in ("linear", "llama3", "yarn")),
    {"type": "longrope", "short_factor": ["a"], "long_factor": {}},
    {"full_attention": 3},
    {"sliding_attention": [1]},
    {"full_attention": {"rope_type": "yarn", "factor": "x"}},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_the_fields_are_the_error_is_typed(family):
    """And it comes at once: a number of layers is not counted up to."""
    fields = SMOLLM2 | FIELDS | {"model_type": family}
    # Heads with a bias are not tied.
    fields["tie_word_embeddings"] = family not in ("gptj", "codegen")
    if FAMILIES[family].kind == "encoder":
        fields["architectures"] = ["ForSequenceClassification"]
    read_model_config(fields)
    rng = random.Random(family)
    refused = 0
    for _ in range(1000):
        changes = {name: rng.choice(JUNK) for name in rng.sample([*fields], 3)}
        try:
            config = read_model_config(fields | changes)
            config = getattr(config, "decoder", getattr(config, "layer", config))
            rotated = config.rotary_dim or config.head_dim
            if rotated <= 512:
                rope_frequencies(rotated, config.rope_theta, config.rope_scaling, 100)
        except (ValueError, NotImplementedError):
            refused += 1
    assert 100 < refused < 1000


def test_it_is_hashable_and_frozen():
    assert hash(read()) == hash(read())
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().head_dim = 2
