"""What torchrun leaves to its ranks: a name for each life of the group, and to end with the agent that started them.

TORCHELASTIC_RESTART_COUNT cannot be the name: each agent counts the failures that it saw itself, a node that joins
raises no count, and the new node's agent begins at 0. The round of the rendezvous, which all agents know, is not passed
to the ranks. The store outlives the lives, and so do the keys in it.
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
    """A name that the ranks of this life have in common and no life before had; raises TimeoutError.

    Every rank greets with a word of its own, new in each life; rank 0 answers each word that it finds with the name,
    until every rank has thanked it for that very name. A greeting from a life before may be answered in vain, but no
    rank can take an answer that was meant for another life.
    """
    word = uuid.uuid4().hex
    if rank:
        store.set(f"elastic/greeting/{rank}", word)
        store.wait([f"elastic/answer/{word}"], timeout)
        name = bytes(store.get(f"elastic/answer/{word}")).decode()
        store.set(f"elastic/thanks/{name}/{rank}", "")
        return name
    deadline = time.monotonic() + timeout.total_seconds()
    waiting, answered = set(range(1, world)), set()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"elastic/thanks/{word}/{other}"]):
                waiting.discard(other)
            elif store.check([f"elastic/greeting/{other}"]):
                greeting = bytes(store.get(f"elastic/greeting/{other}")).decode()
                if greeting not in answered:
                    answered.add(greeting)
                    store.set(f"elastic/answer/{greeting}", word)
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(waiting)} have not come within {timeout}")
        time.sleep(POLL_SECONDS)
    return word


def die_with_parent() -> None:
    """Let the kernel kill this process when torchrun is gone: orphans would train on beside their successors."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone already
        os.kill(os.getpid(), signal.SIGKILL)
