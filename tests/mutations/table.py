"""Small faults as people make them, and the tests that are to find each."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A fault.

    Attributes:
        name: names it on the command line.
        path: the file, from the root of the repository.
        old: text that occurs in the file once.
        new: text that takes its place.
        tests: what pytest runs.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str


QUANTIZE = "tests/kernels/test_quantize_blockwise.py"
ADAM = "tests/optim/test_adam8bit.py"
INT8 = "tests/kernels/test_matmul_int8.py"

MUTATIONS = [
    # Blocks and codes.
    Mutation(
        "an odd row is cut at its even length",
        "jaxbnb_kernels/blockwise.py",
        "min(block_size, n + n % 2) or block_size",
        "min(block_size, n - n % 2) or block_size",
        QUANTIZE,
    ),
    Mutation(
        "a NaN in a block is left to the maximum",
        "jaxbnb_kernels/blockwise.py",
        "return jnp.where(has_nan, jnp.nan, absmax_of_finite(blocks))",
        "return absmax_of_finite(jnp.nan_to_num(blocks))",
        QUANTIZE,
    ),
    Mutation(
        "large blocks are not brought nearer to 1",
        "jaxbnb_kernels/blockwise.py",
        "jnp.where(absmax > 2.0**64, 2.0**-64, 1.0)",
        "jnp.where(absmax > jnp.inf, 2.0**-64, 1.0)",
        QUANTIZE,
    ),
    Mutation(
        "nibbles are swapped",
        "jaxbnb_kernels/quantize_blockwise/xla.py",
        "jnp.array([16, 1], jnp.uint8)",
        "jnp.array([1, 16], jnp.uint8)",
        QUANTIZE,
    ),
    Mutation(
        "a tie goes up in XLA",
        "jaxbnb_kernels/quantize_blockwise/xla.py",
        "jnp.where(x > point, step, np.uint8(0))",
        "jnp.where(x >= point, step, np.uint8(0))",
        QUANTIZE,
    ),
    Mutation(
        "a tie goes up in the specification",
        "jaxbnb_kernels/quantize_blockwise/reference.py",
        'scaled, side="left")',
        'scaled, side="right")',
        QUANTIZE,
    ),
    Mutation(
        "bfloat16 is cut instead of rounded",
        "jaxbnb_kernels/quantize_blockwise/xla.py",
        "(bits + (0x7FFF + ((bits >> 16) & 1))) >> 16",
        "bits >> 16",
        QUANTIZE,
    ),
    Mutation(
        "the nested offset is dropped",
        "jaxbnb_kernels/quantize_blockwise/reference.py",
        "(decoded + offset[..., None])",
        "decoded",
        "tests/kernels/test_nested.py",
    ),
    Mutation(
        "the dynamic map has a -1",
        "jaxbnb_kernels/_dynamic8.py",
        "jnp.where(x > near_one,",
        "jnp.where(magnitude > near_one,",
        QUANTIZE,
    ),
    Mutation(
        "a negative id is off by one",
        "jaxbnb_kernels/embed_blockwise/rows.py",
        "ids + num_rows, ids)",
        "ids + num_rows - 1, ids)",
        "tests/kernels/test_embed_blockwise.py",
    ),
    # LLM.int8.
    Mutation(
        "the threshold itself is no outlier",
        "jaxbnb_kernels/matmul_int8/reference.py",
        "jnp.abs(x.astype(jnp.float32)) >= outlier_threshold",
        "jnp.abs(x.astype(jnp.float32)) > outlier_threshold",
        INT8,
    ),
    Mutation(
        "an outlier column counts twice",
        "jaxbnb_kernels/matmul_int8/reference.py",
        "return jnp.where(columns, 0, x_codes), row_scale, columns",
        "return x_codes, row_scale, columns",
        INT8,
    ),
    Mutation(
        "rows are scaled in another order",
        "jaxbnb_kernels/matmul_int8/reference.py",
        "(x * nearer[..., None]) * (127.0 * reciprocal)[..., None]",
        "127.0 * ((x * nearer[..., None]) * reciprocal[..., None])",
        INT8,
    ),
    # Optimizers.
    Mutation(
        "the bias correction of Adam's first moment is dropped",
        "jaxbnb/optim/_adam.py",
        '(mu * s["mu_correction"]) / (root + s["eps"])',
        'mu / (root + s["eps"])',
        ADAM,
    ),
    Mutation(
        "Nesterov looks at this step's correction",
        "jaxbnb/optim/_adam.py",
        "1 / (1 - b1 ** (t + 1))",
        "1 / (1 - b1**t)",
        ADAM,
    ),
    Mutation(
        "Lion's sign is of the new momentum's weights",
        "jaxbnb/optim/_lion.py",
        'jnp.sign(s["one_minus_b1"] * g + s["b1"] * mu)',
        'jnp.sign(s["one_minus_b2"] * g + s["b2"] * mu)',
        "tests/goldens/test_optimizers.py",
    ),
    Mutation(
        "the rows that are left after the chunks get no step",
        "jaxbnb_kernels/update_8bit/xla.py",
        "return body(rows - rest, rest, arrays) if rest else arrays",
        "return arrays",
        ADAM,
    ),
    Mutation(
        "a bad element enters the moments",
        "jaxbnb_kernels/update_8bit/rule.py",
        "jnp.isfinite(n + poison)",
        "~jnp.isnan(n)",
        ADAM,
    ),
    Mutation(
        "a norm of zero is recorded",
        "jaxbnb/optim/_clipping.py",
        "jnp.isfinite(squares) & (squares > 0)",
        "jnp.isfinite(squares)",
        "tests/optim/test_clipping.py",
    ),
    # Language models.
    Mutation(
        "the cache advances by one",
        "jaxbnb/models/_cache.py",
        "length=self.length + seq)",
        "length=self.length + 1)",
        "tests/models/test_llama.py",
    ),
    Mutation(
        "the cache keeps a slot too many",
        "jaxbnb/models/_cache.py",
        "jnp.arange(self.max_length) < length",
        "jnp.arange(self.max_length) <= length",
        "tests/models/test_generate.py",
    ),
    Mutation(
        "pairs turn the other way",
        "jaxbnb/models/_rope.py",
        "second * cos + first * sin, rest]",
        "second * cos - first * sin, rest]",
        "tests/models/test_llama.py",
    ),
    Mutation(
        "the nucleus stops a token early",
        "jaxbnb/models/_sampling.py",
        "jnp.cumsum(p, axis=-1) - p < sampling.top_p",
        "jnp.cumsum(p, axis=-1) < sampling.top_p",
        "tests/models/test_generate.py",
    ),
    Mutation(
        "the last token of a row is a target's place",
        "jaxbnb/finetune/_loss.py",
        ".at[:, -1].set(0.0)",
        ".at[:, 0].set(0.0)",
        "tests/finetune/test_loss.py",
    ),
    Mutation(
        "the mask of targets is ignored",
        "jaxbnb/finetune/_loss.py",
        "bool) if mask is None else mask",
        "bool)",
        "tests/finetune/test_loss.py",
    ),
    # Data.
    Mutation(
        "data: a prompt is trained on",
        "jaxbnb/data/_encoder.py",
        "is_target = np.arange(len(tokens)) >= start",
        "is_target = np.arange(len(tokens)) >= 0",
        "tests/data/test_encoder.py",
    ),
    Mutation(
        "data: a span begins a token late",
        "jaxbnb/data/_encoder.py",
        "(begins < stop) & (ends > start)",
        "(begins < stop) & (begins > start)",
        "tests/data/test_encoder.py",
    ),
    Mutation(
        "data: the end of a text is not learned",
        "jaxbnb/data/_encoder.py",
        "else [*tokens, stops[0]]",
        "else [*tokens]",
        "tests/data/test_encoder.py",
    ),
    Mutation(
        "data: a template that changes earlier turns passes",
        "jaxbnb/data/_chat.py",
        "if not whole.text.startswith(shorter):",
        "if not whole.text:",
        "tests/data/test_encoder.py",
    ),
    Mutation(
        "data: a blank line shifts the rows",
        "jaxbnb/data/_files.py",
        "begin, start = start, start + len(line)",
        "begin, start = start, start + len(line.lstrip())",
        "tests/data/test_dataset.py",
    ),
    Mutation(
        "data: padding belongs to the last document",
        "jaxbnb/data/_batches.py",
        "segments[index, start:] = len(window) + 1",
        "segments[index, start:] = len(window)",
        "tests/data/test_batches.py",
    ),
    Mutation(
        "data: pieces of a text do not overlap",
        "jaxbnb/data/_batches.py",
        "start += count - 1",
        "start += count",
        "tests/data/test_batches.py",
    ),
    Mutation(
        "data: a restart forgets the window",
        "jaxbnb/data/_batches.py",
        'self._window = state["window"]',
        "self._window = 0",
        "tests/data/test_batches.py",
    ),
    Mutation(
        "data: a restart counts a chunk again",
        "jaxbnb/data/_batches.py",
        "Statistics() if self._window else self.statistics",
        "self.statistics",
        "tests/data/test_batches.py",
    ),
    Mutation(
        "data: every epoch has the same order",
        "jaxbnb/data/_batches.py",
        "return shuffled(positions, count, self._seed, epoch)",
        "return shuffled(positions, count, self._seed, 0)",
        "tests/data/test_batches.py",
    ),
    Mutation(
        "data: worst fit",
        "jaxbnb/data/_packing.py",
        "bisect.bisect_left(rooms, (length, -1))",
        "len(rooms)",
        "tests/data/test_packing.py",
    ),
    # Adapters.
    Mutation(
        "rsLoRA is scaled as LoRA",
        "jaxbnb/lora/_config.py",
        "(math.sqrt(rank) if self.use_rslora else rank)",
        "rank",
        "tests/lora/test_adapter.py",
    ),
    Mutation(
        "PiSSA leaves the scale out",
        "jaxbnb/lora/_init.py",
        "jnp.sqrt(s[..., :rank] / expand_axes(scale, s.ndim))",
        "jnp.sqrt(s[..., :rank])",
        "tests/lora/test_init.py",
    ),
    Mutation(
        "only the last adapter is merged",
        "jaxbnb/lora/_merge.py",
        "weight = weight + change",
        "weight = get_weight(base) + change",
        "tests/lora/test_merge.py",
    ),
    Mutation(
        "a tied head does not follow the rows of tokens",
        "jaxbnb/lora/_embed.py",
        "                logits = self._keep_rows(name, new, logits)",
        "                self._keep_rows(name, new, logits)",
        "tests/lora/test_trained.py",
    ),
    Mutation(
        "a trained bias is not merged",
        "jaxbnb/lora/_merge.py",
        "    bias.set_value(total.astype(bias[...].dtype))",
        "    del total",
        "tests/lora/test_trained.py",
    ),
    Mutation(
        "the reference of DPO has a gradient",
        "jaxbnb/finetune/_preference.py",
        "return jax.lax.stop_gradient(x) if jnp",
        "return x if jnp",
        "tests/finetune/test_preference.py",
    ),
    Mutation(
        "IPO takes sums over tokens, not means",
        "jaxbnb/finetune/_preference.py",
        "jnp.split(ratios / counts, 2)",
        "jnp.split(ratios, 2)",
        "tests/finetune/test_preference.py",
    ),
    # Files.
    Mutation(
        "a wrong key of bitsandbytes",
        "jaxbnb/convert/_bitsandbytes_weights.py",
        '".quant_state.bitsandbytes__"',
        '".quant_state.bitsandbytes_"',
        "tests/convert/test_bitsandbytes_weights.py",
    ),
    Mutation(
        "a positive square is stored as zero",
        "jaxbnb/convert/_bitsandbytes_state.py",
        "(flat > 0) & (codes < positive)",
        "(flat > 1) & (codes < positive)",
        "tests/convert/test_bitsandbytes_optimizer.py",
    ),
    Mutation(
        "Q6_K is centred on 31",
        "jaxbnb/convert/_gguf_blocks.py",
        "astype(np.float32) - 32",
        "astype(np.float32) - 31",
        "tests/convert/test_gguf.py",
    ),
    Mutation(
        "the high bits of Q4_K's minima are those of its scales",
        "jaxbnb/convert/_gguf_blocks.py",
        "mixed >> 4 | second >> 6 << 4",
        "mixed >> 4 | first >> 6 << 4",
        "tests/convert/test_gguf.py",
    ),
]
