"""CycleGAN: its networks, its losses, the known maps, what its translations are compared with, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import workloads
from trainer.config.options import OptimizerOptions, UserError
from trainer.data.description import Batch, ImageDescription
from trainer.distributed.process import ProcessInfo
from trainer.distributed.runtime import Runtime
from trainer.figures import Panels
from trainer.randomness import Draws
from trainer.run.build import recipe
from trainer.workloads.cyclegan import MAPS, CycleGan, Generator, Options, build

from ..engines import Keep, engine_of, metrics_of
from ..workers import on_ranks

DATA = ImageDescription("noise", 16, 8, 3, 16, ("a", "b"), (0.5,), (0.5,), domains=("summer", "winter"))
ROWS = 4


def cyclegan(data: ImageDescription = DATA, **options: Any) -> CycleGan:
    torch.manual_seed(0)
    workload = build(Options.model_validate({"width": 2, "blocks": 1, "pool": 0, **options}), data, OptimizerOptions())
    assert isinstance(workload, CycleGan)
    return workload


def images(seed: int) -> Tensor:
    return torch.rand((ROWS, 3, 16, 16), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def batch() -> Batch:
    return {"image": images(0), "partner_image": images(1), "id": torch.arange(ROWS)}


def draws(step: int = 0) -> Draws:
    return Draws(0, (step, "phase", 0, 0), slice(0, ROWS), torch.device("cpu"))


class Negative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


class Constant(nn.Module):
    """A discriminator that says the same of everything."""

    def __init__(self, score: float) -> None:
        super().__init__()
        self.score = score

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 1, 2, 2), self.score)


# Networks and losses.


@pytest.mark.parametrize(("size", "blocks"), [(128, 6), (256, 9)])
def test_the_generators_are_those_of_the_paper(size: int, blocks: int) -> None:
    workload = cyclegan(replace(DATA, size=size), width=4, blocks=None)
    convolutions = [m for m in workload.to_b.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    middle = [(16, 16, 3, 1)] * (2 * blocks)
    expected = [(3, 4, 7, 1), (4, 8, 3, 2), (8, 16, 3, 2), *middle, (16, 8, 3, 2), (8, 4, 3, 2), (4, 3, 7, 1)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in convolutions] == expected
    assert all(m.padding_mode == "reflect" for m in convolutions if isinstance(m, nn.Conv2d))
    x = torch.rand(1, 3, 20, 20)
    assert workload.to_b(x).shape == x.shape


def test_a_generator_makes_of_an_image_what_it_makes_of_it_alone() -> None:
    generator = Generator(3, 4, 2).double()
    x = images(0).double()
    torch.testing.assert_close(generator(x)[1:2], generator(x[1:2]))
    assert generator(x).abs().max() <= 1


def test_losses_follow_their_formulas() -> None:
    """A guess of 1/2 costs a discriminator half of 1/4 + 1/4; G negates and F leaves as it is."""
    workload = cyclegan()
    workload.judge_a = workload.judge_b = Constant(0.5)  # type: ignore[assignment]
    workload.to_a, workload.to_b = nn.Identity(), Negative()  # type: ignore[assignment]
    loss, scalars = workload.discriminator_loss(batch(), draws())
    assert float(loss) == pytest.approx(2 * 0.25)
    assert {name: float(value) for name, value in scalars.items()} == pytest.approx(
        {"discriminator_loss": 0.25, "real_score": 0.5, "fake_score": 0.5}
    )
    a, b = (float(x.abs().mean()) for x in workload.domains(batch()))
    cycle, identity = 2 * a + 2 * b, 2 * b  # of negated images, of which G makes the others
    loss, scalars = workload.generator_loss(batch(), draws())
    assert float(loss) == pytest.approx(2 * 0.25 + 10 * cycle + 5 * identity)
    assert float(scalars["cycle_loss"]) == pytest.approx(cycle / 2)
    assert float(scalars["identity_loss"]) == pytest.approx(identity / 2)
    without = cyclegan(identity=0)
    without.load_state_dict(cyclegan().state_dict())
    assert "identity_loss" not in without.generator_loss(batch(), draws())[1]


def test_a_real_score_is_worth_one_and_a_fake_one_nothing() -> None:
    workload = cyclegan()
    workload.judge_a = workload.judge_b = Constant(1.0)  # type: ignore[assignment]
    loss, scalars = workload.discriminator_loss(batch(), draws())
    assert float(loss) == 1.0  # that fakes are taken for real
    assert float(workload.generator_loss(batch(), draws())[1]["generator_loss"]) == 0.0
    assert float(scalars["real_score"]) == 1.0


def test_a_discriminator_trains_on_earlier_fakes_and_a_generator_on_the_newest() -> None:
    workload = cyclegan(pool=ROWS)  # one place a row
    for pool in (workload.pool_a, workload.pool_b):
        pool.allocate([ROWS], ROWS)
    seen: list[Tensor] = []
    workload.judge_b.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    made: list[Tensor] = []
    for step in range(6):
        with torch.no_grad():
            made.append(workload.fakes(*workload.domains(batch()))[1])
        workload.discriminator_loss(batch(), draws(step))
        workload.generator_loss(batch(), draws(step))
        with torch.no_grad():
            for parameter in workload.to_b.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    judged, newest = seen[1::3], seen[2::3]
    assert all(torch.equal(a, b) for a, b in zip(newest, made, strict=True))
    assert torch.equal(judged[0], made[0])
    earlier = [not torch.equal(judged[step][row], made[step][row]) for step in range(1, 6) for row in range(ROWS)]
    assert 0 < sum(earlier) < len(earlier)
    for step in range(1, 6):
        for row in range(ROWS):
            assert any(torch.equal(judged[step][row], past[row]) for past in made[: step + 1])


def pools(runtime: Runtime) -> dict[str, Tensor]:
    """The rows of a checkpoint after four steps, on every rank."""
    saver = Keep()
    made, _ = engine_of(runtime, config("none").model_copy(update={"duration": "4 steps"}), saver)
    made.train()
    return saver.on_all_ranks(runtime).groups["rows"]


def test_a_checkpoint_has_the_same_pools_whatever_the_world_size() -> None:
    (alone,) = on_ranks(1, pools)
    assert {name: tuple(pool.shape) for name, pool in alone.items()} == {"pool_a": (4, 13, 432), "pool_b": (4, 13, 432)}
    for shared in on_ranks(3, pools):
        for name, pool in alone.items():
            torch.testing.assert_close(shared[name], pool, rtol=0, atol=1e-9)
            assert pool[:, :4].abs().sum(2).all()
            assert not pool[:, 4:].any()


# Known maps and evaluation.


def test_the_known_maps() -> None:
    x = torch.linspace(-1, 1, 3 * 4).view(1, 3, 2, 2)
    assert torch.equal(MAPS["invert"](x), -x)
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None]
    assert MAPS["hue"](red).flatten().tolist() == [-1, 1, -1]  # green
    assert torch.equal(MAPS["hue"](MAPS["hue"](MAPS["hue"](x))), x)


def config(known_map: str, **data: Any) -> Any:
    return workloads.config_model("cyclegan")(
        workload={"name": "cyclegan", "width": 2, "blocks": 1, "known_map": known_map},
        data={"name": "fake", "samples": 120, "size": 12, "classes": 3, "domains": ("class 0", "class 2"), **data},
        batch_size=4, precision="fp64", duration="1 steps",
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.fixture(scope="module")
def runtime() -> Any:
    with Runtime(ProcessInfo(), precision="fp64", threads=1) as alone:
        yield alone


def test_the_error_of_a_translation_is_measured_where_the_map_is_known(runtime: Runtime) -> None:
    engine, parts = engine_of(runtime, config("invert"))
    workload = engine.workload
    assert isinstance(workload, CycleGan)
    workload.to_b = Negative()  # type: ignore[assignment]
    perfect = metrics_of(engine)
    assert parts.evaluator.headline == "true_error"
    assert perfect["true_error"] == 0
    workload.to_b, workload.to_a = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    same = metrics_of(engine)
    assert same["true_error"] == same["identity_map_error"] == perfect["identity_map_error"] > 0.1
    assert same["cycle_error"] == 0
    held_out = torch.cat([batch["image"] for _, batch in engine.loader.evaluate()])
    assert same["true_error"] == pytest.approx(float(held_out.abs().mean()))  # 2 |x| of [-1, 1] is |x| of [0, 1]


def test_without_a_known_map_the_first_domain_becomes_what_is_compared_with_the_second(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, parts = engine_of(runtime, config("none"))
    assert parts.evaluator.headline == "fid@pixels"
    monkeypatch.setattr(engine.workload, "fakes", lambda a, b: (a, b))  # as if `a` became held-out images of `b`
    perfect = metrics_of(engine)
    assert perfect["fid@pixels"] == pytest.approx(0, abs=1e-6)
    assert perfect["recall@pixels"] == 1
    monkeypatch.setattr(engine.workload, "fakes", lambda a, b: (b, a))  # nothing changes
    unchanged = metrics_of(engine)
    assert unchanged["fid@pixels"] > 10 * perfect["fid_floor@pixels"]


def test_a_picture_shows_both_ways_and_the_known_map(runtime: Runtime) -> None:
    engine, _ = engine_of(runtime, config("hue"))
    figure = engine.workload.shown(engine.loader.held_out, engine.boundary.fixed_draws())
    assert isinstance(figure, Panels)
    there, back = figure.grids
    assert (there.title, back.title) == ("class 0 to class 2", "class 2 to class 0")
    assert there.rows == ("class 0", "translated", "known map", "and back")
    first, _, truth, _ = there.images.chunk(4)
    assert torch.equal(truth, first.roll(1, 1))
    second, _, truth, _ = back.images.chunk(4)
    assert torch.equal(second, truth.roll(1, 1))


# What it refuses.


@pytest.mark.parametrize(
    ("known_map", "data", "mistake"),
    [
        ("none", {"domains": ()}, "data.domains: cyclegan translates between two domains, and fake is one: set "
                                  "data.domains to two of its classes, such as [class 0, class 1], or to halves"),
        ("none", {"domains": (), "classes": 1}, "data.domains: cyclegan translates between two domains, and fake is "
                                                "one: set data.domains to halves"),
        ("none", {"size": 30}, "data.size: cyclegan cannot make images of 30 pixels: use a multiple of 4, from 12 on"),
        ("none", {"size": 8}, "data.size: cyclegan cannot make images of 8 pixels: use a multiple of 4, from 12 on"),
        ("hue", {"channels": 1}, "workload.known_map: hue is of colours, and the images of fake have none: use invert"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated(known_map: str, data: dict[str, Any], mistake: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(config(known_map, **data), 1)
    assert str(caught.value) == mistake
