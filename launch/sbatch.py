"""The batch script: a pure function of a Job and a Site, compared with the golden files in slurm/.

What the script relies on was measured on a real Slurm: a signal with B: reaches only the batch shell and one without it
only the steps; a shell waits for a foreground command before it runs a trap; a trap of SIGCONT loses the signal that
follows it; neither torchrun nor srun says by its code how the run ended, so outcome.json does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from . import torchrun
from .job import Job, time_text
from .site import Site

WIDTH = 110


def script(job: Job, site: Site, python: str) -> str:
    """`python` is the interpreter that has the trainer, on the nodes or in the container."""
    parts = [
        _head(job, site), _environment(site), _run(job), _signals(job), _start(job, site, python),
        _end(job, site, python),
    ]  # fmt: skip
    return "\n".join(parts)


def array(name: str, words: Sequence[str]) -> str:
    """A bash array, over several lines where it is long. Its elements are never split or expanded again."""
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
    """An option as #SBATCH reads it: within double quotes, where only the quote and the backslash are special."""
    if not re.fullmatch(r"[A-Za-z0-9_./%:@=,&|*()\[\]-]+", value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"--{name}={value}"


def output(job: Job) -> str:
    """Slurm's pattern for the log; a percent sign of the folder's name is doubled."""
    return f"{job.folder.replace('%', '%%')}/slurm-{'%A_%a' if job.tasks else '%j'}.out"


def _head(job: Job, site: Site) -> str:
    shrink = site.after_node_failure == "shrink" and job.nodes > 1
    options: list[tuple[str, str | None]] = [
        ("job-name", job.name),
        ("partition", job.partition or site.partition),
        ("account", job.account or site.account),
        ("qos", job.qos or site.qos),
        ("constraint", job.constraint or site.constraint),
        ("nodes", f"1-{job.nodes}" if shrink else str(job.nodes)),
        # With a range of nodes, tasks per node would make Slurm take the least.
        ("ntasks-per-node", None if shrink else str(job.ranks_per_node if job.starter == "srun" else 1)),
        ("cpus-per-task", str(_cpus(job))),
        ("gpus-per-node", str(job.gpus_per_node) if job.gpus_per_node else None),
        ("time", time_text(job.minutes)),
        ("signal", f"B:USR1@{job.signal_seconds}"),
        ("open-mode", "append"),
        ("output", output(job)),
    ]
    if job.tasks:
        limit = f"%{job.parallel}" if job.parallel else ""
        options.append(("array", f"0-{len(job.tasks) - 1}{limit}"))
    lines = [_option(name, value) for name, value in options if value is not None]
    lines += ["--requeue" if job.requeue else "--no-requeue", *(["--no-kill"] if shrink else []), *site.sbatch]
    text = "".join(f"#SBATCH {line}\n" for line in lines)
    return f"#!/bin/bash\n{text}# Written by `python -m launch slurm`. What happens here: slurm/README.md.\n"


def _environment(site: Site) -> str:
    lines = [f"module load {shlex.quote(module)}" for module in site.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    lines += [*site.setup, "set -u"]  # of which the modules of many clusters know nothing
    return "\n".join(lines) + "\n"


def _run(job: Job) -> str:
    text = array("arguments", job.arguments)
    record = f"{job.folder}/attempts{'-%s' if job.tasks else ''}.jsonl"
    if not job.tasks:
        return text + f"run={shlex.quote(job.run)}\nrecord={shlex.quote(record)}\n"
    text += "case $SLURM_ARRAY_TASK_ID in\n"
    for index, task in enumerate(job.tasks):
        text += f"{index}) run={shlex.quote(task.run)} arguments+=({' '.join(map(shlex.quote, task.arguments))}) ;;\n"
    text += "esac\n"
    return text + f'record={shlex.quote(job.folder)}/attempts-"$SLURM_ARRAY_TASK_ID".jsonl\n'


def _signals(job: Job) -> str:
    """What the job knows of itself, and who tells whom to stop."""
    return f"""\
export LAUNCH_STARTED=$EPOCHSECONDS
restarts=${{SLURM_RESTART_COUNT:-0}} # unset in the first life
port=$((20000 + (SLURM_JOB_ID + 997 * restarts) % 12000))
read -r LAUNCH_END LAUNCH_SUBMITTED < <(SLURM_TIME_FORMAT=%s squeue -h -j "$SLURM_JOB_ID" -o '%e %V')
export LAUNCH_END LAUNCH_SUBMITTED
export {torchrun.SHUTDOWN_VARIABLE}={job.shutdown_seconds} # seconds to save in, once torchrun is told to stop

# Slurm warns this shell, which warns the ranks. On SIGTERM Slurm has decided, and has told the ranks itself.
told=
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'told=$EPOCHSECONDS' TERM
"""


def _start(job: Job, site: Site, python: str) -> str:
    """The step, in the background, for only then a trap runs at once."""
    shrink = site.after_node_failure == "shrink" and job.nodes > 1
    options = ["--export=ALL", f"--cpus-per-task={_cpus(job)}"]
    options += ["--no-kill", "--ntasks-per-node=1"] if shrink else ["--kill-on-bad-exit=1"]
    options += [*site.srun, *_container_of_srun(site)]
    inside = _container(site)
    lines = []
    if job.starter == "srun":
        lines.append('first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)')
        lines.append("export MASTER_ADDR=$first MASTER_PORT=$port")
        lines.append(array("ranks", [*inside, python, "-m", "trainer"]).rstrip())
        launch = '"${ranks[@]}" "${arguments[@]}" --run.url "$run"'
    else:
        nodes = "1" if job.nodes == 1 else "1:$SLURM_JOB_NUM_NODES" if shrink else "$SLURM_JOB_NUM_NODES"
        if job.nodes > 1:
            lines.append('first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)')
        words = [*inside, *torchrun.agent(python, "@", job.ranks_per_node, job.restarts)]
        text = array("agent", words).rstrip().replace("--nnodes=@", f'--nnodes="{nodes}"' if "$" in nodes else
                                                      f"--nnodes={nodes}")  # fmt: skip
        lines.append(text)
        if shrink:
            lines.append(f"export {torchrun.OWN_STORE} # lest a node that joins later waits for ever")
        where = ['--standalone'] if job.nodes == 1 else [
            "--rdzv-backend=c10d", '--rdzv-endpoint="$first:$port"', '--rdzv-id="$SLURM_JOB_ID.$restarts"',
        ]  # fmt: skip
        lines.append(f"agent+=({' '.join(where)})")
        launch = '"${agent[@]}" -m trainer "${arguments[@]}" --run.url "$run"'
    lines.append(array("step", ["srun", *options]).rstrip())
    # A warning that comes before Python can handle it is lost, and does not kill: the trainer knows the end time too.
    lines.append(f"""\"${{step[@]}}" bash -c 'trap "" USR1; exec "$@"' bash \\\n    {launch} &""")
    lines.append("""\
srun=$!
wait "$srun"
code=$?
while kill -0 "$srun" 2>/dev/null; do # a trapped signal ends the wait, not the step
    wait "$srun"
    code=$?
done""")
    return "\n".join(lines) + "\n"


def _cpus(job: Job) -> int:
    return job.cpus_per_rank * (job.ranks_per_node if job.starter == "torchrun" else 1)


def _container(site: Site) -> list[str]:
    container = site.container
    if container is None or container.kind != "apptainer":
        return []
    mounts = [f"--bind={mount}" for mount in container.mounts]
    return ["apptainer", "exec", "--nv", *mounts, container.image]


def _container_of_srun(site: Site) -> list[str]:
    """enroot runs through a plugin of srun, which takes the image as an option."""
    container = site.container
    if container is None or container.kind != "enroot":
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", *mounts]


def _end(job: Job, site: Site, python: str) -> str:
    """What follows the run: the outcome decides, unless Slurm has."""
    options = _container_of_srun(site)
    alone = ["srun", "--overlap", "--nodes=1", "--ntasks=1", *options] if options else []
    after = [*alone, *_container(site), python, "-m", "launch", "after"]
    flags = f'--run "$run" --record "$record" --life "$SLURM_JOB_ID.$restarts" --code "$code" --crashes {job.crashes}'
    again = {True: 'scontrol requeue "$SLURM_JOB_ID" && sleep 600 # it ends this shell, and not at once',
             False: 'echo "launch: not requeued, as asked: submit again to go on"'}[job.requeue]  # fmt: skip
    following = " --chain" if job.chain > 1 else ""
    return f"""\
# Cancelled, or preempted and put back into the queue by Slurm: then it is not for this shell to requeue.
if [[ -n $told && ( $LAUNCH_END != [0-9]* || $told -lt $LAUNCH_END ) ]]; then
    exit 143
fi
{array("after", after).rstrip()}
trap - TERM
trap '' USR1
verdict=$("${{after[@]}}" {flags}{following})
case $verdict in
done | next) exit 0 ;;
requeue)
    {again}
    ;;
esac
exit "$((code ? code : 1))"
"""
