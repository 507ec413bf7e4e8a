"""BEGAN: its activation, its controller."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainer.config.options import OptimizerOptions
from trainer.data.description import ImageDescription
from trainer.workloads.began import Began, Elu, Options, build

DATA = ImageDescription("noise", 16, 8, 1, 8, ("a", "b"), (0.5,), (0.25,))


def began(**options: float | str) -> Began:
    workload = build(Options.model_validate({"width": 2, "latent": 4, **options}), DATA, OptimizerOptions())
    assert isinstance(workload, Began)
    return workload


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_activation_is_torchs_elu(dtype: torch.dtype) -> None:
    ours, theirs = (torch.linspace(-30, 30, 1001, dtype=dtype).requires_grad_() for _ in range(2))
    ours_out, theirs_out = Elu()(ours), F.elu(theirs)
    torch.testing.assert_close(ours_out, theirs_out, atol=1e-6, rtol=1e-6)
    ours_out.square().sum().backward()
    theirs_out.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_the_activation_can_be_differentiated_twice() -> None:
    assert torch.autograd.gradgradcheck(Elu(), torch.linspace(-3, 3, 8, dtype=torch.float64).requires_grad_())


def test_the_controller_follows_its_formula_and_stays_between_0_and_1() -> None:
    workload = began(balance=0.7, gain=0.1)
    real, fake = torch.tensor(0.5), torch.tensor(0.25)
    workload.after_step(0, {"real_loss": real, "fake_loss": fake})
    assert float(workload.k) == pytest.approx(0.1 * (0.7 * 0.5 - 0.25))
    assert float(workload.convergence) == pytest.approx(0.5 + abs(0.7 * 0.5 - 0.25))
    workload.after_step(1, {"real_loss": real, "fake_loss": torch.tensor(5.0)})
    assert float(workload.k) == 0
    for step in range(200):
        workload.after_step(step, {"real_loss": real, "fake_loss": torch.tensor(0.0)})
    assert float(workload.k) == 1


def test_a_normalised_code_tells_a_batch_of_fakes_that_are_alike() -> None:
    alike = torch.zeros(16, 1, 8, 8) + 0.05 * torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain, normalised = (began(norm=norm).discriminator.encoder(alike).std(0).mean() for norm in ("none", "batch"))
    assert normalised > 10 * plain
