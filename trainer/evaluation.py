"""One evaluation, by all ranks together; needs no engine."""

from __future__ import annotations

import contextlib

import torch

from .distributed.runtime import Runtime
from .metrics.evaluator import Evaluator, Totals
from .nn.row_state import fresh_rows
from .randomness import Draws
from .services import Loader, Metrics
from .workload import Workload


@torch.no_grad()
def evaluate(
    workload: Workload, evaluator: Evaluator, loader: Loader, runtime: Runtime, seed: int
) -> tuple[Totals, Metrics] | None:
    """Totals and metrics over every sample of the held-out split, each once; None where a rank must stop first."""
    totals: Totals = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.averaged(runtime.per_rank_buffers(workload)))
        workload.eval()
        stack.callback(workload.train)
        stack.enter_context(fresh_rows(workload, loader.evaluation_rows))
        for rows, batch in loader.evaluate():
            if runtime.stopping():
                return None
            if rows.start == rows.stop:  # the last batch may have fewer rows than there are ranks
                continue
            draws = Draws(seed, ("evaluate",), rows, runtime.device, runtime.dtype)
            with runtime.autocast():
                sums = evaluator.totals(batch, draws)
            sums["seen"] = torch.bincount(batch["id"], minlength=loader.evaluation_samples)
            for name, value in sums.items():
                totals[name] = totals[name] + value if name in totals else value
    totals = runtime.total(totals)
    seen = totals.pop("seen")
    assert (seen == 1).all(), f"{int((seen != 1).sum())} samples were not evaluated exactly once"
    # On one rank: some metrics take long, and all ranks must come to the same conclusions from them.
    return totals, runtime.broadcast(evaluator.report(totals) if runtime.main else {})
