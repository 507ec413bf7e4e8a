"""A real Slurm on this machine: munged, slurmctld and a few slurmd nodes in a temporary folder, removed at the end.

    python -m tests.slurm_cluster [NODES]    starts one, prints the environment of its clients, stops it on Ctrl-C

Needs the Debian packages slurm-wlm and munge, and root or unprivileged user namespaces: each slurmd runs in UTS and
mount namespaces of its own, so that its `hostname` is the node's name and the names of the others resolve, as on a real
cluster. Neither /etc nor systemd is changed. As root, steps are tracked by a private freezer cgroup as in production,
where a signal to a step reaches what srun started and not its children.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "munge", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel",
            "unshare")  # fmt: skip
INSTALL = "apt-get install slurm-wlm munge"
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
CPUS, GPUS = 4, 2  # of a node; may be more than the machine has
KILL_WAIT, GRACE, SLURMD_TIMEOUT, REQUEUE_WAIT = 10, 10, 10, 5  # seconds; REQUEUE_WAIT is at least 5

# Run by a shell in a node's namespaces: sets the host name, /etc/hosts and the cgroup of the freezer; then slurmd.
ENTER = """
hostname "$1" && mount --bind "$2/etc/hosts" /etc/hosts || exit 1
if [ -n "$3" ]; then
    mount -t cgroup -o freezer none "$2/cgroup/all" && mkdir -p "$2/cgroup/all/$3/$1" &&
        mount --bind "$2/cgroup/all/$3/$1" "$2/cgroup/freezer" && umount "$2/cgroup/all" || exit 1
fi
exec slurmd -D -N "$1" -f "$2/etc/slurm.conf"
"""

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_wait}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
MailProg=/bin/true
ProctrackType=proctrack/{track}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
MessageTimeout=10
MinJobAge=86400
ReturnToService=2
TreeWidth=65533
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES State=UP MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


class Unavailable(Exception):
    """This machine cannot run a cluster; the message says what is missing."""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Poll; raises AssertionError at the end of the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {seconds} s: {what}"
        time.sleep(0.05)


def _works(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _namespaces() -> list[str]:
    """The unshare command that gives a node its namespaces. Raises Unavailable."""
    for user_options in ([], ["--map-current-user", "--keep-caps"]):
        command = ["unshare", "--uts", "--mount", "--propagation", "private", *user_options]
        if _works([*command, "sh", "-c", "hostname probe && mount --bind /dev/null /etc/hosts"]):
            return command
    raise Unavailable("a Slurm on this machine needs root or unprivileged user namespaces")


class Cluster:
    """Use as a context manager. A client needs `environment` in addition to its own."""

    def __init__(self, nodes: int = 2) -> None:
        path = f"{os.environ['PATH']}:{SBIN}"
        missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
        if missing:
            raise Unavailable(f"no {missing[0]} on this machine: {INSTALL}")
        self._unshare = _namespaces()
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._folder = Path(tempfile.mkdtemp(prefix="slurm.", dir="/tmp"))  # the paths of sockets must be short
        self.environment = {"SLURM_CONF": str(self._folder / "etc" / "slurm.conf")}
        self._daemon_environment = {
            "PATH": path, "HOME": os.environ.get("HOME", "/"), "LANG": "C", **self.environment,
        }  # fmt: skip
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._freezer = ""

    def __enter__(self) -> Cluster:
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, *command: str) -> str:
        """Standard output of one of Slurm's clients."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def fail(self, node: str) -> None:
        """The node fails: every process on it is killed, at once, and the controller is told."""
        assert _in_namespace(self._namespace(node)), f"{node} is down"
        self._kill_all(node)
        self._daemons.pop(node).wait()
        self.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def restore(self, node: str) -> None:
        """The node is up again, without jobs."""
        self._start_node(node)
        self._until_idle(1, node)

    def restore_all(self) -> None:
        for node in self.nodes:
            if node not in self._daemons:
                self._start_node(node)
        self._until_idle(len(self.nodes))

    def stop(self) -> None:
        for node in self.nodes:
            if node in self._daemons:
                self._kill_all(node)
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        if self._freezer:
            self._in_freezer('find "$2/cgroup/all/$1" -depth -type d -exec rmdir {} +')
        shutil.rmtree(self._folder, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """The daemons with their children, and everything that runs on a node. No other process of the machine."""
        up = [node for node in self.nodes if node in self._daemons]
        processes = {process for node in up for process in _in_namespace(self._namespace(node))}
        for daemon in self._daemons.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(daemon.pid)
                processes |= {process, *process.children(recursive=True)}
        return list(processes)

    def _namespace(self, node: str) -> str:
        return _mount_namespace(self._daemons[node].pid)

    def _kill_all(self, node: str) -> None:
        """Until none is left, since a process may start another one before it is killed."""
        namespace = self._namespace(node)
        for _ in range(100):
            processes = _in_namespace(namespace)
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if not processes:
                return
            time.sleep(0.02)

    def _in_freezer(self, command: str) -> bool:
        mount = f'mount -t cgroup -o freezer none "$2/cgroup/all" && {command}'
        inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh"]
        return _works([*inside, self._freezer, str(self._folder)])

    def _start_all(self) -> None:
        folder = self._folder
        for part in ("etc", "munge", "state", "run", "log", "dev", "cgroup/all", "cgroup/freezer",
                     *(f"spool/{node}" for node in self.nodes)):  # fmt: skip
            (folder / part).mkdir(parents=True, mode=0o755)
        if os.geteuid() == 0:
            self._freezer = f"trainer-test.{os.getpid()}.{secrets.token_hex(4)}"
            if not self._in_freezer('mkdir "$2/cgroup/all/$1"'):
                self._freezer = ""
        ports = _free_ports(len(self.nodes) + 1)
        self._configure(ports)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        self._start("munged", [
            "munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}",
            f"--socket={folder}/munge/socket", f"--pid-file={folder}/munge/pid", f"--log-file={folder}/log/munged.log",
            f"--seed-file={folder}/munge/seed",
        ])  # fmt: skip
        wait_until(lambda: (folder / "munge" / "socket").exists(), "munged")
        self._start("slurmctld", ["slurmctld", "-D", "-f", f"{folder}/etc/slurm.conf"])
        wait_until(lambda: _listens(ports[0]), "slurmctld")
        for node in self.nodes:
            self._start_node(node)
        self._until_idle(len(self.nodes))

    def _configure(self, ports: Sequence[int]) -> None:
        folder, etc = self._folder, self._folder / "etc"
        addresses = {node: f"127.0.77.{number}" for number, node in enumerate(self.nodes, 1)}
        hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {node}\n" for node, address in addresses.items())
        (etc / "hosts").write_text(hosts)
        for number in range(GPUS):  # Slurm requires a device, but never opens it
            (folder / "dev" / f"gpu{number}").symlink_to("/dev/null")
        (etc / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/dev/gpu[0-{GPUS - 1}]\n")
        cgroup = f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n" if self._freezer else ""
        (etc / "cgroup.conf").write_text(cgroup)
        lines = [
            f"NodeName={node} NodeHostName={node} NodeAddr={address} Port={port} CPUs={CPUS} Boards=1 "
            f"SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=64000 Gres=gpu:{GPUS} State=UNKNOWN"
            for (node, address), port in zip(addresses.items(), ports[1:], strict=True)
        ]
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        (etc / "slurm.conf").write_text(CONF.format(
            host=socket.gethostname().partition(".")[0], port=ports[0], user=user, folder=folder,
            track="cgroup" if self._freezer else "linuxproc", nodes="\n".join(lines), kill_wait=KILL_WAIT,
            grace=GRACE, slurmd_timeout=SLURMD_TIMEOUT, requeue_wait=REQUEUE_WAIT,
        ))  # fmt: skip

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self._folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self._daemon_environment, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _start_node(self, node: str) -> None:
        self._start(node, [*self._unshare, "sh", "-c", ENTER, "sh", node, str(self._folder), self._freezer])

    def _until_idle(self, count: int, node: str | None = None) -> None:
        chosen = ["-n", node] if node else []

        def idle() -> bool:
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, f"{name} has ended:\n{self.logs(name)}"
            done = subprocess.run(
                ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N", *chosen], env={**os.environ, **self.environment},
                capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
            return len(set(done.stdout.split())) >= count

        wait_until(idle, f"{count} idle nodes")

    def logs(self, name: str) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in (self._folder / "log").glob(f"{name}.*"))


def _mount_namespace(pid: int | str) -> str:
    """Empty for a process that is gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/mnt").readlink())
    except OSError:
        return ""


def _in_namespace(namespace: str) -> list[psutil.Process]:
    """The processes of a node: job steps are in the mount namespace of its slurmd, but are not its descendants."""
    if namespace in ("", _mount_namespace("self")):  # slurmd has ended, or has no namespace of its own yet
        return []
    processes = []
    for pid in psutil.pids():
        if _mount_namespace(pid) == namespace:
            with contextlib.suppress(psutil.NoSuchProcess):
                processes.append(psutil.Process(pid))
    return processes


def _listening() -> set[int]:
    """Read from the kernel's table: a daemon would log a connection without a request as an error."""
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def _listens(port: int) -> bool:
    return port in _listening()


def _free_ports(count: int) -> list[int]:
    """Consecutive ports below the range from which the kernel assigns ports to clients."""
    taken = _listening()
    while True:
        first = 12000 + secrets.randbelow(7000)
        ports = list(range(first, first + count))
        if not taken & set(ports):
            return ports


def main() -> None:
    import sys

    with Cluster(int(sys.argv[1]) if len(sys.argv) > 1 else 2) as cluster:
        for name, value in cluster.environment.items():
            print(f"export {name}={value}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
