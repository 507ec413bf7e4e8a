"""`evaluate`: the metrics of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..distributed.process import ProcessInfo
from ..distributed.runtime import Runtime
from ..engine import Engine
from ..run import build
from ..run.directory import SilentSaver
from ..run.features import open_judge
from ..run.opened import open_run
from ..state import TrainState
from ..tracking.tracker import Silent
from .common import Parser, checkpoint_arguments, say


def main(words: Sequence[str]) -> int:
    parser = Parser("python -m trainer evaluate", description="Evaluate a checkpoint; every sample counts once.")
    checkpoint_arguments(parser)
    parser.add_argument("--data-root", metavar="DIR", help="where the data is, if not where the run found it")
    parser.add_argument(
        "--split", metavar="NAME", default="auto", choices=["auto", "val", "test", "train"],
        help="val | test | train (default: the split that the run evaluated)",
    )  # fmt: skip
    parser.add_argument(
        "--device", metavar="NAME", default="auto", choices=["auto", "cpu"],
        help="auto | cpu; auto is the accelerator where there is one (default: auto)",
    )  # fmt: skip
    options = parser.parse_args(words)
    trained = open_run(options.checkpoint, step=options.step, best=options.best)
    config, workload = trained.config, trained.workload
    data = build.open_run_data(config, options.data_root, None if options.split == "auto" else options.split)
    workload.data = data.description  # the networks stay as they are, but this split may have another size
    judge = open_judge(config, data.description) if workload.generates else None
    workload.quality = judge
    process = ProcessInfo.from_environment()
    with Runtime(process, device=options.device, precision=config.precision, threads=config.threads) as runtime:
        runtime.prepare(workload, config.channels_last, False)
        plan = build.build_plan(config, len(data.train), workload, 1)
        loader = build.build_loader(config, data, workload, plan, runtime)
        engine = Engine(
            runtime, TrainState(workload), loader, Silent(), SilentSaver(),
            build.build_limits(config, plan.batch_size, plan.size), lambda step: 1.0, config.seed,
        )  # fmt: skip
        if judge is not None:
            judge.prepare(loader, runtime)
        if not engine.evaluate():
            return 1
        if runtime.main:
            split = data.split
            say(json.dumps({**engine.metrics, "split": split, "samples": loader.evaluation_samples,
                            "step": trained.step, "checkpoint": trained.name}))  # fmt: skip
    return 0
