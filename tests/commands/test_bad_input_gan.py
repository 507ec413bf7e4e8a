"""What a user of the GAN family may get wrong: one clear line from the first rank, exit code 2 on every rank."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from ..ranks import run
from .test_bad_input import WORLDS, contents, refused

FAKE = ["--data.name", "fake", "--data.samples", "64", "--batch_size", "8", "--workload.width", "4"]
SHORT = ["--duration", "2 steps", "--run.url", "run"]


def gan(name: str, *words: str, size: int = 8) -> list[str]:
    return ["--workload.name", name, *FAKE, "--data.size", str(size), *SHORT, *words]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `grey`, a classifier of grey images, and `gan`."""
    folder = tmp_path_factory.mktemp("runs")
    run(["--workload.network", "softmax", "--duration", "2 steps", "--run.url", "grey"], folder)
    run(gan("gan", "--run.url", "gan"), folder)
    return folder


SIZES = "use a size that is 4, 5, 6 or 7 times a power of two, from 8 to 1024, such as 28, 32, 64 or 128"


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (gan("dcgan", "--workload.latent", "0"), "workload.latent: '0' should be greater than or equal to 1"),
        (gan("dcgan", size=30), f"data.size: this network cannot make images of 30 pixels: {SIZES}"),
        (gan("infogan", size=9), f"data.size: this network cannot make images of 9 pixels: {SIZES}"),
        (gan("began", size=18), f"data.size: this network cannot make images of 18 pixels: {SIZES}"),
        (
            gan("biggan", "--workload.latent", "7"),
            "workload.latent: 7 cannot be shared out among 2 layers: use 6, or set workload.hierarchical to false",
        ),
        (
            gan("biggan", "--workload.latent", "8", "--data.classes", "1"),
            "workload.name: biggan needs classes, but fake has none: use dcgan or wgan_gp",
        ),
        (
            gan("r3gan", "--workload.width", "5", "--workload.group_channels", "4"),
            "workload.group_channels: 4 do not divide the 10 channels in a block at 4 pixels: use a divisor of 10, or "
            "another workload.width",
        ),
        (
            gan("r3gan", "--data.classes", "1"),
            "workload.conditional: fake has no classes to choose from: set workload.conditional to false",
        ),
        (
            gan("wgan", "--workload.label_smoothing", "0.1"),
            "workload.label_smoothing: 0.1 is no setting of wgan, which has no targets: remove it",
        ),
        (
            gan("gan", "--workload.loss", "wasserstein", "--workload.label_smoothing", "0.1"),
            "workload.label_smoothing: only the logistic loss has targets: remove it or set loss",
        ),
        (
            gan("began", "--workload.r1", "1"),
            "workload.r1: 1.0 is no setting of began, whose discriminator rebuilds images: remove it",
        ),
        (
            gan("stylegan", size=28),
            "data.size: stylegan cannot make images of 28 pixels: use a power of two from 8 to 1024, such as 32, 64 or "
            "256",
        ),
        (
            gan("stylegan", "--workload.augment", "color"),
            "workload.augment: ('color',) is no setting of stylegan, which has workload.ada_target for it: remove it",
        ),
        (
            gan("stylegan", "--workload.conditional", "true", "--data.classes", "1"),
            "workload.conditional: fake has no classes: remove it",
        ),
        (
            gan("stylegan", "--workload.deviation_group", "3"),
            "batch_size: 8 is no multiple of 3, the samples that are judged together",
        ),
        (
            gan("dcgan", "--workload.packing", "3"),
            "batch_size: 8 is no multiple of 3, the samples that are judged together",
        ),
        (
            gan("dcgan", "--evaluate.samples", "4"),
            "metrics.features: 4 held-out samples are too few for scores: evaluate 6 or more, better thousands",
        ),
        (
            gan("dcgan", "--metrics.features", "nothing/there"),
            "metrics.features: nothing/there: no run there: give the URL of a run (it holds config.yaml) or of one of "
            "its checkpoints; train it first, or use metrics.features pixels",
        ),
        (
            gan("dcgan", "--metrics.features", "inception:absent.pth"),
            "metrics.features: 'absent.pth' cannot be read (No such file or directory): give the path of the Inception "
            "weights of torch-fidelity, pt_inception-2015-12-05",
        ),
    ],
)
def test_what_a_gan_cannot_be(tmp_path: Path, words: list[str], mistake: str) -> None:
    assert refused(words, tmp_path, 1) == mistake
    assert not (tmp_path / "run").exists()


def test_every_rank_leaves_together(tmp_path: Path) -> None:
    said = refused(gan("dcgan", size=30), tmp_path, 2)
    assert said == f"data.size: this network cannot make images of 30 pixels: {SIZES}"
    said = refused(gan("dcgan", "--evaluate.samples", "4"), tmp_path, 2)
    assert said.startswith("metrics.features: 4 held-out samples are too few")


def test_augmentations_that_nobody_knows(tmp_path: Path) -> None:
    said = refused(gan("dcgan", "--workload.augment", "color,rotation"), tmp_path, 1)
    assert re.match(r"workload\.augment\S*: 'rotation' should be 'color', 'translation' or 'cutout'", said), said


def test_points_cannot_be_augmented(tmp_path: Path) -> None:
    words = ["--workload.name", "gan", "--workload.augment", "color", "--data.name", "ring8", *SHORT]
    assert refused(words, tmp_path, 1) == "workload.augment: ring8 has no images to augment: remove it"


def test_points_are_for_a_fully_connected_network(tmp_path: Path) -> None:
    said = refused(["--workload.name", "dcgan", "--data.name", "ring8", *SHORT], tmp_path, 1)
    assert said == f"data.size: this network cannot make images of 1 pixels: {SIZES}"


# Features


@WORLDS
def test_features_of_images_of_another_kind(tmp_path: Path, runs: Path, world: int) -> None:
    said = refused(gan("dcgan", "--metrics.features", str(runs / "grey")), tmp_path, world)
    assert said == (
        f"metrics.features: {runs}/grey was trained on digits, images of 1 channel(s); fake has 3: use features of "
        f"such images, or metrics.features pixels"
    )


def test_features_of_a_run_that_is_no_classifier(tmp_path: Path, runs: Path) -> None:
    said = refused(gan("dcgan", "--metrics.features", str(runs / "gan")), tmp_path, 1)
    assert said == f"metrics.features: {runs}/gan is no classifier: give the URL of a run that trained one"


def test_features_of_a_classifier_without_a_linear_layer(tmp_path: Path) -> None:
    words = [*FAKE[:-2], "--data.size", "32", "--workload.network", "torchvision:squeezenet1_1"]
    words += ["--duration", "1 steps", "--run.url", "squeezed"]
    run(words, tmp_path)
    said = refused(gan("dcgan", "--metrics.features", "squeezed", size=32), tmp_path, 1)
    assert said.startswith("metrics.features: squeezed ")
    assert "linear" in said


def test_features_at_a_url_that_cannot_be(tmp_path: Path) -> None:
    said = refused(gan("dcgan", "--metrics.features", "gopher://host/run"), tmp_path, 1)
    assert said.startswith("metrics.features: ")
    assert "gopher" in said


@pytest.mark.parametrize("content", [b"no weights at all", b"", b"\x80\x04}."])
def test_a_file_that_holds_no_inception_weights(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("torch_fidelity")
    (tmp_path / "weights.pth").write_bytes(content)
    said = refused(gan("dcgan", "--metrics.features", "inception:weights.pth"), tmp_path, 1)
    assert said.startswith("metrics.features: 'weights.pth' holds no Inception weights: ")


class Trap:
    """What a pickle may do."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("sprung",)


def test_a_file_of_weights_may_not_run_code(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save({"fc.weight": Trap()}, tmp_path / "weights.pth", pickle_module=pickle)
    said = refused(gan("dcgan", "--metrics.features", "inception:weights.pth"), tmp_path, 1)
    assert said.startswith("metrics.features: 'weights.pth' holds no Inception weights: ")
    assert not (tmp_path / "sprung").exists()


def test_grey_fake_images_can_be_asked_for_by_a_flag(tmp_path: Path, runs: Path) -> None:
    """The way out of the mistake above, and no mistake."""
    grey = ["--data.channels", "1", "--metrics.features", str(runs / "grey"), "--run.url", "run"]
    assert "fid@grey-" in run(gan("dcgan", *grey), tmp_path)


# The cache


@WORLDS
def test_a_cache_that_cannot_be_written(tmp_path: Path, world: int) -> None:
    (tmp_path / "file").write_text("in the way")
    said = refused(gan("dcgan", "--metrics.cache", "file/cache"), tmp_path, world)
    assert said.startswith("metrics.cache: ")
    assert "file/cache" in said


@WORLDS
def test_a_cache_at_a_url_that_cannot_be(tmp_path: Path, world: int) -> None:
    said = refused(gan("dcgan", "--metrics.cache", "gopher://host/cache"), tmp_path, world)
    assert said.startswith("metrics.cache: ")
    assert "gopher" in said


# A run that is there already


def test_a_run_of_another_gan_is_left_alone(tmp_path: Path) -> None:
    run(gan("dcgan"), tmp_path)
    before = contents(tmp_path / "run")
    said = refused(gan("dcgan", "--workload.latent", "9"), tmp_path, 2)
    assert said == (
        "run.url: the run there was started with workload.latent: 100, now it is 9: "
        "use another run.url, or resume all the same with --run.force_resume"
    )
    assert contents(tmp_path / "run") == before
