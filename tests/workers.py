"""What the ranks of a test run in place of the command line: functions of a Runtime, started from the forkserver."""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from .ranks import _context, free_port


def _call(
    work: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world: int, port: int, pipe: Connection
) -> None:
    from trainer.distributed.process import ProcessInfo
    from trainer.distributed.runtime import Runtime

    try:
        process = ProcessInfo(rank, world, rank, world, port=port)
        with Runtime(process, precision="fp64", deterministic=True, threads=1) as runtime:
            _send(pipe, (True, work(runtime, *arguments)))
    except BaseException:
        _send(pipe, (False, traceback.format_exc()))


def _send(pipe: Connection, value: Any) -> None:
    """As bytes: multiprocessing would share a tensor's memory, which ends with the process."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    pipe.send_bytes(buffer.getvalue())


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 60) -> list[Any]:
    """`work(runtime, *arguments)` on every rank; returns what each returned. Functions must be importable."""
    port, pipes, processes = free_port(), [], []
    for rank in range(world):
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_call, args=(work, arguments, rank, world, port, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    results = []
    for rank, pipe in enumerate(pipes):
        assert pipe.poll(timeout), f"rank {rank} did not answer within {timeout} s"
        good, value = torch.load(io.BytesIO(pipe.recv_bytes()), map_location="cpu", weights_only=True)
        assert good, value
        results.append(value)
    for process in processes:
        process.join(10)
    return results
