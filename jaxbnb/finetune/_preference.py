"""Losses of pairs: direct preference optimization, and a reward model."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jaxbnb.finetune._loss import check_language_model, target_losses
from jaxbnb.lora import adapter_names, set_adapter
from jaxbnb.models import CausalLM
from jaxbnb.nnx import Remat

_LOSSES: Final = ("sigmoid", "hinge", "ipo", "robust")


class PreferenceBatch(NamedTuple):
    """Pairs of texts, of which one is preferred: the chosen rows, then the rejected.

    Attributes:
        tokens: int32 token ids; row ``i`` is chosen over row ``pairs + i``.
        mask: whether each token is part of a completion.
    """

    tokens: Int32[np.ndarray, "2*pairs seq"]
    mask: Bool[np.ndarray, "2*pairs seq"]


class PairLosses(NamedTuple):
    """The losses of pairs, and the rewards that they compare.

    Attributes:
        losses: loss of each pair.
        chosen_rewards: reward of each chosen text.
        rejected_rewards: reward of each rejected text.
    """

    losses: Float32[Array, " pairs"]
    chosen_rewards: Float32[Array, " pairs"]
    rejected_rewards: Float32[Array, " pairs"]

    def metrics(self) -> dict[str, Float32[Array, ""]]:
        """Returns means over the pairs, by TRL's names, without gradients."""
        chosen, rejected = map(
            jax.lax.stop_gradient, (self.chosen_rewards, self.rejected_rewards)
        )
        return {
            "loss": jnp.mean(jax.lax.stop_gradient(self.losses)),
            "rewards/chosen": jnp.mean(chosen),
            "rewards/rejected": jnp.mean(rejected),
            "rewards/margins": jnp.mean(chosen - rejected),
            "rewards/accuracies": jnp.mean(chosen > rejected),
        }


def make_preference_batch(
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    *,
    length: int | None = None,
    pad_token_id: int = 0,
) -> PreferenceBatch:
    """Makes a batch of pairs from token ids, padded at the end.

    Causal attention does not see padding that follows a text.

    Args:
        prompts: tokens before the completions; at least one for each pair.
        chosen: tokens of each preferred completion, with its end-of-text token.
        rejected: tokens of each other completion, likewise.
        length: length of the rows, so that batches have the same shape; None for the
            longest text.
        pad_token_id: token to pad with.

    Raises:
        ValueError: the lists differ in length, or are empty; a prompt or a completion
            is empty; or a text is longer than ``length``.

    Example:
        >>> import jaxbnb
        >>> batch = jaxbnb.finetune.make_preference_batch([[5, 6]], [[7, 2]], [[2]])
        >>> batch.tokens.tolist()
        [[5, 6, 7, 2], [5, 6, 2, 0]]
        >>> batch.mask.tolist()
        [[False, False, True, True], [False, False, True, False]]
    """
    if not len(prompts) == len(chosen) == len(rejected) > 0:
        raise ValueError(
            "prompts, chosen and rejected must have an entry for each pair, and at "
            f"least one; got {len(prompts)}, {len(chosen)} and {len(rejected)}"
        )
    for name, texts in (
        ("prompts", prompts),
        ("chosen", chosen),
        ("rejected", rejected),
    ):
        for number, text in enumerate(texts):
            if len(text) == 0:
                raise ValueError(f"{name}[{number}] must have a token; it is empty")
    rows = [
        ([*prompt, *completion], len(prompt))
        for completions in (chosen, rejected)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    longest = max(len(row) for row, _ in rows)
    size = longest if length is None else length
    if longest > size:
        raise ValueError(
            f"length must be at least {longest}, the tokens of the longest prompt and "
            f"completion; got {length}. Leave out such pairs, or cut their prompts"
        )
    tokens = np.full((len(rows), size), pad_token_id, np.int32)
    mask = np.zeros(tokens.shape, np.bool_)
    for i, (row, start) in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, start : len(row)] = True
    return PreferenceBatch(tokens, mask)


def completion_log_probs(
    model: CausalLM,
    tokens: Int[Array, "rows seq"],
    mask: Bool[Array, "rows seq"],
    *,
    remat: bool | Remat = False,
) -> Float32[Array, " rows"]:
    """Computes the log-probability, in nats, of the completion in each row.

    As in `next_token_loss`, only a chunk of the logits exists at a time.

    Args:
        model: a language model.
        tokens: token ids.
        mask: whether each token is part of the completion; the first one of a row has
            no prediction.
        remat: recompute each layer in the backward pass; see `next_token_loss`.

    Returns:
        The sums over the completions; NaN if a token is outside the vocabulary.

    Example:
        >>> import jax.numpy as jnp, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> tokens = jnp.arange(8)[None]
        >>> jaxbnb.finetune.completion_log_probs(model, tokens, tokens > 4).shape
        (1,)
    """
    return -jnp.sum(target_losses(model, tokens, mask=mask, remat=remat), axis=1)


def dpo_losses(
    model: CausalLM,
    batch: Any,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    reference: str | None = None,
    remat: bool | Remat = False,
) -> PairLosses:
    r"""Computes the losses of direct preference optimization, one for each pair.

    With the log-probabilities of completions under the model and the reference, and

    .. math:: \delta = \log\frac{\pi(y_w)}{\pi_\mathrm{ref}(y_w)}
              - \log\frac{\pi(y_l)}{\pi_\mathrm{ref}(y_l)}

    the loss is :math:`-\log\sigma(\beta\delta)` for "sigmoid" and
    :math:`\max(0, 1 - \beta\delta)` for "hinge". For "ipo" it is
    :math:`(\delta' - \frac{1}{2\beta})^2`, where each log-ratio is the mean over its
    tokens. ``label_smoothing`` is the share of labels that are wrong: "sigmoid" is then
    conservative DPO, and "robust" the estimate that is unbiased. The rewards are
    :math:`\beta` times the log-ratios.

    The reference shares the weights of the model, and has no gradient.

    Args:
        model: a language model with adapters.
        batch: a `PreferenceBatch`, or anything with its ``tokens`` and ``mask``.
        beta: strength of the pull towards the reference; positive.
        loss_type: "sigmoid", "hinge", "ipo" or "robust".
        label_smoothing: probability that a label is wrong, in [0, 0.5); only for
            "sigmoid" and "robust".
        reference: name of the adapter that is the reference, without dropout; None for
            the model without adapters.
        remat: recompute each layer in the backward pass; see `next_token_loss`.

    Raises:
        ValueError: an argument is none of these, the model does not have the adapter,
            or the number of rows is odd.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> _ = jaxbnb.lora.add_adapter(
        ...     model, jaxbnb.lora.LoraConfig(r=4), rngs=nnx.Rngs(1))
        >>> batch = jaxbnb.finetune.make_preference_batch([[5, 6]], [[7, 2]], [[2]])
        >>> pairs = jaxbnb.finetune.dpo_losses(model, batch)
        >>> [f"{x:.3f}" for x in pairs.losses]  # log 2, before any training
        ['0.693']

    References:
        Rafailov et al., Direct Preference Optimization, 2023. Azar et al., A General
        Theoretical Paradigm to Understand Learning from Human Preferences (IPO), 2023.
        Zhao et al., SLiC-HF (hinge), 2023. Chowdhury et al., Provably Robust DPO, 2024.
        ``DPOTrainer`` of TRL.
    """
    _check_dpo(beta, loss_type, label_smoothing)
    tokens, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.mask)
    _check_rows(tokens)
    frozen = _make_reference(model, reference)
    policy = completion_log_probs(model, tokens, mask, remat=remat)
    ratios = policy - completion_log_probs(frozen, tokens, mask)
    chosen, rejected = jnp.split(ratios, 2)
    if loss_type == "ipo":
        counts = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(jnp.float32)
        chosen_mean, rejected_mean = jnp.split(ratios / counts, 2)
        losses = (chosen_mean - rejected_mean - 1 / (2 * beta)) ** 2
    else:
        losses = _compare(beta * (chosen - rejected), loss_type, label_smoothing)
    return PairLosses(losses, beta * chosen, beta * rejected)


def _compare(
    logits: Float32[Array, " pairs"], loss_type: str, label_smoothing: float
) -> Float32[Array, " pairs"]:
    if loss_type == "hinge":
        return jax.nn.relu(1 - logits)
    right, wrong = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    if loss_type == "robust":
        losses = label_smoothing * wrong - (1 - label_smoothing) * right
        return losses / (1 - 2 * label_smoothing)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def dpo_loss(
    model: CausalLM, batch: Any, **options: Any
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns the sum of the losses of a batch of pairs, and the number of pairs.

    This is the form that `fit` and `train_step` take as ``loss_fn``. Give options with
    ``functools.partial``.

    Args:
        model: a language model with adapters.
        batch: pairs, as in `dpo_losses`.
        **options: options of `dpo_losses`.

    Example:
        >>> import functools, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> _ = jaxbnb.lora.add_adapter(
        ...     model, jaxbnb.lora.LoraConfig(r=4), rngs=nnx.Rngs(1))
        >>> batch = jaxbnb.finetune.make_preference_batch([[5, 6]], [[7, 2]], [[2]])
        >>> result = jaxbnb.finetune.fit(
        ...     model, jaxbnb.adamw8bit(1e-2), [batch] * 4,
        ...     loss_fn=functools.partial(jaxbnb.finetune.dpo_loss, beta=0.5))
        >>> result.losses[-1] < result.losses[0]
        True
    """
    return _sum(dpo_losses(model, batch, **options))


def _sum(pairs: PairLosses) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    return jnp.sum(pairs.losses), jnp.float32(len(pairs.losses))


def add_reward_head(model: CausalLM, *, rngs: nnx.Rngs) -> None:
    """Gives a language model a reward head, ``model.score``, in place.

    The head is a linear layer from the last hidden state to one number, in float32. To
    train it with an adapter, name it in ``modules_to_save`` of
    `jaxbnb.lora.LoraConfig`. `jaxbnb.lora.save_adapter` then saves it, and PEFT opens
    it with transformers' ``AutoModelForSequenceClassification`` of one label. The model
    computes the same as before.

    Args:
        model: a language model without a reward head.
        rngs: random streams; ``params`` seeds the head, normal with deviation 0.02.

    Raises:
        TypeError: the model is not a decoder.
        ValueError: the model has a reward head already.

    Example:
        >>> import jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> jaxbnb.finetune.add_reward_head(model, rngs=nnx.Rngs(1))
        >>> lora = jaxbnb.lora.LoraConfig(r=4, modules_to_save=["score"])
        >>> _ = jaxbnb.lora.add_adapter(model, lora, rngs=nnx.Rngs(2))
        >>> batch = jaxbnb.finetune.make_preference_batch([[5, 6]], [[7, 2]], [[2]])
        >>> result = jaxbnb.finetune.fit(
        ...     model, jaxbnb.adamw8bit(1e-2), [batch] * 4,
        ...     loss_fn=jaxbnb.finetune.reward_loss)
        >>> result.losses[-1] < result.losses[0]
        True
    """
    check_language_model(model)
    if hasattr(model, "score"):
        raise ValueError(f"{type(model).__name__} has a reward head already")
    head = nnx.Linear(
        model.config.hidden_size,
        1,
        use_bias=False,
        dtype=jnp.float32,
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )
    setattr(model, "score", head)  # noqa: B010 (the class does not declare it)


def compute_rewards(
    model: CausalLM,
    tokens: Int[Array, "rows seq"],
    mask: Bool[Array, "rows seq"],
    *,
    remat: bool | Remat = False,
) -> Float32[Array, " rows"]:
    """Computes the reward of each row: the head's result at its last token.

    Args:
        model: a model after `add_reward_head`.
        tokens: token ids.
        mask: whether each token is part of the completion; the last one that is has the
            reward.
        remat: recompute each layer in the backward pass; see `next_token_loss`.

    Raises:
        ValueError: the model does not have a reward head.

    Example: see `add_reward_head`.
    """
    score = getattr(model, "score", None)
    if score is None:
        raise ValueError(
            f"{type(model).__name__} has no reward head; "
            "jaxbnb.finetune.add_reward_head adds one"
        )
    hidden = model.model(tokens, remat=remat)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return score(hidden.astype(jnp.float32))[:, 0, 0]


def reward_losses(
    model: CausalLM,
    batch: Any,
    *,
    margins: Float[Array, " pairs"] | None = None,
    remat: bool | Remat = False,
) -> PairLosses:
    r"""Computes the Bradley-Terry losses of a reward model, one for each pair.

    .. math:: -\log\sigma(r_w - r_l - m)

    Args:
        model: a model after `add_reward_head`.
        batch: a `PreferenceBatch`, or anything with its ``tokens`` and ``mask``.
        margins: margin of each pair; None for 0.
        remat: recompute each layer in the backward pass; see `next_token_loss`.

    Raises:
        ValueError: the model does not have a reward head, the number of rows is odd, or
            there is not a margin for each pair.

    Example: see `add_reward_head`.

    References:
        Touvron et al., Llama 2 (the margin), 2023. ``RewardTrainer`` of TRL.
    """
    tokens, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.mask)
    _check_rows(tokens)
    rewards = compute_rewards(model, tokens, mask, remat=remat)
    chosen, rejected = jnp.split(rewards, 2)
    difference = chosen - rejected
    if margins is not None:
        margins = jnp.asarray(margins, jnp.float32)
        if margins.shape != chosen.shape:
            raise ValueError(
                f"margins must have shape {chosen.shape}, one for each pair; got "
                f"{margins.shape}"
            )
        difference = difference - margins
    return PairLosses(-jax.nn.log_sigmoid(difference), chosen, rejected)


def reward_loss(
    model: CausalLM, batch: Any, **options: Any
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Returns the sum of `reward_losses`, and the number of pairs, like `dpo_loss`."""
    return _sum(reward_losses(model, batch, **options))


def _make_reference(model: CausalLM, name: str | None) -> CausalLM:
    """Returns a model with the same arrays, another adapter, and no gradient."""
    if not adapter_names(model):
        raise ValueError(
            f"{type(model).__name__} has no adapters, so it would be its own "
            "reference; jaxbnb.lora.add_adapter adds one"
        )
    graphdef, state = nnx.split(model)
    frozen = nnx.merge(graphdef, jax.tree.map(_stop_gradient, state))
    set_adapter(frozen, [] if name is None else name)
    frozen.eval()
    return frozen


def _stop_gradient(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _check_dpo(beta: float, loss_type: str, label_smoothing: float) -> None:
    if loss_type not in _LOSSES:
        raise ValueError(f"loss_type must be one of {_LOSSES}; got {loss_type!r}")
    if not beta > 0:
        raise ValueError(f"beta must be positive; got {beta!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5); got {label_smoothing}")
    if label_smoothing and loss_type not in ("sigmoid", "robust"):
        raise ValueError(
            f"label_smoothing is for 'sigmoid' and 'robust'; got {label_smoothing} "
            f"with {loss_type!r}"
        )


def _check_rows(tokens: Array) -> None:
    if tokens.ndim != 2 or len(tokens) % 2 or not len(tokens):
        raise ValueError(
            "a batch of pairs has the chosen rows and then as many rejected ones; got "
            f"tokens of shape {tokens.shape}"
        )
