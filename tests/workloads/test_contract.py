"""The contract that every workload keeps, over all that are found: a new file in trainer/workloads is tested by being
there. Settings make the networks small; further cases are the options that change how a step is computed.

    python -m pytest tests/workloads/test_contract.py --workload path/to/my_gan.py [--data path/to/data.py:open]

holds a file of your own to it, on fake images or on data of your own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import workloads
from trainer.config.options import RunConfig
from trainer.data.description import ImageDescription
from trainer.distributed.runtime import Runtime
from trainer.engine import Engine
from trainer.gan.adversarial import Adversarial, Fakes
from trainer.randomness import Draws
from trainer.run.build import recipe
from trainer.storage.checkpoint import Checkpoint
from trainer.tracking import render

from ..engines import Keep, engine_of
from ..test_engine import difference
from ..workers import on_ranks

SMALL: dict[str, dict[str, Any]] = {
    "biggan": {"latent": 10, "embedding": 4},
    "infogan": {"hidden": 16},
    "stylegan": {"latent": 8, "mapping_layers": 2, "deviation_group": 2, "r1_every": 2, "ada_steps": 10},
    "pix2pix": {"pairs": "edges"},
    "r3gan": {"group_channels": 4, "blocks": 1, "ramp": 4, "beta2": 0.99},
    "language": {"written": 12},
    "cyclegan": {"blocks": 1, "pool": 20},
}
TRANSLATE = ("pix2pix", "cyclegan")  # from images
NOISY = {"label_smoothing": 0.1, "instance_noise": 0.1, "augment": "color,translation,cutout", "packing": 2}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in workloads.names()},
    "dcgan, noisy": {"name": "dcgan", **NOISY},
    "dcgan, constrained": {"name": "dcgan", "spectral_norm": True, "r1": 1.0, "r1_every": 2, "ema": 0.9},
    "dcgan, penalised": {"name": "dcgan", "gradient_penalty": 1.0, "discriminator_steps": 2, "packing": 2},
    "dcgan, multi-scale": {"name": "dcgan", "multi_scale": True, "gradient_penalty": 1.0, "instance_noise": 0.1},
    "biggan, attending": {"name": "biggan", "attention": "yes", "hierarchical": False, "r1": 1.0},
    "gan, points": {"name": "gan", "loss": "hinge", "packing": 2, "spectral_norm": True},
    "began, normalised": {"name": "began", "norm": "batch"},
    "infogan, convolutions": {"name": "infogan", "norm": "convolutions"},
    "infogan, constrained": {"name": "infogan", "spectral_norm": True, "augment": "translation"},
    "stylegan, by class": {"name": "stylegan", "conditional": True, "path_length": 0, "ada_target": 0, "ema": 0},
    "r3gan, augmented": {"name": "r3gan", "conditional": False, "augment_p": 0.8, "instance_noise": 0.1},
    "wgan_gp, accumulating": {"name": "wgan_gp"},
    "pix2pix, accumulating": {"name": "pix2pix", "pairs": "low_resolution", "factor": 2, "norm": "instance"},
    "language, accumulating": {"name": "language", "cell": "gru", "layers": 2, "dropout": 0.2, "tied": True},
    "cyclegan, accumulating": {"name": "cyclegan", "known_map": "invert", "identity": 0, "pool": 14},
}  # fmt: skip
if OWN := os.environ.get("CONTRACT_WORKLOAD"):
    CASES = {OWN: {"name": OWN}}
BATCH, STEPS = 14, 6  # a batch that does not divide by 3


def configure(case: str) -> RunConfig:
    options = {**SMALL.get(CASES[case]["name"], {}), **CASES[case]}
    model = workloads.config_model(options["name"])
    fields = type(model.model_fields["workload"].default).model_fields
    options = {**({"width": 4} if "width" in fields else {}), **options}
    data: dict[str, Any] = {"name": "fake", "samples": 40, "size": 8, "classes": 5, "channels": 1}
    if case == "gan, points":
        data = {"name": "ring8"}
    if options["name"] == "language":
        words = {"level": "word", "vocabulary": 20} if "accumulating" in case else {}
        data = {"name": "text", "root": str(Path(__file__)), "length": 6, **words}
    if options["name"] == "cyclegan":
        data |= {"size": 12, "domains": ("class 0", "class 1"), "samples": 400}
    if own := os.environ.get("CONTRACT_DATA"):
        data = {"name": own}
    return model(
        workload=options, data=data, batch_size=BATCH, precision="fp64", optimizer={"lr": 1e-3},
        accumulation=2 if "accumulating" in case else 1, duration=f"{STEPS} steps", evaluate={"samples": 23},
    )  # type: ignore[arg-type]  # fmt: skip


def from_latents(case: str) -> bool:
    """Whether it generates from nothing but noise; of one's own, the workload itself says so."""
    if not OWN:
        return CASES[case]["name"] not in ("classifier", "language", *TRANSLATE)
    workload = recipe(configure(case), 1).workload
    return workload.generates and not workload.directions


GENERATORS = [case for case in CASES if from_latents(case)]
TRANSLATORS = [case for case in CASES if CASES[case]["name"] in TRANSLATE]


def engine(
    runtime: Runtime, case: str, steps: int = STEPS, checkpoint: Checkpoint | None = None
) -> tuple[Engine, Keep]:
    saver = Keep()
    config = configure(case).model_copy(update={"duration": f"{steps} steps"})
    return engine_of(runtime, config, saver, checkpoint)[0], saver


Result = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]
Trained = Callable[[str, int], list[Result]]
TOGETHER = 8  # cases in one start of the ranks, which costs more than the training of one


def trained(runtime: Runtime, cases: Sequence[str]) -> list[Result]:
    """Of each case: weights of a whole run, of one that was cut in the middle and resumed, and the metrics."""
    results = []
    for case in cases:
        try:
            whole, _ = engine(runtime, case)
            assert whole.train().status == "done"
            first, saver = engine(runtime, case, STEPS // 2)
            first.train()
            second, _ = engine(runtime, case, checkpoint=saver.on_all_ranks(runtime))
            second.train()
        except BaseException as error:
            error.add_note(f"in the case {case!r}")
            raise
        results.append((whole.workload.state_dict(), second.workload.state_dict(), whole.boundary.metrics))
    return results


@pytest.fixture(scope="module")
def on_each_rank(request: pytest.FixtureRequest) -> Trained:
    """What every rank has of a case in a world of some size; cases that are asked for are trained together."""
    wanted = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    cases = [case for case in CASES if case in wanted]

    @functools.cache
    def start(first: int, world: int) -> list[list[Result]]:
        return on_ranks(world, trained, cases[first : first + TOGETHER], timeout=250)

    def on_each_rank(case: str, world: int) -> list[Result]:
        index = cases.index(case)
        return [results[index % TOGETHER] for results in start(index - index % TOGETHER, world)]

    return on_each_rank


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_cut_goes_on_bit_for_bit(case: str, on_each_rank: Trained) -> None:
    ((whole, resumed, _),) = on_each_rank(case, 1)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_world_size_changes_nothing(case: str, world: int, on_each_rank: Trained) -> None:
    ((weights, _, metrics),) = on_each_rank(case, 1)
    for whole, resumed, sharded_metrics in on_each_rank(case, world):
        assert difference(weights, whole) < 1e-9
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert sharded_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)


def phase_by_phase(runtime: Runtime, case: str) -> list[tuple[set[str], set[str]]]:
    """For each update: the parameters that have a gradient, and those of the phase."""
    made, _ = engine(runtime, case)
    names = {id(p): name for name, p in made.workload.named_parameters()}
    seen: list[tuple[set[str], set[str]]] = []
    for phase in made.workload.phases:
        own = {names[id(p)] for p in phase.parameters}

        def look(*_: object, own: set[str] = own) -> None:
            with_gradient = {name for name, p in made.workload.named_parameters() if p.grad is not None}
            seen.append((with_gradient, own))

        phase.optimizer.register_step_pre_hook(look)
    made.train()
    return seen


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_only_where_a_phase_trains(case: str) -> None:
    for with_gradient, own in phase_by_phase(_runtime(), case):
        assert with_gradient == own


@pytest.mark.parametrize("case", GENERATORS)
def test_the_generator_is_judged_by_the_fakes_that_the_discriminator_has_just_seen(case: str) -> None:
    made, _ = engine(_runtime(), case)
    workload = made.workload
    assert isinstance(workload, Adversarial)
    generated: list[tuple[Tensor, ...]] = []
    detached: list[tuple[Tensor, ...]] = []
    judged: list[tuple[Tensor, ...]] = []
    generate, detach, fakes_of = workload.generate, workload.detached_fakes, workload.generate_fakes

    def noted(kind: list[tuple[Tensor, ...]], fakes: Fakes) -> Fakes:
        kind.append(fakes.views)
        return fakes

    def generate_and_note(z: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
        generated.append(generate(z, labels))
        return generated[-1]

    workload.generate = generate_and_note  # type: ignore[method-assign]
    workload.detached_fakes = lambda batch, draws: noted(detached, detach(batch, draws))  # type: ignore[method-assign]
    workload.generate_fakes = lambda batch, draws: noted(judged, fakes_of(batch, draws))  # type: ignore[method-assign]
    made.update(list(islice(made.loader.train(0), workload.batches_per_step)))

    micro_batches = made.loader.plan.accumulation  # type: ignore[attr-defined]
    assert len(detached) == micro_batches * workload.phases[0].times
    assert len(judged) == micro_batches
    assert len(generated) == len(detached) + micro_batches - 1
    assert all(torch.equal(a, b) for a, b in zip(detached[-1], judged[-1], strict=True))
    assert not any(view.requires_grad for views in detached for view in views)
    assert all(view.requires_grad for views in judged for view in views)
    assert workload.newest.kept is None


@pytest.mark.parametrize("case", CASES)
def test_every_phase_can_overfit_one_batch(case: str) -> None:
    made, _ = engine(_runtime(), case)
    rows, batch = next(iter(made.loader.train(0)))[0]
    for step, phase in enumerate(made.workload.phases, 1):
        for parameter in made.workload.parameters():
            parameter.requires_grad_(any(parameter is p for p in phase.parameters))
        losses = []
        for _ in range(40):
            value, _ = phase.loss(batch, Draws(0, (step, phase.name, 0, 0), rows, _runtime().device, torch.float64))
            value.backward()
            phase.optimizer.step()
            phase.optimizer.zero_grad()
            losses.append(float(value.detach()))
        assert min(losses[-5:]) < losses[0] - 0.01 * abs(losses[0]), f"{phase.name}: {losses[0]} -> {losses[-1]}"


@pytest.mark.parametrize("case", GENERATORS)
def test_samples_are_images_of_the_data_set_and_follow_their_draws(case: str) -> None:
    parts = recipe(configure(case), 1)
    workload, data = parts.workload, parts.data
    assert isinstance(data.description, ImageDescription)
    workload.double().eval()

    def draws(rows: slice, seed: int = 0) -> Draws:
        return Draws(seed, ("samples",), rows, torch.device("cpu"), torch.float64)

    images = workload.samples(draws(slice(0, 12)))
    assert isinstance(images, Tensor)
    assert images.shape == (12, *data.description.shape)
    assert images.isfinite().all()
    if data.description.mixture is None and CASES[case]["name"] not in ("began", "r3gan", "stylegan"):  # linear
        assert images.abs().max() <= 1
    assert len(images.flatten(1).unique(dim=0)) == 12
    part, other = workload.samples(draws(slice(4, 9))), workload.samples(draws(slice(0, 12), 1))
    assert isinstance(part, Tensor)
    assert isinstance(other, Tensor)
    torch.testing.assert_close(part, images[4:9])
    assert not torch.equal(other, images)
    assert isinstance(workload.samples(draws(slice(0, 3)), label=1, truncation=0.5), Tensor)


@pytest.mark.parametrize("case", TRANSLATORS)
def test_translations_are_images_of_the_data_set_and_follow_input_and_draws(case: str) -> None:
    made, _ = engine(_runtime(), case)
    workload = made.workload.eval()
    images = made.loader.held_out(range(10))["image"]
    inputs = workload.input_of(images)
    for direction in workload.directions:

        def outputs(rows: slice, seed: int = 0, direction: str = direction) -> Tensor:
            draws = Draws(seed, ("translate",), rows, _runtime().device, torch.float64)
            return workload.translate(inputs[rows], draws, direction)

        whole = outputs(slice(0, 10))
        assert whole.shape == images.shape
        assert whole.abs().max() <= 1
        torch.testing.assert_close(outputs(slice(4, 9)), whole[4:9])
        draws_nothing = CASES[case]["name"] == "cyclegan"
        assert torch.equal(outputs(slice(0, 10), seed=1), whole) == draws_nothing
        assert len(whole.flatten(1).unique(dim=0)) == 10
    figure = workload.shown(made.loader.held_out, made.boundary.fixed_draws())
    assert not isinstance(figure, (Tensor, str, type(None)))
    assert render.render(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_is_a_sum_over_samples(case: str) -> None:
    made, _ = engine(_runtime(), case)
    assert made.boundary.evaluate() is None
    made.workload.eval()
    evaluator = made.boundary.evaluator
    if any(state.evaluated for state in made.state.row_states.values()):
        pytest.skip("a state that is carried from batch to batch makes no sum")
    (rows, batch), *_ = made.loader.evaluate()
    cut = len(batch["id"]) // 3

    def totals(part: slice) -> dict[str, Tensor]:
        rows_of_part = slice(rows.start + part.start, rows.start + part.stop)
        draws = Draws(0, ("evaluate",), rows_of_part, _runtime().device, torch.float64)
        return evaluator.totals({name: value[part] for name, value in batch.items()}, draws)

    whole, first, second = (totals(slice(*ends)) for ends in ((0, len(batch["id"])), (0, cut), (cut, len(batch["id"]))))
    for name, value in whole.items():
        torch.testing.assert_close(first[name] + second[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_figures_can_be_drawn(case: str) -> None:
    made, _ = engine(_runtime(), case)
    boundary = made.boundary
    boundary.evaluate()
    figures = made.workload.eval().figures(boundary.totals, made.loader.pixels, boundary.fixed_draws())
    for figure in figures.values():
        assert render.render(figure).startswith((b"\x89PNG", b"GIF89a"))


_kept: list[Runtime] = []


def _runtime() -> Runtime:
    """A world of one in this process."""
    import torch.distributed as dist

    from trainer.distributed.process import ProcessInfo

    if not _kept or not dist.is_initialized():
        _kept[:] = [Runtime(ProcessInfo(), precision="fp64", deterministic=True, threads=1)]
    return _kept[0]


@pytest.fixture(scope="module", autouse=True)
def _leave_no_process_group() -> Any:
    yield
    if _kept:
        _kept.pop().__exit__(None)
