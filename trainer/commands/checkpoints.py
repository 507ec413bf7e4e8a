"""`checkpoints`: list, verify or prune them."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.options import UserError
from ..run.opened import history, locate
from ..storage.checkpoint import MANIFEST, QUARANTINED, CheckpointStore, CorruptCheckpoint, folder
from ..storage.objects import Storage
from .common import Parser, say


def main(words: Sequence[str]) -> int:
    parser = Parser("python -m trainer checkpoints", description="List, verify or prune the checkpoints of a run.")
    parser.add_argument(
        "action", metavar="ACTION", choices=["list", "verify", "prune"],
        help="list: what there is | verify: read every byte; exit code 1 if any is corrupt | prune: delete old ones",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="URL of a run, or for list and verify of a checkpoint in it")
    parser.add_argument(
        "--keep", metavar="N", type=int, default=3, help="prune: keep the newest N, and the best (default: 3)"
    )
    options = parser.parse_args(words)
    storage, step = locate(options.run)
    store = CheckpointStore(storage.at("checkpoints"))
    if options.action == "prune":
        return _prune(storage, store, options.keep)
    steps = [step] if step is not None else store.folders()
    return _list(store, steps) if options.action == "list" else _verify(store, steps)


def _list(store: CheckpointStore, steps: Sequence[int]) -> int:
    for step in steps:
        names = store.storage.list(folder(step))
        if MANIFEST in names:
            say(f"{folder(step)}  committed  {store.size(step) / 2**20:.1f} MiB")
        else:
            say(f"{folder(step)}  {'quarantined' if QUARANTINED in names else 'unfinished'}")
    return 0


def _verify(store: CheckpointStore, steps: Sequence[int]) -> int:
    """Print a line per problem, or that a checkpoint is valid; returns 1 if any has a problem."""
    all_valid = True
    for step in steps:
        problems = store.verify(step)
        all_valid = all_valid and not problems
        for line in problems or ["valid"]:
            say(f"{folder(step)}  {line}")
    return 0 if all_valid else 1


def _prune(storage: Storage, store: CheckpointStore, keep: int) -> int:
    if keep < 1:
        raise UserError(f"--keep: {keep} would delete every checkpoint: keep 1 or more")
    steps = store.steps()
    best = None
    if steps:
        try:
            state = store.load(steps[-1], []).state
        except CorruptCheckpoint as error:
            raise UserError(f"{folder(steps[-1])} is corrupt, so nothing was deleted: {error}") from None
        best = history(storage).best(state["headline"], state["maximise"], steps)
    deleted = store.prune(keep, lambda step: step == best)
    say(f"deleted {len(deleted)}, kept {len(store.steps())}: {', '.join(map(folder, store.steps()))}")
    return 0
