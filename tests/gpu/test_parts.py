"""The parts of gpu/run.sh, rehearsed on this machine at tiny sizes, so that a GPU's minutes are not spent on a typo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import torch

from trainer.__main__ import _known

ROOT = Path(__file__).parents[2]


def test_speed_and_quality_leave_their_results_behind(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "gpu", "--quick", "--out", str(tmp_path), "speed", "quality=200"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRAINER_WANDB__MODE": "disabled"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["speed"]["exit_code"] == summary["quality"]["exit_code"] == 0
    speed = json.loads((tmp_path / "speed" / "speed.json").read_text())["dcgan 64"]
    assert speed["ours"]["images_per_second"] > 0 < speed["bare"]["images_per_second"]
    quality = json.loads((tmp_path / "quality" / "quality.json").read_text())["cifar10_dcgan"]
    assert quality["status"] == "done"
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = archive.getnames()
    assert any(name.endswith("real_and_fake.png") for name in names)
    assert not any("checkpoints" in name for name in names)


def test_a_part_that_takes_too_long_is_ended_and_the_others_go_on(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "gpu", "--quick", "--out", str(tmp_path), "speed=0.1", "tests"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1
    assert summary["speed"]["exit_code"] == -9
    assert summary["tests"]["exit_code"] == 0, (tmp_path / "tests.log").read_text()


def test_the_scripts_are_valid_bash() -> None:
    for script in ROOT.glob("gpu/*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_what_a_gpu_refuses_is_one_line_with_the_way_out() -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    line = _known(full)
    assert line is not None
    assert line.startswith("CUDA out of memory: lower batch_size")
    text = "grid_sampler_2d_backward_cuda does not have a deterministic implementation, but you set 'torch..."
    line = _known(RuntimeError(text))
    assert line is not None
    assert line.startswith("deterministic: true: grid_sampler_2d_backward_cuda does not")
    assert _known(RuntimeError("")) is None
