"""Starts 1, 2 and 4 processes on this machine, and checks what they do together.

``make multihost`` runs all of it, without a GPU. With names of checks, only those run:
``python -m tests.multihost signals``.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.finetune import toy
from tests.quick_compile import _flags

NAMES = ("saving", "slurm", "training", "signals", "differences")
STEPS = 16
toy.CONFIG["num_hidden_layers"] = 1
ROWS = [
    {"prompt": f"{a}+{b}=", "completion": str(a + b)}
    for a in range(8)
    for b in range(8)
]
# Sums in another order: some roundings of float32, of values around one.
TOLERANCE = 2e-6


class Group:
    """Processes of one run, each with a log."""

    def __init__(self, folder, command, count, devices, variables=lambda index: {}):
        folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XLA_FLAGS": " ".join(_flags()),
        }
        self.logs = [folder / f"process{index}.log" for index in range(count)]
        self.processes = []
        for index, log in enumerate(self.logs):
            with log.open("wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *command(address, count, index)],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env={**environment, **variables(index)},
                    )
                )

    def wait(self, seconds=600):
        """Waits for all; returns their exit statuses."""
        end = time.monotonic() + seconds
        try:
            return [
                process.wait(timeout=max(0.1, end - time.monotonic()))
                for process in self.processes
            ]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s") from None

    def read(self, index):
        return self.logs[index].read_text(errors="replace")

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


class Checks:
    """The checks; each is a method, in the order that they run in."""

    def __init__(self, folder):
        self.folder = folder
        self.model = folder / "model"
        self.model.mkdir()
        toy.write_folder(self.model)
        for name, rows in (("train", ROWS[:52]), ("held_out", ROWS[52:])):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines)
        self.groups = []
        self.whole = None

    @contextlib.contextmanager
    def start(self, name, command, count, devices, *variables):
        folder = self.folder / "logs" / name
        group = Group(folder, command, count, devices, *variables)
        self.groups.append(group)
        try:
            yield group
        finally:
            group.close()

    def run_worker(self, name, count, devices):
        out = self.folder / name
        out.mkdir()

        def command(address, count, index):
            names = (str(count), str(index), str(self.model), str(out))
            return ["tests.multihost.worker", address, *names]

        with self.start(name, command, count, devices) as group:
            assert group.wait() == [0] * count
        return out

    def finetune(self, name, count, devices, *options, alter=None):
        """Starts a run, or goes on with it; ``alter`` changes a process' options."""

        def command(address, count, index):
            more = list(options)
            if count > 1:
                more += ["--coordinator", address, "--num-processes", str(count)]
                more += ["--process-id", str(index)]
            if alter is not None:
                more += alter(index)
            fixed = {"steps": STEPS, "batch": 4, "accumulate": 2, "seq": 32, "rank": 4}
            fixed |= {"lr": 1e-3, "dtype": "float32", "save-every": 2}
            return [
                *("jaxbnb", "finetune", str(self.model), "--out"),
                *(str(self.folder / name), "--data", str(self.folder / "train.jsonl")),
                *(x for key, value in fixed.items() for x in (f"--{key}", str(value))),
                *("--prompts", "--dropout", "0.1", "--remat", "none"),
                *more,
            ]

        number = len(self.groups)
        return self.start(f"{number}-{name}", command, count, devices)

    def read_losses(self, name):
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = {}
        for text in lines:
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text)
                found |= {line["step"]: line["loss"]} if "loss" in line else {}
        return found

    def wait_for_step(self, group, name, step):
        end = time.monotonic() + 600
        while max(self.read_losses(name), default=0) < step:
            assert all(p.poll() is None for p in group.processes), "a run has ended"
            assert time.monotonic() < end, f"no step {step}"
            time.sleep(0.02)

    def check_losses(self, name):
        if self.whole is None:
            with self.finetune("whole", 1, 1) as group:
                assert group.wait() == [0]
            self.whole = self.read_losses("whole")
        got = self.read_losses(name)
        assert list(got) == list(range(1, STEPS + 1)), list(got)
        want, got = (np.array(list(x.values())) for x in (self.whole, got))
        error = np.max(np.abs(got / want - 1))
        assert error < TOLERANCE, f"losses differ by {error:.1e}"
        return f"losses within {error:.1e}"

    def saving(self):
        """Adapters, models and Flax folders of 2 and 4 processes are those of one."""
        alone = self.run_worker("one", 1, 4)
        for name, count, devices in (("two", 2, 2), ("four", 4, 1)):
            out = self.run_worker(name, count, devices)
            parts = sorted(out.glob("model/*.safetensors"))
            # A large tensor may fill the share of several processes.
            assert 1 < len(parts) <= count, parts
            want = load_file(alone / "model" / "model.safetensors")
            got = {key: x for part in parts for key, x in load_file(part).items()}
            assert set(got) == set(want)
            for key, x in want.items():
                np.testing.assert_array_equal(got[key], x)
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                got, want = (x / "adapter" / file for x in (out, alone))
                assert got.read_bytes() == want.read_bytes(), file

    def slurm(self):
        """SLURM's variables are enough, and one of two processes prints."""
        out = str(self.folder / "slurm")

        def command(address, count, index):
            verb = ("jaxbnb", "convert", str(self.model), out, "--to", "flax")
            return [*verb, "--quant", "nf4", "--coordinator", "auto"]

        def variables(index):
            return {
                "SLURM_JOB_ID": str(os.getpid()),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
            }

        with self.start("slurm", command, 2, 1, variables) as group:
            assert group.wait() == [0, 0]
            assert "slurm: 11 tensors" in group.read(0), group.read(0)
            assert "tensors" not in group.read(1)
        assert json.loads(Path(out, "flax.json").read_text())["format_version"] == 1

    def training(self):
        """A run of two processes: the losses and the files of one."""
        options = ("--eval", str(self.folder / "held_out.jsonl"), "--prompts", "1+2=")
        with self.finetune("two_runs", 2, 2, *options) as group:
            assert group.wait() == [0, 0]
            assert "report:" in group.read(0)
            assert "step" not in group.read(1)
        names = {path.name for path in (self.folder / "two_runs").iterdir()}
        assert {"adapter", "best", "report.html", "config.yaml"} <= names, names
        return self.check_losses("two_runs")

    def signals(self):
        """SIGTERM to one of 2 processes saves; 4 go on; one is killed; 1 goes on."""
        name = "interrupted"
        with self.finetune(name, 2, 4) as group:
            self.wait_for_step(group, name, 2)
            group.processes[1].send_signal(signal.SIGTERM)
            assert group.wait() == [75, 75]
        begun = max(self.read_losses(name))
        with self.finetune(name, 4, 1, "--resume") as group:
            # After two checkpoints, at least the first is complete.
            self.wait_for_step(group, name, begun + 5)
            start = time.monotonic()
            group.processes[3].kill()
            first, *others, _ = group.wait(60)
            took = time.monotonic() - start
            # JAX may abort a process before it has said why.
            assert first in (1, -signal.SIGABRT), first
            assert all(others), others
            if first == 1:
                assert "cannot reach the others" in group.read(0), group.read(0)
        with self.finetune(name, 1, 1, "--resume") as group:
            assert group.wait() == [0]
            last = re.search(r"goes on after step (\d+)", group.read(0))
            assert last, group.read(0)
            assert int(last[1]) > begun
        return f"{self.check_losses(name)}; the others ended after {took:.0f} s"

    def differences(self):
        """Another config, other data: each process names it and ends with status 1."""
        other = self.folder / "other.jsonl"
        other.write_text((self.folder / "held_out.jsonl").read_text())

        def alter(index):
            return ["--lr", "0.1", "--data", str(other)] if index else []

        with self.finetune("different", 2, 1, alter=alter) as group:
            assert group.wait() == [1, 1]
            for index in range(2):
                text = group.read(index)
                assert "lr is 0.1 in process 1 and 0.001 in process 0" in text, text
                assert "the data is" in text, text
        assert not (self.folder / "different").exists()


def main():
    # Ends the processes that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="multihost") as folder:
        checks = Checks(Path(folder))
        names = sys.argv[1:] or NAMES
        start = time.monotonic()
        for name in names:
            begin = time.monotonic()
            try:
                note = getattr(checks, name)()
            except Exception:
                for log in checks.groups[-1].logs if checks.groups else ():
                    text = log.read_text(errors="replace")
                    print(f"--- {log.parent.name}/{log.name}\n{text[-6000:]}")
                raise
            what = getattr(Checks, name).__doc__
            note = f" ({note})" if note else ""
            print(f"ok  {time.monotonic() - begin:5.1f} s  {what}{note}", flush=True)
        print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
