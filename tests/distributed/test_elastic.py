"""Elastic jobs under torchrun: ranks, agents and nodes come and go, and the run ends with the same weights."""

from __future__ import annotations

import datetime
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from trainer.distributed import elastic

from ..ranks import free_port, run
from ..results import final_tensors, largest_difference, outcome, records

SECONDS = datetime.timedelta(seconds=20)


@pytest.mark.parametrize("seed", range(3))
def test_the_ranks_of_an_attempt_agree_and_those_of_another_do_not(seed: int) -> None:
    """Attempts of changing size over one store; in some, ranks die in the middle of the exchange."""
    chance = random.Random(seed)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    names: list[str] = []
    for _ in range(6):
        world = chance.randint(2, 4)
        dead = chance.randint(0, world - 1) if chance.random() < 0.5 else None
        agreed: dict[int, str] = {}

        def join(rank: int, world: int = world, agreed: dict[int, str] = agreed, dead: int | None = dead) -> None:
            store = dist.TCPStore("127.0.0.1", server.port, is_master=False)  # type: ignore[attr-defined]
            seconds = SECONDS if dead is None else datetime.timedelta(seconds=0.5)
            try:
                agreed[rank] = elastic.agree_on_attempt(store, rank, world, seconds)
            except (TimeoutError, dist.DistError):
                return

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world) if rank != dead]
        chance.shuffle(threads)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if dead is None:
            assert len(agreed) == world
        assert len(set(agreed.values())) <= 1
        assert not set(agreed.values()) & set(names)
        names += set(agreed.values())
    assert names


STEPS = 300
SETTINGS = ["--precision", "fp64", "--batch_size", "48", "--duration", f"{STEPS} steps", "--run.url", "run",
            "--checkpoint.every", "10 steps", "--log.every", "20 steps"]  # fmt: skip


class Agents:
    """torchruns on this machine, each in the role of a node."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.folder, self.settings = folder, settings
        self.port = free_port()
        self.running: list[subprocess.Popen[bytes]] = []

    def add(self, ranks: int = 1) -> subprocess.Popen[bytes]:
        output = (self.folder / f"agent-{len(self.running)}").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:4", f"--nproc-per-node={ranks}",
             "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}", "--rdzv-id=test",
             "--local-addr=127.0.0.1",
             "--rdzv-conf=last_call_timeout=3,keep_alive_interval=1", "-m", "trainer", *self.settings],
            cwd=self.folder, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRAINER_WANDB__MODE": "disabled",
                 "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )  # fmt: skip
        self.running.append(process)
        return process

    def text(self) -> str:
        return "\n".join((self.folder / f"agent-{i}").read_text()[-3000:] for i in range(len(self.running)))

    def until(self, step: int) -> None:
        """Until a checkpoint of that step or a later one is committed."""
        deadline = time.monotonic() + 120
        while (
            max((int(p.parent.name[5:]) for p in self.folder.glob("run/checkpoints/*/MANIFEST.json")), default=0) < step
        ):
            assert time.monotonic() < deadline, self.text()
            assert self.running[0].poll() is None, self.text()
            time.sleep(0.02)

    def worlds(self) -> list[int]:
        attempts = sorted((self.folder / "run" / "lives").glob("[!.]*"))  # a file being written has a dot in front
        return [json.loads(p.read_text())["world_size"] for p in attempts]

    def end(self) -> None:
        try:
            assert self.running[0].wait(180) == 0, self.text()
        finally:
            for process in self.running:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def ranks_of(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(agent.pid).children(recursive=True)
    return [
        process
        for process in children
        if "trainer" in process.cmdline() and "torch.distributed.run" not in process.cmdline()
    ]


def _has_pending_sigterm(pid: int) -> bool:
    """Whether a SIGTERM is pending for a suspended process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd"))
    return bool(mask & 1 << (signal.SIGTERM - 1))


def check(folder: Path, alone: Path) -> None:
    assert outcome(folder / "run")["status"] == "done"
    assert largest_difference(final_tensors(alone), final_tensors(folder / "run")) < 1e-9
    assert [r["step"] for r in records(folder / "run")] == [r["step"] for r in records(alone)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(SETTINGS, folder)
    return folder / "run"


def test_a_killed_rank_and_a_killed_agent_restart_the_group(tmp_path: Path, alone: Path) -> None:
    agents = Agents(tmp_path, SETTINGS)
    first = agents.add()
    agents.until(10)
    (rank,) = ranks_of(first)
    rank.suspend()  # or it would be done before the node joins
    second = agents.add(ranks=2)  # a node joins
    while not _has_pending_sigterm(rank.pid):
        assert second.poll() is None, agents.text()
        time.sleep(0.02)
    rank.resume()
    while 3 not in agents.worlds():
        assert first.poll() is None, agents.text()
        time.sleep(0.02)
    ranks_of(second)[0].send_signal(signal.SIGKILL)
    while agents.worlds().count(3) < 2:
        assert first.poll() is None, agents.text()
        time.sleep(0.02)
    orphans = ranks_of(second)
    second.kill()
    for orphan in orphans:
        orphan.wait(20)  # the ranks end with their agent
    agents.end()
    check(tmp_path, alone)
    worlds = agents.worlds()
    assert (worlds[0], worlds[-1]) == (1, 1)
    assert worlds.count(3) == 2
