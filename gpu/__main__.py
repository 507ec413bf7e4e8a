"""python -m gpu [PART ...]: run the parts, each as a process with a time limit, and put their results together."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch

WORKERS = str(max(2, (os.cpu_count() or 2) - 4))  # of which some start three ranks
PARTS: dict[str, tuple[list[str], float]] = {  # command, and seconds
    "tests": (["-m", "pytest", "tests/gpu", "tests/test_engine.py", "tests/workloads/test_contract.py", "-n", WORKERS,
               "--dist", "load", "-p", "no:cacheprovider", "-p", "gpu.failures"], 240),
    "speed": (["-m", "gpu.speed"], 200),
    "quality": (["-m", "gpu.quality"], 420),
}  # fmt: skip
MORE = {"speed", "quality"}  # write JSON and pictures into a folder of their own
QUICK = {  # what of a part a rehearsal on a CPU takes
    "tests": ["-n", "0", "-k", "compiled"],
    "speed": ["--quick", "--cases", "dcgan 64"],
    "quality": ["--quick", "--runs", "cifar10_dcgan"],
}


def run(name: str, limit: float, quick: bool, out: Path) -> dict[str, object]:
    """Run one part to its end or its limit; its output is in OUT/NAME.log."""
    command, _ = PARTS[name]
    words = [sys.executable, *command, *(QUICK[name] if quick else [])]
    if name in MORE:
        words += ["--out", str(out / name)]
    began = time.monotonic()
    with (out / f"{name}.log").open("wb") as log:
        environment = {**os.environ, "GPU_FAILURES": str(out)}
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, env=environment)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return {"seconds": round(time.monotonic() - began, 1), "limit": limit, "exit_code": code}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART[=SECONDS]", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a rehearsal")
    options = parser.parse_args()
    limits = {name: limit for name, (_, limit) in PARTS.items()}
    chosen = dict(word.partition("=")[::2] for word in options.parts) or dict.fromkeys(PARTS, "")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"{unknown[0]!r} is no part; known: {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    summary: dict[str, object] = {
        "device": accelerator, "torch": torch.__version__, "python": platform.python_version(),
        "cores": os.cpu_count(), "processor": _processor(),
    }  # fmt: skip
    for name, seconds in chosen.items():
        summary[name] = run(name, float(seconds or limits[name]), options.quick, options.out)
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1))
        print(f"{name}: {summary[name]}", flush=True)
        print("\n".join((options.out / f"{name}.log").read_text(errors="replace").splitlines()[-40:]), flush=True)
    with tarfile.open(options.out / "results.tar.gz", "w:gz") as archive:
        for name in MORE & chosen.keys():
            if (folder := options.out / name).is_dir():
                archive.add(folder, name)
    print(json.dumps(summary))
    return int(any(part["exit_code"] for part in summary.values() if isinstance(part, dict)))


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
