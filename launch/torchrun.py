"""The commands that start the ranks: torchrun's and, without torchrun, the trainer's own."""

from __future__ import annotations

from collections.abc import Sequence

# SIGUSR1 is Slurm's warning: it kills torchrun unless torchrun is set to pass it on to the ranks.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# Gives the ranks of each restart a store of their own. The store that torchrun shares otherwise keeps its first address
# forever, so that a node that joins later waits without end (seen with torch 2.14).
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # not --shutdown-timeout: older versions refuse it


def local(python: str, ranks: int, restarts: int, arguments: Sequence[str]) -> list[str]:
    """All ranks on this machine."""
    return [
        python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}", f"--signals-to-handle={SIGNALS}", "-m", "trainer", *arguments,
    ]  # fmt: skip


def agent(python: str, nodes: str, ranks: int, restarts: int) -> list[str]:
    """torchrun on one node of a job; the script adds the endpoint and the id of the rendezvous.

    `nodes` is a number, or a range such as 1:4, with which the run continues when a node is lost or joins.
    """
    return [
        python, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}", f"--signals-to-handle={SIGNALS}",
    ]  # fmt: skip
