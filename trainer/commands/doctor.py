"""`python -m trainer doctor`: find out before a long run what would stop it.

The real config is tried with a few steps on N gloo ranks on the CPU: data, shapes, storage rights, memory, and a run
that is killed and must end as if it had not been.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import safetensors.torch
import torch

from ..config.options import RunConfig, UserError, data_root, dump
from ..data.dataset import DataSet
from ..distributed.process import LaunchError, cores
from ..randomness import Draws
from ..run.build import build_plan, build_workload, open_run_data, run_url
from ..storage.objects import Storage, StorageError
from ..workload import Workload
from .common import peek, read_config

STEPS, SAVE_EVERY = 8, 2
ROWS_PER_RANK = 16  # the trial's batch is cut down to this, so that a laptop can carry a cluster's config


def main(words: Sequence[str]) -> int:
    words = list(words)
    ranks = peek(words, "--ranks") or "2"
    if "--ranks" in words:
        index = words.index("--ranks")
        del words[index : index + 2]
    words = [word for word in words if not word.startswith("--ranks=")]
    if not ranks.isdecimal() or not 1 <= int(ranks) <= 64:
        raise UserError(f"--ranks: {ranks!r} is not a number of processes from 1 to 64")
    text = "Check the real config with a few steps on N gloo ranks (--ranks N, default 2) on the CPU."
    config, name = read_config(words, "python -m trainer doctor [--ranks N] [CONFIG.yaml]", text)
    return examine(config, name, int(ranks))


def examine(config: RunConfig, name: str, ranks: int) -> int:
    """Print a line per check; returns 0 if all is well, else 1."""
    doctor = _Doctor(config, name, ranks)
    sound = [doctor.check(title, work) for title, work in doctor.checks()]  # all of them, also after a failure
    return 0 if all(sound) else 1


class _Doctor:
    def __init__(self, config: RunConfig, name: str, ranks: int) -> None:
        self.config, self.name, self.ranks = config, name, ranks
        self.data: DataSet | None = None
        self.workload: Workload | None = None

    def checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "versions", self.versions
        yield "data", self.open_data
        yield "storage", self.storage
        if self.data is not None:
            yield "network", self.network
        if self.workload is not None:
            yield "memory", self.memory
            yield f"{self.ranks} rank{'s' if self.ranks > 1 else ''}", self.trial

    def check(self, title: str, work: Callable[[], str]) -> bool:
        started = time.monotonic()
        try:
            verdict, text = "ok", work()
        except (UserError, StorageError, LaunchError) as error:
            verdict, text = "FAIL", str(error)
        except (RuntimeError, ValueError, OSError) as error:
            verdict, text = "FAIL", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        seconds = time.monotonic() - started
        print(f"{verdict:<5} {title:<9} {text}" + (f" ({seconds:.0f} s)" if seconds >= 1 else ""), flush=True)  # noqa: T201
        return verdict == "ok"

    def versions(self) -> str:
        names = ("torch", "torchvision", "accelerate", "fsspec", "wandb")
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
        gpus = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
        return f"Python {platform.python_version()}, {versions}; {cores()} cores, {gpus}"

    def open_data(self) -> str:
        self.data = open_run_data(self.config)
        d = self.data.description
        return (
            f"{d.name}: {d.train_size:,} samples, {d.eval_size:,} held out ({self.data.split}), "
            f"{len(d.classes)} classes, {d.channels}x{d.size}x{d.size}"
        )

    def storage(self) -> str:
        storage = Storage(run_url(self.config, self.name))
        storage.probe()
        return f"{storage}: may write, list, read and delete"

    def network(self) -> str:
        assert self.data is not None
        workload = build_workload(self.config, self.data.description)
        build_plan(self.config, len(self.data.train), workload, self.ranks)
        count = sum(p.numel() for p in workload.parameters() if p.requires_grad)
        self.workload = workload
        return f"{self.config.workload.name}: {count:,} parameters, phases {', '.join(p.name for p in workload.phases)}"

    def memory(self) -> str:
        """Bytes a rank needs: what is fixed, and what the backward pass keeps of one sample."""
        workload, data = self.workload, self.data
        assert workload is not None
        assert data is not None
        kept: dict[tuple[int, torch.Size], int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.data_ptr(), tensor.shape] = tensor.numel() * tensor.element_size()
            return tensor

        rows = 2 * workload.group
        batch = {
            "image": torch.zeros(rows, *data.description.shape),
            "label": torch.zeros(rows, dtype=torch.int64),
            "id": torch.arange(rows),
        }
        held = 0
        for phase in workload.phases:
            kept.clear()
            draws = Draws(0, (0, phase.name, 0, 0), slice(0, rows), torch.device("cpu"))
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                phase.loss(batch, draws)
            own = {parameter.data_ptr() for parameter in workload.parameters()}
            held = max(held, sum(size for (pointer, _), size in kept.items() if pointer not in own))
        trained = sum(p.numel() * p.element_size() for phase in workload.phases for p in phase.parameters)
        everything = sum(t.numel() * t.element_size() for t in workload.state_dict().values())
        fixed = everything + trained * (3 if self.config.optimizer.name != "sgd" else 2)
        share = -(-self.config.batch_size // self.config.accumulation // self.ranks)
        total = fixed + held / rows * share
        return (
            f"about {_size(total)} a rank in fp32: {_size(fixed)} for weights, gradients and optimizer, "
            f"{_size(held / rows)} for each of {share} samples"
        )

    def trial(self) -> str:
        """Train a few steps twice, once with every rank killed half-way; the results must be equal, bit for bit."""
        assert self.workload is not None
        rows = ROWS_PER_RANK * self.ranks * self.config.accumulation
        c = self.config
        with tempfile.TemporaryDirectory(prefix="trainer-doctor-") as temporary:
            looks = {"every": f"{STEPS} steps", "samples": rows, "batch_size": rows}
            small = c.model_copy(update={
                "batch_size": min(c.batch_size, max(rows, self.workload.group * self.ranks * c.accumulation)),
                "duration": f"{STEPS} steps", "device": "cpu", "threads": None,
                "data": c.data.model_copy(update={"root": _absolute(data_root(c))}),
                "precision": "fp32" if c.precision == "auto" else c.precision,
                "log": c.log.model_copy(update={"every": "1 step"}),
                "evaluate": c.evaluate.model_copy(update=looks),
                "checkpoint": c.checkpoint.model_copy(update={"every": f"{SAVE_EVERY} steps", "keep": STEPS}),
                "wandb": c.wandb.model_copy(update={"mode": "disabled"}),
                "schedule": c.schedule.model_copy(update={"warmup": "2 steps"}),
            })  # fmt: skip
            whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
            self.run_ranks(small, whole)
            when = self.run_ranks(small, killed, kill=True)
            self.run_ranks(small, killed)
            for file in ("weights", "optimizer"):
                a, b = (safetensors.torch.load_file(_final(run) / f"{file}.safetensors") for run in (whole, killed))
                for name, tensor in a.items():
                    if not torch.equal(tensor, b[name]):
                        raise UserError(f"after a kill and a restart, {name} differs from the uninterrupted run's")
        cut = f"batch {small.batch_size} for {c.batch_size}, " if small.batch_size != c.batch_size else ""
        return f"{cut}{STEPS} steps, {when} and resumed: weights and optimizer equal bit for bit"

    def run_ranks(self, config: RunConfig, folder: Path, kill: bool = False) -> str:
        """Run to the end, or until a checkpoint is committed and every rank has been killed."""
        file = folder.with_suffix(".yaml")
        file.write_text(dump(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRAINER_", "SLURM_", "TORCHELASTIC"))}
        environment |= {"WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(max(1, cores() // self.ranks))}  # fmt: skip
        log = folder.with_suffix(".log")
        with log.open("w") as output:
            processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "trainer", str(file), "--run.url", str(folder)],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=output, stderr=output,
                )
                for rank in range(self.ranks)
            ]  # fmt: skip
        committed = folder / "checkpoints" / f"step-{SAVE_EVERY:08d}" / "MANIFEST.json"
        while kill and not committed.exists() and any(p.poll() is None for p in processes):
            time.sleep(0.005)
        stopped = kill and any(p.poll() is None for p in processes)
        if stopped:
            for process in processes:
                process.send_signal(signal.SIGKILL)
        codes = [process.wait() for process in processes]
        if not stopped and any(codes):
            lines = [line for line in log.read_text().splitlines() if line.startswith("error:")]
            last = lines or log.read_text().splitlines()[-1:] or ["no output"]
            raise UserError(f"the trial run ended with exit codes {codes}: {last[0].removeprefix('error: ')}")
        return "killed half-way" if stopped else "ended before it could be killed"


def _final(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STEPS:08d}"


def _absolute(root: str) -> str:
    return root if "://" in root else str(Path(root).expanduser().absolute())


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
