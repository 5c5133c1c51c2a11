"""The families of models that jaxbnb reads, by ``model_type``.

A family translates: the fields of ``config.json`` to those of `DecoderConfig`, and the
names of tensors to ours.
"""

from typing import Any, Final

from jaxbnb.models.families._bloom import BLOOM
from jaxbnb.models.families._encoders import BERT, DEIT, ROBERTA, VIT
from jaxbnb.models.families._falcon import FALCON
from jaxbnb.models.families._family import Family
from jaxbnb.models.families._gemma import GEMMA2, GEMMA3, GEMMA3_TEXT
from jaxbnb.models.families._gpt2 import GPT2
from jaxbnb.models.families._gpt_bigcode import GPT_BIGCODE
from jaxbnb.models.families._gpt_neo import GPT_NEO
from jaxbnb.models.families._gpt_neox import GPT_NEOX
from jaxbnb.models.families._gpt_oss import GPT_OSS
from jaxbnb.models.families._gptj import CODEGEN, GPTJ
from jaxbnb.models.families._llama import LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from jaxbnb.models.families._mixtral import MIXTRAL
from jaxbnb.models.families._opt import OPT
from jaxbnb.models.families._phi3 import PHI3
from jaxbnb.models.families._smolvlm import SMOLVLM
from jaxbnb.models.families._t5 import MT5, T5
from jaxbnb.models.families._whisper import WHISPER
from jaxbnb.models.families._xglm import XGLM

FAMILIES: Final[dict[str, Family]] = {
    "bert": BERT,
    "bloom": BLOOM,
    "codegen": CODEGEN,
    "deit": DEIT,
    "falcon": FALCON,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3_TEXT,
    "gpt2": GPT2,
    "gpt_bigcode": GPT_BIGCODE,
    "gpt_neo": GPT_NEO,
    "gpt_neox": GPT_NEOX,
    "gpt_oss": GPT_OSS,
    "gptj": GPTJ,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "mt5": MT5,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "roberta": ROBERTA,
    "smollm3": SMOLLM3,
    "smolvlm": SMOLVLM,
    "t5": T5,
    "vit": VIT,
    "whisper": WHISPER,
    "xglm": XGLM,
    "xlm-roberta": ROBERTA,
}

__all__ = ["FAMILIES", "Family", "find_family", "get_family"]


def get_family(config: Any) -> Family:
    """Returns the family of a model's config, with the names of its variant."""
    family = FAMILIES[config.model_type]
    return family if family.vary is None else family.vary(config)


def find_family(model_type: Any) -> Family:
    """Returns the family of a ``model_type``.

    Raises:
        NotImplementedError: jaxbnb does not have it.

    Example:
        >>> find_family("gpt2").layers
        'transformer.h'
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise NotImplementedError(
        f"model_type {model_type!r} is not implemented; jaxbnb has "
        f"{', '.join(map(repr, FAMILIES))}. A family with layers that DecoderConfig "
        "can describe needs only a Family in jaxbnb/models/families, which says how "
        "its config.json is read and what its tensors are called"
    )
