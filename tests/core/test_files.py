import errno
import functools
import os

import pytest

from jaxbnb.core.extras import import_extra
from jaxbnb.core.files import atomic_folder, atomic_write, resumable_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path):
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path
        assert names(tmp_path) == [temporary.name]
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (names(tmp_path), path.read_bytes()) == (["a"], b"old")
    with atomic_write(str(path)) as temporary:
        temporary.write_bytes(b"new")
    assert (names(tmp_path), path.read_bytes()) == (["a"], b"new")


def test_a_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "a") as temporary:
        temporary.touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_names_the_file(tmp_path):
    def write():
        with (
            atomic_write(tmp_path / "a") as temporary,
            open("/dev/full", "wb", buffering=0) as full,
        ):
            temporary.touch()
            full.write(b"x")

    with pytest.raises(OSError, match="No space left") as error:
        write()
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "a")
    assert names(tmp_path) == []


def test_errors_of_the_temporary_name_the_file(tmp_path):
    with (
        pytest.raises(FileNotFoundError) as error,
        atomic_write(tmp_path / "a") as temporary,
    ):
        (temporary / "b").write_bytes(b"")
    assert error.value.filename == str(tmp_path / "a" / "b")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        pass


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "parents" / "a"
    with atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("x")
        assert not path.exists()
    assert names(path.parent) == ["a"]
    assert (path / "sub" / "file").read_text() == "x"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "a").mkdir()
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "file").touch()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["file"]


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    (tmp_path / "f").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("a", "f", "link"):
        with pytest.raises(FileExistsError, match=rf"{name} is .*; choose another"):
            atomic_folder(tmp_path / name).__enter__()
    assert names(tmp_path) == ["a", "f", "link"]


def test_a_folder_filled_meanwhile_is_left_alone(tmp_path):
    def fill():
        with atomic_folder(tmp_path / "a") as temporary:
            (temporary / "ours").touch()
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "theirs").touch()

    with pytest.raises(FileExistsError):
        fill()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["theirs"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "a") as temporary:
            (temporary / "file").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "make", [atomic_folder, functools.partial(resumable_folder, mark="", resumes=())]
)
def test_an_error_names_the_folder_that_was_asked_for(tmp_path, monkeypatch, make):
    def mkdir(path, **options):
        # The parent is there already; only the temporary folder cannot be made.
        if path != tmp_path:
            raise FileNotFoundError(errno.ENOENT, "No such file", os.fspath(path))

    def fail():
        with make(tmp_path / "a"):
            pytest.fail("there is no folder to fill")

    monkeypatch.setattr(type(tmp_path), "mkdir", mkdir)
    with pytest.raises(FileNotFoundError) as error:
        fail()
    assert error.value.filename == os.fspath(tmp_path / "a")
    assert names(tmp_path) == []


@pytest.mark.parametrize("module", ["no_such", "no_such.numpy"])
def test_an_extra_that_is_not_installed(module):
    how = r"pip install '\.\[convert\]' in a checkout of jaxbnb"
    message = rf"^jaxbnb\.lora needs no_such: {how}$"
    with pytest.raises(ImportError, match=message) as error:
        import_extra(module, needed_by="jaxbnb.lora", extra="convert")
    assert error.value.name == "no_such"


def test_a_package_that_no_extra_has():
    with pytest.raises(ImportError, match=r"^it needs no_such: pip install no_such$"):
        import_extra("no_such.part", needed_by="it")


def test_an_extra_that_is_broken_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_extra.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        import_extra("broken_extra", needed_by="jaxbnb", extra="convert")
