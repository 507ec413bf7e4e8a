"""`evaluate`: the metrics of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..config.options import UserError
from ..distributed.process import ProcessInfo
from ..distributed.runtime import Runtime
from ..evaluation import evaluate
from ..run.build import open_run_data, recipe
from ..run.opened import open_run
from .common import Parser, checkpoint_arguments, say


def main(words: Sequence[str]) -> int:
    parser = Parser("python -m trainer evaluate", description="Evaluate a checkpoint; every sample counts once.")
    checkpoint_arguments(parser)
    parser.add_argument("--data-root", metavar="DIR", help="where the data is, if not where the run found it")
    parser.add_argument(
        "--features", metavar="TEXT", help="what images are compared by, if not by the run's own metrics.features"
    )
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
    data = open_run_data(trained.config, options.data_root, None if options.split == "auto" else options.split)
    config = trained.config
    if options.features is not None:
        if not trained.workload.generates:
            raise UserError(f"--features: {config.workload.name} generates nothing to compare: remove it")
        config = config.model_copy(update={"metrics": config.metrics.model_copy(update={"features": options.features})})
    parts = recipe(config, 1, data=data, workload=trained.workload)
    try:
        evaluator = parts.evaluator  # before the process group: its features may be missing
    except UserError as error:
        hint = "; or name others with --features" if str(error).startswith("metrics.features") else ""
        raise UserError(f"{error}{hint}") from None
    process = ProcessInfo.from_environment()
    with Runtime(
        process, device=options.device, precision=config.precision, deterministic=config.deterministic,
        threads=config.threads,
    ) as runtime:  # fmt: skip
        parts.prepare_workload(runtime)
        loader = parts.open_loader(runtime)
        parts.prepare_reference(loader, runtime)
        evaluation = evaluate(parts.workload, evaluator, loader, runtime, config.seed)
        if evaluation is None:
            return 1
        if runtime.main:
            _, metrics = evaluation
            say(json.dumps({**metrics, "split": data.split, "samples": loader.evaluation_samples,
                            "step": trained.step, "checkpoint": trained.name}))  # fmt: skip
    return 0
