"""The command line: python -m launch COMMAND ... -- ARGUMENTS OF THE TRAINER."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from . import Refused, after, record, sbatch, slurm, sweep, torchrun
from .job import NAME, Job, lint, parse_minutes
from .site import Site, read_site, read_yaml

DEFAULT_NAME = "digits_cnn"  # of the run that the trainer makes without a config
DESCRIPTION = """Run the trainer on this machine or on a Slurm cluster.

What comes after `--` goes to the trainer as it is: a config file and flags. The same command again goes on with the
same run. slurm/README.md leads from a clone to a job on two nodes."""
EXAMPLES = """examples:
  python -m launch local --gpus 4 -- configs/fashion_cnn.yaml --batch_size 400
  python -m launch slurm --nodes 2 --gpus-per-node 4 --time 04:00:00 -- configs/cifar10_resnet18.yaml
  python -m launch sweep --sweep optimizer.lr=1e-4,3e-4 --time 30 -- configs/fashion_cnn.yaml
  python -m launch status cifar10_resnet18

exit codes: 0 done; 1 failed; 2 a mistake in what was asked for, which a line on standard error names: nothing was
submitted
"""


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - what the user asked for


class _Parser(argparse.ArgumentParser):
    """Mistakes as one line."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{self.prog.removeprefix('python -m ')}: {message}; see --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m launch", description=DESCRIPTION, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)

    local = command("local", "run on this machine under torchrun")
    local.add_argument("--gpus", type=int, metavar="N", help="a rank for each of N GPUs")
    local.add_argument("--ranks", type=int, metavar="N", help="N ranks on the CPU (default: 1)")
    local.add_argument("--max-restarts", type=int, default=3, metavar="N", help="restarts of killed ranks (default: 3)")
    local.add_argument("--dry-run", action="store_true", help="print the command only")
    _add_job(command("slurm", "submit a run to Slurm"))
    sweeping = command("sweep", "submit a job array, a run for every combination of settings")
    _add_job(sweeping)
    sweeping.add_argument("--sweep", action="append", required=True, metavar="SETTING=VALUE,VALUE",
                          help="a setting and its values; may be repeated")  # fmt: skip
    sweeping.add_argument("--parallel", type=int, metavar="N", help="at most N tasks at a time")
    for name, text in (("status", "show the jobs of a run and how far it is"), ("logs", "print the log of a run"),
                       ("cancel", "cancel the jobs of a run"),
                       ("requeue", "put a run back into the queue, or submit it again")):  # fmt: skip
        about = command(name, text)
        about.add_argument("run", metavar="RUN", help="the run's name or directory")
        if name == "logs":
            about.add_argument("--follow", "-f", action="store_true", help="go on with what is added")
    ending = command("after", "decide whether a job goes on; the batch script asks this")
    for option in ("run", "record", "life"):
        ending.add_argument(f"--{option}", required=True)
    ending.add_argument("--code", type=int, required=True)
    ending.add_argument("--crashes", type=int, required=True)
    ending.add_argument("--chain", action="store_true")
    return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
    whole = {"type": int, "metavar": "N"}
    add = parser.add_argument
    add("--name", help="of the run and the job (default: the config's name)")
    add("--nodes", default=1, help="how many machines (default: 1)", **whole)  # type: ignore[arg-type]
    add("--gpus-per-node", default=0, help="a rank for each; 0 is CPU only (default: 0)", **whole)  # type: ignore[arg-type]
    add("--ranks-per-node", help="ranks on the CPU (default: one per GPU, else 1)", **whole)  # type: ignore[arg-type]
    add("--cpus-per-rank", help="cores for a rank and its loaders (default: the site's)", **whole)  # type: ignore[arg-type]
    add("--time", default="60", metavar="HH:MM:SS", help="time limit of a job, or minutes (default: 60)")
    for option in ("partition", "account", "qos", "constraint"):
        add(f"--{option}", help="(default: the site's)")
    add("--starter", choices=("torchrun", "srun"), default="torchrun",
        help="torchrun: one a node, restarts killed ranks; srun: a task for each rank (default: torchrun)")  # fmt: skip
    add("--restarts", default=3, help="of killed ranks within a job, by torchrun (default: 3)", **whole)  # type: ignore[arg-type]
    add("--crashes", default=3, help="give up after so many lives without a new checkpoint (default: 3)", **whole)  # type: ignore[arg-type]
    add("--signal-seconds", help="how long before the time limit to save and stop", **whole)  # type: ignore[arg-type]
    add("--save-seconds", help="how long the slowest save takes", **whole)  # type: ignore[arg-type]
    add("--no-requeue", action="store_true", help="never put the job back into the queue")
    add("--chain", default=1, help="so many jobs, each after the one before", **whole)  # type: ignore[arg-type]
    add("--site", metavar="FILE", help="(default: $LAUNCH_SITE, else slurm/site.yaml)")
    add("--check", action="store_true", help="let the trainer check config and flags first; takes some seconds")
    add("--dry-run", action="store_true", help="show the script, submit nothing")


def _job(options: argparse.Namespace, arguments: list[str], site: Site) -> Job:
    file = record.config_file(arguments)
    values = read_yaml(file) if file else {}
    said = record.flag(arguments, "run.url") or (values.get("run") or {}).get("url")
    name = options.name or (_last_part(said) if said else Path(file or DEFAULT_NAME).stem)
    root = f"{site.scratch}/runs" if site.scratch else "runs"
    run = said or f"{root}/{name}"
    ranks = options.ranks_per_node or options.gpus_per_node or 1
    job = Job(
        name=name, run=run, arguments=tuple(_without(arguments, "--run.url")), folder=record.folder_of(name, run),
        nodes=options.nodes, ranks_per_node=ranks, gpus_per_node=options.gpus_per_node,
        cpus_per_rank=options.cpus_per_rank or site.cpus_per_rank, minutes=parse_minutes(options.time),
        starter=options.starter, partition=options.partition, account=options.account, qos=options.qos,
        constraint=options.constraint, signal_seconds=_or(options.signal_seconds, site.signal_seconds),
        save_seconds=_or(options.save_seconds, site.save_seconds), restarts=options.restarts, crashes=options.crashes,
        requeue=not options.no_requeue, chain=options.chain,
    )  # fmt: skip
    if options.command == "sweep":
        tasks = sweep.tasks(name, run, options.sweep)
        job = replace(job, tasks=tasks, parallel=options.parallel)
    return job


def _or(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _last_part(url: str) -> str:
    part = re.sub(r"[^A-Za-z0-9._-]", "_", url.rstrip("/").rpartition("/")[2]).strip("._-")
    return part if NAME.fullmatch(part) else "run"


def _without(words: list[str], flag: str) -> list[str]:
    """The arguments without a flag and its value: the script adds it itself."""
    found, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == flag:
            skip = True
        elif not word.startswith(f"{flag}="):
            found.append(word)
    return found


def _local(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.gpus and options.ranks and options.gpus != options.ranks:
        raise Refused(
            f"--ranks: {options.ranks} ranks for {options.gpus} GPUs: a rank uses exactly one: give one of them"
        )
    ranks = options.gpus or options.ranks or 1
    if ranks < 1 or options.max_restarts < 0:
        raise Refused(f"--ranks: {ranks} with --max-restarts {options.max_restarts}: should be at least 1 and 0")
    if file := record.config_file(arguments):
        read_yaml(file)
    command = torchrun.local(sys.executable, ranks, options.max_restarts, arguments)
    say(shlex.join(command))
    if options.dry_run:
        return 0
    return os.execv(command[0], command)


def _slurm(options: argparse.Namespace, arguments: list[str]) -> int:
    site = read_site(options.site)
    job = _job(options, arguments, site)
    lint(job, site)
    python = site.python or ("python3" if site.container else sys.executable)
    script = sbatch.script(job, site, python)
    if options.dry_run:
        say(script.rstrip())
        return 0
    slurm.ask(["sbatch", "--version"])
    slurm.check(job, site)
    if active := slurm.queue(record.ids(job.folder)):
        raise Refused(
            f"--name: {job.name!r} is in the queue as job {active[0]['job']}: wait for it, or `launch cancel` it"
        )
    record.check_unused(job)
    if options.check:
        _check(arguments)
    path = record.write(job, script)
    number = ""
    for _ in range(job.chain):
        number = slurm.submit(path, after=number or None)
        record.add_id(job.folder, number)
        many = f", {len(job.tasks)} tasks" if job.tasks else ""
        log = sbatch.output(job).replace("%j", number).replace("%A_%a", f"{number}_*").replace("%%", "%")
        say(f"job {number}{many}: log {log}")
    say(f"run {job.run}: python -m launch status|logs|cancel {job.name if _is_found(job) else job.folder}")
    return 0


def _is_found(job: Job) -> bool:
    return Path(job.folder) == Path("runs", job.name, "launch")


def _check(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "config", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Refused(done.stderr.replace("error: ", "").strip() or "the trainer refuses this config")


def _status(folder: str, job: dict[str, object]) -> int:
    numbers = record.ids(folder)
    for row in slurm.queue(numbers):
        say(f"job {row['job']}  {row['state'].lower()}  ran {row['time']}, {row['left']} left, "
            f"{row['nodes']} nodes  {row['reason']}")  # fmt: skip
    for line in slurm.history(numbers) if numbers else ():
        say(f"job {line}")
    tasks = job.get("tasks")
    runs = [str(task["run"]) for task in tasks] if isinstance(tasks, list) and tasks else [str(job["run"])]
    for run in runs:
        outcome = after.read_outcome(run)
        how = f"{outcome.get('status')}: {outcome.get('reason')}" if outcome else "no outcome yet"
        say(f"run {run}  checkpoint at step {after.newest_step(run)}  {how}")
    return 0


def _logs(folder: str, follow: bool) -> int:
    logs = sorted(Path(folder).glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise Refused(f"{folder}: no log yet: the job has not started")
    say(f"==> {logs[-1]}")
    if follow:
        os.execvp("tail", ["tail", "-n", "50", "-f", str(logs[-1])])
    sys.stdout.write(logs[-1].read_text(errors="replace"))
    return 0


def _cancel(folder: str) -> int:
    numbers = sorted({row["job"].partition("_")[0] for row in slurm.queue(record.ids(folder))}, key=int)
    if not numbers:
        say("no job of this run is in the queue")
        return 0
    slurm.ask(["scancel", *numbers])
    say(f"cancelled {' '.join(numbers)}: the run goes on from its last checkpoint with `launch requeue`")
    return 0


def _requeue(folder: str) -> int:
    """A job that runs is stopped, saves and starts again; one that has ended is submitted again."""
    if active := slurm.queue(record.ids(folder)):
        running = [row["job"] for row in active if row["state"] == "RUNNING"]
        if not running:
            raise Refused(f"job {active[0]['job']} is in the queue already: {active[0]['state'].lower()}")
        for number in running:
            slurm.ask(["scontrol", "requeue", number])
        say(f"requeued {' '.join(running)}")
        return 0
    number = slurm.submit(str(Path(folder, record.SCRIPT)))
    record.add_id(folder, number)
    say(f"job {number}")
    return 0


def run(words: Sequence[str]) -> int:
    split = words.index("--") if "--" in words else len(words)
    own, arguments = list(words[:split]), list(words[split + 1 :])
    options = _parser().parse_args(own)
    if arguments and options.command not in ("local", "slurm", "sweep"):
        raise Refused(f"{options.command}: takes nothing after --")
    match options.command:
        case "local":
            return _local(options, arguments)
        case "slurm" | "sweep":
            return _slurm(options, arguments)
        case "after":
            verdict, reason = after.judge(
                options.run, Path(options.record), options.life, options.code, options.crashes, options.chain
            )
            print(f"launch: {reason}", file=sys.stderr, flush=True)  # noqa: T201
            say(verdict)
            return 0
    folder, job = record.find(options.run)
    match options.command:
        case "status":
            return _status(folder, job)
        case "logs":
            return _logs(folder, options.follow)
        case "cancel":
            return _cancel(folder)
        case _:
            return _requeue(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except Refused as problem:
        for line in str(problem).splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
