"""A language model's run: what it leaves behind, what can be done with it, and that none of it is lost."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from trainer.run.opened import open_run

from ..ranks import run, start, wait_for
from ..results import final_tensors, largest_difference, outcome, records
from .test_bad_input import refused

STEPS = 40


def write_text(file: Path, seed: int = 0, letters: str = "abcdefg") -> None:
    """Lines in which a letter is the one before or the next one, which a few steps can learn."""
    chance, place, text = random.Random(seed), 0, ""
    for _ in range(3000):
        place = (place + chance.choice((1, 1, 3))) % len(letters)
        text += letters[place] + ("\n" if chance.random() < 0.05 else "")
    file.write_text(text)


def words(steps: int = STEPS, url: str = "run") -> list[str]:
    return [
        "--workload.name", "language", "--workload.width", "12", "--workload.layers", "2", "--workload.dropout", "0.1",
        "--workload.written", "30", "--data.name", "text", "--data.root", "own.txt", "--data.length", "8",
        "--batch_size", "7", "--accumulation", "2", "--precision", "fp64", "--optimizer.lr", "0.02",
        "--duration", f"{steps} steps", "--log.every", "5 steps", "--checkpoint.every", "10 steps",
        "--evaluate.every", "20 steps", "--evaluate.batch_size", "4", "--samples.every", "20 steps",
        "--samples.count", "3", "--run.url", url,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    write_text(folder / "own.txt")
    (folder / "output").write_text(run(words(), folder))
    return folder


@pytest.fixture
def again(alone: Path, tmp_path: Path) -> Path:
    """Another folder with the text."""
    shutil.copy(alone / "own.txt", tmp_path)
    return tmp_path


def rows(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "run" / "checkpoints" / f"step-{STEPS:08d}" / "rows.safetensors")


# Training


def test_it_learns_beside_an_ngram_and_shows_what_it_writes(alone: Path) -> None:
    output = (alone / "output").read_text()
    result = json.loads(output.splitlines()[-1])
    first, last = (record for record in records(alone / "run") if record["kind"] == "evaluate")
    assert last["bits_per_character"] < first["bits_per_character"] < 2.9
    assert 1.0 < last["ngram_bits_per_character"] == first["ngram_bits_per_character"] < 2.0
    assert result["perplexity"] == pytest.approx(2 ** result["bits_per_character"])
    (shown,) = (line for line in output.splitlines() if line.startswith(f"step {STEPS}/{STEPS}") and "held out" in line)
    assert [name in shown for name in ("bits/char", "n-gram", "perplexity")] == [True] * 3
    assert all(len(line) <= 80 for line in output.splitlines() if line.startswith("step"))
    for step in (20, 40):
        texts = (alone / "run" / "samples" / f"step-{step:08d}.txt").read_text().split(f"\n{'-' * 40}\n")
        assert [len(text) for text in texts] == [30, 30, 31]  # the file ends in a newline
    assert {path.name for path in (alone / "run" / "samples").glob("*.png")} == {"learning_curves.png"}


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (2, 1)])
def test_a_run_that_is_killed_goes_on_with_the_state_of_every_row(
    before: int, after: int, alone: Path, again: Path
) -> None:
    first = start(words(1000), again, before)
    committed = again / "run" / "checkpoints" / "step-00000010" / "MANIFEST.json"
    assert wait_for(committed.exists, first)
    for rank in range(before):
        first.kill(rank, signal.SIGKILL)
    first.wait()
    for later in (again / "run" / "checkpoints").glob("step-*"):
        if later.name > "step-00000010":
            shutil.rmtree(later)
    run(words(), again, after)
    difference = largest_difference(final_tensors(alone / "run"), final_tensors(again / "run"))
    assert difference == 0 if before == after else difference < 1e-9
    whole, resumed = rows(alone), rows(again)
    assert whole.keys() == {"hidden", "cell"}
    assert whole["hidden"].shape == (7, 2, 12)
    for name, state in whole.items():
        torch.testing.assert_close(resumed[name], state, rtol=0, atol=0 if before == after else 1e-9)
    assert outcome(again / "run")["metrics"] == pytest.approx(outcome(alone / "run")["metrics"], rel=1e-9)


# The commands


def test_evaluate_gives_the_numbers_of_the_run_at_any_world_size(alone: Path) -> None:
    expected = outcome(alone / "run")["metrics"]
    for world in (1, 2):
        said = json.loads(run(["evaluate", "run"], alone, world).splitlines()[-1])
        assert {name: said[name] for name in expected} == pytest.approx(expected, rel=1e-9)
        assert said["split"] == "val"


def test_sample_goes_on_from_a_prompt_without_the_text(alone: Path, tmp_path: Path) -> None:
    url = alone / "run"
    common = ["sample", url, "--prompt", "abc", "--length", "20"]
    first = run(common, tmp_path)
    assert first.startswith("abc")
    assert len(first) == 24
    assert run(common, tmp_path) == first
    assert run([*common, "--seed", "1"], tmp_path) != first
    assert "out.txt" in run([*common, "--count", "3", "--out", "out.txt"], tmp_path)
    texts = (tmp_path / "out.txt").read_text().removesuffix("\n").split(f"\n{'-' * 40}\n")
    assert texts[0] == first.removesuffix("\n")
    assert len(set(texts)) == 3
    run([*common, "--count", "3", "--out", "folder", "--temperature", "0"], tmp_path)
    files = [path.read_text() for path in sorted((tmp_path / "folder").glob("0000?.txt"))]
    assert len(files) == 3
    assert len(set(files)) == 1


def test_the_network_and_its_state_are_exported(alone: Path, tmp_path: Path) -> None:
    import onnxruntime

    said = run(["export", alone / "run", "--to", "out", "--format", "safetensors", "torch", "onnx"], tmp_path)
    assert "Warning" not in said
    opened = open_run(str(alone / "run"))
    network, example = opened.workload.eval().inference().float(), opened.workload.example()
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["vocabulary"] == list("\nabcdefg\ufffd")
    assert about["input"] == {"shapes": [["batch", 1], ["batch", 2, 12], ["batch", 2, 12]]}
    weights = safetensors.torch.load_file(tmp_path / "out" / "weights.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())

    inputs: dict[str, Any] = {name: value[:1].repeat(3, *[1] * (value.dim() - 1)) for name, value in example.items()}
    with torch.no_grad():
        expected = network(*inputs.values())
        program = torch.export.load(tmp_path / "out" / "model.pt2").module()
        others = [program(*inputs.values())]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    names = ["logits", "next_hidden", "next_cell"]
    others.append(session.run(names, {name: value.numpy() for name, value in inputs.items()}))
    for other in others:
        for ours, theirs in zip(expected, other, strict=True):
            torch.testing.assert_close(torch.as_tensor(theirs), ours, atol=1e-5, rtol=0)


# What a user may get wrong


@pytest.mark.parametrize(
    ("more", "mistake"),
    [
        (["--prompt", "a-b-z"], "--prompt: '-z' is not in the vocabulary of text"),
        (["--class", "3"], "--class: language gives text, not images: leave it out"),
        (["--temperature", "-1"], "--temperature: -1.0 must be 0 or more"),
        (["--length", "0"], "--length: 0 must be 1 or more"),
        (["--out", "a.png"], "--out: 'a.png': give a FILE.txt, or a folder for a file each"),
    ],
)
def test_what_cannot_be_written_is_one_line(more: list[str], mistake: str, alone: Path, tmp_path: Path) -> None:
    assert refused(["sample", str(alone / "run"), *more], tmp_path, 1) == mistake


def test_another_text_is_refused_where_its_vocabulary_is_another(alone: Path, again: Path) -> None:
    shutil.copytree(alone / "run", again / "run")
    write_text(again / "own.txt", letters="abcdefgh")
    mistake = (
        "data.root: the data there has another vocabulary than the run was trained with: set data.root to that data, "
        "or train another run on this"
    )
    for world in (1, 2):
        assert refused([*words(60), "--run.force_resume"], again, world) == mistake
    assert refused(["evaluate", "run"], again, 1) == mistake
    write_text(again / "own.txt", seed=1)
    other = json.loads(run(["evaluate", "run"], again).splitlines()[-1])
    assert other["bits_per_character"] != outcome(alone / "run")["metrics"]["bits_per_character"]


@pytest.mark.parametrize(
    ("content", "more", "mistake"),
    [
        (b"abc", [], "data.length: a window of 8 tokens and the one before it do not fit into the train part of "),
        (b"abc\xff" * 99, [], "data.root: {folder}/own.txt is not UTF-8 (byte 3): convert it, "),
        (b"abc" * 99, ["--data.root", "empty"], "data.root: no *.txt in 'empty': a text of another name is read "),
        (b"abc" * 99, ["--batch_size", "50"], "batch_size: 50 rows cannot share 33 windows of text: lower it to 33 "),
    ],
)
def test_a_text_that_cannot_be_trained_on_is_one_line(
    content: bytes, more: list[str], mistake: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.txt").write_bytes(content)
    assert refused([*words(), *more], tmp_path, 1).startswith(mistake.format(folder=tmp_path))
