"""A child process runs its parent's code, and nothing from the current folder."""

import os
import shutil
import subprocess
import sys

import pytest

from jaxbnb_kernels import child

PROBE = """
import json, sys

def show(*arguments):
    import other
    print(json.__file__, __file__, other.__file__, sys.flags.no_user_site, *arguments)
"""
PARENT = """
import subprocess, sys
from jaxbnb_kernels import child
command = child.command("probe.show", "show", "a b", packages=("other", "probe"))
sys.exit(subprocess.run(command).returncode)
"""
HOSTILE = "raise SystemExit('json.py of the current folder')"


@pytest.mark.parametrize("place", ["current folder", "PYTHONPATH"])
@pytest.mark.parametrize("flags", ["-P", "-sP"])
def test_it_imports_what_its_parent_has(place, flags, tmp_path):
    """Copies of packages come before installed ones; a json.py lies next to them."""
    here, package = tmp_path / "here", tmp_path / "package"
    here.mkdir()
    code, environment = PARENT, dict(os.environ)
    if place == "PYTHONPATH":
        environment["PYTHONPATH"] = str(package)
    else:
        package = here
        # This parent finds only packages there; it has imported the rest already.
        code = f"import subprocess, sys; sys.path.insert(0, ''){PARENT}"
    for name in ("jaxbnb_kernels", "probe", "other"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    shutil.copy(child.__file__, package / "jaxbnb_kernels")
    (package / "probe" / "show.py").write_text(PROBE)
    (here / "json.py").write_text(HOSTILE)
    command = [sys.executable, flags, "-c", code]
    done = subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    standard, probe, second, no_user_site, *arguments = done.stdout.split()
    assert standard == os.path.join(os.path.dirname(os.__file__), "json", "__init__.py")
    assert probe == str(package / "probe" / "show.py")
    assert second == str(package / "other" / "__init__.py")
    assert no_user_site == str(int("s" in flags))
    assert arguments == ["a", "b"]
