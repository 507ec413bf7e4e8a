"""The judge of generated images: its scores are those of plain code and of torchmetrics over all images at once."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from trainer import workloads
from trainer.config.options import RunConfig
from trainer.data.dataset import DataSet
from trainer.data.description import ImageDescription, Mixture
from trainer.distributed.process import ProcessInfo
from trainer.distributed.runtime import Runtime
from trainer.engine import Engine
from trainer.metrics import modes
from trainer.metrics.features import Penultimate, PerChannel
from trainer.metrics.scores import SampleScores
from trainer.randomness import Draws
from trainer.run.build import open_run_data, recipe
from trainer.run.opened import open_run
from trainer.run.reference import open_reference
from trainer.workload import Workload

from ..engines import engine_of, metrics_of
from ..ranks import run
from ..results import records
from ..workers import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:Metric:UserWarning", "ignore:std:UserWarning")  # of torchmetrics
COUNT = 148  # held-out samples: 21 batches of 7 and one of a single row, which leaves ranks without any
CLASSIFIER = ["--duration", "30 steps", "--checkpoint.every", "15 steps", "--run.url", "digits"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a classifier of digits, with checkpoints of steps 15 and 30."""
    folder = tmp_path_factory.mktemp("classifier")
    run(CLASSIFIER, folder)
    return str(folder / "digits")


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime(ProcessInfo(), precision="fp64", threads=1) as runtime:
        yield runtime


def configure(metrics: dict[str, Any], workload: dict[str, Any] | None = None, data: dict[str, Any] | None = None,
              batch: int = 500, count: int | None = COUNT) -> RunConfig:  # fmt: skip
    workload = workload or {"name": "gan", "width": 8, "layers": 2, "latent": 8}
    return workloads.config_model(workload["name"])(
        workload=workload, data=data or {"name": "digits"}, batch_size=32, precision="fp64", duration="4 steps",
        metrics=metrics, evaluate={"samples": count, "batch_size": batch},
    )  # type: ignore[arg-type]  # fmt: skip


def scores(runtime: Runtime, config: dict[str, Any], trained: bool = False) -> dict[str, float]:
    engine, _ = engine_of(runtime, configure(**config))
    if trained:
        assert engine.train().status == "done"
        return engine.boundary.metrics
    return metrics_of(engine)


# What the scores should be


@torch.no_grad()
def fakes_of(workload: Workload, count: int, averaged: bool = True) -> Tensor:
    """All generated images of an evaluation, as 8-bit files would hold them, in [0, 1]."""
    draws = Draws(0, ("evaluate",), slice(0, count), torch.device("cpu"), torch.float64)
    network: Any = workload.inference() if averaged else workload.generator
    images = network.eval()(workload.latents(draws))  # type: ignore[operator]
    return ((images.float() + 1) * 127.5).round() / 255


def reals_of(data: DataSet) -> Tensor:
    return data.held_out["image"].float() / 255  # type: ignore[union-attr]


@torch.no_grad()
def seen_by(url: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """What comes into the last layer of a classifier, and what it makes of it."""
    opened = open_run(url)
    mean, std = (torch.tensor(v)[:, None, None] for v in (opened.data.mean, opened.data.std))
    network: Any = opened.workload.inference().eval()
    name, last = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
    parent = network.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.Identity())
    features = network((images - mean) / std)
    return features, last(features).softmax(1)


class Same(nn.Identity):
    """What torchmetrics wants for an extractor, where the images are the features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


def library_scores(real: Tensor, fake: Tensor) -> dict[str, float]:
    values = {}
    fid = FrechetInceptionDistance(Same(real.shape[1]), normalize=True).set_dtype(torch.float64)
    kid = KernelInceptionDistance(Same(real.shape[1]), subsets=1, subset_size=len(real), normalize=True)
    for name, metric in (("fid", fid), ("kid", kid)):
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        value = metric.compute()
        values[name] = float(value[0] if name == "kid" else value)
    return values


def neighbour_scores(real: Tensor, fake: Tensor) -> dict[str, float]:
    """By their definitions, in numpy."""
    distances = {
        (a, b): np.sqrt(np.square(x[:, None].numpy() - y[None].numpy()).sum(-1))
        for a, x in (("r", real.double()), ("f", fake.double()))
        for b, y in (("r", real.double()), ("f", fake.double()))
    }
    of_real, of_fake = np.sort(distances["r", "r"]), np.sort(distances["f", "f"])
    between = distances["r", "f"]
    inside = between < of_real[:, 5:6]
    return {
        "precision": (between < of_real[:, 3:4]).any(0).mean(),
        "recall": (between < of_fake[None, :, 3]).any(1).mean(),
        "density": inside.sum() / 5 / len(fake),
        "coverage": inside.any(1).mean(),
    }


def check(actual: dict[str, float], label: str, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert actual[f"{name}@{label}"] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@pytest.fixture(scope="module")
def good(runtime: Runtime) -> tuple[Engine, DataSet]:
    """A generator that is good enough for every score to mean something: the training digits' principal components."""
    engine, parts = engine_of(runtime, configure({}, {"name": "gan", "width": 8, "latent": 12}))
    data = parts.data
    images = data.train["image"].double().flatten(1) / 127.5 - 1  # type: ignore[union-attr]
    _, deviations, axes = torch.linalg.svd(images - images.mean(0), full_matrices=False)
    linear = nn.Linear(12, 64, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_((deviations[:12, None] * axes[:12]).T / len(images) ** 0.5)
        linear.bias.copy_(images.mean(0))
    engine.workload.generator.network = nn.Sequential(linear, nn.Hardtanh())  # type: ignore[union-attr]
    return engine, data


def evaluated(runtime: Runtime, good: tuple[Engine, DataSet], features: str) -> tuple[dict[str, float], SampleScores]:
    engine, data = good
    reference = open_reference(configure({"features": features}), data.description)
    reference.prepare(engine.loader, runtime)  # type: ignore[arg-type]
    engine.boundary.evaluator = engine.workload.evaluator(lambda: reference.scores)
    return metrics_of(engine), reference.scores


def test_scores_in_pixels_are_those_of_the_library_over_all_images(
    runtime: Runtime, good: tuple[Engine, DataSet]
) -> None:
    values, _ = evaluated(runtime, good, "pixels")
    real, fake = (images.flatten(1) * 2 - 1 for images in (reals_of(good[1]), fakes_of(good[0].workload, COUNT)))
    assert real.shape == fake.shape == (COUNT, 64)
    expected = {**library_scores(real, fake), **neighbour_scores(real, fake)}
    assert all(value > 0 for value in expected.values()), expected  # else little would be compared
    check(values, "pixels", expected)
    assert not any(name.startswith("is@") for name in values)  # pixels have no classes


def test_scores_in_the_features_of_a_classifier_are_those_of_the_library_over_all_images(
    runtime: Runtime, good: tuple[Engine, DataSet], classifier: str
) -> None:
    values, scores = evaluated(runtime, good, classifier)
    (real, reals), (fake, fakes) = (
        seen_by(classifier, images) for images in (reals_of(good[1]), fakes_of(good[0].workload, COUNT))
    )
    assert (scores.features.dimensions, scores.features.classes) == (real.shape[1], 10)
    expected = {**library_scores(real, fake), **neighbour_scores(real, fake)}
    score = InceptionScore(Same(10), splits=1)
    score.update(fakes.log())
    expected["is"] = float(score.compute()[0])
    shares = [torch.bincount(p.argmax(1), minlength=10).double() / COUNT for p in (fakes, reals)]
    expected["class_kl"] = float(F.kl_div(shares[1].log(), shares[0], reduction="sum"))
    check(values, scores.features.label, expected)


def test_controls_stand_beside_the_scores(runtime: Runtime) -> None:
    """As many training images are close to the held-out ones; pieces of these in another order are not."""
    metrics = scores(runtime, {"metrics": {"features": "pixels"}, "count": None})
    floor, shuffled = metrics["fid_floor@pixels"], metrics["fid_shuffled@pixels"]
    assert 0 < floor < 1
    assert shuffled > 20 * floor
    data = open_run_data(configure({}, count=None))
    every = torch.arange(599) * 1198 // 599
    train = data.train["image"][every].float() / 127.5 - 1  # type: ignore[union-attr]
    expected = library_scores(reals_of(data).flatten(1) * 2 - 1, train.flatten(1))
    assert floor == pytest.approx(expected["fid"], rel=1e-4, abs=1e-4)


# The world size


@pytest.mark.parametrize("kind", ["pixels", "classifier"])
def test_scores_are_the_same_on_any_number_of_ranks_and_in_batches_of_any_size(kind: str, classifier: str) -> None:
    workload = {"name": "dcgan", "width": 4, "latent": 8, "ema": 0.5}
    features = classifier if kind == "classifier" else kind
    config = {"metrics": {"features": features, "neighbours": 50}, "workload": workload}
    (alone,) = on_ranks(1, scores, {**config, "batch": 500}, True)
    assert {name.partition("@")[0] for name in alone} >= {
        "fid", "kid", "precision", "recall", "density", "coverage", "fid_floor", "fid_shuffled", "diversity", "spacing",
    }  # fmt: skip
    for world, batch in ((1, 7), (2, 7), (3, 500), (3, 7)):
        for sharded in on_ranks(world, scores, {**config, "batch": batch}, True):
            assert sharded == pytest.approx(alone, rel=1e-6, abs=1e-9), (world, batch)


# Labels


def test_a_score_is_named_after_the_classifier_and_the_hash_of_its_weights(classifier: str) -> None:
    data = open_run_data(configure({})).description
    labels = []
    for step in (15, 30):
        url = f"{classifier}/checkpoints/step-{step:08d}"
        scores = open_reference(configure({"features": url}), data).scores
        digest = hashlib.sha256(Path(url, "weights.safetensors").read_bytes()).hexdigest()
        assert scores.features.label == f"digits-{digest[:8]}"
        assert scores.headline == f"fid@digits-{digest[:8]}"
        labels.append(scores.features.label)
    assert labels[0] != labels[1]


# Averaged weights


def test_the_averaged_weights_are_what_is_judged(runtime: Runtime) -> None:
    workload = {"name": "gan", "width": 8, "layers": 2, "latent": 8, "ema": 0.99}
    engine, parts = engine_of(runtime, configure({"features": "pixels"}, workload))
    data = parts.data
    assert engine.train().status == "done"
    real = reals_of(data).flatten(1) * 2 - 1
    averaged, newest = (
        library_scores(real, fakes_of(engine.workload, COUNT, average).flatten(1) * 2 - 1)["fid"]
        for average in (True, False)
    )
    assert engine.boundary.metrics["fid@pixels"] == pytest.approx(averaged, rel=1e-8)
    assert newest != pytest.approx(averaged, rel=1e-6)


# The cache


class Counting:
    """Features that count the images that they see."""

    def __init__(self, features: Any) -> None:
        self.features, self.images = features, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.features, name)

    def __call__(self, images: Tensor) -> Any:
        self.images += len(images)
        return self.features(images)


def prepared(runtime: Runtime, cache: str, **more: Any) -> tuple[SampleScores, int]:
    """Scores with the statistics of the real images, and at how many images they had to look for them."""
    parts = recipe(configure({"cache": cache, **more.pop("metrics", {})}, **more), 1)
    parts.check()
    assert parts.reference
    scores = parts.reference.scores
    scores.features = counting = Counting(scores.features)  # type: ignore[assignment]
    parts.prepare_reference(parts.open_loader(runtime), runtime)
    return scores, counting.images


def alike(a: SampleScores, b: SampleScores) -> bool:
    return (
        a.controls == b.controls
        and torch.equal(a.table, b.table)
        and torch.equal(a.real.mean, b.real.mean)
        and torch.equal(a.real.covariance, b.real.covariance)
        and torch.equal(a.predicted, b.predicted)
    )


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_statistics_are_taken_once_and_then_come_from_the_cache(
    where: str, runtime: Runtime, tmp_path: Path, classifier: str
) -> None:
    cache = str(tmp_path / "cache") if where == "folder" else f"memory://cache-{tmp_path.name}"
    (first, looked), (second, again) = (prepared(runtime, cache, metrics={"features": classifier}) for _ in range(2))
    assert (looked, again) == (3 * COUNT, 0)
    assert alike(first, second)
    assert len(first.predicted) == 10
    (_,) = fsspec.core.url_to_fs(cache)[0].ls(fsspec.core.url_to_fs(cache)[1])


def test_other_features_counts_or_data_have_statistics_of_their_own(
    runtime: Runtime, tmp_path: Path, classifier: str
) -> None:
    cache = str(tmp_path / "cache")
    fake = {"name": "fake", "samples": 600, "size": 8, "channels": 1}
    cases: list[dict[str, Any]] = [
        {}, {"count": 50}, {"metrics": {"neighbours": 20}}, {"metrics": {"features": classifier}},
        {"metrics": {"features": f"{classifier}/checkpoints/step-00000015"}}, {"data": fake},
        {"data": {**fake, "classes": 3}},
    ]  # fmt: skip
    for case in cases:
        assert prepared(runtime, cache, **case)[1] > 0, case
    for case in cases:
        assert prepared(runtime, cache, **case)[1] == 0, case


def test_two_folders_of_images_do_not_share_statistics(runtime: Runtime, tmp_path: Path) -> None:
    """They have the same name and the same numbers of images."""
    opened = []
    for shade, name in ((40, "dark"), (200, "light")):
        for split in ("train", "val"):
            for number in range(8):
                path = tmp_path / name / split / f"class{number % 2}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(number).integers(shade, shade + 50, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(path)
        data = {"name": "folder", "root": str(tmp_path / name), "size": 8, "workers": 0}
        opened.append(prepared(runtime, str(tmp_path / "cache"), data=data, count=None)[0])
    assert float((opened[1].real.mean - opened[0].real.mean).mean()) == pytest.approx(160 / 127.5, abs=0.2)


@pytest.mark.parametrize("split", ["train", "val"])
def test_any_image_that_was_replaced_makes_statistics_of_its_own(split: str, runtime: Runtime, tmp_path: Path) -> None:
    """Though it has the name, the size and the time of the one before."""
    for part, number in itertools.product(("train", "val"), range(40)):
        path = tmp_path / "set" / part / "class" / f"{number:02}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 5 * number, np.uint8)).save(path)
        os.utime(path, (0, 0))
    data = {"name": "folder", "root": str(tmp_path / "set"), "size": 8, "workers": 0}
    cache = str(tmp_path / "cache")
    assert [prepared(runtime, cache, data=data, count=None)[1] for _ in range(2)] == [120, 0]
    replaced = tmp_path / "set" / split / "class" / "03.bmp"
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(replaced)
    os.utime(replaced, (0, 0))
    assert [prepared(runtime, cache, data=data, count=None)[1] for _ in range(2)] == [120, 0]


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "garbage"])
def test_a_corrupt_cache_is_replaced(damage: str, runtime: Runtime, tmp_path: Path) -> None:
    whole, _ = prepared(runtime, str(tmp_path))
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[-9] ^= 1
    file.write_bytes(
        {"truncated": content[:-8], "one bit": bytes(flipped), "empty": b"", "garbage": b"\0" * 99}[damage]
    )
    again, looked = prepared(runtime, str(tmp_path))
    assert looked == 3 * COUNT
    assert alike(whole, again)
    assert prepared(runtime, str(tmp_path))[1] == 0


def test_a_run_shares_its_cache_on_s3_with_the_next_one(tmp_path: Path, s3_server: dict[str, str]) -> None:
    """On two ranks, of which only the first reads storage."""
    import s3fs

    words = ["--workload.name", "gan", "--workload.width", "8", "--data.name", "digits", "--duration", "2 steps",
             "--batch_size", "32", "--metrics.cache", "s3://warm-up/fid", "--evaluate.samples", "50"]  # fmt: skip
    bucket = s3fs.S3FileSystem(
        key=s3_server["AWS_ACCESS_KEY_ID"], secret=s3_server["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=s3_server["AWS_ENDPOINT_URL"], use_listings_cache=False,
    )  # fmt: skip
    for name in ("first", "second"):
        run([*words, "--run.url", name], tmp_path, 2, s3_server)
        (file,) = bucket.ls("s3://warm-up/fid", detail=True)
        if name == "first":
            written = file["LastModified"]
    assert file["LastModified"] == written
    assert records(tmp_path / "first") == records(tmp_path / "second")


# Known modes


def mixture(kind: str) -> tuple[DataSet, Mixture]:
    data = open_run_data(configure({}, data={"name": kind}, count=None))
    assert data.description.mixture is not None
    return data, data.description.mixture


def mode_scores(points: Tensor, mixture: Mixture) -> dict[str, float]:
    cut = len(points) // 3
    first, second = (modes.mixture_totals(part, mixture) for part in (points[:cut], points[cut:]))
    return modes.report({name: first[name] + second[name] for name in first})


@pytest.mark.parametrize(("kind", "count"), [("ring8", 8), ("grid25", 25)])
def test_the_held_out_points_themselves_have_all_modes(kind: str, count: int) -> None:
    """Of a Gaussian in the plane, 1 - exp(-9/2) = 98.9 % lie within three deviations."""
    data, known = mixture(kind)
    points = data.held_out["image"].flatten(1) / 127.5 - 1  # type: ignore[union-attr]
    scored = mode_scores(points, known)
    assert len(known.centres) == scored["modes"] == count
    assert scored["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.008)
    assert scored["reverse_kl"] < 3 * (count - 1) / (2 * len(points))  # three times that of a sample of equal modes


def test_modes_of_points_made_by_hand() -> None:
    _, ring = mixture("ring8")
    centres = torch.tensor(ring.centres, dtype=torch.float64)
    assert mode_scores(centres.repeat(5, 1), ring) == {"modes": 8, "high_quality": 1, "reverse_kl": 0}
    one = mode_scores(centres[:1].repeat(9, 1), ring)
    assert one == {"modes": 1, "high_quality": 1, "reverse_kl": pytest.approx(math.log(8), rel=1e-12)}
    half = mode_scores(centres[::2].repeat(3, 1), ring)
    assert half == {"modes": 4, "high_quality": 1, "reverse_kl": pytest.approx(math.log(2), rel=1e-12)}
    aside = torch.tensor([[0.0299, 0.0], [0.0301, 0.0]], dtype=torch.float64)  # three deviations are 0.03
    near = mode_scores(torch.cat([centres[:1] + aside, centres[3:4] + aside[1:]]), ring)
    assert near["modes"] == 1  # the other one is nearest to a point, but not near
    assert near["high_quality"] == pytest.approx(1 / 3)
    assert near["reverse_kl"] == pytest.approx(2 / 3 * math.log(2 / 3 * 8) + 1 / 3 * math.log(1 / 3 * 8))


def test_an_evaluation_of_points_counts_modes(runtime: Runtime) -> None:
    workload = {"name": "gan", "width": 8, "layers": 2, "latent": 2}
    metrics = scores(runtime, {"metrics": {}, "workload": workload, "data": {"name": "ring8"}})
    assert metrics["modes"] == 0  # of an untrained generator
    assert metrics["high_quality"] == 0
    assert 0 < metrics["reverse_kl"] <= math.log(8)
    assert {"fid@points", "precision@points"} <= metrics.keys()
    assert metrics["fid_floor@points"] > 1e-5  # two samples are not alike, which the watch must know
    assert not any(name.startswith("fid_shuffled") for name in metrics)


class Brightness(nn.Module):
    """Tells ten shades of grey apart, as a linear layer can: -(mean - c/9)^2 less the square of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1, 10)
        shades = torch.arange(10) / 9
        with torch.no_grad():
            self.last.weight.copy_(2 * shades[:, None])
            self.last.bias.copy_(-shades.square())

    def forward(self, images: Tensor) -> Tensor:
        return self.last(images.mean((1, 2, 3))[:, None])


def test_modes_of_stacked_digits_are_the_digits_of_their_channels() -> None:
    grey = ImageDescription("shades", 10, 10, 1, 4, tuple("0123456789"), (0.0,), (1.0,))
    features = PerChannel(Penultimate(Brightness(), grey, "shades"), 3)
    numbers = torch.tensor([0, 7, 42, 123, 999, 990])
    digits = torch.stack([numbers // 100, numbers // 10 % 10, numbers % 10], 1)
    images = (digits / 9 * 2 - 1)[:, :, None, None].expand(-1, -1, 4, 4)
    assert features.modes == 1000
    assert torch.equal(features.mode_of(images), numbers)
    shades, classes = features(images)
    assert classes is None
    torch.testing.assert_close(shades, digits / 9)


def test_an_evaluation_of_stacked_digits_counts_what_our_own_classifier_sees(
    tmp_path: Path, real_data: str, runtime: Runtime
) -> None:
    words = ["--workload.network", "softmax", "--data.name", "mnist", "--data.root", real_data, "--duration",
             "40 steps", "--batch_size", "100", "--optimizer.lr", "0.01", "--evaluate.samples", "100"]  # fmt: skip
    run([*words, "--run.url", "grey"], tmp_path)
    workload = {"name": "dcgan", "width": 2, "latent": 8}
    config = configure({"features": str(tmp_path / "grey")}, workload, {"name": "stacked_mnist", "root": real_data})
    engine, parts = engine_of(runtime, config)
    metrics = metrics_of(engine)
    assert parts.reference
    features = parts.reference.scores.features
    assert isinstance(features, PerChannel)
    digits = features.mode_of(fakes_of(engine.workload, COUNT) * 2 - 1)
    counts = torch.bincount(digits, minlength=1000).double()
    shares = counts[counts > 0] / COUNT
    assert metrics["modes"] == (counts > 0).sum()
    assert metrics["high_quality"] == 1
    assert metrics["reverse_kl"] == pytest.approx(float((shares * (shares * 1000).log()).sum()))
    real = features.mode_of(reals_of(parts.data) * 2 - 1)
    assert (real == parts.data.held_out["label"]).float().mean() > 0.4  # a tenth of it would be chance
    assert features(torch.zeros(1, 3, 28, 28))[0].shape == (1, 3 * 784)


# Inception


def test_inception_takes_its_weights_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here random ones: the real ones cannot be fetched."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    names = ["2048", "logits_unbiased"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(kind, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        network = kind("inception-v3-compat", names)
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    grey = open_run_data(configure({})).description
    extractor = open_reference(configure({"features": f"inception:{path}"}), grey).scores.features
    assert extractor.label == f"inception-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    assert (extractor.dimensions, extractor.classes) == (2048, 1008)
    pixels = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, probabilities = extractor(pixels.float() / 127.5 - 1)
    assert features.shape == (2, 2048)
    assert features.isfinite().all()
    assert probabilities is not None
    expected = network(pixels.expand(-1, 3, -1, -1))
    torch.testing.assert_close(features, expected[0])
    torch.testing.assert_close(probabilities, expected[1].softmax(1))
