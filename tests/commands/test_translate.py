"""What a run that learned to make images of images leaves behind, and what can be done with it: sample, translate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.__main__ import main
from trainer.data.image_files import read_images
from trainer.randomness import Draws
from trainer.run.opened import open_run

from .. import pictures_on_disk as disk
from ..ranks import run
from ..results import outcome
from .test_bad_input import refused

BASE = ["--workload.name", "pix2pix", "--workload.width", "4", "--data.size", "8", "--batch_size", "4",
        "--duration", "12 steps", "--samples.every", "6 steps", "--samples.count", "6", "--evaluate.every", "6 steps",
        "--optimizer.lr", "0.02", "--data.workers", "0"]  # fmt: skip
GIVEN = [*BASE, "--data.name", "pairs", "--data.root", "pairs", "--run.url", "given"]
EDGES = [*BASE, "--data.name", "fake", "--data.samples", "32", "--workload.pairs", "edges", "--run.url", "edges"]

DOMAINS = ["--workload.name", "cyclegan", *BASE[2:], "--data.size", "12", "--workload.blocks", "1",
           "--data.name", "folder", "--data.root", "two"]  # fmt: skip


def pairs(folder: Path) -> None:
    files = {f"{split}/{i}.png": disk.png(i, 16, 8) for split in ("train", "val") for i in range(8)}
    disk.write(str(folder / "pairs"), files)


@dataclass(frozen=True)
class Finished:
    """A folder with the runs `given`, `edges` and `domains`, and images of other sizes in `photos`."""

    folder: Path
    results: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("trained")
    pairs(folder)
    parts = {"trainA": 9, "trainB": 8, "testA": 6, "testB": 7}
    disk.write(str(folder / "two"), {f"{part}/{i}.png": disk.png(i) for part, n in parts.items() for i in range(n)})
    words = {"given": GIVEN, "edges": EDGES,
             "domains": [*DOMAINS, "--data.domains", "A", "B", "--run.url", "domains"]}  # fmt: skip
    results = {name: json.loads(run(flags, folder).splitlines()[-1]) for name, flags in words.items()}
    disk.write(str(folder / "photos"), {f"{i}.png": disk.png(i, 20 + i, 16) for i in range(5)})
    return Finished(folder, results)


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(trained: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs a command in this process, where the runs are; its exit code, and what it said and complained of."""
    monkeypatch.chdir(trained.folder)

    def asked(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return code, *(text.strip() for text in capsys.readouterr())

    return asked


def test_a_run_is_scored_by_pair_and_as_a_whole_and_shows_strips(trained: Finished) -> None:
    for name in ("given", "edges"):
        assert trained.results[name].keys() >= {"l1", "psnr", "sharpness", "fid@pixels", "diversity"}
        files = {path.name for path in (trained.folder / name / "samples").iterdir()}
        assert files == {"step-00000006.png", "step-00000012.png", "training.gif", "learning_curves.png"}
        assert outcome(trained.folder / name)["health"]["state"] == "healthy"


def test_sampling_shows_what_becomes_of_held_out_images(trained: Finished, ask: Ask, tmp_path: Path) -> None:
    shown = []
    for number, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{number}.png"
        code, out, _ = ask("sample", "given", "--out", path, "--count", 5, "--seed", seed)
        assert (code, out) == (0, f"5 samples of step 12: {path}")
        shown.append(path.read_bytes())
    assert shown[0] == shown[1] != shown[2]


@pytest.mark.parametrize("name", ["given", "edges"])
def test_translated_images_are_what_the_generator_makes_of_them(
    name: str, trained: Finished, ask: Ask, tmp_path: Path
) -> None:
    code, out, _ = ask("translate", name, "photos", "--out", tmp_path, "--batch-size", 2)
    assert (code, out) == (0, f"5 translated by step 12: {tmp_path}/0.png and on")
    opened = open_run(name)
    workload = opened.workload.eval()
    images = read_images([Path(f"photos/{i}.png") for i in range(5)], opened.images.normalised_to((-1, 1)), "white")
    draws = Draws(0, ("translate",), slice(0, 5), torch.device("cpu"))
    expected = workload.translate(workload.input_of(images), draws, "forward")
    for i, image in enumerate(expected):
        pixels = np.asarray(Image.open(tmp_path / f"{i}.png"), np.float64).transpose(2, 0, 1)
        assert np.abs(pixels - (image.numpy() + 1) * 127.5).max() < 0.51


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_a_run_of_two_domains_translates_both_ways(
    direction: str, trained: Finished, ask: Ask, tmp_path: Path
) -> None:  # fmt: skip
    assert trained.results["domains"].keys() >= {"fid@pixels", "cycle_error"}
    assert {p.name for p in (trained.folder / "domains" / "samples").iterdir()} >= {"step-00000012.png", "training.gif"}
    ask("translate", "domains", "photos", "--direction", direction, "--out", tmp_path)
    workload: Any = open_run("domains").workload.eval()
    image = read_images([Path("photos/0.png")], workload.data.normalised_to((-1, 1)), "white")
    with torch.no_grad():
        (expected,) = (workload.to_b if direction == "AtoB" else workload.to_a)(image)
    pixels = np.asarray(Image.open(tmp_path / "0.png"), np.float64).transpose(2, 0, 1)
    assert np.abs(pixels - (expected.numpy() + 1) * 127.5).max() < 0.51


def test_drawn_inputs_are_taken_as_they_are(trained: Finished, ask: Ask, tmp_path: Path) -> None:
    made = []
    for number, words in enumerate(([], ["--inputs"], ["--seed", 1])):
        ask("translate", "edges", "photos/2.png", "--out", tmp_path / str(number), *words)
        made.append((tmp_path / str(number) / "2.png").read_bytes())
    assert len(set(made)) == 3


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["translate", "edges", "photos", "--direction", "BtoA"],
         "--direction: 'BtoA' is not known; pix2pix has: forward"),
        (["translate", "domains", "photos", "--direction", "B"],
         "--direction: 'B' is not known; cyclegan has: AtoB, BtoA"),
        (["translate", "edges", "photos", "photos/0.png"],
         "--out: both photos/0.png and photos/0.png would be 0.png: translate one folder at a time"),
        (["translate", "edges", "photos", "--out", "photos"],
         "--out: 'photos' holds photos/0.png, which would be overwritten: name another folder"),
        (["translate", "edges", "nowhere"], "nowhere: no such file or folder"),
        (["translate", "edges", "photos", "--batch-size", "0"], "translate: --batch-size must be 1 or more"),
        (["sample", "edges", "--class", "1"],
         "--class: pix2pix gives translations, not images: leave it out"),
        (["sample", "edges", "--out", "folder"],
         "--out: 'folder': give a FILE.png for held-out images; `translate` writes a file each"),
        (["sample", "given", "--data-root", "photos"], "data.root: no folder 'train' in 'photos': pairs are"),
        (["predict", "edges", "photos"], "edges: pix2pix labels nothing: give a classifier's run"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_one_line(words: list[str], mistake: str, trained: Finished, ask: Ask) -> None:
    code, _, err = ask(*words)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: {mistake}")


def test_the_exported_network_has_no_noise(trained: Finished, ask: Ask, tmp_path: Path) -> None:
    code, out, _ = ask("export", "edges", "--to", tmp_path, "--format", "torch")
    assert code == 0
    assert "outputs differ by 0.0e+00 at most" in out


# What training refuses


def test_a_set_without_pairs_and_an_odd_pair_end_with_exit_code_2(tmp_path: Path) -> None:
    said = refused([*BASE, "--data.name", "fake"], tmp_path, 2)
    assert said.startswith("workload.pairs: fake holds no pairs: derive an input from each image by edges, grey or ")
    pairs(tmp_path)
    (tmp_path / "pairs" / "train" / "3.png").write_bytes(disk.png(3, 15, 8))
    said = refused([*GIVEN, "--duration", "4 epochs"], tmp_path, 1)
    assert said.startswith("data.bad_images: 1 images cannot be read, 0 are allowed: ")
    assert "pairs/train/3.png: its width of 15 pixels is odd, so it is no two images side by side" in said


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        ([], "data.domains: cyclegan translates between two domains, and folder is one: set data.domains to two of its "
             "classes, such as [A, B], or to halves"),
        (["--data.domains", "A", "A"], "data.domains: ['A', 'A'] must be two different classes, such as [horse, deer], "
                                       "or `halves`"),
        (["--data.domains", "A", "C"], "data.domains: 'C' is no class of folder; there are: A, B"),
    ],
)  # fmt: skip
def test_what_are_no_two_domains_ends_with_exit_code_2(words: list[str], mistake: str, tmp_path: Path) -> None:
    parts = ("trainA", "trainB", "testA", "testB")
    disk.write(str(tmp_path / "two"), {f"{part}/{i}.png": disk.png(i) for part in parts for i in range(6)})
    assert refused([*DOMAINS, *words], tmp_path, 1) == mistake
