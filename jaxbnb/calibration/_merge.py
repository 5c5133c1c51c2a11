"""merge_calibrated: adapters merged into weights of 4 bits, so that they are kept."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from flax import nnx

from jaxbnb.calibration._batches import check_language_model
from jaxbnb.calibration._calibrate import calibrate
from jaxbnb.calibration._matrix import LayerReport, Method, Progress, check_choices
from jaxbnb.calibration._tune import tune
from jaxbnb.core import QuantConfig, QuantizedArray
from jaxbnb.core.rules import Rule
from jaxbnb.lora import merge
from jaxbnb.nnx import dequantize_model, surgery


class MergedModel(NamedTuple):
    """The result of `merge_calibrated`.

    Attributes:
        model: the merged model, with quantised layers and without adapters.
        kept: share of the adapters' update that each layer has kept, as in
            `jaxbnb.lora.Merged`.
        layers: report on each matrix.
        divergences: divergence of each step of tuning, as from `tune`.
    """

    model: Any
    kept: dict[str, float]
    layers: list[LayerReport]
    divergences: list[float]


def merge_calibrated(
    model: nnx.Module,
    batches: Iterable[Any] | None = None,
    config: QuantConfig | str = QuantConfig(),  # noqa: B008 (frozen)
    *,
    method: Method = "guided",
    tune_steps: int = 0,
    rules: Sequence[Rule] = (),
    skip: str | Sequence[str] = ("lm_head",),
    seed: int = 0,
    resume_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> MergedModel:
    """Merges the active adapters of a language model into weights of few bits.

    `jaxbnb.lora.merge` rounds each element of a quantised weight by itself. A small
    update moves almost none of them to another level, and is lost. This merges into the
    decoded weights, chooses codes for the sums with `calibrate`, and then brings the
    predictions closer to those of the model with adapters with `tune`.

    Args:
        model: a language model with adapters, quantised or not. It is not changed.
        batches: text like that which the adapters were trained on; see `calibrate`.
        config: format of the result.
        method: method that chooses the codes.
        tune_steps: number of steps of `tune`; 0 for none.
        rules: formats of some layers.
        skip: layers that get no format.
        seed: seed of the labels, and of the order of batches in tuning.
        resume_dir: folder for finished parts; see `calibrate`.
        progress: called as ``progress(done, total, what)``.

    Returns:
        The merged model, which shares arrays with ``model`` where they are the same,
        and reports.

    Raises:
        ValueError: no adapter is active, or ``tune_steps`` is negative or needs
            ``batches``; or one of the errors of `jaxbnb.lora.merge` and `calibrate`.
        TypeError: ``model`` is not a language model, but an encoder-decoder for
            example; or one of the errors of `calibrate`.
        FloatingPointError: one of the errors of `calibrate` and `tune`.

    Example:
        >>> import jax, jaxbnb
        >>> from flax import nnx
        >>> from jaxbnb.calibration import compare, merge_calibrated
        >>> from jaxbnb.models import CausalLM, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16)
        >>> model = CausalLM(config, rngs=nnx.Rngs(0))
        >>> _ = jaxbnb.nnx.quantize_model(model, "nf4")
        >>> lora = jaxbnb.lora.LoraConfig(r=2, init_lora_weights=False)
        >>> _ = jaxbnb.lora.add_adapter(model, lora, rngs=nnx.Rngs(1))
        >>> text = jax.random.randint(jax.random.key(0), (4, 2, 32), 0, 64)
        >>> result = merge_calibrated(model, text, "nf4", method="gptq")
        >>> plain = nnx.merge(*nnx.split(model))
        >>> _ = jaxbnb.lora.merge(plain)
        >>> compare(result.model, model, text).kl < compare(plain, model, text).kl
        True
    """
    surgery.check_model(model, "merge_calibrated")
    check_choices(method, config, rules)
    if method != "mse" or batches is not None:
        check_language_model(model)
    texts = None if batches is None else list(batches)
    if tune_steps < 0 or (tune_steps and not texts):
        raise ValueError(
            f"tune_steps must be 0, or positive with batches of text; got {tune_steps} "
            f"and {0 if texts is None else len(texts)} batches"
        )
    # Modules of its own, with the same arrays.
    working = nnx.merge(*nnx.split(model))
    values = surgery.collect_values(working).values()
    if any(isinstance(value, QuantizedArray) for _, value in values):
        dequantize_model(working)
    merged = merge(working)
    layers = calibrate(
        working,
        texts,
        config,
        method=method,
        rules=rules,
        skip=skip,
        seed=seed,
        resume_dir=resume_dir,
        progress=progress,
    )
    divergences = []
    if tune_steps:
        assert texts is not None
        divergences = tune(
            working, model, texts, steps=tune_steps, seed=seed, progress=progress
        )
    return MergedModel(working, merged.measure(working).kept, layers, divergences)
