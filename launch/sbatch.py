"""The batch script: a pure function of a Job and a Site, compared with the golden files in slurm/.

The script relies on what was measured on a real Slurm: a signal with B: reaches only the batch shell and one without it
only the steps; a shell waits for a foreground command before it runs a trap; a trap of SIGCONT loses the signal that
follows it; the exit codes of torchrun and srun do not tell how the run ended, so outcome.json does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from . import torchrun
from .job import Job, time_text
from .site import Site

WIDTH = 110
FIRST_NODE = 'first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


def script(job: Job, site: Site, python: str) -> str:
    """`python` is the interpreter that has the trainer, on the nodes or in the container."""
    parts = [
        _header(job, site), _environment(site), _run(job), _signals(job), _start(job, site, python),
        _end(job, site, python),
    ]  # fmt: skip
    return "\n".join(parts)


def bash_array(name: str, words: Sequence[str]) -> str:
    """Over several lines where it is long. Bash neither splits nor expands the elements again."""
    lines: list[str] = []
    line = ""
    for word in map(shlex.quote, words):
        if line and len(line) + len(word) > WIDTH:
            lines, line = [*lines, line], ""
        line += f"{' ' if line else ''}{word}"
    if not lines and len(line) + len(name) < WIDTH:
        return f"{name}=({line})\n"
    return "\n    ".join([f"{name}=(", *lines, line]) + "\n)\n"


def _option(name: str, value: str) -> str:
    """An option as #SBATCH parses it: in double quotes, within which only the quote and the backslash are special."""
    if not re.fullmatch(r"[A-Za-z0-9_./%:@=,&|*()\[\]-]+", value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"--{name}={value}"


def log_pattern(job: Job) -> str:
    """Slurm's pattern for the file of the log; a percent sign in the folder's name is doubled."""
    return f"{job.folder.replace('%', '%%')}/slurm-{'%A_%a' if job.tasks else '%j'}.out"


def _header(job: Job, site: Site) -> str:
    shrinks = _shrinks(job, site)
    options: list[tuple[str, str | None]] = [
        ("job-name", job.name),
        ("partition", job.partition or site.partition),
        ("account", job.account or site.account),
        ("qos", job.qos or site.qos),
        ("constraint", job.constraint or site.constraint),
        ("nodes", f"1-{job.nodes}" if shrinks else str(job.nodes)),
        # With a range of nodes, --ntasks-per-node would make Slurm allocate the smallest number.
        ("ntasks-per-node", None if shrinks else str(job.ranks_per_node if job.starter == "srun" else 1)),
        ("cpus-per-task", str(_cpus_per_task(job))),
        ("gpus-per-node", str(job.gpus_per_node) if job.gpus_per_node else None),
        ("time", time_text(job.minutes)),
        ("signal", f"B:USR1@{job.signal_seconds}"),
        ("open-mode", "append"),
        ("output", log_pattern(job)),
    ]
    if job.tasks:
        limit = f"%{job.parallel}" if job.parallel else ""
        options.append(("array", f"0-{len(job.tasks) - 1}{limit}"))
    lines = [_option(name, value) for name, value in options if value is not None]
    lines += ["--requeue" if job.requeue else "--no-requeue", *(["--no-kill"] if shrinks else []), *site.sbatch]
    text = "".join(f"#SBATCH {line}\n" for line in lines)
    return f"#!/bin/bash\n{text}# Written by `python -m launch slurm` and explained in slurm/README.md.\n"


def _environment(site: Site) -> str:
    lines = [f"module load {shlex.quote(module)}" for module in site.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    lines += [*site.setup, "set -u"]  # only here, since the module command of many clusters fails under it
    return "\n".join(lines) + "\n"


def _run(job: Job) -> str:
    text = bash_array("arguments", job.arguments)
    record = f"{job.folder}/attempts{'-%s' if job.tasks else ''}.jsonl"
    if not job.tasks:
        return text + f"run={shlex.quote(job.run)}\nrecord={shlex.quote(record)}\n"
    text += "case $SLURM_ARRAY_TASK_ID in\n"
    for index, task in enumerate(job.tasks):
        text += f"{index}) run={shlex.quote(task.run)} arguments+=({' '.join(map(shlex.quote, task.arguments))}) ;;\n"
    text += "esac\n"
    return text + f'record={shlex.quote(job.folder)}/attempts-"$SLURM_ARRAY_TASK_ID".jsonl\n'


def _signals(job: Job) -> str:
    """The job's times, port and restarts, and the path of the signals to stop."""
    return f"""\
export LAUNCH_STARTED=$EPOCHSECONDS
restarts=${{SLURM_RESTART_COUNT:-0}} # unset in the first attempt
port=$((20000 + (SLURM_JOB_ID + 997 * restarts) % 12000))
read -r LAUNCH_END LAUNCH_SUBMITTED < <(SLURM_TIME_FORMAT=%s squeue -h -j "$SLURM_JOB_ID" -o '%e %V')
export LAUNCH_END LAUNCH_SUBMITTED
export {torchrun.SHUTDOWN_VARIABLE}={job.shutdown_seconds} # seconds that torchrun gives the ranks to save

# Slurm sends its warning, SIGUSR1, to this shell only, which passes it on to the ranks. SIGTERM means that Slurm ends
# the job; it goes to the ranks as well.
terminated_at=
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'terminated_at=$EPOCHSECONDS' TERM
"""


def _start(job: Job, site: Site, python: str) -> str:
    """The job step: srun in the background, so that the shell runs a trap at once."""
    options = ["--export=ALL", f"--cpus-per-task={_cpus_per_task(job)}"]
    options += ["--no-kill", "--ntasks-per-node=1"] if _shrinks(job, site) else ["--kill-on-bad-exit=1"]
    options += [*site.srun, *_container_options_of_srun(site)]
    lines, command = (_with_srun if job.starter == "srun" else _with_torchrun)(job, site, python)
    lines.append(bash_array("step", ["srun", *options]).rstrip())
    # The warning would kill a Python that does not handle it yet. Ignored, it is lost, but the trainer knows the end
    # time as well.
    lines.append(f"""\"${{step[@]}}" bash -c 'trap "" USR1; exec "$@"' bash \\\n    {command} &""")
    lines.append("""\
srun_pid=$!
wait "$srun_pid"
code=$?
while kill -0 "$srun_pid" 2>/dev/null; do # a trapped signal ends the wait, not the step
    wait "$srun_pid"
    code=$?
done""")
    return "\n".join(lines) + "\n"


def _with_srun(job: Job, site: Site, python: str) -> tuple[list[str], str]:
    """Lines of the script, and the command of the step, in which srun starts every rank."""
    lines = [
        FIRST_NODE, "export MASTER_ADDR=$first_node MASTER_PORT=$port",
        bash_array("trainer", [*_container_command(site), python, "-m", "trainer"]).rstrip(),
    ]  # fmt: skip
    return lines, '"${trainer[@]}" "${arguments[@]}" --run.url "$run"'


def _with_torchrun(job: Job, site: Site, python: str) -> tuple[list[str], str]:
    """Lines of the script, and the command of the step, in which srun starts a torchrun on every node."""
    shrinks = _shrinks(job, site)
    nodes = "1" if job.nodes == 1 else '"1:$SLURM_JOB_NUM_NODES"' if shrinks else '"$SLURM_JOB_NUM_NODES"'
    words = [*_container_command(site), *torchrun.agent(python, "@", job.ranks_per_node, job.restarts)]
    agent = bash_array("agent", words).rstrip().replace("--nnodes=@", f"--nnodes={nodes}")
    rendezvous = "--standalone" if job.nodes == 1 else (
        '--rdzv-backend=c10d --rdzv-endpoint="$first_node:$port" --rdzv-id="$SLURM_JOB_ID.$restarts"'
    )  # fmt: skip
    lines = [FIRST_NODE] if job.nodes > 1 else []
    lines.append(agent)
    if shrinks:
        lines.append(f"export {torchrun.OWN_STORE} # without it, a node that joins later waits forever")
    lines.append(f"agent+=({rendezvous})")
    return lines, '"${agent[@]}" -m trainer "${arguments[@]}" --run.url "$run"'


def _shrinks(job: Job, site: Site) -> bool:
    return site.after_node_failure == "shrink" and job.nodes > 1


def _cpus_per_task(job: Job) -> int:
    return job.cpus_per_rank * (job.ranks_per_node if job.starter == "torchrun" else 1)


def _container_command(site: Site) -> list[str]:
    """What comes before the command that is to run in the container."""
    container = site.container
    if container is None or container.kind != "apptainer":
        return []
    mounts = [f"--bind={mount}" for mount in container.mounts]
    return ["apptainer", "exec", "--nv", *mounts, container.image]


def _container_options_of_srun(site: Site) -> list[str]:
    """enroot is a plugin of srun, which takes the image as an option."""
    container = site.container
    if container is None or container.kind != "enroot":
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", *mounts]


def _end(job: Job, site: Site, python: str) -> str:
    """What follows the step: the outcome decides whether the job is requeued, unless Slurm has decided."""
    options = _container_options_of_srun(site)
    single_task = ["srun", "--overlap", "--nodes=1", "--ntasks=1", *options] if options else []
    after = [*single_task, *_container_command(site), python, "-m", "launch", "after"]
    chain = " --chain" if job.chain > 1 else ""
    requeue = 'scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until Slurm ends this shell'
    if not job.requeue:
        requeue = 'echo "launch: not requeued, because of --no-requeue: submit again to resume"'
    return f"""\
# Cancelled, or preempted and requeued by Slurm itself: this script must not requeue the job.
if [[ -n $terminated_at && ( $LAUNCH_END != [0-9]* || $terminated_at -lt $LAUNCH_END ) ]]; then
    exit 143
fi
{bash_array("after", after).rstrip()}
trap - TERM
trap '' USR1
decision=$("${{after[@]}}" --run "$run" --record "$record" --attempt "$SLURM_JOB_ID.$restarts" \\
    --code "$code" --crashes {job.crashes}{chain})
case $decision in
done | next) exit 0 ;;
requeue)
    {requeue}
    ;;
esac
exit "$((code ? code : 1))"
"""
