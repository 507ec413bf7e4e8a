"""Calls of Slurm's client programs, and the parsing of their output. Raises Refused with Slurm's own message."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from collections.abc import Sequence

from . import Refused
from .job import Job
from .site import Site

TIMEOUT_SECONDS = 60  # a client retries for as long when the controller does not answer


def call(command: Sequence[str], required: bool = True) -> str:
    """Standard output. If the command fails, raises Refused, or returns '' if the answer is not required."""
    if shutil.which(command[0]) is None:
        if not required:
            return ""
        raise Refused(f"{command[0]}: not on the PATH: work on a login node of the cluster, or load its Slurm module")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(f"{command[0]}: Slurm's controller does not answer: try again later") from None
    if done.returncode and required:
        reason = " ".join(done.stderr.replace(f"{command[0]}: error: ", "").split()) or f"code {done.returncode}"
        raise Refused(f"{command[0]}: {reason}")
    return "" if done.returncode else done.stdout


def check(job: Job, site: Site) -> None:
    """Compare the job with the partitions and nodes that sinfo lists, if it does; sbatch has the last word."""
    name = job.partition or site.partition
    nodes: dict[str, list[tuple[int, int]]] = {}  # CPUs and GPUs of each kind of node, by partition
    default = None
    for line in call(["sinfo", "-h", "-o", "%P|%c|%G"], required=False).splitlines():
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
    cpus_wanted = job.ranks_per_node * job.cpus_per_rank
    if cpus_wanted > (most := max(cores for cores, _ in kinds)):
        raise Refused(f"--cpus-per-rank: {job.cpus_per_rank} for {job.ranks_per_node} ranks make {cpus_wanted}: "
                      f"a node {where} has {most}")  # fmt: skip


def _gpus(gres: str) -> int:
    """The number of GPUs in `gpu:4`, `gpu:a100:4(S:0-1),tmp:5` and so on."""
    counts = re.findall(r"gpu(?::[^:,()]+)*?:(\d+)", gres)
    return sum(map(int, counts))


def submit(script: str, after: str | None = None) -> str:
    """Submit a script, to start after another job has ended; returns the job's id."""
    dependency = [f"--dependency=afterany:{after}"] if after else []
    return call(["sbatch", "--parsable", *dependency, script]).strip().partition(";")[0]


def queue(job_ids: Sequence[str]) -> list[dict[str, str]]:
    """Those of the jobs that are pending or running."""
    keys = ("job", "state", "time", "left", "nodes", "reason")
    if not job_ids:
        return []
    # squeue -j fails for all ids if it has forgotten one of them, so this asks for all jobs of the user.
    text = call(["squeue", "-h", "--me", "-o", "%i|%A|%T|%M|%L|%D|%R"])
    rows = []
    for line in text.splitlines():
        shown_id, job_id, *rest = line.split("|", 6)  # shown with the index of the array
        if {shown_id, job_id, shown_id.partition("_")[0]} & set(job_ids):
            rows.append(dict(zip(keys, [shown_id, *rest], strict=True)))
    return rows


def history(job_ids: Sequence[str]) -> list[str]:
    """What Slurm's accounting knows of the jobs, a line each; empty on a cluster without accounting."""
    text = call(
        ["sacct", "-n", "-X", "-P", "-j", ",".join(job_ids), "-o", "JobID,State,Elapsed,ExitCode"], required=False
    )
    return [line.replace("|", "  ") for line in text.splitlines()]
