"""The commands that start the ranks: torchrun's and, without torchrun, the trainer's own."""

from __future__ import annotations

from collections.abc import Sequence

# SIGUSR1 is Slurm's warning: torchrun dies of it unless it is told to pass it on.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# With it, the ranks of each life have a store of their own. The one that torchrun shares out else keeps its first
# address for ever, so that a node that joins later waits for an answer that nobody gives (seen with torch 2.14).
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # --shutdown-timeout as older versions can ignore it


def local(python: str, ranks: int, restarts: int, arguments: Sequence[str]) -> list[str]:
    """The ranks of this machine."""
    return [
        python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}", f"--signals-to-handle={SIGNALS}", "-m", "trainer", *arguments,
    ]  # fmt: skip


def agent(python: str, nodes: str, ranks: int, restarts: int) -> list[str]:
    """One node's share of a job; the endpoint and the id of the rendezvous are added by the script.

    `nodes` is a number, or a range such as 1:4, with which the run goes on when a node is lost or found.
    """
    return [
        python, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}", f"--signals-to-handle={SIGNALS}",
    ]  # fmt: skip
