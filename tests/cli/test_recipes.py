"""The recipes of docs/many_hosts.md start the commands that they should."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from jaxbnb.cli._arguments import parse

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "many_hosts.md"


def find_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def read_script(kind):
    if kind == "SLURM":
        (script,) = find_blocks("bash")
        return re.search(r"^srun (?:.*\\\n)*.*", script, re.MULTILINE)[0]
    jobset, task = (yaml.safe_load(block) for block in find_blocks("yaml"))
    if kind == "SkyPilot":
        return task["run"]
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (script,) = pod["containers"][0]["args"]
    return script


RECIPES = {
    "SLURM": ({}, ("auto", None, None)),
    "JobSet": (
        {"JOB_COMPLETION_INDEX": "1"},
        ("train-workers-0-0.train:1234", 2, 1),
    ),
    "SkyPilot": (
        {
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": "1",
        },
        ("10.0.0.1:1234", 2, 1),
    ),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_the_command_of_a_process(kind, tmp_path):
    variables, want = RECIPES[kind]
    # A program that says what it was called with.
    program = f'#!{sys.executable}\nimport sys\nprint(*sys.argv[1:], sep="\\n")\n'
    commands = {"jaxbnb": program, "srun": '#!/bin/bash\nshift\nexec "$@"\n'}
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", read_script(kind)],
        env={"PATH": path, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    args = parse(result.stdout.splitlines())
    names = ("coordinator", "num_processes", "process_id")
    assert tuple(getattr(args, name, None) for name in names) == want
    assert (args.mesh, args.batch, args.resume) == ("fsdp", 16, True)
    assert args.out.startswith("/shared/")
