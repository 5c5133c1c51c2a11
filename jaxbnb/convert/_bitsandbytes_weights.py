"""How bitsandbytes stores quantised weights in a checkpoint.

A weight ``W`` in 4 bits consists of its packed codes under its own name, ``W.absmax``,
the codebook ``W.quant_map``, and ``W.quant_state.bitsandbytes__nf4`` (or ``__fp4``),
the text of a JSON object. If the absmax is quantised too, there are also
``W.nested_absmax`` and ``W.nested_quant_map``. A module ``M`` in 8 bits has
``M.weight``, ``M.SCB`` and ``M.weight_format``. Its blocks run along the rows of a
weight ``(out, in)``, and jaxbnb's along the first axis of a kernel ``(in, out)``, so
the arrays are the same.
"""

from typing import Final

import ml_dtypes
import numpy as np

from jaxbnb_kernels.codebooks import FP4, NF4

CODEBOOKS: Final = {"nf4": NF4, "fp4": FP4}
NESTED_BLOCK_SIZE: Final = 256
# Stands between the name of a weight and its format in the name of its state.
STATE_INFIX: Final = ".quant_state.bitsandbytes__"
# A state has about 150 bytes.
MAX_STATE_BYTES: Final = 4096
DTYPES: Final = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Models that store linear layers as (in, out), unless they are quantised.
TRANSPOSED_MODELS: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
