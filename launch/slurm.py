"""Slurm's clients: what is asked of them and how their answers are read. Raises Refused, with Slurm's own words."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from collections.abc import Sequence

from . import Refused
from .job import Job
from .site import Site

SECONDS = 60  # a client of a controller that does not answer tries for as long


def ask(command: Sequence[str], wanted: bool = True) -> str:
    """Standard output. Where it fails, raises Refused, or returns '' if the answer is not needed."""
    if shutil.which(command[0]) is None:
        if not wanted:
            return ""
        raise Refused(f"{command[0]}: not on the PATH: work on a login node of the cluster, or load its Slurm module")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(f"{command[0]}: the controller of Slurm does not answer: try again later") from None
    if done.returncode and wanted:
        reason = " ".join(done.stderr.replace(f"{command[0]}: error: ", "").split()) or f"code {done.returncode}"
        raise Refused(f"{command[0]}: {reason}")
    return "" if done.returncode else done.stdout


def check(job: Job, site: Site) -> None:
    """Compare the job with what the cluster has, as far as it tells; sbatch has the last word."""
    name = job.partition or site.partition
    nodes: dict[str, list[tuple[int, int]]] = {}  # CPUs and GPUs of the kinds of node, by partition
    default = None
    for line in ask(["sinfo", "-h", "-o", "%P|%c|%G"], wanted=False).splitlines():
        partition, cpus, gres = line.split("|", 2)
        default = partition.rstrip("*") if partition.endswith("*") else default
        nodes.setdefault(partition.rstrip("*"), []).append((int(re.sub(r"\D", "", cpus) or 0), _gpus(gres)))
    if not nodes:
        return
    if name is not None and "," not in name and name not in nodes:
        near = difflib.get_close_matches(name, nodes, 1)
        way_out = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(nodes))}"
        raise Refused(f"--partition: {name!r} is not known here; {way_out}")
    kinds = [kind for p in (name or default or "").split(",") for kind in nodes.get(p, [])]
    if not kinds:
        return
    where = f"of partition {name or default}"
    if job.gpus_per_node > (most := max(gpus for _, gpus in kinds)):
        raise Refused(f"--gpus-per-node: {job.gpus_per_node}: a node {where} has {most}: take more --nodes")
    wanted = job.ranks_per_node * job.cpus_per_rank
    if wanted > (most := max(cores for cores, _ in kinds)):
        raise Refused(f"--cpus-per-rank: {job.cpus_per_rank} for {job.ranks_per_node} ranks make {wanted}: "
                      f"a node {where} has {most}")  # fmt: skip


def _gpus(gres: str) -> int:
    """The number in `gpu:4`, `gpu:a100:4(S:0-1),tmp:5` and so on."""
    found = re.findall(r"gpu(?::[^:,()]+)*?:(\d+)", gres)
    return sum(map(int, found))


def submit(script: str, after: str | None = None) -> str:
    """Submit a script, to start after another job has ended; returns the job's id."""
    dependency = [f"--dependency=afterany:{after}"] if after else []
    return ask(["sbatch", "--parsable", *dependency, script]).strip().partition(";")[0]


def queue(jobs: Sequence[str]) -> list[dict[str, str]]:
    """Those of the jobs that wait or run."""
    keys = ("job", "state", "time", "left", "nodes", "reason")
    if not jobs:
        return []
    # One id that is long gone would make squeue fail for all of them, so it is asked for everything of ours.
    text = ask(["squeue", "-h", "--me", "-o", "%i|%A|%T|%M|%L|%D|%R"])
    found = []
    for line in text.splitlines():
        shown, number, *rest = line.split("|", 6)
        if shown in jobs or number in jobs or shown.partition("_")[0] in jobs:
            found.append(dict(zip(keys, [shown, *rest], strict=True)))
    return found


def history(jobs: Sequence[str]) -> list[str]:
    """What accounting says of ended jobs, a line each; nothing where the cluster keeps no accounts."""
    text = ask(["sacct", "-n", "-X", "-P", "-j", ",".join(jobs), "-o", "JobID,State,Elapsed,ExitCode"], wanted=False)
    return [line.replace("|", "  ") for line in text.splitlines()]
