"""Which process of a run this is, from the environment of torchrun or Slurm; without either, the only one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


class LaunchError(Exception):
    """The processes of the run cannot find each other; the message is for the user."""


@dataclass(frozen=True)
class ProcessInfo:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    restart: str = "0"  # distinguishes the process groups of a job's attempts
    agent: bool = False  # whether torchrun keeps the store
    agents: int = 1  # how many torchruns, one a node
    torchrun: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> ProcessInfo:
        """torchrun's variables, else Slurm's, else a world of one. Raises LaunchError."""
        env = os.environ if environment is None else environment
        try:
            if "RANK" in env and "WORLD_SIZE" in env:
                rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
                return cls(
                    rank, world, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", world)),
                    env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", 29500)),
                    env.get("TORCHELASTIC_RESTART_COUNT", "0"), env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                    int(env.get("GROUP_WORLD_SIZE", "1")), "TORCHELASTIC_RUN_ID" in env,
                )  # fmt: skip
            if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
                hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "localhost"))
                nodes = int(env.get("SLURM_STEP_NUM_NODES", "1"))
                world = int(env["SLURM_STEP_NUM_TASKS"])
                return cls(
                    int(env["SLURM_PROCID"]), world, int(env.get("SLURM_LOCALID", "0")), -(-world // nodes),
                    env.get("MASTER_ADDR") or ("127.0.0.1" if nodes == 1 else first_host(hosts)),
                    int(env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000),
                    f"{env.get('SLURM_JOB_ID', '0')}.{env.get('SLURM_RESTART_COUNT', '0')}.{env['SLURM_STEP_ID']}",
                )  # fmt: skip
        except (KeyError, ValueError) as error:
            raise LaunchError(
                f"the launcher's environment is incomplete: {error}: start with torchrun, srun, or plainly"
            ) from None
        return cls()


_LAUNCHER = re.compile(r"(SLURM|TORCHELASTIC|LAUNCH|GROUP|ROLE|LOCAL|MASTER)_|(RANK|WORLD_SIZE)$")


def without_launcher() -> dict[str, str]:
    """The environment of a process that is a run of its own, alone: neither the ranks nor the settings of this one."""
    return {
        name: value
        for name, value in os.environ.items()
        if not _LAUNCHER.match(name) and (not name.startswith("TRAINER_") or name == "TRAINER_DATA")
    }


def first_error(output: str) -> str:
    """What a process of the trainer that has failed complains of: its error, else its last line."""
    lines = output.split("\n")
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return next(iter(errors or [line for line in lines[::-1] if line.strip()]), "no output")


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list such as 'gpu[03-05,9],login1'."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    if not match:
        raise LaunchError(f"SLURM_STEP_NODELIST: {nodes!r} is not a node list: set MASTER_ADDR to the first host")
    return match[1] + (match[2] or "") + (match[3] if match[2] else "")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(process: ProcessInfo, threads: int | None, environment: Mapping[str, str] | None = None) -> int:
    """The setting `threads`, else OMP_NUM_THREADS unless it is torchrun's own default of 1, else cores / ranks."""
    env = os.environ if environment is None else environment
    if threads:
        return threads
    omp_threads = env.get("OMP_NUM_THREADS", "")
    torchruns_default = (process.agent or process.torchrun) and omp_threads == "1" and process.local_world > 1
    if omp_threads.isdecimal() and int(omp_threads) > 0 and not torchruns_default:
        return int(omp_threads)
    return max(1, cores() // process.local_world)
