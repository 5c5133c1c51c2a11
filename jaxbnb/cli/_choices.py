"""What arguments choose among: names of verbs, formats, benchmarks and GPUs.

The command line does not import JAX to know them; a test compares them with the
packages.
"""

from typing import Final

VERBS: Final = {
    "bench": "measure speed, memory and perplexity, and compare with other libraries",
    "calibrate": "quantise a checkpoint, with codes chosen on your text",
    "chat": "chat with a model",
    "convert": "rewrite a checkpoint, and quantise it if asked",
    "finetune": "fine-tune a model on your data",
    "env": "print versions, devices and implementations, and check the numbers",
    "generate": "continue a prompt",
    "inspect": "print the contents of a checkpoint, and whether it loads",
    "plan": "say whether a training run fits on a GPU, before there is one",
    "verify-kernels": "check the GPU kernels on this machine, and let them run",
}
# Copies of names from packages that import JAX. A test compares them with the
# originals.
BENCHMARKS: Final = (
    "quantize",
    "optim",
    "layers",
    "scaling",
    "kernels",
    "generate",
    "perplexity",
    "calibrate",
    "calibrate-peers",
    "convert",
    "parity",
    "adapters",
    "context",
    "plan",
    "sharding",
    "finetune",
)
# Options that only one benchmark has.
BENCHMARK_OPTIONS: Final = {
    "kernels": ("seconds", "records", "rehearse"),
    "parity": ("only", "adapters"),
}
PLOTTED: Final = ("parity", "plan", "scaling")
OPTIMIZERS: Final = (
    "adamw8bit",
    "adamw4bit",
    "adamw_fp8",
    "lion8bit",
    "sgd8bit",
    "rmsprop8bit",
    "adagrad8bit",
    "lamb8bit",
    "lars8bit",
    "ademamix8bit",
    "muon8bit",
)
# In place of a format: keep what the file stores.
STORED: Final = "stored"
FORMATS: Final = (
    "nf4",
    "fp4",
    "int4",
    "int8",
    "llm_int8",
    "dynamic8",
    "fp8_e4m3",
    "fp8_e5m2",
    "mxfp4",
    "nvfp4",
    "int4_scaled",
    "int8_scaled",
    "uint4",
    "uint8",
    "fp8_scaled",
)
CALIBRATED: Final = ("nf4", "fp4", "int4", "int8")
METHODS: Final = ("kronecker", "guided", "gptq", "mse")
OPS: Final = (
    "quantize_blockwise",
    "embed_blockwise",
    "matmul_blockwise",
    "grouped_matmul_blockwise",
    "matmul_int8",
    "update_8bit",
)
PLANNED_GPUS: Final = (
    *("t4", "a100", "rtx3090", "rtx4090", "rtx5090", "l4", "h100", "h200", "b200"),
)
SHARDINGS: Final = ("fsdp", "tensor", "fsdp+tensor")
REMAT: Final = (
    "what the backward pass keeps: the input of every layer (layer, the default), the "
    "results of its products as well, which is faster (products), the input of every "
    "Nth layer (N), all inputs on the host (offload), or all values (none)"
)
MODEL: Final = (
    "a Hugging Face folder, a GGUF file, or a model's name on the hub: "
    "org/name[@revision]"
)
DTYPES: Final = ("float32", "bfloat16", "float16")
OUTPUTS: Final = ("safetensors", "bitsandbytes", "compressed-tensors", "flax", "gguf")
COMPRESSED: Final = (
    *("int4", "int8", "int4_scaled", "int8_scaled", "uint4", "uint8"),
    *("llm_int8", "fp8_e4m3", "mxfp4", "nvfp4"),
)
GGUF_TYPES: Final = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
