"""What happens between two steps: samples, evaluation, the ranks' votes, log, checkpoint.

Each action returns None, or the status that ends training; a status is the same on every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from .clock import Clock
from .config.status import REASONS, Status
from .distributed.runtime import Runtime, Votes
from .evaluation import evaluate
from .metrics.evaluator import Evaluator, Totals
from .metrics.health import HEALTHY, Verdict, Watch
from .nn.row_state import fresh_rows
from .randomness import Draws
from .schedule import Limits
from .services import Loader, Metrics, Saver, Tracker
from .state import TrainState

POLL_SECONDS = 0.1  # how often the ranks ask each other whether to stop: small enough for any grace period


@dataclass(frozen=True)
class Outcome:
    """How training ended."""

    status: Status
    step: int
    reason: str
    metrics: Metrics = field(default_factory=dict)  # of the last evaluation
    samples_per_second: float = 0.0
    totals: Totals = field(default_factory=dict, repr=False)  # what `metrics` were made from
    health: Verdict = HEALTHY


@dataclass
class Boundary:
    runtime: Runtime
    state: TrainState
    evaluator: Evaluator
    loader: Loader
    tracker: Tracker
    saver: Saver
    limits: Limits
    samples_per_step: int
    seed: int
    last_eval_step: int = -1
    metrics: Metrics = field(default_factory=dict)  # of the last evaluation
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        self.workload = self.state.workload
        self.poll_every = 1  # steps between two agreements of the ranks; the same on all of them
        self.votes = Votes()
        self.totals: Totals = {}
        self.begin()

    def begin(self) -> None:
        """The attempt begins here, at the state's step."""
        self.clock, self.saved_step = Clock(self.state.seconds, self.state.step), self.state.step

    def vote(self) -> Status | None:
        """Ask all ranks what they want, so that none decides alone."""
        limits, clock, step = self.limits, self.clock, self.state.step
        self.runtime.deadline.step()
        self.votes = Votes()
        if step % self.poll_every == 0:
            save = limits.save_seconds is not None and clock.since_save() > limits.save_seconds
            finish = limits.total_seconds is not None and clock.run_seconds() > limits.total_seconds
            stop, lost = bool(self.runtime.signalled), self.saver.lease_lost
            self.votes = self.runtime.agree(Votes(stop, save, finish, lost, len(self.loader.bad_samples())))
        if self.votes.lease_lost:
            return "lease_lost"
        if self.votes.stop:
            return "preempted"
        # An attempt may begin beyond the duration, where the user has made it shorter.
        if self.votes.finish or (limits.total_steps is not None and step >= limits.total_steps):
            return "done"
        return "bad_data" if self.votes.bad_samples > limits.bad_samples and self.bad_data() else None

    def bad_data(self) -> bool:
        """Whether all ranks together have met more bad samples than a run may."""
        names = {name for own in self.runtime.gather(self.loader.bad_samples()) for name in own}
        return len(names) > self.limits.bad_samples

    def evaluation_due(self, step: int) -> bool:
        return self.limits.evaluate.due(step) and step != self.last_eval_step

    def save_due(self, step: int) -> bool:
        return bool(self.votes.save) or self.limits.save.due(step)

    def check_health(self) -> Status | None:
        state = self.watch.verdict.state
        if state == "healthy" or not self.limits.stop_when_unhealthy:
            return None
        if state == "non_finite":  # a metric, not the loss, which would have ended the run already
            self.save()
        return state

    def update_health(self, kind: str, values: Metrics) -> None:
        """Report a new verdict of the watch; the same on every rank, since they see the same numbers."""
        before = self.watch.verdict
        if (verdict := self.watch.observe(self.state.step, kind, values)) != before:
            self.tracker.health(verdict)

    def show_progress(self) -> None:
        self.tracker.progress(self.state.step)

    def end_interval(self) -> dict[str, float]:
        """Speed and waiting since the last log."""
        return self.clock.interval(self.state.step, self.samples_per_step)

    def log(self) -> Status | None:
        """Record the means since the last log."""
        step, loader = self.state.step, self.loader
        timings = self.end_interval()
        means = self.state.meter.means(self.runtime.total)
        if self.runtime.world > 1:
            seconds = self.runtime.broadcast(self.samples_per_step / timings["samples_per_second"])
            self.poll_every = max(1, int(POLL_SECONDS / seconds))
        values = {
            "epoch": step * self.samples_per_step / loader.epoch_samples, **means,
            "lr": float(self.workload.phases[0].optimizer.param_groups[0]["lr"]),
            "steps_per_epoch": loader.epoch_samples / self.samples_per_step, **timings,
        }  # fmt: skip
        if memory := self.runtime.memory():
            values["gpu_memory_bytes"] = memory
        self.tracker.log(step, "train", values)
        self.update_health("train", means)
        return None if all(map(math.isfinite, means.values())) else "non_finite"

    def evaluate(self, record: bool = True) -> Status | None:
        """Evaluate every sample once and record the metrics; a status where a rank must stop first."""
        step = self.state.step
        self.clock.start()
        evaluation = evaluate(self.workload, self.evaluator, self.loader, self.runtime, self.seed)
        if evaluation is None:
            return "preempted"
        self.totals, self.metrics = evaluation
        self.last_eval_step = step
        self.clock.stop_elsewhere()
        if record:
            epoch = step * self.samples_per_step / self.loader.epoch_samples
            self.tracker.log(step, "evaluate", {"epoch": epoch, **self.metrics})
            self.update_health("evaluate", self.metrics)
        return None

    @torch.no_grad()
    def sample(self) -> None:
        """Show what the first rank's networks generate, from latents or held-out samples that are always the same."""
        self.clock.start()
        if self.runtime.main:
            self.workload.eval()
            with self.runtime.autocast(), fresh_rows(self.workload, self.limits.sample_count):
                shown = self.workload.shown(self.loader.held_out, self.fixed_draws())
            self.workload.train()
            if shown is not None:
                self.saver.show(self.state.step, shown)
        self.clock.stop_elsewhere()

    def fixed_draws(self) -> Draws:
        runtime = self.runtime
        return Draws(self.seed, ("samples",), slice(0, self.limits.sample_count), runtime.device, runtime.dtype)

    def save(self) -> Status | None:
        """Snapshot at this boundary; it is written in the background."""
        if self.saved_step == self.state.step:
            return None
        self.clock.start()
        self.state.seconds = self.clock.run_seconds()
        checkpoint = self.state.snapshot()
        if checkpoint is None:
            return "non_finite"
        self.saver.save(checkpoint)
        self.saved_step = self.state.step
        self.clock.stop_elsewhere(saved=True)
        return None

    def outcome(self, status: Status) -> Outcome:
        asked = self.runtime.gather((self.runtime.signalled, self.saver.lease_lost))
        signal = next((name for name, _ in asked if name), "a signal")
        if any(lost for _, lost in asked):  # perhaps since the last vote: then not even the last save was made
            status = "lease_lost"
        elif status == "preempted" and self.runtime.deadline.is_time_limit(signal):
            status = "time_limit"
        health = self.watch.verdict
        reason = REASONS.get(status, health.reason).format(signal=signal)
        if status == "non_finite" != health.state:  # the save has noticed before the log did
            health = Verdict(status, self.state.step, reason)
        speed = self.clock.speed(self.samples_per_step)
        return Outcome(status, self.state.step, reason, self.metrics, speed, self.totals, health)
