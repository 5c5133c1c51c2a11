"""Small valid files, built byte by byte from the formats' definitions."""

import json
import struct

import numpy as np
import pytest

UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5
F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 4, 2, 2, 32


def _string(text):
    text = text.encode()
    return struct.pack("<Q", len(text)) + text


def _value(kind, value):
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        inner, values = value
        head = struct.pack("<IQ", inner, len(values))
        return head + b"".join(_value(inner, v) for v in values)
    code = {UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?"}[kind]
    return struct.pack("<" + code, value)


def gguf_bytes(metadata, tensors, *, version=3, alignment=32):
    """metadata: key -> (kind, value); tensors: name -> (shape, kind, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        head += _string(key) + struct.pack("<I", kind) + _value(kind, value)
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        head += _string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += raw + b"\0" * (-len(raw) % alignment)
    return head + b"\0" * (-len(head) % alignment) + data


def random_blocks(kind, shape, rng):
    """The stored bytes of random values of a GGUF type."""
    count = int(np.prod(shape))
    if kind == F32:
        return rng.standard_normal(count).astype(np.float32).tobytes()
    scales = {Q8_0: 1, Q4_0: 1, Q4_1: 2}[kind]
    blocks = []
    for _ in range(count // 32):
        scale = rng.standard_normal(scales).astype(np.float16).tobytes()
        blocks.append(scale + rng.bytes({Q8_0: 32, Q4_0: 16, Q4_1: 16}[kind]))
    return b"".join(blocks)


def llama_metadata(**changes):
    metadata = {
        "general.architecture": (STRING, "llama"),
        "llama.block_count": (UINT32, LAYERS),
        "llama.context_length": (UINT32, 128),
        "llama.embedding_length": (UINT32, HIDDEN),
        "llama.feed_forward_length": (UINT32, FFN),
        "llama.attention.head_count": (UINT32, HEADS),
        "llama.attention.head_count_kv": (UINT32, KV_HEADS),
        "llama.rope.freq_base": (FLOAT32, 100000.0),
        "llama.rope.dimension_count": (UINT32, HIDDEN // HEADS),
        "llama.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
        "llama.vocab_size": (UINT32, VOCAB),
        "tokenizer.ggml.bos_token_id": (UINT32, 1),
        "tokenizer.ggml.eos_token_id": (UINT32, 2),
    }
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def llama_tensors(seed=0):
    """name -> (shape, kind, bytes), stored as SmolLM2's file stores them."""
    rng = np.random.default_rng(seed)
    keys = KV_HEADS * HIDDEN // HEADS
    tensors = {"token_embd.weight": ((VOCAB, HIDDEN), Q8_0)}
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": ((HIDDEN,), F32),
            f"blk.{layer}.ffn_down.weight": ((HIDDEN, FFN), Q4_1),
            f"blk.{layer}.ffn_gate.weight": ((FFN, HIDDEN), Q4_1),
            f"blk.{layer}.ffn_up.weight": ((FFN, HIDDEN), Q4_1),
            f"blk.{layer}.ffn_norm.weight": ((HIDDEN,), F32),
            f"blk.{layer}.attn_k.weight": ((keys, HIDDEN), Q4_1),
            f"blk.{layer}.attn_output.weight": ((HIDDEN, HIDDEN), Q4_1),
            f"blk.{layer}.attn_q.weight": ((HIDDEN, HIDDEN), Q4_1),
            f"blk.{layer}.attn_v.weight": ((keys, HIDDEN), Q4_1),
        }
    tensors["output_norm.weight"] = ((HIDDEN,), F32)
    return {
        name: (shape, kind, random_blocks(kind, shape, rng))
        for name, (shape, kind) in tensors.items()
    }


def safetensors_bytes(entries, data=b"", *, padding=8):
    """A file with exactly this header, true or not."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    text += b" " * (-len(text) % padding)
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="session")
def build():
    """The builders above, which importlib's import mode cannot import."""

    class Build:
        gguf = staticmethod(gguf_bytes)
        blocks = staticmethod(random_blocks)
        metadata = staticmethod(llama_metadata)
        tensors = staticmethod(llama_tensors)
        safetensors = staticmethod(safetensors_bytes)

    return Build


@pytest.fixture
def llama_gguf(tmp_path):
    path = tmp_path / "toy.gguf"
    path.write_bytes(gguf_bytes(llama_metadata(), llama_tensors()))
    return path


@pytest.fixture
def folder(tmp_path):
    """Makes a Hugging Face folder with a trivial config and without weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "toy"}')
    return folder
