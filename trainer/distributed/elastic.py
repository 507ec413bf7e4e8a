"""What torchrun leaves to its ranks: a name for each attempt of the group, and to end with the agent that started them.

TORCHELASTIC_RESTART_COUNT cannot be the name: each agent counts the failures that it saw itself, a node that joins
raises no count, and the new node's agent begins at 0. The round of the rendezvous, which all agents know, is not passed
to the ranks. The store and the keys in it survive a restart.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import signal
import sys
import time
import uuid
from typing import Any

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.01


def agree_on_attempt(store: Any, rank: int, world: int, timeout: datetime.timedelta) -> str:
    """A name that the ranks of this attempt share and no earlier attempt had; raises TimeoutError.

    Each rank sends a request with an id that is new in each attempt. Rank 0 answers every request that it sees with the
    name, until every rank has acknowledged that very name. A request of an earlier attempt may be answered, which does
    no harm: no rank can take an answer that was meant for another attempt.
    """
    own_id = uuid.uuid4().hex
    if rank:
        store.set(f"elastic/request/{rank}", own_id)
        store.wait([f"elastic/response/{own_id}"], timeout)
        name = bytes(store.get(f"elastic/response/{own_id}")).decode()
        store.set(f"elastic/acknowledged/{name}/{rank}", "")
        return name
    name = own_id
    deadline = time.monotonic() + timeout.total_seconds()
    waiting, answered = set(range(1, world)), set()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"elastic/acknowledged/{name}/{other}"]):
                waiting.discard(other)
            elif store.check([f"elastic/request/{other}"]):
                request = bytes(store.get(f"elastic/request/{other}")).decode()
                if request not in answered:
                    answered.add(request)
                    store.set(f"elastic/response/{request}", name)
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(waiting)} did not answer within {timeout}")
        time.sleep(POLL_SECONDS)
    return name


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel end this process when its parent is gone: orphans would keep training next to their successors."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it was gone already
        os.kill(os.getpid(), signal.SIGKILL)
