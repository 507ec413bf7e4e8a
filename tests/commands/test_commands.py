"""What can be done with a trained run: evaluate, predict, export, look after its checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from trainer import __version__, workloads
from trainer.config.options import DataOptions
from trainer.data.decoding import SUFFIXES
from trainer.data.sources import open_data
from trainer.run.opened import open_run

from ..ranks import run
from .conftest import Ask

WORDS = ["--workload.network", "cnn", "--workload.ema", "0.5", "--optimizer.lr", "0.01", "--run.url", "run",
         "--seed", "3", "--duration", "24 steps", "--checkpoint.every", "8 steps", "--evaluate.every", "8 steps",
         "--checkpoint.keep", "5"]  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A run of 24 steps with checkpoints at 8, 16 and 24."""

    folder: Path
    result: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.folder / "run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("trained")
    return Finished(folder, json.loads(run(WORDS, folder).splitlines()[-1]))


def said(answer: tuple[int, list[str], list[str]]) -> list[str]:
    code, out, err = answer
    assert code == 0, err
    return out


def held_out() -> tuple[Tensor, Tensor]:
    """The digits that were held out: uint8 (N, 1, 8, 8) and labels."""
    part: Any = open_data(DataOptions(), "", "test").held_out
    return part["image"], part["label"]


def save_digit(path: Path, index: int = 0) -> None:
    Image.fromarray(held_out()[0][index, 0].numpy()).save(path)


# evaluate


@pytest.mark.parametrize("world", [1, 2])
def test_evaluating_gives_the_metrics_that_training_ended_with(trained: Finished, world: int) -> None:
    metrics = json.loads(run(["evaluate", "run"], trained.folder, world).splitlines()[-1])
    assert metrics["accuracy"] == trained.result["accuracy"]
    assert metrics["top5_accuracy"] == trained.result["top5_accuracy"]
    assert metrics["loss"] == pytest.approx(trained.result["loss"], rel=1e-6)
    assert (metrics["step"], metrics["split"], metrics["samples"]) == (24, "test", 599)
    assert metrics["checkpoint"].endswith("run/checkpoints/step-00000024")


def evaluations(trained: Finished) -> dict[int, dict[str, Any]]:
    lines = [line for file in sorted((trained.folder / "run" / "metrics").glob("*.jsonl"))
             for line in file.read_text().splitlines()]  # fmt: skip
    records = map(json.loads, lines)
    return {record["step"]: record for record in records if record["kind"] != "train" and "accuracy" in record}


def test_any_checkpoint_can_be_evaluated_and_the_best_one_is_known(trained: Finished) -> None:
    logged = evaluations(trained)
    assert set(logged) == {8, 16, 24}
    best = max(logged, key=lambda step: logged[step]["accuracy"])
    for words, step in ((["run", "--step", 8], 8), (["run/checkpoints/step-00000016"], 16), (["run", "--best"], best)):
        metrics = json.loads(run(["evaluate", *words], trained.folder).splitlines()[-1])
        assert metrics["step"] == step
        assert metrics["accuracy"] == logged[step]["accuracy"]


def test_the_training_split_can_be_evaluated(trained: Finished) -> None:
    metrics = json.loads(run(["evaluate", "run", "--split", "train"], trained.folder).splitlines()[-1])
    assert (metrics["split"], metrics["samples"]) == ("train", 1198)
    assert 0 < metrics["accuracy"] <= 1


# predict


def test_predicting_gives_the_labels_and_probabilities_of_the_network(
    trained: Finished, ask: Ask, tmp_path: Path
) -> None:
    for index in range(12):
        save_digit(tmp_path / f"{index:02}.png", index)
    (tmp_path / "notes.txt").write_text("no image")
    lines = said(ask("predict", trained.url, tmp_path, "--json", "--top", 10, "--batch-size", 5))
    predictions = [json.loads(line) for line in lines]
    assert [Path(prediction["image"]).name for prediction in predictions] == [f"{index:02}.png" for index in range(12)]
    opened = open_run(trained.url)
    images = held_out()[0][:12].double() / 255
    mean, std = opened.data.mean[0], opened.data.std[0]
    with torch.no_grad():
        expected = opened.workload.eval().inference()(((images - mean) / std).float()).softmax(1)
    for row, prediction in zip(expected, predictions, strict=True):
        assert prediction["label"] == str(int(row.argmax()))
        assert [prediction["probabilities"][str(c)] for c in range(10)] == pytest.approx(row.tolist(), abs=2e-6)
        assert list(prediction["probabilities"].values()) == sorted(prediction["probabilities"].values(), reverse=True)


def test_the_table_shows_as_many_classes_as_asked_for(trained: Finished, ask: Ask, tmp_path: Path) -> None:
    save_digit(tmp_path / "digit.png")
    header, row = said(ask("predict", trained.url, "digit.png", "--top", 2))
    assert header.split() == ["image", "label", "2."]
    one = json.loads(said(ask("predict", trained.url, "digit.png", "--json", "--top", 1))[0])
    assert row.split()[0] == "digit.png"
    assert row.split()[1] == one["label"]
    assert len(row.split()) == 5  # the image, and a label with its share, twice
    assert len(one["probabilities"]) == 1


def test_images_are_brought_to_the_size_and_colours_of_the_data(trained: Finished, ask: Ask, tmp_path: Path) -> None:
    digit = Image.fromarray(held_out()[0][3, 0].numpy())
    digit.save(tmp_path / "a_grey.png")
    digit.convert("RGB").save(tmp_path / "b_colour.png")
    digit.convert("RGBA").save(tmp_path / "c_transparent.png")
    digit.resize((16, 16), Image.Resampling.NEAREST).save(tmp_path / "d_large.bmp")
    wide = np.pad(np.asarray(digit), ((0, 0), (4, 4)))
    Image.fromarray(wide).save(tmp_path / "e_wide.tiff")  # its middle is the digit
    predictions = [json.loads(line) for line in said(ask("predict", trained.url, tmp_path, "--json", "--top", 10))]
    assert len(predictions) == 5
    for other in predictions[1:]:
        assert other["label"] == predictions[0]["label"]
        blurred = Path(other["image"]).name.startswith("d_")  # by scaling down with antialiasing
        assert other["probabilities"] == pytest.approx(predictions[0]["probabilities"], abs=0.05 if blurred else 1e-6)


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["torn.png"], "torn.png: cannot identify image file <image>: repair or remove it"),
        (["absent.png"], "absent.png: no such file or folder"),
        (
            ["empty"],
            f"empty: no images in this folder ({', '.join(SUFFIXES)})",
        ),
        (["torn.png", "--top", "0"], "predict: --top and --batch-size must be 1 or more"),
        (["torn.png", "--step", "7"], "{url}: no checkpoint of step 7; there are: 8, 16, 24"),
        (["torn.png", "--step", "x"], "predict: argument --step: invalid int value: 'x'; see --help"),
        ([], "predict: the following arguments are required: IMAGE; see --help"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(
    trained: Finished, ask: Ask, tmp_path: Path, words: list[str], mistake: str
) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    (tmp_path / "empty").mkdir()
    code, out, err = ask("predict", trained.url, *words)
    assert (code, out, len(err)) == (2, [], 1)
    expected = mistake.format(url=trained.url)
    assert err[0].removeprefix("error: ").replace(" at 0x", "").startswith(expected.partition(" <image>")[0])
    assert err[0].endswith(expected.rpartition("<image>")[2])


def test_a_classifier_translates_nothing(trained: Finished, ask: Ask, tmp_path: Path) -> None:
    save_digit(tmp_path / "digit.png")
    code, _, err = ask("translate", trained.url, "digit.png")
    mistake = f"error: {trained.url}: classifier translates nothing: give the run of pix2pix or cyclegan"
    assert (code, err) == (2, [mistake])


# export


@pytest.fixture
def expected(trained: Finished) -> tuple[Any, Tensor, Tensor]:
    opened = open_run(trained.url)
    network = opened.workload.eval().inference().eval()
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return opened, images, network(images)


def test_exported_weights_fill_the_same_network(
    trained: Finished, ask: Ask, tmp_path: Path, expected: tuple[Any, Tensor, Tensor]
) -> None:
    opened, images, logits = expected
    assert said(ask("export", trained.url, "--to", "out")) == ["safetensors  out/weights.safetensors, out/config.json"]
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["workload"]["network"] == "cnn"
    assert about["classes"] == [str(c) for c in range(10)]
    assert about["input"] == {"shape": ["batch", 1, 8, 8], "mean": [0.3055], "std": [0.3763], "range": [0, 1]}
    assert about["checkpoint"].endswith("step-00000024")
    fresh = workloads.build(opened.config, opened.data).inference().eval()
    fresh.load_state_dict(load_file(tmp_path / "out" / "weights.safetensors"))
    with torch.no_grad():
        assert torch.equal(fresh(images), logits)


def test_the_exported_program_gives_the_same_logits_for_any_batch(
    trained: Finished, ask: Ask, tmp_path: Path, expected: tuple[Any, Tensor, Tensor]
) -> None:
    _, images, logits = expected
    (line,) = said(ask("export", trained.url, "--to", "out", "--format", "torch"))
    assert line.startswith("torch        out/model.pt2; outputs differ by ")
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    with torch.no_grad():
        for count in (1, 3, 5):
            torch.testing.assert_close(program(images[:count]), logits[:count], atol=1e-5, rtol=0)


def test_the_exported_onnx_file_gives_the_same_logits_for_any_batch(
    trained: Finished, ask: Ask, tmp_path: Path, expected: tuple[Any, Tensor, Tensor]
) -> None:
    import onnxruntime

    _, images, logits = expected
    code, out, err = ask("export", trained.url, "--to", "out", "--format", "onnx", "--step", "24")
    assert (code, err) == (0, [])
    assert len(out) == 1
    assert out[0].startswith("onnx         out/model.onnx; outputs differ by ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3, 5):
        (actual,) = session.run(["logits"], {"images": images[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), logits[:count], atol=1e-5, rtol=0)


def test_a_target_that_cannot_be_made_is_one_line(trained: Finished, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, out, err = ask("export", trained.url, "--to", "file/out")
    assert (code, out, err) == (2, [], ["error: --to: 'file/out' cannot be made: Not a directory"])


# checkpoints


def test_checkpoints_are_listed_verified_and_pruned(ask: Ask, tmp_path: Path) -> None:
    run(WORDS, tmp_path)
    steps = ["step-00000008", "step-00000016", "step-00000024"]
    lines = said(ask("checkpoints", "list", "run"))
    assert [line.split()[:2] for line in lines] == [[step, "committed"] for step in steps]
    assert all(line.endswith(" MiB") for line in lines)
    assert said(ask("checkpoints", "verify", "run")) == [f"{step}  valid" for step in steps]

    weights = tmp_path / "run" / "checkpoints" / steps[1] / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    verdict = f"{steps[1]}  weights.safetensors has other content than was written (sha256 differs)"
    assert ask("checkpoints", "verify", "run") == (1, [f"{steps[0]}  valid", verdict, f"{steps[2]}  valid"], [])
    assert ask("checkpoints", "verify", f"run/checkpoints/{steps[1]}") == (1, [verdict], [])
    assert ask("checkpoints", "verify", f"run/checkpoints/{steps[2]}") == (0, [f"{steps[2]}  valid"], [])
    code, _, err = ask("evaluate", "run", "--step", "16")
    assert code == 2
    assert err == [
        f"error: {tmp_path}/run/checkpoints/{steps[1]} is corrupt: weights.safetensors has other content than was "
        f"written (sha256 differs): choose another with --step"
    ]

    (tmp_path / "run" / "checkpoints" / steps[0] / "MANIFEST.json").unlink()
    assert said(ask("checkpoints", "list", "run"))[0] == f"{steps[0]}  unfinished"
    assert ask("checkpoints", "verify", "run")[1][0] == f"{steps[0]}  MANIFEST.json is missing: the save did not finish"

    assert said(ask("checkpoints", "prune", "run", "--keep", 1)) == [f"deleted 1, kept 1: {steps[2]}"]
    assert not (tmp_path / "run" / "checkpoints" / steps[1]).exists()
    assert json.loads(run(["evaluate", "run"], tmp_path).splitlines()[-1])["step"] == 24


def test_pruning_keeps_the_best_checkpoint(ask: Ask, tmp_path: Path) -> None:
    run(WORDS, tmp_path)
    best = {"step": 8, "kind": "evaluate", "epoch": 1.0, "accuracy": 1.0, "loss": 0.0}
    with (tmp_path / "run" / "metrics" / "00000008.jsonl").open("a") as log:
        log.write(json.dumps(best) + "\n")
    kept = "step-00000008, step-00000024"
    assert said(ask("checkpoints", "prune", "run", "--keep", 1)) == [f"deleted 1, kept 2: {kept}"]


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["destroy", "run"], "checkpoints: argument ACTION: invalid choice: 'destroy' (choose from "),
        (["list"], "checkpoints: the following arguments are required: RUN; see --help"),
        (["prune", "run", "--kep", "1"], "checkpoints: unrecognized arguments: "),
    ],
)
def test_a_misused_command_is_one_line(ask: Ask, words: list[str], mistake: str) -> None:
    code, out, err = ask("checkpoints", *words)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith(f"error: {mistake}")


# config and version


def test_the_config_in_a_run_directory_starts_the_same_run(trained: Finished, ask: Ask) -> None:
    printed = yaml.safe_load("\n".join(said(ask("config", f"{trained.url}/config.yaml"))))
    stored = yaml.safe_load(Path(f"{trained.url}/config.yaml").read_text())
    assert {**printed, "wandb": None} == {**stored, "wandb": None}  # the tests switch W&B off by the environment
    assert printed["workload"]["ema"] == 0.5


def test_the_version_is_one_word(ask: Ask) -> None:
    assert said(ask("--version")) == [__version__]


def test_garbage_is_collected_again_once_torch_is_imported() -> None:
    script = """
import gc
from trainer.__main__ import main
main(["config"])
print(gc.isenabled(), gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    enabled, frozen = done.stdout.splitlines()[-1].split()
    assert enabled == "True"
    assert int(frozen) > 100_000
