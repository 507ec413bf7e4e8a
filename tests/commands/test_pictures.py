"""Pictures that a trained network makes of an image: deep dream and style transfer, and what a user may get wrong."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model

from ..ranks import run
from .conftest import Ask
from .test_commands import said

FAKE = ["--data.name", "fake", "--data.samples", "64", "--batch_size", "8", "--data.size", "32"]
TORCHVISION = "squeezenet1_1"
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs: `colour` and `grey` of classifiers, `gan` and `text`; and weights."""
    folder = tmp_path_factory.mktemp("runs")
    short = ["--duration", "2 steps", "--evaluate.samples", "8", "--run.url"]
    run([*FAKE, "--workload.network", "vgg_small", *short, "colour"], folder)
    run(["--workload.network", "cnn", *short, "grey"], folder)
    tiny = ["--workload.name", "gan", "--workload.width", "8", "--workload.layers", "1", "--samples.count", "4"]
    run([*FAKE, *tiny, "--data.size", "8", *short, "gan"], folder)
    letters = ["--workload.name", EXAMPLES / "tiny_rnn.py", "--data.name", f"{EXAMPLES / 'letters.py'}:open_letters"]
    run([*letters, *short, "text"], folder)
    torch.manual_seed(0)
    weights = get_model(TORCHVISION).state_dict()
    torch.save(weights, folder / "squeeze.pth")
    save_file(weights, folder / "squeeze.safetensors")
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> str:
    """A wide picture of a disc."""
    y, x = np.mgrid[0:60, 0:90]
    disc = (x - 40) ** 2 + (y - 30) ** 2 < 400
    Image.fromarray(np.stack([disc * 200, x * 2, y * 3], 2).astype(np.uint8)).save(tmp_path / "photo.png")
    return "photo.png"


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    y, x = np.mgrid[0:50, 0:50]
    stripes = (x + y) // 5 % 2
    Image.fromarray(np.stack([stripes * 250, stripes * 90, stripes * 20], 2).astype(np.uint8)).save(
        tmp_path / "pattern.jpg"
    )
    return "pattern.jpg"


def numbers(line: str) -> tuple[float, float]:
    """What a last line says that something was and is."""
    match = re.search(r" from (\S+) to ([^:]+):", line)
    assert match, line
    return float(match[1]), float(match[2])


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


QUICK = ["--size", "64", "--octaves", "2", "--steps", "8"]


def test_a_dream_raises_the_activation_and_is_the_same_each_time(
    runs: Path, ask: Ask, photo: str, tmp_path: Path
) -> None:
    lines = said(ask("dream", runs / "colour", photo, *QUICK, "--out", "new/one.png"))
    assert [line.split()[:4] for line in lines[:2]] == [["octave", "1/2", "46", "x"], ["octave", "2/2", "64", "x"]]
    assert lines[2].startswith("activation of relu4_2 from ")
    assert lines[2].endswith(": new/one.png, 64 x 43 pixels")
    before, after = numbers(lines[2])
    assert after > 1.3 * before
    assert size(tmp_path / "new" / "one.png") == (64, 43)
    said(ask("dream", runs / "colour", photo, *QUICK, "--out", "two.png"))
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "new" / "one.png").read_bytes()


def test_any_layer_and_channel_can_be_dreamt_of(runs: Path, ask: Ask, photo: str) -> None:
    for layer, channel in (("conv1_1", 3), ("pool2", 63), ("classes", 9)):  # behind a mean over any number of pixels
        line = said(ask("dream", runs / "colour", photo, *QUICK, "--layer", layer, "--channel", channel))[-1]
        assert line.startswith(f"activation of {layer}, channel {channel} from ")
        before, after = numbers(line)
        assert after > before


def test_a_grey_network_makes_grey_pictures_of_coloured_images(
    runs: Path, ask: Ask, photo: str, pattern: str, tmp_path: Path
) -> None:
    line = said(ask("dream", runs / "grey", photo, *QUICK))[-1]
    assert line.endswith(": dream.png, 64 x 43 pixels, grey as the network's images")
    line = said(ask("stylize", photo, pattern, "--features", runs / "grey", "--size", "32", "--steps", "4"))[-1]
    assert line.endswith(": stylized.png, 32 x 21 pixels, grey as the network's images")
    for name in ("dream.png", "stylized.png"):
        with Image.open(tmp_path / name) as image:
            assert image.mode == "L"


def test_the_layers_are_listed(runs: Path, ask: Ask) -> None:
    lines = [line.split() for line in said(ask("dream", runs / "colour", "--list-layers"))]
    assert lines[0][0] == "layer"
    assert lines[1] == ["conv1_1", "32", "x", "32", "x", "32"]
    assert lines[-1] == ["classes", "10"]


def test_a_photograph_that_was_turned_stands_upright(runs: Path, ask: Ask, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    said(ask("dream", runs / "colour", "turned.jpg", *QUICK))
    assert size(tmp_path / "dream.png") == (43, 64)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_a_stylized_picture_has_the_style(
    runs: Path, ask: Ask, photo: str, pattern: str, tmp_path: Path, optimizer: str
) -> None:
    words = ["--features", runs / "colour", "--size", 48, "--steps", 24, "--optimizer", optimizer, "--out", "made.jpg"]
    lines = said(ask("stylize", photo, pattern, *words))
    assert [line.split()[1] for line in lines[:-1]] == ["0/24", "20/24", "24/24"]
    before, after = numbers(lines[-1])
    assert after < 0.7 * before
    assert size(tmp_path / "made.jpg") == (48, 32)


def test_more_weight_on_the_content_keeps_more_of_it(runs: Path, ask: Ask, photo: str, pattern: str) -> None:
    contents = []
    for weight in (0, 1):
        words = ["--features", runs / "colour", "--size", 32, "--steps", 20, "--content-weight", weight]
        lines = said(ask("stylize", photo, pattern, *words, "--layers", "relu1_1", "relu2_1", "--style-size", "24"))
        contents.append(float(lines[-2].split()[-1]))
    assert contents[1] < 0.7 * contents[0]


@pytest.mark.parametrize("file", ["squeeze.pth", "squeeze.safetensors"])
def test_torchvisions_networks_take_weights_of_ones_own(runs: Path, ask: Ask, photo: str, file: str) -> None:
    network = f"torchvision:{TORCHVISION}:{runs / file}"
    lines = said(ask("dream", network, photo, *QUICK, "--octaves", "1", "--layer", "features.3"))
    before, after = numbers(lines[-1])
    assert after > before


NO_CLASSIFIER = "gan generates images and recognises nothing: give the run of a classifier"
LAYERS = "conv1_1, norm1_1, relu1_1, pool1, conv2_1, norm2_1, relu2_1, pool2, conv3_1, norm3_1, relu3_1, conv3_2, "
LAYERS += "norm3_2, relu3_2, pool3, conv4_1, norm4_1, relu4_1, conv4_2, norm4_2, relu4_2, pool, flatten, classes"


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["gan", "photo.png"], f"{{runs}}/gan: {NO_CLASSIFIER}"),
        (["text", "photo.png"], f"{{runs}}/text: {EXAMPLES / 'tiny_rnn.py'} is not of images: give a run that is"),
        (["nothing", "photo.png"], "{runs}/nothing: no run there: "),
        (["colour"], "dream: the following arguments are required: IMAGE; see --help"),
        (["colour", "absent.png"], "absent.png: cannot be read: No such file or directory"),
        (["colour", "."], ".: cannot be read: Is a directory"),
        (["colour", "torn.png"], "torn.png: cannot identify image file of it: repair it, or give another image"),
        (["colour", "photo.png", "--layer", "relu5"],
         f"--layer: 'relu5' is no layer of this network; layers: {LAYERS}"),
        (["colour", "photo.png", "--layer", "relu1_1", "--channel", "32"],
         "--channel: 32: the channels of relu1_1 are 0 to 31"),
        (["colour", "photo.png", "--octaves", "10"],
         "--octaves: the smallest of 10 would be 19 x 12 pixels, below 16: use 9 octaves or fewer, or a larger --size"),
        (["colour", "line.png"], "--octaves: the smallest of 4 would be 140 x 4 pixels, below 16: use a larger --size"),
        (["colour", "photo.png", "--size", "9"],
         "dream: argument --size: 9 should be 16 to 8192; see --help"),
        (["colour", "photo.png", "--rate", "nan"],
         "dream: argument --rate: nan should be 1e-05 to 1; see --help"),
        (["colour", "photo.png", "--steps", "x"], "dream: argument --steps: invalid int value: 'x'; see --help"),
        (["colour", "photo.png", "--step", "2"], "dream: unrecognized arguments: --step 2; see --help"),
        (["colour", "photo.png", "--out", "dream.gif"], "--out: 'dream.gif' must end in .png, .jpg, .jpeg"),
        (["grey", "photo.png", "--layer", "3", "--octaves", "1"],
         "--layer: 3 takes no image of 384 x 256 pixels (mat1 and mat2 shapes cannot be multiplied "),
    ],
)  # fmt: skip
def test_what_cannot_be_dreamt_of(
    runs: Path, ask: Ask, photo: str, tmp_path: Path, words: list[str], mistake: str
) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    Image.new("RGB", (400, 10)).save(tmp_path / "line.png")
    refuses(ask("dream", runs / words[0], *words[1:]), mistake.format(runs=runs))


def refuses(answer: tuple[int, list[str], list[str]], mistake: str) -> None:
    code, out, err = answer
    assert (code, out, len(err)) == (2, [], 1), err
    assert err[0].startswith(f"error: {mistake}")


@pytest.mark.parametrize(
    ("features", "words", "mistake"),
    [
        ("gan", [], f"{{runs}}/gan: {NO_CLASSIFIER}"),
        ("colour", ["--layers", "relu1_1", "x"], "--layers: 'x' is no layer of this network; layers: conv1_1, "),
        ("colour", ["--content-layer", "x"], "--content-layer: 'x' is no layer of this network; layers: conv1_1, "),
        ("colour", ["--layers", "classes"], "--layers: classes has no rows and columns, so no textures: "),
        ("colour", ["--steps", "0"], "stylize: argument --steps: 0 should be 1 or more; see --help"),
        ("colour", ["--style-weight", "-1"], "stylize: argument --style-weight: -1 should be 0 or more; see --help"),
        ("colour", ["--size", "20"], "photo.png: 20 x 13 pixels are too few: use a size at which both are 16 or more"),
        ("grey", ["--content-layer", "3"], "photo.png: the layers take no image of 384 x 256 pixels (mat1 and mat2 "),
    ],
)
def test_what_cannot_be_stylized(
    runs: Path, ask: Ask, photo: str, pattern: str, features: str, words: list[str], mistake: str
) -> None:
    refuses(ask("stylize", photo, pattern, "--features", runs / features, *words), mistake.format(runs=runs))


class Trap:
    """What a pickle may do."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
    ("network", "mistake"),
    [
        ("torchvision:vgg99:x", "torchvision:vgg99:x: torchvision has no classification model 'vgg99'; it has: vgg"),
        ("torchvision:vgg19", "torchvision:vgg19: no weights: give torchvision:vgg19:FILE, "),
        ("torchvision:vgg19:absent.pth", "absent.pth: the weights cannot be read: No such file or directory"),
        ("torchvision:resnet18:{runs}/squeeze.pth", "{runs}/squeeze.pth: not the weights of torchvision's resnet18: "),
        ("torchvision:vgg19:photo.png", "photo.png: no file of weights: "),
        ("torchvision:vgg19:trap.pth", "trap.pth: no file of weights: "),
        ("torchvision:vgg19:list.pth", "list.pth: no state dict, which maps names to tensors"),
        ("torchvision:vgg19:torn.safetensors", "torn.safetensors: no file of weights: "),
    ],
)
def test_weights_that_are_none(runs: Path, ask: Ask, photo: str, tmp_path: Path, network: str, mistake: str) -> None:
    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth", pickle_module=pickle)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    refuses(ask("dream", network.format(runs=runs), photo), mistake.format(runs=runs))
    assert not (tmp_path / "sprung").exists()
