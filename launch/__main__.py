"""The command line: python -m launch COMMAND ... -- ARGUMENTS OF THE TRAINER."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from . import Refused, after, record, sbatch, slurm, sweep, torchrun
from .job import NAME, Job, parse_minutes, validate
from .site import Site, read_site, read_yaml

DEFAULT_NAME = "digits_cnn"  # of the run that the trainer makes without a config
DESCRIPTION = """Run the trainer on this machine or on a Slurm cluster.

Everything after `--` is passed to the trainer unchanged: a config file and flags. The same command again resumes the
same run. slurm/README.md describes each step from a clone to a job on two nodes."""
EXAMPLES = """examples:
  python -m launch local --gpus 4 -- configs/fashion_cnn.yaml --batch_size 400
  python -m launch slurm --nodes 2 --gpus-per-node 4 --time 04:00:00 -- configs/cifar10_resnet18.yaml
  python -m launch sweep --sweep optimizer.lr=1e-4,3e-4 --time 30 -- configs/fashion_cnn.yaml
  python -m launch status cifar10_resnet18

exit codes: 0 done; 1 failed; 2 a mistake in the command, which a line on standard error names: nothing was submitted
"""


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the output of the command


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as one line."""

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

    def command_for_run(name: str, text: str) -> argparse.ArgumentParser:
        subparser = command(name, text)
        subparser.add_argument("run", metavar="RUN", help="the run's name or directory")
        return subparser

    _add_local_options(command("local", "run on this machine under torchrun"))
    _add_job_options(command("slurm", "submit a run to Slurm"))
    sweep_parser = command("sweep", "submit a job array, a run for every combination of settings")
    _add_job_options(sweep_parser)
    _add_sweep_options(sweep_parser)
    command_for_run("status", "show the jobs of a run and its progress")
    logs_parser = command_for_run("logs", "print the log of a run")
    logs_parser.add_argument("--follow", "-f", action="store_true", help="keep printing what is appended")
    command_for_run("cancel", "cancel the jobs of a run")
    command_for_run("requeue", "put a run back into the queue, or submit it again")
    _add_after_options(command("after", "decide whether a job is requeued; called by the batch script"))
    return parser


def _add_local_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, metavar="N", help="one rank on each of N GPUs")
    parser.add_argument("--ranks", type=int, metavar="N", help="N ranks on the CPU (default: 1)")
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="restarts of killed ranks (default: 3)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command only")


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument

    def add_integer(flag: str, text: str, default: int | None = None) -> None:
        add(flag, type=int, metavar="N", default=default, help=text)

    add("--name", help="of the run and the job (default: the config's name)")
    add_integer("--nodes", "how many machines (default: 1)", 1)
    add_integer("--gpus-per-node", "one rank on each; 0 is CPU only (default: 0)", 0)
    add_integer("--ranks-per-node", "ranks on the CPU (default: one per GPU, else 1)")
    add_integer("--cpus-per-rank", "cores for a rank and its loaders (default: the site's)")
    add("--time", default="60", metavar="HH:MM:SS", help="time limit of a job, or minutes (default: 60)")
    for option in ("partition", "account", "qos", "constraint"):
        add(f"--{option}", help="(default: the site's)")
    add("--starter", choices=("torchrun", "srun"), default="torchrun",
        help="torchrun: one per node, restarts killed ranks; srun: a task per rank (default: torchrun)")  # fmt: skip
    add_integer("--restarts", "of killed ranks within a job, by torchrun (default: 3)", 3)
    add_integer("--crashes", "give up after N attempts in a row without a new checkpoint (default: 3)", 3)
    add_integer("--signal-seconds", "how long before the time limit to save and stop (default: the site's)")
    add_integer("--save-seconds", "how long the slowest save takes (default: the site's)")
    add("--no-requeue", action="store_true", help="never put the job back into the queue")
    add_integer("--chain", "submit N jobs, each after the previous one (default: 1)", 1)
    add("--site", metavar="FILE", help="(default: $LAUNCH_SITE, else slurm/site.yaml)")
    add("--check", action="store_true", help="let the trainer check config and flags first; takes some seconds")
    add("--dry-run", action="store_true", help="show the script, submit nothing")


def _add_sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sweep", action="append", required=True, metavar="SETTING=VALUE,VALUE",
                        help="a setting and its values; may be repeated")  # fmt: skip
    parser.add_argument("--parallel", type=int, metavar="N", help="at most N tasks at a time")


def _add_after_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="the run's directory or URL")
    parser.add_argument("--record", required=True, metavar="FILE", help="the job's attempts.jsonl")
    parser.add_argument("--attempt", "--life", required=True, metavar="ID",
                        help="job id and restart count (--life: in scripts that earlier versions wrote)")  # fmt: skip
    parser.add_argument("--code", type=int, required=True, help="exit code of the job step")
    parser.add_argument("--crashes", type=int, required=True, metavar="N", help="see slurm --help")
    parser.add_argument("--chain", action="store_true", help="another job of the chain may follow")


def _job(options: argparse.Namespace, site: Site) -> Job:
    arguments: list[str] = options.arguments
    file = record.config_file(arguments)
    values = read_yaml(file) if file else {}
    url = record.flag_value(arguments, "run.url") or (values.get("run") or {}).get("url")
    name = options.name or (_name_from_url(url) if url else Path(file or DEFAULT_NAME).stem)
    root = f"{site.scratch}/runs" if site.scratch else "runs"
    run = url or f"{root}/{name}"
    ranks = options.ranks_per_node or options.gpus_per_node or 1
    job = Job(
        name=name, run=run, arguments=tuple(_without_flag(arguments, "--run.url")), folder=record.folder_of(name, run),
        nodes=options.nodes, ranks_per_node=ranks, gpus_per_node=options.gpus_per_node,
        cpus_per_rank=options.cpus_per_rank or site.cpus_per_rank, minutes=parse_minutes(options.time),
        starter=options.starter, partition=options.partition, account=options.account, qos=options.qos,
        constraint=options.constraint, signal_seconds=_or_default(options.signal_seconds, site.signal_seconds),
        save_seconds=_or_default(options.save_seconds, site.save_seconds), restarts=options.restarts,
        crashes=options.crashes, requeue=not options.no_requeue, chain=options.chain,
    )  # fmt: skip
    if options.command == "sweep":
        tasks = sweep.tasks(name, run, options.sweep)
        job = replace(job, tasks=tasks, parallel=options.parallel)
    return job


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value


def _name_from_url(url: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "_", url.rstrip("/").rpartition("/")[2]).strip("._-")
    return name if NAME.fullmatch(name) else "run"


def _without_flag(arguments: list[str], flag: str) -> list[str]:
    """The arguments without a flag and its value, which the script adds itself."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == flag:
            skip = True
        elif not argument.startswith(f"{flag}="):
            kept.append(argument)
    return kept


def _local(options: argparse.Namespace) -> int:
    if options.gpus and options.ranks and options.gpus != options.ranks:
        raise Refused(
            f"--ranks: {options.ranks} ranks for {options.gpus} GPUs: a rank uses exactly one: give one of them"
        )
    ranks = options.gpus or options.ranks or 1
    if ranks < 1 or options.max_restarts < 0:
        raise Refused(f"--ranks: {ranks} with --max-restarts {options.max_restarts}: should be at least 1 and 0")
    if file := record.config_file(options.arguments):
        read_yaml(file)
    command = torchrun.local(sys.executable, ranks, options.max_restarts, options.arguments)
    say(shlex.join(command))
    if options.dry_run:
        return 0
    return os.execv(command[0], command)


def _slurm(options: argparse.Namespace) -> int:
    site = read_site(options.site)
    job = _job(options, site)
    validate(job, site)
    python = site.python or ("python3" if site.container else sys.executable)
    script = sbatch.script(job, site, python)
    if options.dry_run:
        say(script.rstrip())
        return 0
    slurm.call(["sbatch", "--version"])
    slurm.check(job, site)
    if active := slurm.queue(record.ids(job.folder)):
        raise Refused(
            f"--name: {job.name!r} is in the queue as job {active[0]['job']}: wait for it, or `launch cancel` it"
        )
    record.check_unused(job)
    if options.check:
        _check_config(options.arguments)
    _submit(job, record.write(job, script))
    return 0


def _submit(job: Job, script: str) -> None:
    """Submit the jobs of the chain, each after the previous one."""
    job_id = ""
    for _ in range(job.chain):
        job_id = slurm.submit(script, after=job_id or None)
        record.add_id(job.folder, job_id)
        tasks = f", {len(job.tasks)} tasks" if job.tasks else ""
        log = sbatch.log_pattern(job).replace("%j", job_id).replace("%A_%a", f"{job_id}_*").replace("%%", "%")
        say(f"job {job_id}{tasks}: log {log}")
    found_by_name = Path(job.folder) == Path("runs", job.name, "launch")
    say(f"run {job.run}: python -m launch status|logs|cancel {job.name if found_by_name else job.folder}")


def _check_config(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "config", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Refused(done.stderr.replace("error: ", "").strip() or "the trainer refuses this config")


def _status(options: argparse.Namespace) -> int:
    folder, job = record.find(options.run)
    job_ids = record.ids(folder)
    for row in slurm.queue(job_ids):
        say(f"job {row['job']}  {row['state'].lower()}  ran {row['time']}, {row['left']} left, "
            f"{row['nodes']} nodes  {row['reason']}")  # fmt: skip
    for line in slurm.history(job_ids) if job_ids else ():
        say(f"job {line}")
    tasks = job.get("tasks")
    runs = [str(task["run"]) for task in tasks] if isinstance(tasks, list) and tasks else [str(job["run"])]
    for run in runs:
        outcome = after.read_outcome(run)
        ending = f"{outcome.get('status')}: {outcome.get('reason')}" if outcome else "no outcome yet"
        say(f"run {run}  checkpoint at step {after.newest_step(run)}  {ending}")
    return 0


def _logs(options: argparse.Namespace) -> int:
    folder, _ = record.find(options.run)
    logs = sorted(Path(folder).glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise Refused(f"{folder}: no log yet: the job has not started")
    say(f"==> {logs[-1]}")
    if options.follow:
        os.execvp("tail", ["tail", "-n", "50", "-f", str(logs[-1])])
    sys.stdout.write(logs[-1].read_text(errors="replace"))
    return 0


def _cancel(options: argparse.Namespace) -> int:
    folder, _ = record.find(options.run)
    job_ids = sorted({row["job"].partition("_")[0] for row in slurm.queue(record.ids(folder))}, key=int)
    if not job_ids:
        say("no job of this run is in the queue")
        return 0
    slurm.call(["scancel", *job_ids])
    say(f"cancelled {' '.join(job_ids)}: `launch requeue` resumes the run from its last checkpoint")
    return 0


def _requeue(options: argparse.Namespace) -> int:
    """A job that is running saves, stops and starts again; one that has ended is submitted again."""
    folder, _ = record.find(options.run)
    if active := slurm.queue(record.ids(folder)):
        running = [row["job"] for row in active if row["state"] == "RUNNING"]
        if not running:
            raise Refused(f"job {active[0]['job']} is in the queue already: {active[0]['state'].lower()}")
        for job_id in running:
            slurm.call(["scontrol", "requeue", job_id])
        say(f"requeued {' '.join(running)}")
        return 0
    job_id = slurm.submit(str(Path(folder, record.SCRIPT)))
    record.add_id(folder, job_id)
    say(f"job {job_id}")
    return 0


def _after(options: argparse.Namespace) -> int:
    """The decision goes to standard output, for the batch script; the reason to standard error, for the log."""
    decision, reason = after.decide(
        options.run, Path(options.record), options.attempt, options.code, options.crashes, options.chain
    )
    print(f"launch: {reason}", file=sys.stderr, flush=True)  # noqa: T201
    say(decision)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "local": _local,
    "slurm": _slurm,
    "sweep": _slurm,
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "requeue": _requeue,
    "after": _after,
}
WITH_TRAINER_ARGUMENTS = ("local", "slurm", "sweep")


def run(words: Sequence[str]) -> int:
    split = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:split])
    options.arguments = list(words[split + 1 :])  # of the trainer
    if options.arguments and options.command not in WITH_TRAINER_ARGUMENTS:
        raise Refused(f"{options.command}: takes nothing after --")
    return COMMANDS[options.command](options)


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
