"""The command line: python -m trainer [COMMAND] ..., where `train` is the default."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning OpenMP threads make a shared machine 10x slower

import contextlib
import difflib
import gc
import importlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .distributed.signals import HELD_BACK

COMMANDS = {
    "train": "train a run, or resume it (the default command)",
    "evaluate": "evaluate a checkpoint on its held-out data",
    "predict": "label images with a checkpoint",
    "sample": "generate images, or text, with a checkpoint",
    "translate": "turn images into others with a checkpoint of pix2pix or cyclegan",
    "dream": "change an image until a layer sees more in it (deep dream)",
    "stylize": "draw an image in the style of another (style transfer)",
    "export": "write a checkpoint as safetensors, torch.export program or ONNX",
    "checkpoints": "list, verify or prune the checkpoints of a run",
    "doctor": "check config, data, storage and resuming before a long run",
    "config": "print the resolved config, or its JSON schema",
}
USAGE = """usage: python -m trainer [train] [CONFIG.yaml] [--setting value ...]
       python -m trainer COMMAND ...

Train an image classifier, a GAN or a language model on one CPU, on the GPUs of
a machine under torchrun, or on a cluster under srun: the same command. Without
a config it trains a CNN on scikit-learn's digits. The same command again
resumes a run that was stopped.

commands:
{commands}

  python -m trainer COMMAND --help     the options of a command
  python -m trainer train --help       every setting of a run

Settings come from the config file, from the environment, which overrides the
file (TRAINER_OPTIMIZER__LR=3e-4), and from flags, which override both.

examples:
  python -m trainer configs/fashion_cnn.yaml --optimizer.lr 3e-4 \\
      --run.url s3://bucket/run7
  torchrun --nproc_per_node=4 -m trainer configs/fashion_cnn.yaml
  srun --ntasks=8 python -m trainer configs/fashion_cnn.yaml

exit codes: 0 done, or stopped by a signal after saving; 1 failed; 2 a mistake
in what was asked for, which a line on standard error names
"""


def _rank() -> int:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(rank) if rank.isdecimal() else 0


def print_error(text: str) -> None:
    """A user's mistake, a line each, from the first rank only."""
    if _rank() == 0:
        for line in text.splitlines():  # those of a traceback are indented
            print(line if line.startswith(" ") else f"error: {line}", file=sys.stderr, flush=True)  # noqa: T201


def _misspelt(words: Sequence[str]) -> str | None:
    """The command that the first word is likely to mean."""
    if not words or words[0] in COMMANDS or not words[0].isalpha() or Path(words[0]).exists():
        return None
    return next(iter(difflib.get_close_matches(words[0], COMMANDS, 1)), None)


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"]) or words == ["help"]:
        table = "\n".join(f"  {name:<12} {text}" for name, text in COMMANDS.items())
        print(USAGE.format(commands=table), end="")  # noqa: T201
        return 0
    if words[:1] == ["--version"]:
        from . import __version__

        print(__version__)  # noqa: T201
        return 0
    if words[:1] == ["help"]:  # `help train` is `train --help`
        words = [*words[1:2], "--help"]
    if (near := _misspelt(words)) is not None:
        print_error(f"{words[0]}: neither a command nor a config file: did you mean {near!r}?")
        return 2
    command = words.pop(0) if words and words[0] in COMMANDS else "train"
    if command == "train":  # importing torch takes seconds, and a signal must neither kill nor be lost meanwhile
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        return _run(command, words)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """For the import of torch: a quarter of its time would go into looking for garbage where there is none."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    yield
    gc.freeze()  # what is here by now stays, and is not looked at again
    gc.enable()


def _known(error: RuntimeError) -> str | None:
    """The line about what torch says of a device in many."""
    first = str(error).partition(". ")[0].splitlines()[0] if str(error) else ""
    if type(error).__name__ == "OutOfMemoryError":
        return f"{first}: lower batch_size, or raise accumulation, which cuts the batch into smaller parts"
    if "does not have a deterministic implementation" in first:
        return f"deterministic: true: {first}: set deterministic to false"
    return None


def _run(command: str, words: list[str]) -> int:
    with _without_collections():
        module = importlib.import_module(f".commands.{command}", __package__)
        from .config.options import UserError
        from .distributed.process import LaunchError
        from .state import Mismatch
        from .storage.objects import StorageError
    try:
        return int(module.main(words))
    except (UserError, LaunchError, StorageError, Mismatch) as error:
        print_error(str(error))
        return 2
    except RuntimeError as error:
        if (line := _known(error)) is not None:
            print(f"error: rank {_rank()}: {line}", file=sys.stderr, flush=True)  # noqa: T201
            return 1
        if "onnection" not in str(error) and "peer" not in str(error):
            raise
        print(f"error: rank {_rank()} lost contact with another rank, which has ended; see its message "  # noqa: T201
              f"({str(error).splitlines()[0][:120]})", file=sys.stderr, flush=True)  # fmt: skip
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1


if __name__ == "__main__":
    code = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it any more; Python would try again at its exit, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    # Abandoned storage or W&B threads must not hold up the exit, and everything is written by now.
    os._exit(code) if code else sys.exit(code)
