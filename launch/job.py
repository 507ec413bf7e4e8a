"""What to run: a Job, and the validation that refuses what cannot work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from . import Refused
from .site import Site

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Task:
    """One task of a job array: its run, and the flags that it adds to those of the job."""

    run: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """A run of the trainer on one node or several. The names of times contain the unit."""

    name: str
    run: str  # run.url; of an array, the folder or URL of the tasks' runs
    arguments: tuple[str, ...]  # of the trainer: config and flags, without run.url
    folder: str  # local: the script, the logs, the record of attempts
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int = 1
    minutes: int = 60
    starter: Literal["torchrun", "srun"] = "torchrun"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal_seconds: int = 120  # how long before the time limit Slurm sends its warning signal
    save_seconds: int = 30  # how long the slowest save takes
    restarts: int = 3  # of the ranks, by torchrun, within one allocation
    crashes: int = 3  # attempts in a row without progress after which the job gives up
    requeue: bool = True
    chain: int = 1  # jobs in a row, each after the previous one
    tasks: tuple[Task, ...] = ()
    parallel: int | None = None  # tasks at a time

    @property
    def shutdown_seconds(self) -> int:
        """What torchrun gives the ranks to save and exit, before it kills them."""
        return max(self.signal_seconds - 10, 10)


def parse_minutes(text: str) -> int:
    """Slurm's formats of a time limit: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS. Rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        raise Refused(f"--time: {text!r} is not a time: write HH:MM:SS, D-HH:MM:SS or minutes")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, *[*numbers, 0][:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + -(-seconds // 60)


def time_text(minutes: int) -> str:
    days, rest = divmod(minutes, 24 * 60)
    return f"{f'{days}-' if days else ''}{rest // 60:02d}:{rest % 60:02d}:00"


def validate(job: Job, site: Site) -> None:
    """Raises Refused with a line per combination that cannot work."""
    checks = (_size_problems, _time_problems, _option_problems)
    if problems := [problem for check in checks for problem in check(job, site)]:
        raise Refused("\n".join(problems))


def _size_problems(job: Job, site: Site) -> list[str]:
    problems = []
    if not NAME.fullmatch(job.name):
        problems.append(f"--name: {job.name!r}: use letters, digits, '.', '_' and '-', at most 100")
    sizes = {"--nodes": job.nodes, "--ranks-per-node": job.ranks_per_node, "--cpus-per-rank": job.cpus_per_rank,
             "--chain": job.chain, "--time": job.minutes}  # fmt: skip
    problems += [f"{flag}: {value} should be at least 1" for flag, value in sizes.items() if value < 1]
    if job.gpus_per_node and job.gpus_per_node != job.ranks_per_node:
        problems.append(
            f"--ranks-per-node: {job.ranks_per_node} ranks for {job.gpus_per_node} GPUs: "
            f"a rank uses exactly one GPU: leave --ranks-per-node out"
        )
    if site.gpus_per_node is not None and job.gpus_per_node > site.gpus_per_node:
        problems.append(f"--gpus-per-node: {job.gpus_per_node}: a node has {site.gpus_per_node}: take more --nodes")
    cpus = job.ranks_per_node * job.cpus_per_rank
    if site.cpus_per_node is not None and cpus > site.cpus_per_node:
        problems.append(f"--cpus-per-rank: {job.cpus_per_rank} for {job.ranks_per_node} ranks make {cpus}: "
                        f"a node has {site.cpus_per_node}")  # fmt: skip
    of_tasks = [word for task in job.tasks for word in (task.run, *task.arguments)]
    for word in (job.run, job.folder, *job.arguments, *of_tasks):
        if "\0" in word:
            problems.append(f"{word!r}: an argument of a program cannot contain a zero byte")
    if "\n" in job.folder:
        problems.append(f"--run.url: {job.folder!r}: Slurm cannot write its output into a folder with a line break")
    return problems


def _time_problems(job: Job, site: Site) -> list[str]:
    problems = []
    if 60 * job.minutes < 2 * job.save_seconds:
        problems.append(
            f"--time: {time_text(job.minutes)} is shorter than two saves of {job.save_seconds} s: "
            f"the run would make no progress: ask for more time"
        )
    elif 60 * job.minutes <= job.signal_seconds:
        problems.append(
            f"--signal-seconds: {job.signal_seconds} is the whole time limit, {time_text(job.minutes)}: "
            f"the job would stop at once: ask for more time or set it lower"
        )
    if job.shutdown_seconds < job.save_seconds:
        problems.append(
            f"--signal-seconds: {job.signal_seconds} leaves the ranks {job.shutdown_seconds} s, "
            f"and a save takes {job.save_seconds} s: set it to {job.save_seconds + 10} or more"
        )
    return problems


def _option_problems(job: Job, site: Site) -> list[str]:
    problems = []
    if not job.requeue and job.crashes and job.chain == 1:
        problems.append(
            "--no-requeue: the job could not continue after a preemption: allow it, or add --crashes 0 or --chain"
        )
    if job.starter == "srun" and site.after_node_failure == "shrink" and job.nodes > 1:
        problems.append("--starter: srun cannot continue with fewer nodes: use torchrun, or after_node_failure: wait")
    if job.run.startswith("memory://"):
        problems.append(
            f"--run.url: {job.run!r} is lost when the process ends: use a folder or a URL that all nodes reach"
        )
    if job.tasks and job.chain > 1:
        problems.append("--chain: a sweep cannot be a chain: its tasks continue by being requeued")
    return problems
