"""`checkpoints`: list, verify or prune them."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.options import UserError
from ..run.opened import history, locate
from ..storage.checkpoint import MANIFEST, QUARANTINED, CheckpointStore, CorruptCheckpoint, folder
from .common import Parser, say


def main(words: Sequence[str]) -> int:
    parser = Parser("python -m trainer checkpoints", description="List, verify or prune the checkpoints of a run.")
    parser.add_argument(
        "action", metavar="ACTION", choices=["list", "verify", "prune"],
        help="list: what there is | verify: read every byte; exit code 1 if any is damaged | prune: delete old ones",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="URL of a run, or for list and verify of a checkpoint in it")
    parser.add_argument(
        "--keep", metavar="N", type=int, default=3, help="prune: keep the newest N, and the best (default: 3)"
    )
    options = parser.parse_args(words)
    storage, step = locate(options.run)
    store = CheckpointStore(storage.at("checkpoints"))
    if options.action == "prune":
        if options.keep < 1:
            raise UserError(f"--keep: {options.keep} would delete every checkpoint: keep 1 or more")
        steps = store.steps()
        best = None
        if steps:
            try:
                state = store.load(steps[-1], []).state
            except CorruptCheckpoint as error:
                raise UserError(f"{folder(steps[-1])} is damaged, so nothing was deleted: {error}") from None
            best = history(storage).best(state["headline"], state["maximise"], steps)
        deleted = store.prune(options.keep, lambda saved: saved == best)
        say(f"deleted {len(deleted)}, kept {len(store.steps())}: {', '.join(map(folder, store.steps()))}")
        return 0
    bad = 0
    for here in [step] if step is not None else store.folders():
        names = store.storage.list(folder(here))
        if options.action == "list":
            committed = MANIFEST in names
            size = f"{store.size(here) / 2**20:.1f} MiB" if committed else ""
            status = "committed" if committed else "set aside" if QUARANTINED in names else "unfinished"
            say(f"{folder(here)}  {status}  {size}".rstrip())
            continue
        problems = store.verify(here)
        bad += bool(problems)
        for problem in problems or ["sound"]:
            say(f"{folder(here)}  {problem}")
    return 1 if bad else 0
