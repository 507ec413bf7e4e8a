"""python -m benchmarks [NAME ...]: run the measurements, each in a process of its own."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import time

from .common import exit_on_sigterm, fashion_mnist, measure_by_name

NAMES = {
    "step": "samples/s of our engine against the plain PyTorch program: softmax, FNN,\nCNN and DCGAN",
    "overhead": "microseconds a step that our loop adds to a bare one (softmax b20)",
    "start": "process start to first step, and peak memory, against the plain program",
    "ranks": "two ranks of one thread against one process of one thread (CNN, DCGAN)",
    "checkpoint": "what a background save costs the training, on disk and on S3",
}
EPILOG = f"""measurements:
{chr(10).join(f"  {name:<11} {text.replace(chr(10), chr(10) + 14 * ' ')}" for name, text in NAMES.items())}

reading the output:
  Contenders take turns in one run; each figure is the median over the turns,
  (min-max) is its spread. Ratios are taken turn by turn, so that what slows
  the machine down for a while cancels: trust them, not the absolute numbers,
  and treat ratios within 10 % as equal. The load of the machine is printed:
  above one or so other programs are at work, and the figures show it. Every
  process has one OpenMP thread. A target that is missed is no error: the exit
  code is 1 only where a measurement could not be taken.

data:
  Fashion-MNIST from $TRAINER_DATA or ../shared/data (FashionMNIST/raw/*.gz),
  else random bytes of its shape: speed does not depend on the pixels.

examples:
  python -m benchmarks                 everything, about fifteen minutes
  python -m benchmarks step overhead   two of them
  python -m benchmarks --quick         everything for three minutes, to see
                                       that it works; the figures are rough
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Side-by-side measurements; each prints ratios taken in one run.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="short turns, few of them: a smoke test")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"{unknown[0]!r} is not a measurement; known: {', '.join(NAMES)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    exit_on_sigterm()
    processes, failed = multiprocessing.get_context("spawn"), []
    with fashion_mnist() as (folder, what):
        print(f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, data: {what}\n")
        for name in options.names or NAMES:
            load, began = os.getloadavg()[0], time.perf_counter()
            process = processes.Process(target=measure_by_name, args=(name, folder, options.quick))
            process.start()
            try:
                process.join()
            finally:
                process.terminate()
                process.join()
            print(f"  [{name}: {time.perf_counter() - began:.0f} s; load when it began {load:.1f}]\n", flush=True)
            if process.exitcode:
                failed.append(name)
    if failed:
        print(f"error: not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
