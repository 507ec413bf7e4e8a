"""Image classification: one network, one phase, cross-entropy."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from ..config.options import OptimizerOptions, WorkloadOptions
from ..config.user_code import is_user_code, load_attribute
from ..data.description import Batch, ImageDescription
from ..figures import Figure, ImageGrid, Matrix
from ..metrics.evaluator import Evaluator, Scores, Totals
from ..nn import optim
from ..nn.average import WeightAverage
from ..nn.dropout import drawing, use_draws
from ..randomness import Draws
from ..workload import Phase, Scalars, Workload

OWN = ("softmax", "fnn", "cnn", "lenet5", "vgg_small")
ADAPTED = (
    "alexnet", "vgg11_bn", "vgg16_bn", "vgg19_bn", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
)  # fmt: skip
SMALL = 64  # up to this size in pixels a network built for 224 gets a stem that keeps the resolution
SHOWN = 24  # worst mistakes in the picture
LARGEST_MATRIX = 100  # classes


class Options(WorkloadOptions):
    code: ClassVar[tuple[str, ...]] = ("network",)

    network: str = "cnn"
    """softmax, fnn, cnn, lenet5, vgg_small, alexnet, vgg11_bn, vgg16_bn, vgg19_bn, resnet18, resnet34, resnet50,
    resnet101, resnet152, torchvision:NAME for any classification model of torchvision, or path/to/net.py:Net of your
    own, which is called with the keywords channels, classes and size and takes images (B, channels, size, size) to
    logits."""
    hidden: int = Field(500, ge=1)
    """Width of the fnn's hidden layer."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes (Szegedy et al. 2016); 0 is off."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup (Zhang et al. 2018); 0 is off."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of CutMix (Yun et al. 2019); 0 is off. With both on, each batch uses one of them."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which is then what is evaluated; 0 is off."""

    @field_validator("network")
    @classmethod
    def _known(cls, network: str) -> str:
        if network not in OWN + ADAPTED and not network.startswith("torchvision:") and not is_user_code(network):
            raise ValueError(f"known networks: {', '.join(OWN + ADAPTED)}, torchvision:NAME, path/to/net.py:Net")
        if network.startswith("torchvision:"):
            import torchvision

            name, names = network.partition(":")[2], torchvision.models.list_models(module=torchvision.models)
            if name not in names:
                near = difflib.get_close_matches(name, names, 3) or names
                raise ValueError(f"torchvision has no such classification model; it has: {', '.join(near)}")
        return network


def build(options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> Classifier:
    return Classifier(options, data, optimizer)


class Classifier(Workload):
    data: ImageDescription

    def __init__(self, options: Options, data: ImageDescription, optimizer: OptimizerOptions) -> None:
        super().__init__()
        self.options, self.data = options, data
        self.network = use_draws(network(options, data))
        self.average = WeightAverage(self.network, options.ema) if options.ema else None
        self.phases = (Phase("classify", self.loss, optim.build(optimizer, self.network)),)
        self.mixing = [name for name in ("mixup", "cutmix") if getattr(options, name)]
        self.group = 2 if self.mixing else 1
        # On small images a ResNet loses by it (measured on a CPU); plain stacks of convolutions gain.
        self.channels_last = options.network in ("cnn", "lenet5") or options.network.startswith("vgg") or data.size > 64

    def loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        images, labels = batch["image"], batch["label"]
        with drawing(self.network, draws):
            if self.mixing:
                images, other, share = self.mix(images, draws)
                logits = self.network(images)
                loss = share * self.cross_entropy(logits, labels)
                loss = loss + (1 - share) * self.cross_entropy(logits, other(labels))
            else:
                logits = self.network(images)
                loss = self.cross_entropy(logits, labels)
        accuracy = (logits.detach().argmax(1) == labels).to(loss.dtype).mean()
        return loss, {"loss": loss.detach(), "accuracy": accuracy}

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.options.label_smoothing)

    def mix(self, images: Tensor, draws: Draws) -> tuple[Tensor, Callable[[Tensor], Tensor], float]:
        """Mix each image with its neighbour in the pair, which is always on the same rank.

        Returns the images, the map from a batch to its partners, and the share that an image keeps of itself.
        """
        chance = draws.shared("mix")
        kind = chance.choice(self.mixing)
        alpha = getattr(self.options, kind)
        share = chance.betavariate(alpha, alpha)
        pairs = len(images) // 2 * 2
        order = torch.arange(len(images), device=images.device)
        order[:pairs] = order[:pairs].view(-1, 2).flip(1).flatten()
        if kind == "mixup":
            return images * share + images[order] * (1 - share), lambda x: x[order], share
        height, width = images.shape[2:]
        side = (1 - share) ** 0.5
        rows, columns = (_cut(chance.random(), size, side * size) for size in (height, width))
        mixed = images.clone()
        mixed[:, :, rows, columns] = images[order][:, :, rows, columns]
        cut = (rows.stop - rows.start) * (columns.stop - columns.start)
        return mixed, lambda x: x[order], 1 - cut / (height * width)

    def after_step(self, step: int, means: Scalars) -> None:
        if self.average is not None:
            self.average.update(self.network, step)

    def inference(self) -> nn.Module:
        return self.network if self.average is None else self.average.module

    def evaluator(self, scores: Callable[[], Scores]) -> Evaluator:
        return ClassificationEvaluator(self)

    def example(self) -> dict[str, Tensor]:
        draws = Draws(0, ("example",), slice(0, 2), torch.device("cpu"))
        return {"images": draws.uniform("images", self.data.shape)}

    def figures(self, totals: Totals, images: Callable[[Iterable[int]], Tensor], draws: Draws) -> dict[str, Figure]:
        names = self.data.classes
        figures: dict[str, Figure] = {}
        label, prediction = totals["label"].long(), totals["prediction"].long()
        if len(names) <= LARGEST_MATRIX:
            counts = torch.bincount(label * len(names) + prediction, minlength=len(names) ** 2)
            figures["confusion"] = Matrix(
                counts.view(len(names), -1), names, f"{self.data.name}: {len(label)} samples", "true", "predicted"
            )
        wrong = torch.nonzero(label != prediction).flatten()
        worst = wrong[totals["nll"][wrong].argsort(descending=True)[:SHOWN]].tolist()
        if worst:
            captions = tuple(
                f"{names[prediction[i]]} {totals['confidence'][i]:.0%}\nis {names[label[i]]}" for i in worst
            )
            figures["mistakes"] = ImageGrid(images(worst), captions, f"{self.data.name}: the worst mistakes")
        return figures


class ClassificationEvaluator:
    """A table over all samples, in which a batch fills its own rows."""

    headline, maximise = "accuracy", True

    def __init__(self, workload: Classifier) -> None:
        self.workload = workload

    def totals(self, batch: Batch, draws: Draws) -> Totals:
        logits = self.workload.inference()(batch["image"])
        wide = logits if logits.dtype == torch.float64 else logits.float()
        labels = batch["label"]
        confidence, prediction = wide.softmax(1).max(1)
        rows = {
            "nll": F.cross_entropy(wide, labels, reduction="none"),
            "prediction": prediction,
            "confidence": confidence,
            "label": labels,
        }
        data = self.workload.data
        if len(data.classes) > 5:
            rows["top5"] = (wide.topk(5, dim=1).indices == labels[:, None]).any(1)
        empty = torch.zeros(data.eval_size, dtype=torch.float64, device=wide.device)
        return {name: empty.index_add(0, batch["id"], values.double()) for name, values in rows.items()}

    def report(self, totals: Totals) -> dict[str, float]:
        metrics = {
            "accuracy": float((totals["prediction"] == totals["label"]).double().mean()),
            "loss": float(totals["nll"].mean()),
        }
        if "top5" in totals:
            metrics["top5_accuracy"] = float(totals["top5"].mean())
        return metrics


def _cut(centre: float, size: int, length: float) -> slice:
    """The part of a box of `length` around a random centre that lies within `size` pixels."""
    middle, half = int(centre * size), round(length / 2)
    return slice(max(middle - half, 0), min(middle + half, size))


def network(options: Options, data: ImageDescription) -> nn.Module:
    """Images (B, C, H, W), normalised, to logits (B, classes)."""
    name, classes = options.network, len(data.classes)
    if name == "softmax":
        return nn.Sequential(nn.Flatten(), nn.Linear(data.channels * data.size**2, classes))
    if name == "fnn":
        width = options.hidden
        return nn.Sequential(
            nn.Flatten(), nn.Linear(data.channels * data.size**2, width), nn.ReLU(), nn.Linear(width, classes)
        )
    if name == "cnn":
        return _cnn(data.channels, data.size, classes)
    if name == "lenet5":
        return _lenet5(data.channels, data.size, classes)
    if name == "vgg_small":
        return _vgg_small(data.channels, classes)
    if is_user_code(name):
        own = load_attribute("workload.network", name)
        return cast(nn.Module, own(channels=data.channels, classes=classes, size=data.size))
    return _torchvision(name.removeprefix("torchvision:"), name in ADAPTED, data, classes)


def _cnn(channels: int, size: int, classes: int) -> nn.Module:
    """Two layers of 5x5 convolution, BatchNorm, ReLU and 2x2 max-pooling, then a linear one.

    The convolutions have no bias: BatchNorm takes it out again, so that its gradient would be rounding noise, which
    Adam would scale up to steps that differ from world size to world size.
    """

    def layer(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 5, padding=2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)
        )

    return nn.Sequential(layer(channels, 16), layer(16, 32), nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, classes))


def _lenet5(channels: int, size: int, classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998), with 28 pixels padded to the 32 of the paper."""
    if size < 12:
        raise ValueError(f"workload.network: lenet5 needs images of 12 pixels or more, not {size}: use cnn")
    padding = 2 if size < 32 else 0
    side = ((size + 2 * padding - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=padding), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(16 * side**2, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, classes),
    )  # fmt: skip


def _vgg_small(channels: int, classes: int) -> nn.Module:
    """VGG-11 (Simonyan and Zisserman 2015) for a CPU: half as wide, a stage shorter, of average pooling.

    The mean instead of the maximum spreads gradients over all pixels, which makes better pictures (Gatys et al. 2016).
    """
    parts: dict[str, nn.Module] = {}
    for stage, widths in enumerate([(32,), (64,), (128, 128), (256, 256)], 1):
        if stage > 1:
            parts[f"pool{stage - 1}"] = nn.AvgPool2d(2, ceil_mode=True)  # a single pixel stays one
        for number, width in enumerate(widths, 1):
            parts[f"conv{stage}_{number}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)  # as in _cnn
            parts[f"norm{stage}_{number}"] = nn.BatchNorm2d(width)
            parts[f"relu{stage}_{number}"] = nn.ReLU()
            channels = width
    parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classes": nn.Linear(channels, classes)}
    return nn.Sequential(OrderedDict(parts))


def _torchvision(name: str, adapt: bool, data: ImageDescription, classes: int) -> nn.Module:
    """torchvision's model, untrained; the adapted ones get a stem for small images where the images are small."""
    from torchvision.models import get_model

    extra: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        extra = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):  # its position embeddings are made for one size
        extra = {"image_size": data.size}
    try:
        model: nn.Module = get_model(name, weights=None, num_classes=classes, **extra)
    except AssertionError as error:
        raise _unfit(name, data, error) from None
    small = adapt and data.size <= SMALL
    features = cast(nn.Sequential, getattr(model, "features", None))
    if small and name.startswith("resnet"):  # as for CIFAR-10 in He et al. 2016
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    elif small and name.startswith("vgg"):
        pools = [i for i, m in enumerate(features) if isinstance(m, nn.MaxPool2d)]
        for index in pools[: max(0, 5 - (data.size.bit_length() - 1))]:  # 16 pixels stand only four halvings
            features[index] = nn.Identity()
        for convolution in features.modules():
            if isinstance(convolution, nn.Conv2d):
                convolution.bias = None  # as in _cnn
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, classes)
        nn.init.normal_(model.classifier.weight, 0, 0.01)
        nn.init.zeros_(model.classifier.bias)
    elif small and name == "alexnet":
        features[0] = nn.Conv2d(3, 64, 5, padding=2)
        if data.size < 24:
            features[2] = nn.Identity()
    if data.channels != 3:
        _replace_first_convolution(model, data.channels)
    if not adapt:
        _try(model, name, data)
    return model


def _unfit(name: str, data: ImageDescription, reason: Exception) -> ValueError:
    return ValueError(
        f"workload.network: torchvision:{name} does not take images of {data.size} pixels "
        f"({str(reason).splitlines()[0].rstrip('. ')}): use images of another size or another network"
    )


@torch.no_grad()
def _try(model: nn.Module, name: str, data: ImageDescription) -> None:
    """Find out whether the images are large enough, by shapes alone; raises ValueError."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    model.eval()
    try:
        torch.func.functional_call(model, shapes, torch.empty(2, *data.shape, device="meta"))
    except (RuntimeError, AssertionError) as error:
        raise _unfit(name, data, error) from None
    finally:
        model.train()


def _replace_first_convolution(model: nn.Module, channels: int) -> None:
    def pair(value: Any) -> Any:  # torch types these as tuples of any length
        return value

    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            parent, _, name = path.rpartition(".")
            fresh = nn.Conv2d(
                channels, module.out_channels, pair(module.kernel_size), pair(module.stride), pair(module.padding),
                pair(module.dilation),
                bias=module.bias is not None,
            )  # fmt: skip
            setattr(model.get_submodule(parent), name, fresh)
            return
