"""What a GAN's run leaves behind, and what can be done with it: sample, evaluate, export."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from wandb.proto.wandb_internal_pb2 import Record

from trainer import workloads
from trainer.run.opened import open_run

from ..ranks import run
from ..results import outcome, records
from ..run.test_rollback import RUN as SICK
from ..run.test_rollback import WON, offline
from ..wandb_tools import chunks, read_runs
from .test_bad_input import refused

STEPS, EVERY, SHOWN = 12, 4, 9
BASE = ["--data.samples", "64", "--data.size", "8", "--data.classes", "5", "--batch_size", "8",
        "--duration", f"{STEPS} steps", "--samples.every", f"{EVERY} steps", "--samples.count", str(SHOWN),
        "--evaluate.every", f"{EVERY} steps", "--checkpoint.every", f"{EVERY} steps", "--log.every", "2 steps",
        "--checkpoint.keep", "1", "--workload.width", "4"]  # fmt: skip
MODELS = {
    "dcgan": ["--workload.latent", "6"],
    "biggan": ["--workload.latent", "10", "--workload.embedding", "4", "--workload.attention", "yes"],
    "infogan": ["--workload.hidden", "16"],
}


def words(name: str, url: str = "", steps: int = STEPS) -> list[str]:
    about = ["--workload.name", name, "--data.name", "fake", *BASE, *MODELS[name]]
    return [*about, "--duration", f"{steps} steps", "--run.url", url or name]


@dataclass(frozen=True)
class Finished:
    """A folder with a run of each model, named after it."""

    folder: Path
    results: dict[str, dict[str, Any]]

    def url(self, name: str) -> str:
        return str(self.folder / name)

    def samples(self, name: str) -> set[str]:
        return {path.name for path in (self.folder / name / "samples").iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("trained")
    results = {name: json.loads(run(words(name), folder).splitlines()[-1]) for name in MODELS}
    points = ["--workload.name", "gan", "--data.name", "ring8", *BASE[6:], "--evaluate.samples", "80"]
    results["points"] = json.loads(run([*points, "--run.url", "points"], folder).splitlines()[-1])
    return Finished(folder, results)


def files_of(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def sampled(trained: Finished, folder: Path, name: str, *more: object) -> list[bytes]:
    """The files that the sample command writes."""
    out = folder / f"out{len(list(folder.iterdir()))}"
    run(["sample", trained.url(name), "--out", out, *more], folder)
    return files_of(out)


def pixels(files: list[bytes]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(Image.open(io.BytesIO(file)), np.float64) for file in files])


# What a run leaves behind


@pytest.mark.parametrize("name", [*MODELS, "points"])
def test_a_run_shows_its_samples_over_time_and_at_the_end(name: str, trained: Finished) -> None:
    steps = {f"step-{step:08d}.png" for step in range(EVERY, STEPS + 1, EVERY)}
    common = {*steps, "training.gif", "learning_curves.png", "real_and_fake.png"}
    special = {
        "dcgan": {"interpolation.png"},
        "biggan": {"interpolation.png", "classes.png"},
        "infogan": {"interpolation.png", "traversal_category.png", "traversal_1.png", "traversal_2.png"},
        "points": set(),
    }
    assert trained.samples(name) == common | special[name]
    for file in trained.samples(name):
        with Image.open(trained.folder / name / "samples" / file) as image:
            image.load()
            assert min(image.size) > 100, file  # a person can see something
            assert getattr(image, "n_frames", 1) == (len(steps) if file.endswith(".gif") else 1)


def test_the_end_is_shown_even_where_the_interval_does_not_meet_it(tmp_path: Path) -> None:
    run([*words("dcgan", "run", 6), "--samples.every", "5 steps"], tmp_path)
    names = sorted(path.name for path in (tmp_path / "run" / "samples").glob("step-*"))
    assert names == ["step-00000005.png", "step-00000006.png"]


def test_the_latents_are_always_the_same(trained: Finished, tmp_path: Path) -> None:
    """A run in two lives, on two ranks in the second, shows what the run in one life showed."""
    run(words("dcgan", "run", 8), tmp_path)
    before = (tmp_path / "run" / "samples" / "step-00000008.png").read_bytes()
    (tmp_path / "run" / "samples" / "step-00000008.png").unlink()
    run(words("dcgan", "run"), tmp_path)
    assert (tmp_path / "run" / "samples" / "step-00000008.png").read_bytes() == before
    for step in range(EVERY, STEPS + 1, EVERY):
        one, other = (folder / f"step-{step:08d}.png" for folder in (
            tmp_path / "run" / "samples", trained.folder / "dcgan" / "samples"))  # fmt: skip
        assert pixels([one.read_bytes()])[0, 24:].tolist() == pixels([other.read_bytes()])[0, 24:].tolist()  # no title


def test_the_number_of_samples_may_change_amid_a_run(tmp_path: Path) -> None:
    run(words("dcgan", "run", 8), tmp_path)
    run([*words("dcgan", "run"), "--samples.count", "30"], tmp_path)
    assert outcome(tmp_path / "run")["status"] == "done"
    with Image.open(tmp_path / "run" / "samples" / "training.gif") as animation:
        assert animation.n_frames == 3  # type: ignore[attr-defined]


def test_a_damaged_picture_is_a_warning_and_no_crash(tmp_path: Path) -> None:
    run(words("dcgan", "run", 8), tmp_path)
    (tmp_path / "run" / "samples" / "step-00000004.png").write_bytes(b"torn")
    text = run(words("dcgan", "run"), tmp_path)
    assert "warning: samples/training.gif was not made: " in text
    assert outcome(tmp_path / "run")["status"] == "done"


def test_a_run_that_was_killed_before_it_had_drawn_its_pictures_draws_them_later(tmp_path: Path) -> None:
    """As a kill leaves it that came after the last checkpoint."""
    run(words("dcgan", "run", 6), tmp_path)
    samples = tmp_path / "run" / "samples"
    before = {path.name: path.read_bytes() for path in samples.iterdir()}
    (tmp_path / "run" / "outcome.json").unlink()
    for name in before:
        if not name.startswith("step"):
            (samples / name).unlink()
    run(words("dcgan", "run", 6), tmp_path)
    assert {path.name for path in samples.iterdir()} == set(before)


def test_the_best_checkpoint_is_kept_and_can_be_asked_for(trained: Finished) -> None:
    for name in MODELS:
        run_folder = trained.folder / name
        fids = {r["step"]: r["fid@pixels"] for r in records(run_folder) if r["kind"] == "evaluate"}
        best = min(fids, key=lambda step: fids[step])
        saved = {int(path.parent.name[5:]) for path in run_folder.glob("checkpoints/*/MANIFEST.json")}
        assert {best, STEPS} <= saved
        assert len(saved) <= 2  # with the newest one also the best, the one that was best before may be left
        metrics = json.loads(run(["evaluate", name, "--best"], trained.folder).splitlines()[-1])
        assert (metrics["step"], metrics["fid@pixels"]) == (best, pytest.approx(fids[best], rel=1e-6))


# W&B


def test_pictures_of_several_steps_and_an_alert_reach_wandb(tmp_path: Path) -> None:
    run(SICK, tmp_path, environment=offline(tmp_path))
    (stored,) = read_runs(tmp_path / "run")
    names = {name.split(".")[0] for row in stored.rows for name in row if name.startswith("pictures/")}
    assert names >= {f"pictures/{name}" for name in ("samples", "real_and_fake", "interpolation", "learning_curves")}
    shown = {row["_step"] for row in stored.rows if any(name.startswith("pictures/samples") for name in row)}
    assert len(shown) >= 2
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    messages = map(Record.FromString, chunks(path.read_bytes()))
    (alert,) = [record.alert for record in messages if record.HasField("alert")]
    assert alert.title == "convergence_failure"
    assert alert.text.startswith(f"step {WON}: the discriminator has won: ")


# sample


def test_samples_are_files_of_the_size_of_the_data(trained: Finished, tmp_path: Path) -> None:
    images = sampled(trained, tmp_path, "dcgan", "--count", 5)
    assert len(images) == 5
    assert pixels(images).shape == (5, 8, 8, 3)
    assert sorted(path.name for path in (tmp_path / "out0").iterdir()) == [f"{i:05d}.png" for i in range(5)]
    assert len(set(images)) == 5


def test_samples_are_a_function_of_the_seed_and_their_number(trained: Finished, tmp_path: Path) -> None:
    one, same, more, other = (
        sampled(trained, tmp_path, "dcgan", "--count", count, "--seed", seed)
        for count, seed in ((6, 3), (6, 3), (260, 3), (6, 4))  # of 256, a batch of them is full
    )
    assert one == same == more[:6]
    assert len(set(more)) == 260
    assert not set(one) & set(other)


def test_a_grid_holds_them_all_and_is_the_same_every_time(trained: Finished, tmp_path: Path) -> None:
    for file in ("a.png", "b.png"):
        said = run(["sample", trained.url("dcgan"), "--count", "30", "--out", file], tmp_path)
        assert said.splitlines()[-1] == f"30 samples of step {STEPS}: {file}"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    run(["sample", trained.url("points"), "--count", "30", "--out", "points.png"], tmp_path)
    assert Image.open(tmp_path / "points.png").size[0] > 100


def test_a_class_goes_by_its_name_or_its_number(trained: Finished, tmp_path: Path) -> None:
    by_name, by_number, in_turn = (
        sampled(trained, tmp_path, "biggan", "--count", 10, *more)
        for more in (["--class", "class 3"], ["--class", "3"], [])
    )
    assert by_name == by_number
    equal = [i for i in range(10) if by_name[i] == in_turn[i]]
    assert equal == [3, 8]  # of the five classes in turn, those that have its turn; the latents are the same


@pytest.mark.parametrize("name", ["dcgan", "biggan", "infogan"])
def test_truncated_samples_vary_less(name: str, trained: Finished, tmp_path: Path) -> None:
    label = ["--class", "1"] if name == "biggan" else []
    spreads = [
        pixels(sampled(trained, tmp_path, name, "--count", 40, *label, *more)).std(0).mean()
        for more in ([], ["--truncation", 1.0], ["--truncation", 0.1])
    ]
    assert spreads[0] > spreads[1] > spreads[2] > 0


@pytest.fixture(scope="module")
def bucket(trained: Finished, s3_server: Mapping[str, str]) -> s3fs.S3FileSystem:
    metrics = s3fs.S3FileSystem(
        key=s3_server["AWS_ACCESS_KEY_ID"], secret=s3_server["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=s3_server["AWS_ENDPOINT_URL"], use_listings_cache=False,
    )  # fmt: skip
    metrics.put(trained.url("dcgan"), "s3://warm-up/generate/dcgan", recursive=True)
    return metrics


def test_a_checkpoint_on_s3_gives_its_samples_to_s3(
    trained: Finished, tmp_path: Path, s3_server: dict[str, str], bucket: s3fs.S3FileSystem
) -> None:
    checkpoint = f"s3://warm-up/generate/dcgan/checkpoints/step-{STEPS:08d}"
    target = "s3://warm-up/generate/out"
    run(["sample", checkpoint, "--count", "4", "--out", target], tmp_path, environment=s3_server)
    run(["sample", checkpoint, "--count", "4", "--out", f"{target}/grid.png"], tmp_path, environment=s3_server)
    run(["sample", trained.url("dcgan"), "--count", "4", "--out", "grid.png"], tmp_path)
    assert [bucket.cat(f"{target}/{i:05d}.png") for i in range(4)] == sampled(trained, tmp_path, "dcgan", "--count", 4)
    assert bucket.cat(f"{target}/grid.png") == (tmp_path / "grid.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["{biggan}", "--class", "class 33"],
         "--class: 'class 33' is not known; classes of fake: class 3, class 4, class 2"),
        (["{biggan}", "--class", "5"],
         "--class: '5' is not known; classes of fake: class 0, class 1, class 2, class 3, class 4"),
        (["{dcgan}", "--class", "1"], "--class: dcgan does not generate by class: leave it out, or use biggan"),
        (["{dcgan}", "--count", "0"], "--count: 0 must be 1 or more"),
        (["{dcgan}", "--truncation", "0"], "--truncation: 0.0 must be above 0"),
        (["{dcgan}", "--truncation", "nan"], "--truncation: nan must be above 0"),
        (["{dcgan}", "--prompt", "a dog"], "--prompt: dcgan gives images, not text: leave it out"),
        (["{dcgan}", "--out", "dogs.txt"], "--out: 'dogs.txt': give a FILE.png, or a folder for a file each"),
        (["{dcgan}", "--step", "5"], "{dcgan}: no checkpoint of step 5; there are: {steps}"),
        (["{points}", "--out", "folder"], "--out: 'folder': points are not images: give a FILE.png"),
        (["nothing"], "nothing: no run there: give the URL of a run (it holds config.yaml) or of one of its "
                      "checkpoints"),
        (["{dcgan}", "--count", "few"], "sample: argument --count: invalid int value: 'few'; see --help"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_one_line(words: list[str], mistake: str, trained: Finished, tmp_path: Path) -> None:
    urls = {name: trained.url(name) for name in trained.results}
    saved = sorted(int(p.parent.name[5:]) for p in trained.folder.glob("dcgan/checkpoints/*/MANIFEST.json"))
    urls["steps"] = ", ".join(map(str, saved))
    assert refused(["sample", *(word.format(**urls) for word in words)], tmp_path, 1) == mistake.format(**urls)


def test_a_classifier_generates_nothing_and_a_gan_labels_nothing(trained: Finished, tmp_path: Path) -> None:
    run(["--workload.network", "softmax", "--duration", "2 steps", "--run.url", "digits"], tmp_path)
    said = refused(["sample", "digits"], tmp_path, 1)
    assert said == "digits: classifier generates nothing: give the run of a GAN or of a language model"
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    url = trained.url("dcgan")
    said = refused(["predict", url, "digit.png"], tmp_path, 1)
    assert said == f"{url}: dcgan labels nothing: give a classifier's run"


def test_samples_that_cannot_be_written_are_one_line(trained: Finished, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in ("file/out", "file/grid.png"):
        assert "file/" in refused(["sample", trained.url("dcgan"), "--out", out], tmp_path, 1)


# evaluate


@pytest.mark.parametrize(("name", "world"), [("dcgan", 1), ("dcgan", 2), ("biggan", 1), ("infogan", 1), ("points", 2)])
def test_evaluating_gives_the_metrics_that_training_ended_with(name: str, world: int, trained: Finished) -> None:
    metrics = json.loads(run(["evaluate", name], trained.folder, world).splitlines()[-1])
    expected = outcome(trained.folder / name)["metrics"]
    assert {"kid", "coverage", "fid_floor", "spacing"} <= {metric.partition("@")[0] for metric in expected}
    for metric, value in expected.items():
        assert metrics[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
        if world == 1:
            assert metrics[metric] == value, metric
    assert (metrics["step"], metrics["samples"]) == (STEPS, 80 if name == "points" else 16)


# export


def inputs(name: str, count: int) -> tuple[Tensor, ...]:
    z = torch.randn(count, {"dcgan": 6, "biggan": 10}[name], generator=torch.Generator().manual_seed(7))
    return (z, torch.arange(count) % 5) if name == "biggan" else (z,)


@pytest.mark.parametrize("name", ["dcgan", "biggan"])
def test_an_exported_generator_gives_the_same_images_for_any_batch(
    name: str, trained: Finished, tmp_path: Path
) -> None:
    import onnxruntime

    formats = ["safetensors", "torch", "onnx"]
    said = run(["export", trained.url(name), "--to", "out", "--format", *formats], tmp_path).splitlines()[-3:]
    assert [line.split()[0] for line in said] == formats
    for line in said[1:]:
        assert float(line.rpartition("outputs differ by ")[2].removesuffix(" at most")) < 1e-5, line
    opened = open_run(trained.url(name))
    network = opened.workload.eval().inference().eval()
    fresh = workloads.build(opened.config, opened.data).inference().eval()
    fresh.load_state_dict(load_file(tmp_path / "out" / "weights.safetensors"))
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    names = ["latents", "labels"] if name == "biggan" else ["latents"]
    for count in (1, 5):
        example = inputs(name, count)
        with torch.no_grad():
            images = network(*example)
            assert images.shape == (count, 3, 8, 8)
            assert torch.equal(fresh(*example), images)
            torch.testing.assert_close(program(*example), images, atol=1e-5, rtol=0)
        feed = {n: t.numpy() for n, t in zip(names, example, strict=True)}
        (output,) = session.run(["images"], feed)
        torch.testing.assert_close(torch.from_numpy(output), images, atol=1e-5, rtol=0)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["workload"]["name"] == name
    assert about["input"]["shapes"] == [["batch", *tensor.shape[1:]] for tensor in inputs(name, 2)]
    assert about["checkpoint"].endswith(f"step-{STEPS:08d}")
