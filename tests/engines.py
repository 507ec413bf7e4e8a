"""Engines without a run directory."""

from __future__ import annotations

from typing import Any

from trainer.config.options import RunConfig
from trainer.distributed.runtime import Runtime
from trainer.engine import Engine
from trainer.evaluation import evaluate
from trainer.run.build import Recipe, recipe
from trainer.run.directory import NullDirectory
from trainer.storage.checkpoint import Checkpoint
from trainer.tracking.tracker import Silent


class Keep(NullDirectory):
    """A saver that keeps the last checkpoint."""

    last: Checkpoint | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        self.last = checkpoint

    def on_all_ranks(self, runtime: Runtime) -> Checkpoint:
        """The last checkpoint with its tensors, which only the first rank had."""
        assert self.last is not None
        groups = runtime.broadcast_groups(self.last.groups if runtime.main else None)
        return Checkpoint(self.last.step, groups, self.last.state)


def engine_of(
    runtime: Runtime, config: RunConfig, saver: Keep | None = None, checkpoint: Checkpoint | None = None
) -> tuple[Engine, Recipe]:  # fmt: skip
    """The engine of a config, ready to train."""
    parts = recipe(config, runtime.world)
    parts.check()
    parts.prepare_workload(runtime)
    loader = parts.open_loader(runtime)
    parts.prepare_reference(loader, runtime)
    return parts.engine(runtime, loader, Silent(), saver or Keep(), checkpoint=checkpoint), parts


def metrics_of(engine: Engine) -> dict[str, float]:
    """Those of an evaluation of the engine's weights as they are."""
    boundary = engine.boundary
    evaluation: Any = evaluate(engine.workload, boundary.evaluator, engine.loader, engine.runtime, boundary.seed)
    return evaluation[1]
