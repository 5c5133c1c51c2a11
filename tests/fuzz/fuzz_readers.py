"""The table of what reads files of strangers."""

import fuzz_data
import fuzz_models
import fuzz_tokenizers
import fuzz_weights

READERS = [
    *fuzz_weights.READERS,
    *fuzz_models.READERS,
    *fuzz_tokenizers.READERS,
    *fuzz_data.READERS,
]
