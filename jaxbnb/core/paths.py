"""How names select modules: one rule for skips, targets and overrides."""

import re
from collections.abc import Sequence


def matches(path: str, patterns: str | Sequence[str]) -> bool:
    """Returns whether names select a module, by the rule of PEFT's target_modules.

    Args:
        path: dotted path of the module, e.g. "model.layers.layer.self_attn.q_proj".
        patterns: list of names, each the whole path or its last parts; or one string, a
            regular expression for the whole path.

    Example:
        >>> matches("model.layers.layer.self_attn.q_proj", ["q_proj", "v_proj"])
        True
        >>> matches("model.layers.layer.self_attn.q_proj", r".*(mlp|attn).*_proj")
        True
        >>> matches("model.layers.layer.mlp.up_proj", ["proj"])
        False
    """
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == name or path.endswith("." + name) for name in patterns)
