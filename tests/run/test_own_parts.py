"""A user's own workload, network and data set, by path; and what a batch may hold besides an image and its label."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from ..commands.test_bad_input import refused
from ..ranks import run
from ..results import final_tensors, largest_difference, outcome, records

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = ["--workload.name", EXAMPLES / "tiny_rnn.py", "--data.name", f"{EXAMPLES}/letters.py:open_letters",
        "--precision", "fp64", "--batch_size", "7", "--accumulation", "2", "--optimizer.lr", "0.01", "--log.every",
        "3 steps", "--checkpoint.every", "5 steps", "--evaluate.every", "6 steps", "--evaluate.batch_size", "4",
        "--samples.count", "5", "--run.url", "run"]  # fmt: skip


def rows(folder: Path) -> torch.Tensor:
    """The hidden states that the newest checkpoint keeps, in the order of the global batch."""
    newest = sorted((folder / "run" / "checkpoints").glob("step-*/MANIFEST.json"))[-1].parent
    return safetensors.torch.load_file(newest / "rows.safetensors")["hidden"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run([*TEXT, "--duration", "30 steps"], folder)
    return folder


def test_a_text_is_read_on_with_the_state_of_each_row(alone: Path) -> None:
    nats = [record["nats"] for record in records(alone / "run") if record["kind"] == "evaluate"]
    assert nats[-1] < nats[0] < 2.1  # a guess costs ln 7 = 1.95, and the text itself ln 2 = 0.69
    assert rows(alone).shape == (1, 7, 8)
    assert (rows(alone).flatten(2).abs().sum(2) > 0).all()
    assert json.loads(run(["evaluate", "run"], alone).splitlines()[-1])["nats"] == pytest.approx(nats[-1], rel=1e-9)
    lines = (alone / "run" / "samples" / "step-00000030.txt").read_text().splitlines()
    assert len(lines) == 5
    assert all(len(line) == 9 for line in lines)


def test_a_checkpoint_of_another_batch_is_one_line(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone / "run", tmp_path / "run")
    words = [*map(str, TEXT), "--duration", "40 steps", "--batch_size", "9", "--run.force_resume"]
    for world in (1, 2):
        said = refused(words, tmp_path, world)
        assert said == "run.url: the checkpoint has 7 rows of hidden, the batch 9: use another run.url"


@pytest.mark.parametrize("world", [2, 3])
def test_a_carried_state_is_the_same_at_any_world_size(world: int, alone: Path, tmp_path: Path) -> None:
    run([*TEXT, "--duration", "30 steps"], tmp_path, world)
    assert largest_difference(final_tensors(alone / "run"), final_tensors(tmp_path / "run")) < 1e-9
    torch.testing.assert_close(rows(tmp_path), rows(alone), rtol=0, atol=1e-9)
    assert outcome(tmp_path / "run")["metrics"] == pytest.approx(outcome(alone / "run")["metrics"], rel=1e-9)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 2)])
def test_a_carried_state_is_cut_again_when_the_world_size_changes(
    before: int, after: int, alone: Path, tmp_path: Path
) -> None:
    run([*TEXT, "--duration", "15 steps"], tmp_path, before)
    run([*TEXT, "--duration", "30 steps"], tmp_path, after)
    difference = largest_difference(final_tensors(alone / "run"), final_tensors(tmp_path / "run"))
    assert difference == 0 if (before, after) == (1, 1) else difference < 1e-9
    assert float((rows(tmp_path) - rows(alone)).abs().max()) < 1e-9


def test_a_network_of_ones_own_is_trained_and_opened_again(tmp_path: Path) -> None:
    network = f"{EXAMPLES}/tiny_net.py:TinyNet"
    words = ["--workload.network", network, "--duration", "3 epochs", "--run.url", "run"]
    run(words, tmp_path)
    assert outcome(tmp_path / "run")["metrics"]["accuracy"] > 0.5
    digest = hashlib.sha256((EXAMPLES / "tiny_net.py").read_bytes()).hexdigest()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["code"] == {f"{EXAMPLES}/tiny_net.py": digest}
    assert '"accuracy"' in run(["evaluate", "run"], tmp_path)
    assert "is done" in run(["run/config.yaml", "--run.url", "run"], tmp_path)


def test_a_resume_under_another_file_says_so(tmp_path: Path) -> None:
    file = tmp_path / "tiny_net.py"
    shutil.copy(EXAMPLES / "tiny_net.py", file)
    words = ["--workload.network", "tiny_net.py:TinyNet", "--run.url", "run"]
    run([*words, "--duration", "3 steps"], tmp_path)
    file.write_text(file.read_text().replace("nn.Tanh()", "nn.ReLU()"))
    said = refused([*words, "--duration", "6 steps"], tmp_path, 1)
    assert said.startswith("run.url: the run there was started with code.tiny_net.py: '")
    assert "--run.force_resume" in said
    assert "tiny_net.py has changed since" in run(["evaluate", "run"], tmp_path)
    run([*words, "--duration", "6 steps", "--run.force_resume"], tmp_path)


@pytest.mark.parametrize(
    "words", [["--workload", "tiny_gan.py"], ["--workload", "tiny_rnn.py", "--data", "letters.py:open_letters"]]
)
def test_a_workload_of_ones_own_keeps_the_contract(words: list[str]) -> None:
    """As README says. Some of it here: the built-in ones go through all."""
    own = [str(EXAMPLES / word) if ".py" in word else word for word in words]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
               "tests/workloads/test_contract.py", *own, "-k", "cut or gradients or samples or figures"]  # fmt: skip
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout


def test_a_gan_of_ones_own_is_trained(tmp_path: Path) -> None:
    gan = EXAMPLES / "tiny_gan.py"
    run(["--workload.name", gan, "--data.name", "fake", "--data.size", "8", "--duration", "2 steps"], tmp_path)


def test_figures_that_fail_are_a_warning_with_their_traceback(tmp_path: Path) -> None:
    broken = (EXAMPLES / "tiny_gan.py").read_text()
    broken += "\n    def figures(self, totals, images, draws):\n        raise RuntimeError('no figures today')\n"
    (tmp_path / "own_gan.py").write_text(broken)
    words = ["--workload.name", "own_gan.py", "--data.name", "fake", "--data.size", "8", "--duration", "2 steps"]
    text = run([*words, "--run.url", "run"], tmp_path)
    assert "warning: the workload's figures could not be drawn:" in text
    assert f'File "{tmp_path}/own_gan.py"' in text
    assert outcome(tmp_path / "run")["status"] == "done"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--workload.name", "no.py"], "workload.name: no file 'no.py': the path counts from "),
        (["--workload.name", "no.such.module"], "workload.name: no module 'no.such.module': give the path of a "),
        (["--workload.name", "empty.py"], "workload.name: empty.py defines no 'Options': see 'How to add a GAN'"),
        (["--workload.network", "empty.py"], "workload.network: 'empty.py' names no function or class: write "),
        (["--workload.network", "empty.py:Net"], "workload.network: empty.py defines no 'Net': define it, or write"),
        (["--data.name", "empty.py"], "data.name: empty.py defines no 'open': define it, or write empty.py:NAME"),
        (["--data.name", f"{EXAMPLES}/letters.py:open_letters"],
         "workload.name: classifier takes images, and letters is a text: use another"),
        (["--workload.name", EXAMPLES / "tiny_rnn.py"],
         f"workload.name: {EXAMPLES}/tiny_rnn.py takes a text, and digits is images: use another"),
        ([*TEXT, "--batch_size", "500"], "batch_size: 500 rows cannot share 187 windows of letters: lower "),
    ],
)  # fmt: skip
def test_a_mistake_with_ones_own_parts_is_one_line(words: list[object], expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    assert refused([str(word) for word in words], tmp_path, 1).startswith(expected)


def test_an_error_in_a_users_file_shows_the_traceback_of_that_file(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def helper():\n    return nonsense\n\n\nhelper()\n")
    text = run(["--workload.name", "broken.py"], tmp_path, code=2)
    assert "error: workload.name: 'broken.py' cannot be imported: NameError: name 'nonsense' is not defined" in text
    assert f'  File "{tmp_path}/broken.py", line 5, in <module>\n    helper()' in text
    assert f'  File "{tmp_path}/broken.py", line 2, in helper\n    return nonsense' in text
    assert "importlib" not in text
