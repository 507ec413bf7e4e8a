"""Whether a GAN's training is healthy: a watch whose verdict is a function of the records logged so far.

So nothing of it needs saving: a resumed run replays its metric log into a new watch and comes to the same verdicts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

State = Literal["healthy", "mode_collapse", "convergence_failure", "diverged", "non_finite"]
STATES: tuple[State, ...] = get_args(State)
RECENT = 20  # records that a rule may look back at

Values = Mapping[str, float]
Answer = tuple[bool, str]  # whether a rule holds, and how to say so


@dataclass(frozen=True)
class Verdict:
    """The state, the step at which it was reached, and why, in a sentence of at most REASON characters."""

    state: State
    step: int
    reason: str


REASON = 160  # characters, at most
HEALTHY = Verdict("healthy", 0, "no rule holds")


@dataclass(frozen=True)
class Rules:
    """Thresholds, and how often in a row they must be crossed: evaluations, or train records (one each log interval).

    Those without a source are reasoned from what the values mean, and to be tuned on runs.
    """

    # Catches 16 of 16 collapsed runs among those that StudioGAN published, with no false alarm in 46 (in-sample). A
    # ratio of 1.3 raises 2 false alarms; 2.0, and 5 in a row, miss a run each.
    risen: float = 1.5  # FID over its running best
    risen_evaluations: int = 3
    fid_floor: float = 0.0  # a best below it counts as it: the FID of real against real, where a ratio is noise
    # Recall or coverage that falls while precision holds is collapse; where both fall, training diverged.
    fallen: float = 0.5  # diversity over that at the best FID; recall and coverage over their best
    held: float = 0.75  # precision over its best

    # An untrained generator's samples are as much alike as a collapsed one's, so the first evaluations do not count.
    grace_evaluations: int = 2
    collapse_evaluations: int = 3
    diversity: float = 0.15  # spread of fakes over that of real samples: 1 is as varied, 0 all alike
    # Fakes on a curve (a latent of size 1) may spread as wide as real samples, but each has near neighbours.
    spacing: float = 0.3  # mean distance of a fake to the nearest other one, over the same of as many real samples
    # Nor does a curve fill any volume. Fakes that resemble nothing real are a failure, not a collapse: see precision.
    narrow_evaluations: int = 5
    narrow_recall: float = 0.05
    narrow_coverage: float = 0.1
    narrow_precision: float = 0.1  # at least

    # A discriminator often leads for the first hundreds of steps; 10 records are 1,000 steps at the default interval.
    won_records: int = 10
    won_accuracy: float = 0.995
    won_loss: float = 0.02  # logistic or hinge; add 0.16, the least that is left, where real labels are smoothed to 0.9
    # At far too high a learning rate its rare mistakes are so large that its loss is not small, but the generator's is
    # then large too: at 10, a fake is real with a probability of e^-10.
    won_generator_loss: float = 10.0

    stuck_evaluations: int = 5
    stuck: float = 0.9  # best FID over the first, which is of a nearly untrained generator
    # Unless that was late in the run: an FID below so much of that of real images cut into pieces shows form. The mean
    # of all images, which shows none, has 0.4 to 0.6 of it in the pixels of digits and clothes.
    formed: float = 0.25


class Past:
    """The records of one kind up to the newest, their values under names without `@...`."""

    def __init__(self) -> None:
        self.records = 0
        self.first: dict[str, float] = {}
        self.least: dict[str, float] = {}
        self.most: dict[str, float] = {}
        self.recent: deque[Values] = deque(maxlen=RECENT)
        self.at_best: Values = {}  # the evaluation with the lowest FID

    def add(self, now: Values) -> None:
        self.records += 1
        self.recent.append(now)
        for name, value in now.items():
            self.first.setdefault(name, value)
            self.least[name] = min(value, self.least.get(name, value))
            self.most[name] = max(value, self.most.get(name, value))
        if "fid" in now and now["fid"] == self.least["fid"]:
            self.at_best = now


def _risen(now: Values, past: Past, rules: Rules) -> Answer:
    fid, best = now["fid"], max(past.least["fid"], rules.fid_floor)
    return fid > rules.risen * best, f"the FID is {fid:.4g}, above {rules.risen:g} times {best:.4g} at best"


def _risen_and_narrowed(now: Values, past: Past, rules: Rules) -> Answer:
    risen, reason = _risen(now, past, rules)
    before = {"diversity": past.at_best["diversity"]} if "diversity" in past.at_best else {}
    if "precision" in now and now["precision"] >= rules.held * past.most["precision"]:
        before |= {name: past.most[name] for name in ("recall", "coverage") if name in now}
    for name, value in before.items():
        if name in now and now[name] < rules.fallen * value:
            return risen, f"{reason}, and {name} fell from {value:.2g} to {now[name]:.2g}"
    return False, ""


def _learned(now: Values, past: Past, rules: Rules) -> bool:
    """Whether the generator has come nearer to the real samples at all: only then can it have collapsed."""
    if "fid" not in past.first:
        return True
    return past.least["fid"] <= max(rules.stuck * past.first["fid"], rules.formed * now.get("fid_shuffled", 0.0))


def _alike(now: Values, past: Past, rules: Rules) -> Answer:
    spread = now["diversity"]
    alike = spread < rules.diversity and _learned(now, past, rules)
    return alike, f"fakes are alike: they spread {spread:.2g} times as wide as real samples"


def _crowded(now: Values, past: Past, rules: Rules) -> Answer:
    spacing = now["spacing"]
    crowded = spacing < rules.spacing and _learned(now, past, rules)
    return crowded, f"fakes nearly repeat: they lie {spacing:.2g} times as far apart as real samples"


def _narrow(now: Values, past: Past, rules: Rules) -> Answer:
    limits = {"recall": rules.narrow_recall, "coverage": rules.narrow_coverage}
    scores = {name: now[name] for name in ("precision", *limits) if name in now}
    narrow = len(scores) > 1 and all(scores[name] < limits[name] for name in limits if name in scores)
    shown = ", ".join(f"{name} {value:.2g}" for name, value in scores.items())
    return narrow and now["precision"] >= rules.narrow_precision, f"fakes look real but show little of it: {shown}"


def _won(now: Values, past: Past, rules: Rules) -> Answer:
    accuracy, loss, generator = now["discriminator_accuracy"], now["discriminator_loss"], now.get("generator_loss", 0.0)
    won = accuracy > rules.won_accuracy and (loss < rules.won_loss or generator > rules.won_generator_loss)
    return won, f"the discriminator has won: accuracy {accuracy:.4f}, loss {loss:.2g}, the generator's {generator:.3g}"


def _stuck(now: Values, past: Past, rules: Rules) -> Answer:
    first, best = past.first["fid"], past.least["fid"]
    return not _learned(now, past, rules), f"the best FID is {best:.4g}, still above {rules.stuck:g} times {first:.4g}"


@dataclass(frozen=True)
class Rule:
    """A state that holds once `asks` is true of `patience` records in a row, until it is false of as many."""

    state: State
    kind: Literal["train", "evaluate"]
    needs: tuple[str, ...]  # a record without them says nothing for or against it
    grace: int  # first records of the kind that do not count
    patience: int
    asks: Callable[[Values, Past, Rules], Answer]


def by_severity(rules: Rules, own: Sequence[Rule]) -> list[Rule]:
    """All rules but the one on non-finite values, which is the most severe; the first that holds gives the verdict.

    `own` are those that a workload adds.
    """
    grace, collapse, narrow = rules.grace_evaluations, rules.collapse_evaluations, rules.narrow_evaluations
    collapsed: State = "mode_collapse"
    failed: State = "convergence_failure"
    return [
        Rule(collapsed, "evaluate", ("fid",), 0, rules.risen_evaluations, _risen_and_narrowed),
        Rule(collapsed, "evaluate", ("diversity",), grace, collapse, _alike),
        Rule(collapsed, "evaluate", ("spacing",), grace, collapse, _crowded),
        Rule(collapsed, "evaluate", ("precision",), grace, narrow, _narrow),
        Rule(failed, "train", ("discriminator_accuracy", "discriminator_loss"), 0, rules.won_records, _won),
        *own,
        Rule(failed, "evaluate", ("fid",), rules.stuck_evaluations - 1, 1, _stuck),
        Rule("diverged", "evaluate", ("fid",), 0, rules.risen_evaluations, _risen),
    ]


@dataclass
class Standing:
    """Where a rule stands: the reason while it holds, and how many records in a row have said otherwise."""

    rule: Rule
    reason: str = ""
    against: int = 0

    def add(self, holds: bool, reason: str) -> None:
        self.against = self.against + 1 if holds != bool(self.reason) else 0
        if self.against == self.rule.patience:
            records = {"train": "records", "evaluate": "evaluations"}[self.rule.kind]
            often = f" ({self.against} {records} in a row)" if self.against > 1 else ""
            self.reason, self.against = f"{reason[: REASON - len(often)]}{often}" if holds else "", 0


class Watch:
    """Reads records in the order in which they were logged. Values that are absent leave their rules silent.

    From train records: `discriminator_loss`, `generator_loss`, `discriminator_accuracy`, and what the workload's own
    rules need. From evaluations: `fid@...`, `fid_shuffled@...`, `precision@...`, `recall@...`, `coverage@...`,
    `diversity` and `spacing` (see Rules). Of several feature extractors the first by name counts.
    """

    def __init__(self, rules: Rules = Rules(), own: Sequence[Rule] = ()) -> None:
        self.rules = rules
        self.verdict = HEALTHY  # stays as it was reached until the state changes
        self._past = {kind: Past() for kind in ("train", "evaluate")}
        self._standings = [Standing(rule) for rule in by_severity(rules, own)]

    def observe(self, step: int, kind: str, values: Mapping[str, float | None]) -> Verdict:
        """Take in a record of kind `train` or `evaluate` and return the current verdict; `non_finite` is for good.

        None is a value that was not finite: the metric log, being JSON, has no other name for it.
        """
        if self.verdict.state == "non_finite":
            return self.verdict
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        if broken := sorted(values.keys() - finite.keys()):
            others = f", nor are {len(broken) - 1} others" if len(broken) > 1 else ""
            self.verdict = Verdict("non_finite", step, f"{broken[0][:100]} is not finite{others}")
            return self.verdict
        now: dict[str, float] = {}
        for name in sorted(finite):
            now.setdefault(name.partition("@")[0], finite[name])
        past = self._past[kind]
        past.add(now)
        for standing in self._standings:
            rule = standing.rule
            if rule.kind == kind and past.records > rule.grace and now.keys() >= set(rule.needs):
                standing.add(*rule.asks(now, past, self.rules))
        over = f"{self.verdict.state} since step {self.verdict.step} is over"
        held = [(standing.rule.state, standing.reason) for standing in self._standings if standing.reason]
        state, reason = held[0] if held else ("healthy", over)
        if state != self.verdict.state:
            self.verdict = Verdict(state, step, reason)
        return self.verdict
