"""Every network of the classifier: it fits its images, or says so before training, and draws nothing by itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from trainer.config.options import OptimizerOptions
from trainer.data.description import ImageDescription
from trainer.data.plan import BatchPlan
from trainer.nn.dropout import Dropout, drawing
from trainer.randomness import Draws
from trainer.workloads.classifier import ADAPTED, OWN, ClassificationEvaluator, Classifier, Options, build

BORROWED = ("mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "googlenet", "swin_t", "squeezenet1_1")
DEEP = ("resnet50", "resnet101", "resnet152", "vgg16_bn", "vgg19_bn")  # as their smaller sisters: one size will do
SHAPES = ((1, 28), (3, 32), (1, 8))


def description(channels: int, size: int, classes: int = 7) -> ImageDescription:
    names = tuple(map(str, range(classes)))
    return ImageDescription("noise", 16, 8, channels, size, names, (0.5,) * channels, (0.25,) * channels)


def classifier(network: str, channels: int = 1, size: int = 8, **options: float) -> Classifier:
    torch.manual_seed(0)
    chosen = Options.model_validate({"network": network, **options})
    return build(chosen, description(channels, size), OptimizerOptions())


def draws(step: int = 0, rows: slice = slice(0, 4)) -> Draws:
    return Draws(0, (step, "classify", 0, 0), rows, torch.device("cpu"))


def images(workload: Classifier, count: int = 4) -> Tensor:
    return torch.randn(count, *workload.data.shape, generator=torch.Generator().manual_seed(1))


def forward(workload: Classifier, step: int = 0, global_seed: int = 0) -> Tensor:
    torch.manual_seed(global_seed)
    with drawing(workload.network, draws(step)), torch.no_grad():
        return workload.network(images(workload))


CASES = [
    *((name, channels, size) for name in (*OWN, *ADAPTED) for channels, size in SHAPES
      if not (name == "lenet5" and size == 8) and not (name in DEEP and size != 28)),
    *((f"torchvision:{name}", 3, 32) for name in BORROWED),
    ("torchvision:efficientnet_b0", 1, 8), ("torchvision:vit_b_16", 3, 32),
]  # fmt: skip


@pytest.mark.parametrize(("name", "channels", "size"), CASES)
def test_a_network_gives_logits_and_its_only_randomness_is_draws(name: str, channels: int, size: int) -> None:
    workload = classifier(name, channels, size).train()
    left = [
        type(m).__name__ for m in workload.network.modules() if "rop" in type(m).__name__ and type(m) is not Dropout
    ]
    assert left == []
    state = copy.deepcopy(workload.network.state_dict())
    first = forward(workload, global_seed=1)
    assert first.shape == (4, 7)
    workload.network.load_state_dict(state)  # BatchNorm has moved on
    assert torch.equal(forward(workload, global_seed=2), first)
    chance = [m for m in workload.network.modules() if isinstance(m, Dropout) and m.probability > 0]
    workload.network.load_state_dict(state)
    assert torch.equal(forward(workload, step=1), first) == (not chance)
    workload.eval()
    assert torch.isfinite(workload.network(images(workload))).all()


@pytest.mark.parametrize(
    ("name", "channels", "size", "reason"),
    [
        ("lenet5", 1, 8, "workload.network: lenet5 needs images of 12 pixels or more, not 8: use cnn"),
        ("torchvision:convnext_tiny", 1, 8, "workload.network: torchvision:convnext_tiny does not take images of 8 "),
        ("torchvision:googlenet", 1, 8, "workload.network: torchvision:googlenet does not take images of 8 pixels"),
        ("torchvision:vit_b_16", 1, 28, "Input shape indivisible by patch size!"),
        ("torchvision:maxvit_t", 3, 32, "use images of another size or another network"),
    ],
)
def test_a_network_that_images_do_not_fit_says_so_before_training(
    name: str, channels: int, size: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason.replace("!", ".")):
        classifier(name, channels, size)


def test_a_vision_transformer_is_built_for_the_size_of_its_images() -> None:
    assert classifier("torchvision:vit_b_16", 3, 224).network.image_size == 224


def test_trying_a_network_on_shapes_leaves_it_as_it_was() -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    plain = get_model("mobilenet_v3_small", weights=None, num_classes=7).state_dict()
    ours = classifier("torchvision:mobilenet_v3_small", 3, 32).network
    assert all(torch.equal(plain[name], tensor) for name, tensor in ours.state_dict().items())
    assert ours.training


@pytest.mark.parametrize(("channels", "size"), SHAPES)
def test_a_small_image_keeps_its_resolution_in_a_resnets_stem(channels: int, size: int) -> None:
    network = classifier("resnet18", channels, size).network
    assert network.conv1(torch.zeros(1, channels, size, size)).shape == (1, 64, size, size)  # type: ignore[operator]
    assert isinstance(network.maxpool, nn.Identity)
    large = classifier("resnet18", channels, 96).network
    assert large.conv1(torch.zeros(1, channels, 96, 96)).shape == (1, 64, 48, 48)  # type: ignore[operator]


def test_the_networks_of_the_issue_have_their_sizes() -> None:
    def count(name: str, channels: int = 1, size: int = 28) -> int:
        return sum(p.numel() for p in classifier(name, channels, size).network.parameters())

    assert count("softmax") == 784 * 7 + 7
    assert count("fnn") == 784 * 500 + 500 + 500 * 7 + 7
    assert count("cnn") == 16 * 25 + 32 + 32 * 16 * 25 + 64 + 32 * 49 * 7 + 7
    assert count("lenet5", size=32) == 156 + 2416 + 48120 + 10164 + 85 * 7  # LeCun et al. 1998, with all maps joined


def test_every_parameter_of_every_own_network_is_trained() -> None:
    for name in (*OWN, "alexnet", "resnet18"):
        workload = classifier(name, 3, 32).train()
        batch = {"image": images(workload), "label": torch.tensor([0, 1, 2, 3]), "id": torch.arange(4)}
        loss, scalars = workload.loss(batch, draws())
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in workload.network.parameters()), name
        assert set(scalars) == {"loss", "accuracy"}
        trained = {id(p) for p in workload.phases[0].parameters}
        assert trained == {id(p) for p in workload.network.parameters()}


# Mixing


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_the_same_for_any_split_of_the_batch_between_ranks(kind: str) -> None:
    workload = classifier("softmax", 3, 8, **{kind: 1.0})
    plan = BatchPlan(0, 1000, 22, accumulation=1, group=workload.group)
    x = images(workload, 22)
    whole, other, share = workload.mix(x, draws(rows=slice(0, 22)))
    assert other(torch.arange(22)).tolist() == [i ^ 1 for i in range(22)]  # 0 with 1, 2 with 3, ...
    for world in (2, 3, 4):
        for rank in range(world):
            rows = plan.rows(0, rank, world)
            assert rows.start % 2 == 0
            mine, mates, same = workload.mix(x[rows], draws(rows=rows))
            assert same == share
            assert torch.equal(mine, whole[rows])
            assert torch.equal(mates(torch.arange(22)[rows]), other(torch.arange(22))[rows])


def test_mixup_is_a_weighted_sum_and_the_loss_uses_the_same_weights() -> None:
    workload = classifier("softmax", 1, 8, mixup=0.5).train()
    x, labels = images(workload), torch.tensor([0, 1, 2, 3])
    mixed, _, share = workload.mix(x, draws())
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[[1, 0, 3, 2]])
    loss, _ = workload.loss({"image": x, "label": labels, "id": labels}, draws())
    logits = workload.network(mixed)
    parts = [workload.cross_entropy(logits, target) for target in (labels, labels[[1, 0, 3, 2]])]
    torch.testing.assert_close(loss, share * parts[0] + (1 - share) * parts[1])


def test_cutmix_pastes_a_box_and_weighs_the_labels_by_its_area() -> None:
    workload = classifier("softmax", 1, 8, cutmix=1.0)
    x = images(workload)
    shares = set()
    for step in range(30):
        mixed, _, share = workload.mix(x, draws(step))
        theirs = mixed != x
        assert torch.equal(mixed[theirs], x[[1, 0, 3, 2]][theirs])
        assert share == pytest.approx(1 - float(theirs[0].double().mean()))
        shares.add(share)
    assert len(shares) > 10


def test_with_both_kinds_of_mixing_each_step_uses_one_of_them() -> None:
    workload = classifier("softmax", 1, 8, mixup=1.0, cutmix=1.0)
    x = images(workload)
    pasted = {bool(((m := workload.mix(x, draws(step))[0]) == x).any() or (m == x[[1, 0, 3, 2]]).any())
              for step in range(20)}  # fmt: skip
    assert pasted == {True, False}


def test_an_odd_batch_leaves_its_last_image_to_itself() -> None:
    workload = classifier("softmax", 1, 8, mixup=1.0)
    x = images(workload, 5)
    mixed, other, _ = workload.mix(x, draws(rows=slice(0, 5)))
    torch.testing.assert_close(mixed[4], x[4])
    assert other(torch.arange(5)).tolist() == [1, 0, 3, 2, 4]


# Averaged weights


def test_what_is_averaged_is_what_is_evaluated_saved_and_not_trained() -> None:
    workload = classifier("cnn", ema=0.9)
    assert workload.average is not None
    assert workload.inference() is workload.average.module
    assert len(workload.phases[0].parameters) == len(list(workload.network.parameters()))
    assert any(name.startswith("average.module.") for name in workload.state_dict())
    plain = classifier("cnn")
    assert plain.inference() is plain.network


# What the classifier reports


@torch.no_grad()
def test_the_report_counts_every_sample_once_whatever_the_batches() -> None:
    workload = classifier("softmax").eval()
    evaluator = ClassificationEvaluator(workload)
    x, labels = images(workload, 8), torch.arange(8) % 7
    ids = torch.tensor([5, 3, 0, 7, 1, 2, 6, 4])
    totals: dict[str, Tensor] = {}
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        sums = evaluator.totals({"image": x[ids[rows]], "label": labels[ids[rows]], "id": ids[rows]}, draws())
        totals = {name: totals.get(name, torch.zeros(())) + value for name, value in sums.items()}
    logits = workload.network(x)
    report = evaluator.report(totals)
    assert report["accuracy"] == float((logits.argmax(1) == labels).double().mean())
    assert report["top5_accuracy"] == float((logits.topk(5).indices == labels[:, None]).any(1).double().mean())
    assert math.isclose(report["loss"], float(nn.functional.cross_entropy(logits, labels)), rel_tol=1e-6)
