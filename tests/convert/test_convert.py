import errno
import json
import os
import signal
import subprocess
import sys
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxbnb
from jaxbnb import convert
from jaxbnb.convert import safetensors_files, weights


@pytest.fixture
def source(folder):
    """Three tensors, a config of transformers 4 and a tokenizer."""
    rng = np.random.default_rng(0)
    found = {
        "big": rng.standard_normal((40, 30)).astype(np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "ids": np.arange(5),
    }
    save_file(found, folder / "model.safetensors")
    config = {"model_type": "toy", "torch_dtype": "float32", "eos_token_id": [1, 2]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"a": "é"}', encoding="utf-8")
    (folder / "README.md").write_text("not copied")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (folder / "additional_chat_templates" / "notes.txt").write_text("not copied")
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_is_copied_as_it_is(source, tmp_path):
    checkpoint = convert.convert_checkpoint(source, tmp_path / "out")
    assert names(tmp_path / "out") == [
        "additional_chat_templates",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert names(tmp_path / "out" / "additional_chat_templates") == ["rag.jinja"]
    assert (tmp_path / "out" / "tokenizer.json").read_text("utf-8") == '{"a": "é"}'
    assert checkpoint.path == tmp_path / "out"
    original = convert.open_checkpoint(source)
    assert checkpoint.config == original.config
    assert checkpoint.tensors == original.tensors
    for name in original.tensors:
        np.testing.assert_array_equal(checkpoint.read(name), original.read(name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("chunk", [7, 2**22])
def test_floating_tensors_are_cast(source, tmp_path, dtype, chunk, monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK", chunk)
    convert.convert_checkpoint(source, tmp_path / "out", dtype=dtype)
    original = load_file(source / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    for name in ("big", "half"):
        assert written[name].dtype == target
        np.testing.assert_array_equal(written[name], original[name].astype(target))
    assert written["ids"].dtype == np.int64
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    assert "dtype" not in config


def test_the_config_keeps_the_name_of_its_dtype(source, tmp_path):
    (source / "config.json").write_text('{"model_type": "toy", "dtype": "float32"}')
    checkpoint = convert.convert_checkpoint(source, tmp_path / "out", dtype="bfloat16")
    assert checkpoint.config == {"model_type": "toy", "dtype": "bfloat16"}


def test_shards_become_one_file(source, tmp_path):
    found = load_file(source / "model.safetensors")
    weight_map = {name: f"{name}.safetensors" for name in found}
    for name, file in weight_map.items():
        save_file({name: found[name]}, source / file)
    index = json.dumps({"weight_map": weight_map})
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(index)
    convert.convert_checkpoint(source, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: array.tolist() for name, array in written.items()} == {
        name: array.tolist() for name, array in found.items()
    }


def test_progress_counts_every_byte(source, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK", 1000)
    calls = []
    convert.convert_checkpoint(
        source, tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    total = 4 * 1200 + 2 * 7 + 8 * 5
    assert [done for done, _, _ in calls] == [40, 4040, 4840, total]
    assert [name for _, _, name in calls] == ["ids", "big", "big", "half"]
    assert {of for _, of, _ in calls} == {total}


def test_a_gguf_becomes_a_folder(llama_gguf, tmp_path):
    with pytest.warns(UserWarning, match="wrote no tokenizer: .* a None tokenizer"):
        checkpoint = convert.convert_checkpoint(llama_gguf, tmp_path / "out")
    original = convert.open_checkpoint(llama_gguf)
    assert checkpoint.config == original.config
    assert dict(checkpoint.tensors) == dict(original.tensors)
    for name in original.tensors:
        np.testing.assert_array_equal(checkpoint.read(name), original.read(name))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_tokenizer_of_a_gguf_is_written(tmp_path, build):
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "the", "th", "<|end|>"]
    fields = {
        "tokenizer.ggml.model": (8, "gpt2"),
        "tokenizer.ggml.pre": (8, "smollm"),
        "tokenizer.ggml.tokens": (9, (8, tokens)),
        "tokenizer.ggml.token_type": (9, (5, [1] * 258 + [3])),
        "tokenizer.ggml.merges": (9, (8, ["t h", "th e"])),
        "tokenizer.ggml.eos_token_id": (4, 258),
        "tokenizer.chat_template": (8, "{{ messages }}"),
    }
    path = tmp_path / "toy.gguf"
    path.write_bytes(build.gguf(build.metadata(**fields), build.tensors()))
    convert.convert_checkpoint(path, tmp_path / "out")
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    built, template = convert.gguf_tokenizer(path)
    assert template == "{{ messages }}"
    assert loaded.to_str() == built.to_str()
    assert loaded.encode("the1<|end|>").tokens == ["the", "1", "<|end|>"]
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": alphabet[1],
        "eos_token": "<|end|>",
        "model_max_length": 128,
        "chat_template": "{{ messages }}",
    }
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [258]}


def test_without_tokenizers_a_warning_says_so(tmp_path, build, monkeypatch):
    path = tmp_path / "toy.gguf"
    path.write_bytes(build.gguf(build.metadata(), build.tensors()))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.warns(UserWarning, match="needs tokenizers: pip install"):
        convert.convert_checkpoint(path, tmp_path / "out")
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]


def test_a_finite_value_never_becomes_infinite(source, tmp_path):
    wide = np.array([np.inf, np.nan, 1.0, 70000.0], np.float32)
    save_file({"w": wide}, source / "model.safetensors")
    message = "'w' has 7e.04, beyond float16's largest, 6.55e.04"
    with pytest.raises(convert.CheckpointError, match=message):
        convert.convert_checkpoint(source, tmp_path / "out", dtype="float16")
    assert names(tmp_path) == ["model"]
    checkpoint = convert.convert_checkpoint(source, tmp_path / "out", dtype="bfloat16")
    assert np.isinf(checkpoint.read("w").astype(np.float32)).tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_a_quantised_checkpoint_is_copied_but_not_cast(source, tmp_path):
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match="would ruin them"):
        convert.convert_checkpoint(source, tmp_path / "out", dtype="bfloat16")
    assert convert.convert_checkpoint(source, tmp_path / "out").config == config


def test_an_unknown_dtype(source, tmp_path):
    with pytest.raises(ValueError, match=r"\['float32', 'bfloat16', 'float16'\]"):
        convert.convert_checkpoint(source, tmp_path / "out", dtype="int8")


def test_a_destination_that_is_not_empty(source, tmp_path):
    with pytest.raises(FileExistsError, match="not empty; choose another name"):
        convert.convert_checkpoint(source, source)
    assert "model.safetensors" in names(source)
    (tmp_path / "empty").mkdir()
    assert convert.convert_checkpoint(source, tmp_path / "empty").tensors


def test_one_tensor_in_memory_at_a_time(folder, tmp_path):
    size = 2**20
    found = {f"w{i}": np.full(size, i, np.float32) for i in range(6)}
    save_file(found, folder / "model.safetensors")
    del found
    for i, dtype in enumerate((None, "bfloat16")):
        tracemalloc.start()
        convert.convert_checkpoint(folder, tmp_path / f"out{i}", dtype=dtype)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # The tensor itself, and where it is cast, a chunk: here its cast and two masks.
        assert peak < (4 + (2 + 3 if dtype else 0)) * size + 2**20


class TestFailure:
    """Whatever goes wrong, the final name does not appear."""

    def test_a_full_disk(self, source, tmp_path, monkeypatch):
        real, written = safetensors_files._write, []

        def write(file, data):
            if len(written) == 2:
                error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                error.filename = file.name
                raise error
            written.append(len(data))
            real(file, data)

        monkeypatch.setattr(safetensors_files, "_write", write)
        with pytest.raises(OSError, match="No space left") as error:
            convert.convert_checkpoint(source, tmp_path / "out")
        assert error.value.filename == str(tmp_path / "out" / "model.safetensors")
        assert names(tmp_path) == ["model"]

    def test_a_limit_on_the_size_of_a_file(self, source, tmp_path):
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="File too large") as error:
                convert.convert_checkpoint(source, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error.value.filename == str(tmp_path / "out" / "model.safetensors")
        assert names(tmp_path) == ["model"]

    def test_a_source_that_is_cut_meanwhile(self, llama_gguf, tmp_path):
        def cut(done, total, name):
            os.truncate(llama_gguf, 5000)

        with pytest.raises(convert.CheckpointError, match="was truncated after"):
            convert.convert_checkpoint(llama_gguf, tmp_path / "out", progress=cut)
        assert names(tmp_path) == ["toy.gguf"]

    @pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
    def test_an_interrupt(self, source, tmp_path, signal):
        convert.convert_checkpoint(source, tmp_path / "whole")

        def interrupt(done, total, name):
            if name == "half":
                raise signal

        with pytest.raises(signal):
            convert.convert_checkpoint(source, tmp_path / "out", progress=interrupt)
        assert names(tmp_path) == [".out.resume.partial", "model", "whole"]
        calls = []
        convert.convert_checkpoint(
            source, tmp_path / "out", progress=lambda *call: calls.append(call)
        )
        # What was written is one call a tensor, however many chunks it took.
        assert [name for _, _, name in calls] == ["ids", "big", "half"]
        assert names(tmp_path) == ["model", "out", "whole"]
        assert content(tmp_path / "out") == content(tmp_path / "whole")

    @pytest.mark.parametrize("damage", ["journal", "weights", "source", "options"])
    def test_what_is_left_is_trusted_only_where_it_is_true(
        self, source, tmp_path, damage, monkeypatch
    ):
        def interrupt(done, total, name):
            if name == "half":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert.convert_checkpoint(source, tmp_path / "out", progress=interrupt)
        left, options = tmp_path / ".out.resume.partial", {}
        if damage == "journal":
            path = left / "conversion.journal"
            path.write_bytes(path.read_bytes()[:-5])
        elif damage == "weights":
            os.truncate(left / "model.safetensors", 3000)
        elif damage == "source":
            found = load_file(source / "model.safetensors")
            save_file(found | {"ids": np.arange(5) + 1}, source / "model.safetensors")
        else:
            options = {"dtype": "bfloat16"}
        read, reader = [], safetensors_files.read_tensor

        def spy(path, name):
            read.append(name)
            return reader(path, name)

        monkeypatch.setattr(safetensors_files, "read_tensor", spy)
        convert.convert_checkpoint(source, tmp_path / "out", **options)
        again = {"journal": ["big"], "weights": ["big"]}
        assert sorted(read) == sorted([*again.get(damage, ["big", "ids"]), "half"])
        convert.convert_checkpoint(source, tmp_path / "whole", **options)
        assert content(tmp_path / "out") == content(tmp_path / "whole")

    def test_a_kill(self, source, tmp_path):
        code = """
import os, signal, sys
import jaxbnb
from jaxbnb import convert
def kill(done, total, name):
    if name == "half":
        os.kill(os.getpid(), signal.SIGKILL)
convert.convert_checkpoint(sys.argv[1], sys.argv[2], progress=kill)
"""
        command = [sys.executable, "-c", code, source, tmp_path / "out"]
        done = subprocess.run(command, check=False)
        assert done.returncode == -signal.SIGKILL
        assert names(tmp_path) == [".out.resume.partial", "model"]
        convert.convert_checkpoint(source, tmp_path / "whole")
        assert convert.convert_checkpoint(source, tmp_path / "out").tensors
        assert content(tmp_path / "out") == content(tmp_path / "whole")

    def test_two_at_once(self, source, tmp_path):
        def again(done, total, name):
            convert.convert_checkpoint(source, tmp_path / "out")

        with pytest.raises(BlockingIOError, match="another process") as error:
            convert.convert_checkpoint(source, tmp_path / "out", progress=again)
        assert error.value.filename == str(tmp_path / "out")


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shards", [False, True])
def test_transformers_reads_what_we_convert(tmp_path, shards):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=shards,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    size = {"max_shard_size": "60KB"} if shards else {}
    model.save_pretrained(tmp_path / "theirs", **size)
    assert (tmp_path / "theirs" / "model.safetensors").exists() != shards
    convert.convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, model(tokens).logits)
    convert.convert_checkpoint(tmp_path / "theirs", tmp_path / "half", dtype="bfloat16")
    half = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    for name, weight in model.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.to(torch.bfloat16))


def test_kernels_that_are_quantised_already(tmp_path):
    """They are written as they are, if they are what the conversion would write."""
    rng = np.random.default_rng(0)
    source = tmp_path / "source"
    source.mkdir()
    weight = rng.standard_normal((32, 64)).astype(np.float32)
    save_file({"a.weight": weight}, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "toy"}')
    q = jaxbnb.quantize(jnp.asarray(2 * weight.T), "nf4", axis=-2)

    def write(**quantized):
        kernels = {name.replace("_", "."): q for name, q in quantized.items()}
        return convert.convert_checkpoint(
            source, tmp_path / "out", quant="nf4", quantized=kernels
        )

    with pytest.raises(ValueError, match=r"'b\.weight', which is not one of the 1"):
        write(b_weight=q)
    with pytest.raises(ValueError, match=r"must be nf4 of shape \(64, 32\)"):
        write(a_weight=q.mT)
    got = write(a_weight=q).read_quantized("a.weight")
    np.testing.assert_array_equal(got.codes, q.codes)
    np.testing.assert_array_equal(got.absmax, q.absmax)
