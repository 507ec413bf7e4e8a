"""A run's directory: what the first rank keeps there. All other ranks have a null one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..boundary import Boundary, Outcome
from ..config.options import RunConfig, UserError, differences, dump, is_safe
from ..config.status import REASONS, Status, exit_code
from ..data.description import Description, to_json
from ..distributed.runtime import Runtime
from ..figures import Figure
from ..storage.checkpoint import Checkpoint, CheckpointStore, folder
from ..storage.goodput import Goodput, Recorder, new_attempt
from ..storage.lease import Lease, LeaseHeld
from ..storage.metric_log import MetricLog
from ..storage.objects import Storage
from ..tracking import render
from ..tracking.console import Console
from ..tracking.sinks import open_sinks
from ..tracking.tracker import Silent, Tracker
from .build import Recipe, check_outputs, run_url
from .checkpoints import Checkpoints
from .opened import UnreadableDescription, description_of, load_config
from .outcome import OutcomeFile, print_result, reached
from .pictures import Pictures
from .rollbacks import Rollbacks


class NullDirectory:
    """That of the ranks that are not the first."""

    tracker = Silent()
    lease_lost = False

    def save(self, checkpoint: Checkpoint) -> None: ...
    def show(self, step: int, samples: Tensor | str | Figure) -> None: ...
    def start(self, boundary: Boundary) -> None: ...
    def finish(self, boundary: Boundary, outcome: Outcome, rollbacks: list[dict[str, Any]]) -> int:
        return exit_code(outcome.status)

    def stopped(self, status: Status, signal: str) -> int:
        return exit_code(status)

    def refused(self, outcome: Outcome) -> None: ...
    def crashed(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


class RunDirectory:
    """That of the first rank; also the engine's saver. Making one takes the lease and may raise UserError."""

    def __init__(self, recipe: Recipe, name: str, runtime: Runtime) -> None:
        self.recipe, self.config, self.name, self.runtime = recipe, recipe.config, name, runtime
        self.storage = Storage(run_url(recipe.config, name))
        console = Console(recipe.limits.total_steps, recipe.workload.scalars)
        self.storage.probe()
        self.lease = Lease(self.storage)
        self.log = MetricLog(self.storage)
        self.tracker = Tracker(self.log, console)
        self.checkpoints = Checkpoints(
            CheckpointStore(self.storage.at("checkpoints")), self.lease, self.tracker, best=self.best,
            keep=self.config.checkpoint.keep, keep_every=recipe.limits.keep,
            saved=runtime.deadline.saved, rescue=Path("runs") / f"{name}-rescued" / "checkpoints",
        )  # fmt: skip
        self.pictures = Pictures(self.storage, self.tracker, name)
        self.outcome = OutcomeFile(self.storage, self.lease, self.tracker)
        self.rollbacks = Rollbacks(self.storage, self.checkpoints, self.tracker)
        self.recorder: Recorder | None = None
        try:
            self.lease.acquire()
        except LeaseHeld as holder:
            raise UserError(
                f"run.url: {self.storage} is in use by {holder}: wait for it, or use another run.url"
            ) from None

    @property
    def lease_lost(self) -> bool:
        return self.lease.lost

    # What the engine saves.

    def save(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.save(checkpoint)

    def show(self, step: int, samples: Tensor | str | Figure) -> None:
        self.pictures.show(step, samples)

    def best(self, among: list[int]) -> int | None:
        """The step with the best evaluation."""
        evaluator = self.recipe.evaluator  # there is none yet when the directory is taken
        return self.tracker.best(evaluator.headline, evaluator.maximise, among)

    # Resuming.

    def check_resume(self) -> dict[str, Any]:
        """Compare with the config that the run began with. Returns how the run ended where nothing is left to do."""
        if self.checkpoints.store.folders() and self.storage.exists("config.yaml"):
            stored = load_config(self.storage.read("config.yaml").decode(), f"{self.storage}/config.yaml")
            check_resume(self.config, stored, self.config.run.force_resume, self.tracker.note)
            with contextlib.suppress(UnreadableDescription):  # of another version: it is written again
                self.check_data(description_of(self.storage))
        outcome = self.outcome.read()
        if not reached(outcome, self.recipe.limits):
            return {}
        self.tracker.note(f"{self.storage} is done; give another run.url or a longer duration to train more")
        print_result(outcome)
        return outcome

    def check_data(self, before: Description) -> None:
        """Report what the data has become since the run began; raises UserError where that are other classes."""
        now = self.recipe.data.description
        check_outputs(before, now)
        for name, (old, new) in differences(to_json(before), to_json(now)).items():
            effect = "" if name == "evaluated" else " (changes the result)"
            self.tracker.note(f"changed since the run began: the data's {name}: {old!r} -> {new!r}{effect}")

    def newest(self) -> Checkpoint | None:
        """The newest valid checkpoint; the tracker continues from what was logged before it."""
        checkpoint = self.checkpoints.store.newest(self.tracker.note)
        self.tracker.records = self.log.before(checkpoint.step if checkpoint else 0)
        if not self.tracker.sinks:
            rollbacks = self.rollbacks.read()
            self.tracker.sent = rollbacks[-1]["void_records"] if rollbacks else 0
            self.tracker.sinks = open_sinks(self.config, self.name, self.storage, self.tracker.sent, self.tracker.note)
        return checkpoint

    def begin(self, step: int) -> None:
        """From here on the directory is ours: what earlier attempts logged after `step` and how they ended is void."""
        self.storage.write("config.yaml", dump(self.config).encode())
        self.storage.write("data.json", json.dumps(to_json(self.recipe.data.description), indent=1).encode())
        self.storage.delete("outcome.json")
        self.log.rewind(step)

    def start(self, boundary: Boundary) -> None:
        """Say what begins, and keep an account of the attempt; after a rollback, of another one."""
        state, again = boundary.state, self.recorder is not None
        if self.recorder:
            self.recorder.end("rolled_back")
        self.print_banner(state.step)
        self.tracker.console.health = boundary.watch.verdict.state

        def progress() -> dict[str, float]:
            clock = boundary.clock
            at_rest = boundary.saved_step == state.step  # after the last save comes what is no training
            seconds = state.seconds if at_rest else clock.run_seconds()
            return {"step": state.step, "seconds": seconds, "checkpoint": clock.saving, "evaluate": clock.evaluating}

        attempt = new_attempt(state.step, state.seconds, self.runtime.world, process_began=not again)
        self.recorder = Recorder(self.storage, attempt, progress)

    def print_banner(self, step: int) -> None:
        config, note, runtime = self.config, self.tracker.note, self.runtime
        d, workload = self.recipe.data.description, self.recipe.workload
        count = sum(p.numel() for p in workload.parameters() if p.requires_grad)
        network = getattr(config.workload, "network", "")
        of = f"{d.name}, {d.train_size:,} samples and {d.eval_size:,} held out"
        note(f"{config.workload.name}{' ' if network else ''}{network}, {count:,} parameters; {of}")
        device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else str(runtime.device)
        threads = torch.get_num_threads()
        ranks = f"{runtime.world} rank{'s'[: runtime.world > 1]} x {threads} thread{'s'[: threads > 1]}"
        if runtime.shares_device:
            device += f" ({torch.accelerator.device_count()} for {runtime.local_world} ranks, over gloo)"
        batch = f"batch {config.batch_size}, {config.duration}, seed {config.seed}"
        note(f"{ranks} on {device}, {runtime.precision}; {batch}")
        self.tracker.console.start(step)
        if step:
            note(f"resuming {self.storage} at step {step}")

    # The end.

    def finish(self, boundary: Boundary, outcome: Outcome, rollbacks: list[dict[str, Any]]) -> int:
        """Leave pictures, outcome.json and the closing lines behind. Returns the exit code."""
        result = {
            **outcome.metrics,
            "samples_per_second": round(outcome.samples_per_second, 1),
            "status": outcome.status,
            "step": outcome.step,
            "run": str(self.storage),
        }
        if outcome.status == "lease_lost":  # nothing here is ours any more
            self.tracker.note(f"warning: {outcome.status} at step {outcome.step}: {outcome.reason}")
            print_result(result)
            return exit_code(outcome.status)
        unsaved = self.checkpoints.finish()  # before anything that might fail
        self._draw(boundary, outcome)
        about: dict[str, Any] = {"reason": unsaved or outcome.reason, "metrics": outcome.metrics,
                                 "seconds": boundary.state.seconds}  # fmt: skip
        if self.recipe.workload.generates:
            about |= {"health": asdict(outcome.health), "rollbacks": rollbacks}
        assert self.recorder
        goodput = self.recorder.end(outcome.status)
        about["goodput"] = goodput.summary()
        self.outcome.write({**result, **about})
        saved = f"checkpoints/{folder(boundary.saved_step)}" if boundary.saved_step and not unsaved else None
        code = 1 if unsaved else exit_code(outcome.status)
        summary = {**result, "checkpoint": saved and f"{self.storage}/{saved}", "goodput": goodput.summary()}
        self.tracker.close(summary, failed=code != 0)
        self._print_summary(outcome, about["reason"], saved, goodput)
        print_result(result)
        return code

    def _draw(self, boundary: Boundary, outcome: Outcome) -> None:
        workload, step, pictures, records = self.recipe.workload, outcome.step, self.pictures, self.tracker.records
        if records:
            pictures.draw(step, "learning_curves", lambda: render.learning_curves(records, self.name, workload.scalars))
        if outcome.totals:
            workload.eval()
            for name, figure in pictures.figures(workload, boundary, outcome.totals).items():
                pictures.draw(step, name, partial(render.render, figure))
        if workload.generates:
            pictures.animate(step)

    def _print_summary(self, outcome: Outcome, reason: str, saved: str | None, goodput: Goodput) -> None:
        note, here = self.tracker.note, _shown(self.storage)
        note(f"{outcome.status} at step {outcome.step}: {reason}")
        if self.recipe.workload.generates:
            health = outcome.health
            note(f"  health      {health.state}" + (f": {health.reason}" if health.state != "healthy" else ""))
        note(f"  checkpoint  {f'{here}/{saved}' if saved else 'none'}")
        note(f"  metrics     {here}/metrics")
        if self.tracker.records:
            note(f"  pictures    {here}/samples/*.png")
        if self.recipe.workload.writes:
            note(f"  texts       {here}/samples/*.txt")
        for line in goodput.table() if goodput.attempts > 1 else ():
            note(line)

    def stopped(self, status: Status, signal: str) -> int:
        """The run was asked to stop before it could train. Returns the exit code."""
        step, reason = max(self.checkpoints.store.steps(), default=0), REASONS[status].format(signal=signal)
        self.tracker.note(f"{status} at step {step}, before training: {reason}")
        result = {"status": status, "step": step, "run": str(self.storage)}
        self.outcome.write({**result, "reason": reason})
        print_result(result)
        return exit_code(status)

    def refused(self, outcome: Outcome) -> None:
        self.outcome.refused(outcome)

    def crashed(self, error: BaseException) -> None:
        self.outcome.crashed(error)

    def close(self) -> None:
        self.tracker.console.close()
        if self.recorder:
            self.recorder.stop()
        self.lease.release()


def check_resume(config: RunConfig, stored: RunConfig, force: bool, note: Callable[[str], None]) -> None:
    """Print what differs from the run's config; raises UserError where that would change the result."""
    changes = differences(stored.model_dump(mode="json"), config.model_dump(mode="json"))
    changes = {name: change for name, change in changes.items() if not name.startswith("run.")}
    for name, (old, new) in changes.items():
        note(
            f"changed since the run began: {name}: {old!r} -> {new!r}{'' if is_safe(name) else ' (changes the result)'}"
        )
    unsafe = [name for name in changes if not is_safe(name)]
    if unsafe and not force:
        old, new = changes[unsafe[0]]
        more = f" and {len(unsafe) - 1} more" if len(unsafe) > 1 else ""
        raise UserError(
            f"run.url: the run there was started with {unsafe[0]}: {old!r}, now it is {new!r}{more}: "
            f"use another run.url, or resume all the same with --run.force_resume"
        )


def _shown(storage: Storage) -> str:
    """The URL as a person would type it."""
    here = f"{Path.cwd()}/"
    return str(storage).removeprefix(here) if storage.local else str(storage)
