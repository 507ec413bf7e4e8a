"""`python -m trainer doctor`: find out before a long run what would stop it.

The real config is tried with a few steps on N gloo ranks on the CPU: data, shapes, storage rights, memory, and a run
that is killed and resumed, whose result must equal that of an uninterrupted run.
"""

from __future__ import annotations

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
from ..data.description import ImageDescription
from ..distributed.process import LaunchError, cores, first_error, without_launcher
from ..nn.row_state import fresh_rows
from ..randomness import Draws
from ..run.build import Recipe, open_run_data, recipe, run_url
from ..run.feature_classifier import FeatureClassifier
from ..storage.objects import Storage, StorageError
from .common import peek, read_config

STEPS, SAVE_EVERY = 8, 2
ROWS_PER_RANK = 16  # the trial's batch is reduced to this, so that a laptop can try a cluster's config


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
    passed = [doctor.check(title, work) for title, work in doctor.checks()]  # all of them, also after a failure
    return 0 if all(passed) else 1


class _Doctor:
    def __init__(self, config: RunConfig, name: str, ranks: int) -> None:
        self.config, self.name, self.ranks = config, name, ranks
        self.data: DataSet | None = None
        self.recipe: Recipe | None = None
        self.untrained: FeatureClassifier | None = None

    def checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "versions", self.versions
        yield "data", self.open_data
        yield "storage", self.storage
        if self.data is not None:
            yield "network", self.network
        if self.untrained is not None:
            yield "features", self.features
        if self.recipe is not None:
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
        data = self.data.description
        samples = f"{data.name}: {data.train_size:,} samples, {data.eval_size:,} held out ({self.data.split})"
        if isinstance(data, ImageDescription):
            return f"{samples}, {len(data.classes)} classes, {data.channels}x{data.size}x{data.size}"
        return samples

    def storage(self) -> str:
        storage = Storage(run_url(self.config, self.name))
        storage.probe()
        return f"{storage}: may write, list, read and delete"

    def network(self) -> str:
        parts = recipe(self.config, self.ranks, data=self.data)
        parts.check()
        self.untrained, self.recipe = parts.untrained, parts
        workload = parts.workload
        count = sum(p.numel() for p in workload.parameters() if p.requires_grad)
        return f"{self.config.workload.name}: {count:,} parameters, phases {', '.join(p.name for p in workload.phases)}"

    def features(self) -> str:
        """The trial does without them: it lasts seconds."""
        assert self.untrained is not None
        self.untrained.check()
        return f"{self.untrained} is not trained yet: the run will do that first, into {self.untrained.url}"

    def memory(self) -> str:
        """Bytes a rank needs: what is fixed, and the activations that the backward pass needs of one sample."""
        assert self.recipe is not None
        workload = self.recipe.workload
        trained = sum(p.numel() * p.element_size() for phase in workload.phases for p in phase.parameters)
        state = sum(t.numel() * t.element_size() for t in workload.state_dict().values())
        fixed = state + trained * (3 if self.config.optimizer.name != "sgd" else 2)
        activations = self.activation_bytes()
        samples = -(-self.config.batch_size // self.config.accumulation // self.ranks)
        total = fixed + activations * samples
        return (
            f"about {_size(total)} a rank in fp32: {_size(fixed)} for weights, gradients and optimizer, "
            f"{_size(activations)} for each of {samples} samples"
        )

    def activation_bytes(self) -> float:
        """Bytes that autograd saves for the backward pass of one sample, in the phase that needs most."""
        assert self.recipe is not None
        workload = self.recipe.workload
        saved: dict[tuple[int, torch.Size], int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.data_ptr(), tensor.shape] = tensor.numel() * tensor.element_size()
            return tensor

        rows = 2 * workload.group
        batch = self.recipe.example_batch(rows)
        most = 0
        for phase in workload.phases:
            saved.clear()
            draws = Draws(0, (0, phase.name, 0, 0), slice(0, rows), torch.device("cpu"))
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            with hooks, fresh_rows(workload, rows):
                phase.loss(batch, draws)
            parameters = {parameter.data_ptr() for parameter in workload.parameters()}
            most = max(most, sum(size for (pointer, _), size in saved.items() if pointer not in parameters))
        return most / rows

    def trial(self) -> str:
        """Train a few steps twice, once with every rank killed half-way; the results must be equal, bit for bit."""
        config = self.trial_config()
        with tempfile.TemporaryDirectory(prefix="trainer-doctor-") as temporary:
            uninterrupted, resumed = Path(temporary) / "uninterrupted", Path(temporary) / "resumed"
            self.run_ranks(config, uninterrupted)
            ending = self.run_ranks(config, resumed, kill=True)
            self.run_ranks(config, resumed)
            for file in ("weights.safetensors", "optimizer.safetensors"):
                expected, actual = (safetensors.torch.load_file(_final(run) / file) for run in (uninterrupted, resumed))
                for name, tensor in expected.items():
                    if not torch.equal(tensor, actual[name]):
                        raise UserError(f"after a kill and a restart, {name} differs from the uninterrupted run's")
        batch = ""
        if config.batch_size != self.config.batch_size:
            batch = f"batch {config.batch_size} for {self.config.batch_size}, "
        return f"{batch}{STEPS} steps, {ending} and resumed: weights and optimizer equal bit for bit"

    def trial_config(self) -> RunConfig:
        """The config with few steps, a small batch and a checkpoint every other step, on the CPU."""
        assert self.recipe is not None
        c = self.config
        rows = ROWS_PER_RANK * self.ranks * c.accumulation
        evaluation = {"every": f"{STEPS} steps", "samples": rows, "batch_size": rows}
        return c.model_copy(update={
            "batch_size": min(c.batch_size, max(rows, self.recipe.workload.group * self.ranks * c.accumulation)),
            "duration": f"{STEPS} steps", "device": "cpu", "threads": None,
            "data": c.data.model_copy(update={"root": _absolute(data_root(c))}),
            "precision": "fp32" if c.precision == "auto" else c.precision,
            "log": c.log.model_copy(update={"every": "1 step"}),
            "evaluate": c.evaluate.model_copy(update=evaluation),
            "checkpoint": c.checkpoint.model_copy(update={"every": f"{SAVE_EVERY} steps", "keep": STEPS}),
            "metrics": c.metrics.model_copy(update={"features": "pixels"}) if self.untrained else c.metrics,
            "wandb": c.wandb.model_copy(update={"mode": "disabled"}),
            "schedule": c.schedule.model_copy(update={"warmup": "2 steps"}),
        })  # fmt: skip

    def run_ranks(self, config: RunConfig, folder: Path, kill: bool = False) -> str:
        """Run to the end, or until a checkpoint is committed and every rank has been killed."""
        file = folder.with_suffix(".yaml")
        file.write_text(dump(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = without_launcher() | {
            "WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(max(1, cores() // self.ranks)),
        }  # fmt: skip
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
        killed = kill and any(p.poll() is None for p in processes)
        if killed:
            for process in processes:
                process.send_signal(signal.SIGKILL)
        codes = [process.wait() for process in processes]
        if not killed and any(codes):
            raise UserError(f"the trial run ended with exit codes {codes}: {first_error(log.read_text())}")
        return "killed half-way" if killed else "ended before it could be killed"


def _final(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STEPS:08d}"


def _absolute(root: str) -> str:
    return root if "://" in root else str(Path(root).expanduser().absolute())


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
