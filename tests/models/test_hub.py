"""Models by name, from a cache that looks as huggingface_hub leaves it."""

import json
import os
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxbnb import convert
from jaxbnb.convert import find_checkpoint
from jaxbnb.convert.hub import _DESCRIPTION, _WEIGHTS
from jaxbnb.models import load_pretrained

hub = pytest.importorskip("huggingface_hub")
filter_repo_objects = pytest.importorskip("huggingface_hub.utils").filter_repo_objects
constants = pytest.importorskip("huggingface_hub.constants")

MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache, no network, and a folder without anything in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def snapshot(cache, commit, ref=None):
    repo = cache / "models--org--toy"
    if ref is not None:
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def test_a_cached_model_loads_without_a_network(offline, toy):
    model = toy.model(num_hidden_layers=1)
    toy.save(model, snapshot(offline, MAIN, "main"))
    old = toy.model(1, num_hidden_layers=1)
    toy.save(old, snapshot(offline, OLD, "v1"))
    for made, name, revision in (
        (model, "org/toy", None),
        (old, "org/toy", "v1"),
        (old, "org/toy@v1", None),
        (old, "org/toy", OLD),
    ):
        got = load_pretrained(name, revision=revision)
        np.testing.assert_array_equal(
            got.model.embed_tokens.embedding[...],
            made.model.embed_tokens.embedding[...],
        )
    # A folder of that name comes first.
    os.makedirs("org/toy")
    assert find_checkpoint("org/toy").parts == ("org", "toy")
    with pytest.raises(ValueError, match="org/toy is a path that exists; leave rev"):
        find_checkpoint("org/toy", revision="v1")


def test_names_that_cannot_be_found(offline, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"^org/toy: no such .* did not give"):
        convert.open_checkpoint("org/toy")
    with pytest.raises(FileNotFoundError, match=r"^org/toy at revision 'v9': no such"):
        convert.load_tokenizer("org/toy@v9")
    with pytest.raises(ValueError, match="leave out revision='v2'"):
        find_checkpoint("org/toy@v1", revision="v2")
    for path in ("toy", "./org/toy", "/org/toy", "org/toy/config.json", "org/../toy"):
        with pytest.raises(FileNotFoundError, match="and not the name of a model"):
            find_checkpoint(path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"downloading it needs .*\[hub\]"):
        find_checkpoint("org/toy")


@pytest.fixture
def repository(offline, monkeypatch):
    """A hub that gives its files one by one, and keeps the patterns it was asked."""
    files, asked = {}, []
    folder = snapshot(offline, MAIN)

    def download(repo, *, revision, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        names = filter_repo_objects(
            list(files), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files[name](folder / name)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return files, asked, folder


def write_weights(path):
    save_file({"lm_head.weight": np.ones((2, 3), np.float32)}, path)


def write_text(path):
    path.write_text(json.dumps({"model_type": "toy"}))


def test_only_what_a_model_needs_is_downloaded(repository):
    files, asked, folder = repository
    files |= {"config.json": write_text, "README.md": write_text}
    files |= dict.fromkeys(
        ["model.safetensors", "original/a.safetensors", "consolidated.safetensors"],
        write_weights,
    )
    files["pytorch_model.bin"] = write_text
    assert find_checkpoint("org/toy", has_weights=False) == folder
    assert {path.name for path in folder.iterdir()} == {"config.json"}
    checkpoint = convert.open_checkpoint("org/toy")
    assert checkpoint.read("lm_head.weight").sum() == 6
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert asked == [list(_DESCRIPTION), list(_DESCRIPTION), [_WEIGHTS[0]]]


def test_pickles_and_gguf(repository):
    files, _, folder = repository
    files |= {"config.json": write_text, "pytorch_model.bin": write_text}
    find_checkpoint("org/toy")
    assert (folder / "pytorch_model.bin").is_file()
    names = [f"q4/m-0000{i}-of-00002.gguf" for i in (1, 2)]
    files |= dict.fromkeys([*names, "q8.gguf"], write_text)
    assert find_checkpoint(f"org/toy/{names[0]}@v1") == folder / names[0]
    assert (folder / names[1]).is_file()
    assert not (folder / "q8.gguf").exists()


def test_a_full_disk_is_not_a_missing_model(offline, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        find_checkpoint("org/toy")
    assert not isinstance(caught.value, FileNotFoundError)
