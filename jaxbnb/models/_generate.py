"""generate and generate_stream: a prompt's continuation, token by token."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, Int32

from jaxbnb.models._cache import check_length
from jaxbnb.models._decode_loop import LanguageModel, Plan, Prompt, run, stream
from jaxbnb.models._encoder_decoder import check_features
from jaxbnb.models._encoder_decoder_config import EncoderDecoderConfig
from jaxbnb.models._rope import find_turning_length
from jaxbnb.models._sampling import make_sampling
from jaxbnb.models.tokens import as_int32, check_vocabulary, token_array
from jaxbnb.sharding import find_mesh, use_mesh
from jaxbnb.sharding.axis_types import change_mesh, follow_context


def generate(
    model: LanguageModel,
    token_ids: Int[Array, "batch seq"] | Int[np.ndarray, "batch seq"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: Bool[Array, "batch seq"]
    | Bool[np.ndarray, "batch seq"]
    | None = None,
    cache_dtype: jax.typing.DTypeLike | None = None,
    decoder_token_ids: Int[Array | np.ndarray, "batch first"] | None = None,
) -> Int32[Array, "batch max_new_tokens"]:
    """Continues each prompt, stopping early once all rows have ended.

    With an encoder-decoder, the prompt is the source that the encoder reads, and the
    new tokens are another text.

    The whole loop is one compiled function for each combination of model structure,
    shape of ``token_ids``, ``max_new_tokens`` and ``top_k``. New weights, prompts, keys
    and temperatures compile nothing. If lengths vary, pad prompts on the left to a few
    lengths.

    A model with rope of type "longrope" uses other frequencies for long texts. When a
    row reaches that length, the model reads all texts so far once more, as if they were
    prompts.

    Args:
        model: a `CausalLM` or an `EncoderDecoderLM`; its linear layers may be
            quantised.
        token_ids: prompts, padded on the left if they differ in length. Sources of an
            encoder-decoder may be padded on either side, or be log-mel features.
        max_new_tokens: number of tokens to generate.
        temperature: divisor of the logits before sampling; 0 takes the likeliest token.
        top_k: number of likeliest tokens to sample among; None for all.
        top_p: samples among the fewest tokens, likeliest first, that together have at
            least this probability (after ``top_k``); None for all.
        key: random key for sampling, from ``jax.random.key``; unused at temperature 0.
        eos_token_id: token that ends a row, or several, e.g. ``stop_token_ids`` of
            `jaxbnb.convert.load_tokenizer`; None or an empty list never ends one.
        pad_token_id: token that follows the end of a row; None for the first of
            ``eos_token_id``.
        attention_mask: False for padding; None if there is no padding.
        cache_dtype: dtype of the `KVCache`, floating or int8; None for the dtype of the
            computation.
        decoder_token_ids: first tokens of an encoder-decoder's texts, such as language
            and task for Whisper; None for the start token.

    Returns:
        The new tokens without the prompts, including the token that ends a row.

    Raises:
        ValueError: an argument is out of range; ``key`` is missing; a token, even of
            padding, is outside the vocabulary; prompts differ in length or are padded
            on the right; or prompt and continuation exceed the model's positions.
        TypeError: ``token_ids``, ``eos_token_id`` or ``pad_token_id`` are not integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbnb.models import Llama, LlamaConfig, generate
        >>> config = LlamaConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> prompts = jnp.array([[1, 2, 3], [4, 5, 6]])
        >>> generate(model, prompts, 8).shape
        (2, 8)
        >>> generate(model, prompts, 8, temperature=0.7, key=jax.random.key(0)).shape
        (2, 8)

    References:
        Holtzman et al., The Curious Case of Neural Text Degeneration, 2020 (top_p).
    """
    prompt = _check_prompt(
        model, token_ids, attention_mask, max_new_tokens, decoder_token_ids
    )
    plan = _make_plan(
        model, prompt, max_new_tokens, eos_token_id, pad_token_id, cache_dtype
    )
    sampling = make_sampling(model.config.vocab_size, temperature, top_k, top_p, key)
    graphdef, state = nnx.split(model)
    mesh = find_mesh(state)
    state, prompt, sampling = change_mesh((state, prompt, sampling), mesh)
    with use_mesh(mesh):
        tokens = run(graphdef, plan, state, prompt, sampling)
    return tokens if mesh is None else change_mesh(tokens, follow_context(mesh))


def generate_stream(
    model: LanguageModel,
    token_ids: Int[Array, "batch seq"] | Int[np.ndarray, "batch seq"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: Bool[Array, "batch seq"]
    | Bool[np.ndarray, "batch seq"]
    | None = None,
    cache_dtype: jax.typing.DTypeLike | None = None,
    decoder_token_ids: Int[Array | np.ndarray, "batch first"] | None = None,
) -> Iterator[Int32[np.ndarray, " batch"]]:
    """Yields the columns of `generate`'s result, each as soon as it is known.

    The device computes the next token while the caller handles this one, so streaming
    costs little more than `generate`.

    Args:
        model: see `generate`; the other arguments are the same too.
        token_ids: prompts, padded on the left.
        max_new_tokens: largest number of tokens to generate.
        temperature: divisor of the logits before sampling.
        top_k: number of likeliest tokens to sample among.
        top_p: probability of the likeliest tokens to sample among.
        key: random key for sampling.
        eos_token_id: token that ends a row, or several.
        pad_token_id: token that follows the end of a row.
        attention_mask: False for padding.
        cache_dtype: dtype of the `KVCache`.
        decoder_token_ids: first tokens of an encoder-decoder's texts.

    Returns:
        An iterator over the next token of each row; it ends once all rows have ended.

    Raises:
        ValueError: see `generate`; raised before anything runs.
        TypeError: see `generate`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxbnb.models import Llama, LlamaConfig, generate_stream
        >>> config = LlamaConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=128,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     head_dim=16)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> prompt = jnp.array([[1, 2, 3]])
        >>> [tokens.shape for tokens in generate_stream(model, prompt, 2)]
        [(1,), (1,)]
    """
    prompt = _check_prompt(
        model, token_ids, attention_mask, max_new_tokens, decoder_token_ids
    )
    plan = _make_plan(
        model, prompt, max_new_tokens, eos_token_id, pad_token_id, cache_dtype
    )
    sampling = make_sampling(model.config.vocab_size, temperature, top_k, top_p, key)
    graphdef, state = nnx.split(model)
    arrays = change_mesh((state, prompt, sampling), find_mesh(state))
    return stream(graphdef, plan, *arrays)


def _make_plan(
    model: LanguageModel,
    prompt: Prompt,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    cache_dtype: jax.typing.DTypeLike | None,
) -> Plan:
    eos = _as_tuple("eos_token_id", eos_token_id)
    eos = _select_stops(eos, model.config.vocab_size)
    pads = (*_as_tuple("pad_token_id", pad_token_id), *eos, 0)
    if not -(2**31) <= pads[0] < 2**31:
        raise ValueError(f"pad_token_id must fit in int32, got {pads[0]}")
    if cache_dtype is None:
        cache_dtype = model.model.dtype
    has_source = isinstance(model.config, EncoderDecoderConfig)
    turn = None if has_source else find_turning_length(model.config.rope_scaling)
    if turn is not None:
        seq, is_padded = prompt.token_ids.shape[1], prompt.attention_mask is not None
        # The last token is never read. Without padding, a prompt's length is its width.
        is_reached = turn < seq + max_new_tokens - 1
        is_passed = turn < seq and not is_padded
        turn = turn if is_reached and not is_passed else None
    return Plan(max_new_tokens, eos, pads[0], jnp.dtype(cache_dtype), turn)


def _check_prompt(
    model: LanguageModel,
    token_ids: Any,
    attention_mask: Any,
    max_new_tokens: int,
    decoder_token_ids: Any,
) -> Prompt:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    config = model.config
    if isinstance(config, EncoderDecoderConfig):
        prompt = _check_source(config, token_ids, attention_mask, decoder_token_ids)
        config = config.decoder
    elif decoder_token_ids is not None:
        raise ValueError(
            "decoder_token_ids are for an encoder-decoder; a decoder continues "
            "token_ids"
        )
    else:
        tokens, mask = _check_tokens(config, token_ids, "token_ids"), None
        if attention_mask is not None:
            mask = _check_mask(attention_mask, tokens.shape, False)
        prompt = Prompt(tokens, mask)
    check_length(config, prompt.token_ids.shape[1] + max_new_tokens)
    return prompt


def _check_source(
    config: EncoderDecoderConfig, source: Any, attention_mask: Any, first: Any
) -> Prompt:
    """Returns the prompt of a decoder, and of the encoder in it."""
    if config.num_mel_bins:
        source = jnp.asarray(source)
        check_features(config, source, attention_mask)
    else:
        source = _check_tokens(config, source, "token_ids")
    mask = None
    if attention_mask is not None:
        mask = _check_mask(attention_mask, source.shape, True)
    if first is None:
        start = config.decoder_start_token_id
        first = jnp.full((len(source), 1), start, jnp.int32)
    else:
        first = _check_tokens(config, first, "decoder_token_ids")
        if len(first) != len(source):
            raise ValueError(
                f"decoder_token_ids have {len(first)} rows, the sources {len(source)}"
            )
    return Prompt(first, None, source=Prompt(source, mask))


def _check_tokens(config: Any, tokens: Any, name: str) -> Int32[Array, "batch seq"]:
    tokens = token_array(
        tokens,
        name,
        "Pad them on the left and give an attention_mask",
        "prompts are an integer array (batch, seq). A single prompt is token_ids[None]",
    )
    # Values are unknown inside a caller's jit, or if other hosts hold a part of them.
    if not isinstance(tokens, Tracer) and (
        isinstance(tokens, np.ndarray) or tokens.is_fully_addressable
    ):
        check_vocabulary(tokens, config.vocab_size, name)
    return jnp.asarray(as_int32(tokens))


def _check_mask(
    mask: Any, shape: tuple[int, ...], has_source: bool
) -> Bool[Array, "batch seq"]:
    mask = np.asarray(mask).astype(bool)
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask must have the shape of token_ids, {shape}; "
            f"got {mask.shape}"
        )
    if not has_source and not mask[:, -1].all():
        raise ValueError(
            "the last column is padding in rows "
            f"{np.flatnonzero(~mask[:, -1]).tolist()}, and the continuation follows "
            "it; pad on the left"
        )
    return jnp.asarray(mask)


def _as_tuple(name: str, tokens: int | Sequence[int] | None) -> tuple[int, ...]:
    """Returns one token, several or none as a tuple."""
    ids = np.atleast_1d(np.asarray([] if tokens is None else tokens))
    if not ids.size:
        return ()
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name} must be an int, or a sequence of them; got {tokens!r}")
    return tuple(ids.tolist())


def _select_stops(ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """Returns the stop tokens that are in the vocabulary.

    A file may name others, from a larger vocabulary.

    Raises:
        ValueError: there are stop tokens, but none of them is in the vocabulary.
    """
    possible = tuple(token for token in ids if 0 <= token < vocab_size)
    if ids and not possible:
        raise ValueError(
            f"eos_token_id {ids} is not in the vocabulary, 0 to {vocab_size - 1}, and "
            "would never end a text; give None to generate without one"
        )
    return possible
