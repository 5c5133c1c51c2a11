"""What a conversion that was killed leaves: to go on with, and to nobody else.

A kill leaves what is on the disk at that moment. So one run of each conversion, which
keeps a copy of its folder at every step, has all that kills of it can leave.
"""

import importlib.metadata
import os
import random
import shutil
import signal
import subprocess
import sys
import threading

import jax
import mutators
import numpy as np
import pytest
from flax import nnx

from jaxbnb import QuantConfig, convert, models
from jaxbnb.convert import CheckpointError
from jaxbnb.core import files

PARTIAL = ".out.resume.partial"
INT8 = QuantConfig("int8", block_size=32)
CONVERSIONS = {
    "copy": lambda src, dst, **calls: convert.convert_checkpoint(src, dst, **calls),
    "bfloat16": lambda src, dst, **calls: convert.convert_checkpoint(
        src, dst, dtype="bfloat16", **calls
    ),
    "nf4": lambda src, dst, **calls: convert.convert_checkpoint(
        src, dst, quant="nf4", **calls
    ),
    "flax": lambda src, dst, **calls: models.convert_to_flax(
        src, dst, quant=INT8, **calls
    ),
}
QUICK = ("copy", "bfloat16", "nf4")


@pytest.fixture(scope="module", autouse=True)
def no_disk():
    """Nothing waits for the disk here: 40 s of a minute, and no power fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_sync", lambda path: None)
        yield


@pytest.fixture(scope="module")
def sources(toy, tmp_path_factory):
    """Two models of the same shapes; only the first has a template of chats."""
    parent = tmp_path_factory.mktemp("sources")
    folders = {}
    for seed, name in enumerate(("a", "b")):
        model = toy.model(seed, tie_word_embeddings=True, num_hidden_layers=1)
        folders[name] = toy.save(model, parent / name)
        (folders[name] / "tokenizer.json").write_text(f'"{name}"')
    (folders["a"] / "chat_template.jinja").write_text("a")
    return folders


@pytest.fixture(scope="module")
def fresh(sources, tmp_path_factory):
    """The content of what each conversion writes where nothing was before."""
    parent = tmp_path_factory.mktemp("fresh")
    for conversion, function in CONVERSIONS.items():
        for name, source in sources.items():
            function(source, parent / conversion / name)
    return lambda conversion, name: content(parent / conversion / name)


def content(folder):
    """Every file of a folder by its path; of a model's state, its values."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] != "state"
    }
    if (folder / "flax.json").is_file():
        # Orbax puts times and random names in its files.
        assert (folder / "state").is_dir()
        values = nnx.to_flat_state(nnx.state(models.load_pretrained(folder)))
        files["state"] = {
            path: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(value)]
            for path, value in values
        }
    else:
        assert not (folder / "state").exists()
    return files


_steps = []


def _audit(event, arguments):
    """Calls the last of `_steps` before a file or a folder is made or renamed."""
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and _steps:
        is_ours = threading.current_thread() is threading.main_thread()
        if is_ours and PARTIAL in str(arguments[0]):
            _steps[-1]()


def copies(conversion, source, parent):
    """What lies in the partial folder at each step of a conversion, once each."""
    folder, found = parent / PARTIAL, {}

    def step(*call):
        steps, _steps[:] = _steps[:], []
        if folder.is_dir():
            copy = parent / f"copy{len(found)}"
            # A file may go while Orbax' threads work.
            shutil.copytree(folder, copy, ignore=lambda _, names: [])
            key = tuple(
                (str(path.relative_to(copy)), path.is_file() and path.read_bytes())
                for path in sorted(copy.rglob("*"))
            )
            if key in found:
                shutil.rmtree(copy)
            found.setdefault(key, copy)
        _steps[:] = steps

    _steps.append(step)
    try:
        CONVERSIONS[conversion](source, parent / "out", progress=step, report=step)
    finally:
        _steps.clear()
    shutil.rmtree(parent / "out")
    return list(found.values())


@pytest.fixture(scope="module")
def killed(sources, tmp_path_factory):
    sys.addaudithook(_audit)
    return {
        conversion: copies(
            conversion, sources["a"], tmp_path_factory.mktemp(conversion)
        )
        for conversion in ("copy", "nf4", "flax")
    }


def convert_over(left, conversion, source, parent, **calls):
    """The content of what a conversion makes where another one was killed."""
    shutil.rmtree(parent / "out", ignore_errors=True)
    shutil.copytree(left, parent / PARTIAL)
    CONVERSIONS[conversion](source, parent / "out", **calls)
    assert sorted(path.name for path in parent.iterdir()) == ["out"]
    return content(parent / "out")


@pytest.mark.parametrize("first", ["copy", "nf4", "flax"])
def test_nothing_of_a_killed_conversion_is_published(
    killed, sources, fresh, tmp_path, first
):
    assert len(killed[first]) > 15
    for left in killed[first]:
        for then in QUICK:
            for name, source in sources.items():
                got = convert_over(left, then, source, tmp_path)
                assert got == fresh(then, name), (left, then, name)


@pytest.mark.parametrize("first", ["copy", "flax"])
def test_nor_in_a_models_state(killed, sources, fresh, tmp_path, first):
    # Most lies there at the end; of flax, all but the mark.
    for left in killed[first][-2:]:
        got = convert_over(left, "flax", sources["b"], tmp_path)
        assert got == fresh("flax", "b")
    assert "chat_template.jinja" not in got


@pytest.mark.parametrize("conversion", ["copy", "nf4", "flax"])
def test_the_same_conversion_goes_on(killed, sources, fresh, tmp_path, conversion):
    lefts = killed[conversion]
    for left in lefts if conversion in QUICK else lefts[:: len(lefts) // 4]:
        got = convert_over(left, conversion, sources["a"], tmp_path)
        assert got == fresh(conversion, "a")


def count_encoded(left, source, parent):
    """How many tensors a conversion reads where it was killed late."""
    reports = []
    reader = convert.safetensors_files.read_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            convert.safetensors_files,
            "read_tensor",
            lambda *args: reports.append(args) or reader(*args),
        )
        got = convert_over(left, "copy", source, parent)
    return len(reports), got


def latest(lefts):
    """The one in which all tensors are written, and the journal tells of them."""
    return max(
        (left for left in lefts if (left / "conversion.journal").is_file()),
        key=lambda left: (left / "conversion.journal").stat().st_size,
    )


@pytest.fixture
def late(killed):
    return latest(killed["copy"])


def test_a_source_that_changed_is_read_anew(late, sources, fresh, tmp_path):
    source = tmp_path / "a"
    (tmp_path / "work").mkdir()
    shutil.copytree(sources["a"], source)
    lefts = copies("copy", source, tmp_path / "work")
    shutil.move(latest(lefts), tmp_path / "left")
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "work").mkdir()
    assert count_encoded(tmp_path / "left", source, tmp_path / "work")[0] == 0
    # Of the same size and, as `cp -p` has it, the same time.
    path = source / "model.safetensors"
    before = path.stat()
    path.write_bytes((sources["b"] / "model.safetensors").read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    count, got = count_encoded(tmp_path / "left", source, tmp_path / "work")
    assert count == len(convert.open_checkpoint(source).tensors)
    assert got["model.safetensors"] == fresh("copy", "b")["model.safetensors"]


def test_another_version_starts_anew(late, sources, fresh, tmp_path, monkeypatch):
    assert count_encoded(late, sources["a"], tmp_path)[0] == 0
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + "1")
    count, got = count_encoded(late, sources["a"], tmp_path)
    assert count == len(convert.open_checkpoint(sources["a"]).tensors)
    assert got == fresh("copy", "a")


@pytest.mark.parametrize(
    "file", [".mark", "conversion.journal", "model.safetensors", "more"]
)
def test_damage_is_noticed(late, sources, fresh, tmp_path, file):
    (tmp_path / "work").mkdir()
    rng = random.Random(file)
    for _ in range(15):
        left = tmp_path / "left"
        shutil.copytree(late, left)
        if file == "more":
            with (left / "model.safetensors").open("ab") as weights:
                weights.write(b"more")
            (left / "flax.json").mkdir()
            (left / "state").symlink_to(sources["b"])
        else:
            data = (left / file).read_bytes()
            (left / file).write_bytes(mutators.damage(file, data, rng))
        got = convert_over(left, "copy", sources["a"], tmp_path / "work")
        assert got == fresh("copy", "a")
        shutil.rmtree(left)
    # A link is removed, not what it leads to.
    assert (sources["b"] / "model.safetensors").is_file()


def test_a_folder_of_two_models_is_refused(sources, tmp_path):
    folder = tmp_path / "out"
    models.convert_to_flax(sources["a"], folder)
    shutil.copy(sources["b"] / "model.safetensors", folder)
    for load in (models.load_pretrained, models.check_pretrained):
        with pytest.raises(CheckpointError, match=r"flax\.json.* and model\.safe"):
            load(folder)


CHILD = """
import sys, time
from jaxbnb import QuantConfig, convert, models
source, out, conversion = sys.argv[1:]
quant = QuantConfig("int8", block_size=32)
run, options = {
    "copy": (convert.convert_checkpoint, {}),
    "bfloat16": (convert.convert_checkpoint, {"dtype": "bfloat16"}),
    "nf4": (convert.convert_checkpoint, {"quant": "nf4"}),
    "flax": (models.convert_to_flax, {"quant": quant}),
}[conversion]
run(source, out + ".warm", **options)
print("ready", flush=True)
for i in range(1000):
    run(source, out, progress=lambda *call: time.sleep(0.005), **options)
    import shutil
    shutil.rmtree(out)
"""


def test_kills_at_random_moments(sources, fresh, tmp_path, request):
    """Then every conversion of both sources: it makes what it makes anywhere."""
    kills = request.config.getoption("kills")
    if not kills:
        pytest.skip("needs --kills, as of `make fuzz`")
    rng, work, found = random.Random(0), tmp_path / "work", []
    while len(found) < kills:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        first = rng.choice(list(CONVERSIONS))
        command = [sys.executable, "-W", "ignore", "-c", CHILD]
        with subprocess.Popen(
            [*command, sources["a"], work / "out", first], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout.readline() == b"ready\n"
            try:
                child.wait(timeout=rng.uniform(0, 1))
            except subprocess.TimeoutExpired:
                child.kill()
        assert child.returncode == -signal.SIGKILL
        if not (work / PARTIAL).is_dir():
            # Between two conversions, or just as one had ended.
            continue
        left = shutil.move(work / PARTIAL, tmp_path / "left")
        shutil.rmtree(work)
        work.mkdir()
        found.append((first, len(os.listdir(left))))
        for conversion in CONVERSIONS:
            for name, source in sources.items():
                got = convert_over(left, conversion, source, work)
                assert got == fresh(conversion, name), (first, conversion, name)
        shutil.rmtree(left)
        print(f"kill {len(found)}: {first} left {found[-1][1]} entries", flush=True)
