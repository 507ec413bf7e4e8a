"""What a few minutes of a GPU give: runs of the configs at the same time on one GPU, and their last scores.

Their minutes are those of a shared GPU. The FIDs are by LeNet-5, as those of the CPU runs in docs/results.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SECONDS = float(os.environ.get("GPU_QUALITY_SECONDS", "300"))  # until the runs are asked to save and end
FINISH = 40.0  # that a run which is asked to end may take
DATA = Path(os.environ.get("TRAINER_DATA", "data"))
FAKE = ["--data.name", "fake", "--data.samples", "64", "--duration", "2 steps", "--batch_size", "8",
        "--schedule.warmup", "0 steps", "--metrics.features", "pixels"]  # fmt: skip
CIFAR = [  # a copy as an image folder, as small sets are given: whole, and on the GPU
    "--data.name", "folder", "--data.root", str(DATA / "cifar10"), "--data.size", "32", "--data.resized_crop", "false",
    "--data.resident", "yes", "--data.workers", "2",
]  # fmt: skip
LENET = ["--metrics.features", "configs/cifar10_lenet5.yaml", "--evaluate.every", "1000 epochs",
         "--samples.every", "1000 epochs", "--checkpoint.every", "1 hours", "--health.action", "warn"]  # fmt: skip
LASTING = ["--duration", f"{SECONDS:.0f} seconds"]
RUNS: dict[str, list[str]] = {
    "cifar10_resnet18": ["--duration", "30 epochs", "--schedule.warmup", "6 epochs", "--evaluate.every", "10 epochs",
                         "--checkpoint.every", "1 hours"],
    "cifar10_dcgan": LENET,
    "cifar10_stylegan": [*LENET, *LASTING],
    "cifar10_biggan": [*LENET, *LASTING],
    "cifar10_r3gan": [*LENET, *LASTING],
    "cifar10_wgan_gp": [*LENET, "--duration", "30 epochs"],
}  # fmt: skip


def command(name: str, out: Path, quick: bool) -> list[str]:
    words = [*RUNS[name], *(FAKE if quick else CIFAR)]  # of a flag that is given twice, the last value counts
    return [sys.executable, "-m", "trainer", f"configs/{name}.yaml", *words, "--run.url", str(out / name)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.quality", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--runs", nargs="*", default=list(RUNS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    began, running = time.monotonic(), {}
    for name in options.runs:
        with (options.out / f"{name}.log").open("wb") as log:
            words = command(name, options.out, options.quick)
            running[name] = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    results = {}
    for name, process in running.items():
        results[name] = {"exit_code": wait(process, began), "seconds": round(time.monotonic() - began, 1)}
        with contextlib.suppress(OSError, ValueError):
            results[name] |= json.loads((options.out / name / "outcome.json").read_text())
        (options.out / "quality.json").write_text(json.dumps(results, indent=1))
        metrics = results[name].get("metrics", {})
        shown = {key.partition("@")[0]: value for key, value in metrics.items() if "floor" not in key}
        print(name, results[name].get("status"), results[name].get("step"), shown, flush=True)
    for checkpoints in options.out.glob("*/checkpoints"):  # which are large, and not asked for
        shutil.rmtree(checkpoints)
    return int(any(result["exit_code"] for result in results.values()))


def wait(process: subprocess.Popen[bytes], began: float) -> int:
    """The exit code; a run that is late is asked to end, and then ended."""
    for number, seconds in ((signal.SIGTERM, SECONDS + FINISH), (signal.SIGKILL, SECONDS + 1.5 * FINISH)):
        try:
            return process.wait(max(0.1, began + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
