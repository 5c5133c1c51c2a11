"""jaxbnb: bitsandbytes for JAX."""

import importlib
from typing import TYPE_CHECKING, Any

# For readers and type checkers. At run time a name is imported when it is first used
# (PEP 562), so that `jaxbnb --help` does not wait for JAX.
if TYPE_CHECKING:
    from jaxbnb import (
        calibration,
        convert,
        core,
        data,
        finetune,
        linen,
        lora,
        models,
        nnx,
        optim,
        planning,
        sharding,
    )
    from jaxbnb.calibration import calibrate
    from jaxbnb.core import (
        QuantConfig,
        QuantizedArray,
        decode_tree,
        dequantize,
        matmul,
        quantize,
        quantize_tree,
    )
    from jaxbnb.linen import QuantDense
    from jaxbnb.models import load_pretrained
    from jaxbnb.nnx import summary
    from jaxbnb.optim import (
        adagrad8bit,
        adam8bit,
        adamw8bit,
        ademamix8bit,
        lamb8bit,
        lars8bit,
        lion8bit,
        muon8bit,
        paged_adam8bit,
        paged_adamw8bit,
        quantize_state,
        rmsprop8bit,
        sgd8bit,
    )
    from jaxbnb.planning import plan

    __version__: str

__all__ = [
    "QuantConfig",
    "QuantDense",
    "QuantizedArray",
    "adagrad8bit",
    "adam8bit",
    "adamw8bit",
    "ademamix8bit",
    "calibrate",
    "calibration",
    "convert",
    "core",
    "data",
    "decode_tree",
    "dequantize",
    "finetune",
    "lamb8bit",
    "lars8bit",
    "linen",
    "lion8bit",
    "load_pretrained",
    "lora",
    "matmul",
    "models",
    "muon8bit",
    "nnx",
    "optim",
    "paged_adam8bit",
    "paged_adamw8bit",
    "plan",
    "planning",
    "quantize",
    "quantize_state",
    "quantize_tree",
    "rmsprop8bit",
    "sgd8bit",
    "sharding",
    "summary",
]

# Adapters of frameworks, which need extras; so `from jaxbnb import *` leaves them out.
_FRAMEWORKS = ("equinox", "keras")
_PACKAGES = (
    *("core", "optim", "linen", "nnx", "lora", "convert", "data", "models"),
    *("calibration", "finetune", "planning", "sharding"),
)

# With a visible __getattr__, type checkers would accept every name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib import metadata

            return metadata.version("jaxbnb")
        if name in _PACKAGES or name in _FRAMEWORKS:
            return importlib.import_module(f"jaxbnb.{name}")
        if name in __all__:
            for package in _PACKAGES:
                module = importlib.import_module(f"jaxbnb.{package}")
                if name in module.__all__:
                    globals()[name] = getattr(module, name)
                    return globals()[name]
        raise AttributeError(f"module 'jaxbnb' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_FRAMEWORKS, "__version__"})
