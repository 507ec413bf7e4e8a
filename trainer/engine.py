"""train, update, evaluate: the only loop. It has no branch on the kind of workload, and no host sync between logs."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from .clock import Clock, Meter
from .data.description import Batch
from .distributed.runtime import PhaseModule, Runtime
from .metrics.health import HEALTHY, Verdict, Watch
from .randomness import Draws, key
from .schedule import Schedule
from .state import Groups, TrainState
from .workload import Phase, Scalars, Totals, Workload

Metrics = dict[str, float]
MicroBatches = Sequence[tuple[slice, Batch]]  # this rank's rows within each micro-batch of a global batch, and the data


class Loader(Protocol):
    """Delivers a plan's batches to this rank."""

    batch_size: int  # global
    epoch_samples: int
    evaluation_samples: int

    def train(self, first: int) -> Iterator[MicroBatches]: ...
    def evaluate(self) -> Iterator[tuple[slice, Batch]]: ...
    def bad_samples(self) -> list[str]: ...  # the samples that this rank could not read
    def pixels(self, ids: Iterable[int]) -> Tensor: ...  # held-out images in [0, 1]


class Tracker(Protocol):
    """Takes numbers; silent on all ranks but the first. `cut` starts the part of the log that follows a checkpoint."""

    def progress(self, step: int) -> None: ...
    def log(self, step: int, kind: str, values: Metrics) -> None: ...
    def note(self, text: str) -> None: ...
    def cut(self, step: int) -> None: ...
    def health(self, verdict: Verdict) -> None: ...


class Saver(Protocol):
    """Takes checkpoints and samples on the first rank."""

    def save(self, step: int, groups: Groups, state: dict[str, Any]) -> None: ...
    def show(self, step: int, samples: Tensor | str) -> None: ...


@dataclass(frozen=True)
class Every:
    """Something that is due every so many steps, which need not be whole: an epoch seldom is."""

    period: Fraction | None

    def due(self, step: int) -> bool:
        if self.period is None or step <= 0:
            return False
        steps, times = self.period.numerator, self.period.denominator
        return step * times // steps > (step - 1) * times // steps


@dataclass(frozen=True)
class Limits:
    """When things happen, in steps or in seconds of training."""

    total_steps: int | None
    total_seconds: float | None
    log: Every
    evaluate: Every
    save: Every
    save_seconds: float | None
    keep: Every  # checkpoints to keep for ever
    samples: Every = Every(None)
    shown: int = 64  # samples
    stop_when_unhealthy: bool = False  # whether to end training when it is not healthy
    bad_samples: int = 0  # bad samples that a run may meet


@dataclass(frozen=True)
class Outcome:
    """How training ended. `status` is done, preempted, time_limit, bad_data, non_finite, or a finding of the watch."""

    status: str
    step: int
    reason: str
    metrics: Metrics = field(default_factory=dict)  # of the last evaluation
    samples_per_second: float = 0.0
    totals: Totals = field(default_factory=dict, repr=False)  # what `metrics` were made from
    health: Verdict = HEALTHY


@dataclass
class Engine:
    runtime: Runtime
    state: TrainState
    loader: Loader
    tracker: Tracker
    saver: Saver
    limits: Limits
    schedule: Schedule
    seed: int
    rollbacks: int = 0  # how often the run went back to a checkpoint; each attempt has other noise
    clip_norm: float | None = None
    last_eval_step: int = -1  # the step of the last evaluation
    metrics: Metrics = field(default_factory=dict)  # of the last evaluation
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        self.workload: Workload = self.state.workload
        self.phases = [(phase, self.runtime.ddp(phase), phase.parameters) for phase in self.workload.phases]
        owned = [id(parameter) for _, _, parameters in self.phases for parameter in parameters]
        assert len(owned) == len(set(owned)), "two phases train one parameter: DDP would reduce its gradient twice"
        self.samples_per_step = self.workload.batches_per_step * self.loader.batch_size
        self.peak_rates = [[group["lr"] for group in phase.optimizer.param_groups] for phase in self.workload.phases]
        self.noise = key(self.seed, "attempt", self.rollbacks) if self.rollbacks else self.seed
        self.meter = Meter()
        self.poll_every = 1  # steps between two agreements of the ranks; the same on all of them
        self.saved = -1
        self.totals: Totals = {}
        self.clock = Clock(0.0, 0)

    def train(self) -> Outcome:
        """From the state's step to the end of the run, or until any rank must stop. Saves at both."""
        state, limits, runtime = self.state, self.limits, self.runtime
        batches_per_step = self.workload.batches_per_step
        batches = self.loader.train(state.step * batches_per_step)
        self.saved = state.step
        clock = self.clock = Clock(state.seconds, state.step)
        self.workload.train()
        while True:
            if limits.samples.due(state.step):
                self.sample(clock)
            if limits.evaluate.due(state.step) and self.last_eval_step != state.step and not self.evaluate(clock):
                return self.leave("preempted", clock)
            if limits.stop_when_unhealthy and self.watch.verdict.state != "healthy":
                return self.leave(self.watch.verdict.state, clock)
            runtime.deadline.step()
            due = state.step % self.poll_every == 0
            stop, save, finish, bad_samples = runtime.agree(*self.flags(clock)) if due else (0, 0, 0, 0)
            if stop or finish or self.over():
                break
            if bad_samples > limits.bad_samples and self.bad_data():
                return self.outcome("bad_data", clock)
            clock.start()
            read = list(itertools.islice(batches, batches_per_step))
            clock.stop_waiting()
            self.update(read, with_norm=limits.log.due(state.step + 1))
            state.step += 1
            if limits.log.due(state.step) and not self.log(clock):
                return self.outcome("non_finite", clock)
            if (save or limits.save.due(state.step)) and not self.save(clock):
                return self.outcome("non_finite", clock)
            self.tracker.progress(state.step)
        if (finish or self.over()) and not limits.samples.due(state.step):
            self.sample(clock)
        known = self.last_eval_step == state.step  # by a life that was ended before it could draw its pictures
        if stop or (not (known and self.totals) and not self.evaluate(clock, record=not known)):
            return self.leave("preempted", clock)
        return self.outcome("bad_data", clock) if self.bad_data() else self.leave("done", clock)

    def over(self) -> bool:
        """Whether the duration is reached; a life may have begun beyond it, where the user made it shorter."""
        return self.limits.total_steps is not None and self.state.step >= self.limits.total_steps

    def update(self, batches: Sequence[MicroBatches], with_norm: bool = False) -> None:
        """One step: every phase in its turn, with only its own parameters trainable."""
        step, factor = self.state.step, self.schedule(self.state.step)
        controller_inputs: Scalars = {}
        for (phase, loss, parameters), rates in zip(self.phases, self.peak_rates, strict=True):
            if step % phase.every:
                continue
            if len(self.phases) > 1:
                for _, _, others in self.phases:
                    _require_grad(others, False)
                _require_grad(parameters, True)
            for group, rate in zip(phase.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            for turn, micro_batches in enumerate(batches[: phase.times]):
                scope = (step, phase.name, turn)
                for name, value in self.accumulate(loss, micro_batches, scope).items():
                    controller_inputs[name] = controller_inputs.get(name, 0) + value / phase.times
                if self.clip_norm is not None or with_norm:
                    self.clip(phase, parameters)
                phase.optimizer.step()
                for parameter in parameters:  # optimizer.zero_grad() does this too, and costs 20 microseconds more
                    parameter.grad = None
        self.workload.after_step(step, self.runtime.sum_scalars(controller_inputs))

    def accumulate(self, loss: PhaseModule, micro_batches: MicroBatches, scope: tuple[object, ...]) -> Scalars:
        """Gradients of the mean over the global batch: each share's mean, weighted by the share.

        Returns this rank's part of the steering scalars.
        """
        runtime, last = self.runtime, len(micro_batches) - 1
        controller_inputs: Scalars = {}
        for index, (rows, batch) in enumerate(micro_batches):
            draws = Draws(self.noise, (*scope, index), rows, runtime.device, runtime.dtype)
            share = (rows.stop - rows.start) / self.loader.batch_size
            with _NOTHING if index == last else runtime.no_sync(loss):
                with runtime.autocast():
                    value, scalars = loss(batch, draws)
                # DDP divides the sum over the ranks by their number; the weights make that the global mean.
                (value if share == 1 else value * (share * runtime.world)).backward()
            self.meter.add(scalars, share, first=index == 0)
            for name in self.workload.controller_inputs:
                if name in scalars:
                    controller_inputs[name] = controller_inputs.get(name, 0) + scalars[name] * share
        return controller_inputs

    def clip(self, phase: Phase, parameters: list[torch.nn.Parameter]) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        name = "grad_norm" if len(self.phases) == 1 else f"{phase.name}_grad_norm"
        self.meter.add({name: norm.detach()}, 1 / self.runtime.world, first=True)

    def flags(self, clock: Clock) -> tuple[int, int, int, int]:
        """What this rank wants: to stop, to save now, to finish; and its bad samples. All stay up until seen."""
        limits = self.limits
        save = limits.save_seconds is not None and clock.since_save() > limits.save_seconds
        finish = limits.total_seconds is not None and clock.run_seconds() > limits.total_seconds
        return int(bool(self.runtime.signalled)), int(save), int(finish), len(self.loader.bad_samples())

    def bad_data(self) -> bool:
        """Whether all ranks together have met more bad samples than a run may."""
        return (
            len({name for found in self.runtime.gather(self.loader.bad_samples()) for name in found})
            > self.limits.bad_samples
        )

    def log(self, clock: Clock) -> bool:
        """Record the means since the last log; False where they are not finite."""
        step = self.state.step
        timings = clock.interval(step, self.samples_per_step)
        means = self.meter.means(self.runtime)
        if self.runtime.world > 1:
            seconds = self.runtime.broadcast(self.samples_per_step / timings["samples_per_second"])
            self.poll_every = max(1, int(POLL_SECONDS / seconds))
        epoch_samples = self.loader.epoch_samples
        values = {
            "epoch": step * self.samples_per_step / epoch_samples, **means,
            "lr": self.workload.phases[0].optimizer.param_groups[0]["lr"],
            "steps_per_epoch": epoch_samples / self.samples_per_step, **timings,
        }  # fmt: skip
        if memory := self.runtime.memory():
            values["gpu_memory_bytes"] = memory
        self.tracker.log(step, "train", values)
        self.update_health("train", means)
        return all(map(math.isfinite, means.values()))

    @torch.no_grad()
    def evaluate(self, clock: Clock | None = None, record: bool = True) -> bool:
        """Evaluate every sample once and record the metrics; False where a rank must stop first."""
        runtime, step = self.runtime, self.state.step
        buffers = runtime.local_buffers(self.workload)
        totals: Totals = {}
        clock = clock or Clock(0.0, step)
        clock.start()
        self.workload.eval()
        with runtime.averaged(buffers):
            for rows, batch in self.loader.evaluate():
                if runtime.stopping():
                    self.workload.train()
                    return False
                if rows.start == rows.stop:  # the last batch may have fewer rows than there are ranks
                    continue
                draws = Draws(self.seed, ("evaluate",), rows, runtime.device, runtime.dtype)
                with runtime.autocast():
                    found = self.workload.evaluate(batch, draws)
                found["seen"] = torch.bincount(batch["id"], minlength=self.loader.evaluation_samples)
                for name, value in found.items():
                    totals[name] = totals[name] + value if name in totals else value
        self.workload.train()
        self.totals = runtime.total(totals)
        seen = self.totals.pop("seen")
        assert (seen == 1).all(), f"{int((seen != 1).sum())} samples were not evaluated exactly once"
        # On one rank: some metrics take long, and all ranks must come to the same conclusions from them.
        self.metrics = runtime.broadcast(self.workload.report(self.totals) if runtime.main else {})
        self.last_eval_step = step
        clock.stop_elsewhere()
        if record:
            epoch = step * self.samples_per_step / self.loader.epoch_samples
            self.tracker.log(step, "evaluate", {"epoch": epoch, **self.metrics})
            self.update_health("evaluate", self.metrics)
        return True

    @torch.no_grad()
    def sample(self, clock: Clock) -> None:
        """Show what the first rank's networks generate from latents that are always the same."""
        clock.start()
        if self.runtime.main:
            self.workload.eval()
            with self.runtime.autocast():
                samples = self.workload.samples(self.fixed_draws())
            self.workload.train()
            if samples is not None:
                self.saver.show(self.state.step, samples)
        clock.stop_elsewhere()

    def fixed_draws(self) -> Draws:
        runtime = self.runtime
        return Draws(self.seed, ("samples",), slice(0, self.limits.shown), runtime.device, runtime.dtype)

    def update_health(self, kind: str, values: Metrics) -> None:
        """Tell when the watch changes its mind; the same on every rank, since they see the same numbers."""
        before = self.watch.verdict
        if (verdict := self.watch.observe(self.state.step, kind, values)) != before:
            self.tracker.health(verdict)

    def save(self, clock: Clock) -> bool:
        """Snapshot at this boundary; writing goes on in the background. False where the state is not finite."""
        step, runtime = self.state.step, self.runtime
        if self.saved == step:
            return True
        clock.start()
        self.state.seconds = clock.run_seconds()
        meters = runtime.gather(self.meter.dump())
        norm = torch.nn.utils.get_total_norm(self.workload.parameters())  # the same on every rank, as the weights are
        if not all(map(math.isfinite, [float(norm), *(value for meter in meters for value, _ in meter.values())])):
            return False
        groups = {}
        buffers = runtime.local_buffers(self.workload)
        lanes = runtime.gather({name: buffer.cpu() for name, buffer in buffers.items()}) if buffers else []
        if runtime.main:
            self.tracker.cut(step)
            groups = self.state.snapshot()
            if lanes:
                groups["lanes"] = {name: torch.stack([lane[name] for lane in lanes]) for name in buffers}
                groups["weights"].update({name: value.mean(0) for name, value in groups["lanes"].items()})
        state = {"step": step, "seconds": self.state.seconds, "meters": meters, "world_size": runtime.world}
        self.saver.save(step, groups, state)
        self.saved = step
        clock.stop_elsewhere(saved=True)
        return True

    def restore(self, groups: Groups, state: dict[str, Any]) -> None:
        """Take over a checkpoint, also one of another world size."""
        self.state.restore(groups, state)
        runtime, meters = self.runtime, state["meters"]
        if len(meters) != runtime.world:  # the sums are what counts: rank 0 takes them all
            merged: dict[str, tuple[float, int]] = {}
            for meter in meters:
                for name, (value, count) in meter.items():
                    merged[name] = (merged.get(name, (0.0, 0))[0] + value, count)
            meters = [merged] + [{name: (0.0, count) for name, (_, count) in merged.items()}] * (runtime.world - 1)
        self.meter.load(meters[runtime.rank], runtime.device, runtime.dtype)
        lanes = groups.get("lanes", {})
        for name, buffer in runtime.local_buffers(self.workload).items():
            if name in lanes and len(lanes[name]) == runtime.world:
                buffer.copy_(lanes[name][runtime.rank])

    def leave(self, status: str, clock: Clock) -> Outcome:
        """Save at this boundary and go."""
        self.runtime.settle()
        clock.interval(self.state.step, self.samples_per_step)
        return self.outcome(status if self.save(clock) else "non_finite", clock)

    def outcome(self, status: str, clock: Clock) -> Outcome:
        signals = [*filter(None, self.runtime.gather(self.runtime.signalled)), "a signal"]
        if status == "preempted" and self.runtime.deadline.is_time_limit(signals[0]):
            status = "time_limit"
        stopped = f"stopped by {signals[0]}; the same command goes on from here"
        reason = {
            "done": "the duration is reached",
            "preempted": stopped,
            "time_limit": stopped,
            "non_finite": "the loss is not a finite number: lower optimizer.lr or set optimizer.clip_norm",
            "bad_data": "too many samples could not be read",
        }.get(status, self.watch.verdict.reason)
        speed = clock.speed(self.samples_per_step)
        health = self.watch.verdict
        if status == "non_finite" != health.state:  # the save has noticed before the log did
            health = Verdict(status, self.state.step, reason)
        return Outcome(status, self.state.step, reason, self.metrics, speed, self.totals, health)


POLL_SECONDS = 0.1  # how often the ranks ask each other whether to stop: small enough for any grace period
_NOTHING = contextlib.nullcontext()


def _require_grad(parameters: list[torch.nn.Parameter], wanted: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(wanted)
