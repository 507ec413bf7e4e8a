"""The commands behind `python -m trainer`; each takes its words and returns the exit code."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console as RichConsole
from rich.table import Table
from torch import Tensor

from . import parts, pictures
from . import run as runs
from .checkpoint import DAMAGED, MANIFEST, CheckpointStore, Damaged, folder
from .config import DataOptions as Data
from .config import RunConfig, UserError, dump
from .data.stored import SUFFIXES, BadSample, decode
from .data.transforms import Augment, Crop
from .directory import SilentSaver
from .engine import Engine
from .exported import FORMATS
from .place import Place
from .quality import open_judge
from .randomness import Draws
from .runtime import Runtime
from .settings import build, config_class, read_file, takes_no_value
from .state import TrainState
from .storage import Storage
from .tracker import Silent
from .trained import Trained, history, locate, open_run

DEFAULT_FILE = Path(__file__).with_name("digits_cnn.yaml")  # what is trained where no config is given


class _Parser(argparse.ArgumentParser):
    """Mistakes as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('python -m trainer ')}: {message}; see --help")


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - what the user asked for


def _split_file(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The config file among the words, and the flags."""
    flags = list(words)
    for index, word in enumerate(flags):
        before = flags[index - 1] if index else ""
        value_of_flag = before.startswith("--") and "=" not in before and not takes_no_value(before)
        if not word.startswith("-") and (index == 0 or (word.endswith((".yaml", ".yml")) and not value_of_flag)):
            return flags.pop(index), flags
    return None, flags


def _peek(words: Sequence[str], flag: str) -> str | None:
    """The value of a flag, before the model that knows its type exists."""
    for index, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and index + 1 < len(words):
            return words[index + 1]
    return None


def read_config(words: Sequence[str], program: str, description: str) -> tuple[RunConfig, str]:
    """The config that the words, the environment and the file give, and the run's name."""
    file, flags = _split_file(words)
    values = read_file(file or str(DEFAULT_FILE))
    section = values.get("workload", {})
    if not isinstance(section, dict):
        raise UserError(f"workload: {section!r} should be a mapping with a name: 'workload: {{name: classifier}}'")
    name = _peek(flags, "--workload.name") or os.environ.get("TRAINER_WORKLOAD__NAME")
    name = name if name and not name.startswith("--") else str(section.get("name", "classifier"))
    model = parts.model_for(name)
    if file is None and name != section["name"]:  # the default config is that of another workload
        values, section = {}, {}
    values = {**values, "workload": {"name": name, **section}}
    config = build(model, values, flags, program, description)
    stem = Path(file or DEFAULT_FILE).stem
    if file and stem == "config":  # a run directory's own config
        stem = Path(file).absolute().parent.name
    return config, re.sub(r"[^A-Za-z0-9._-]", "_", stem)


def train(words: Sequence[str]) -> int:
    config, name = read_config(words, "python -m trainer [train] [CONFIG.yaml]", "Train a run, or go on with it.")
    return runs.train(config, name)


def config(words: Sequence[str]) -> int:
    """Print the resolved config as YAML, or with --schema the JSON schema of all workloads."""
    if "--schema" in words:
        options = [parts.workload_module(name).Options for name in parts.workload_names()]
        say(json.dumps(config_class(*options).model_json_schema(), indent=1))
        return 0
    text = "Print the resolved config as YAML. With --schema: the JSON schema, for an editor."
    resolved, _ = read_config(words, "python -m trainer config [--schema] [CONFIG.yaml]", text)
    say(dump(resolved).rstrip())
    return 0


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN", help="URL of a run, or of a checkpoint in it")
    parser.add_argument("--step", metavar="N", type=int, help="the checkpoint of this step (default: the newest)")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the best evaluation")


def evaluate(words: Sequence[str]) -> int:
    parser = _Parser("python -m trainer evaluate", description="Evaluate a checkpoint; every sample counts once.")
    _checkpoint_arguments(parser)
    parser.add_argument("--data-root", metavar="DIR", help="where the data is, if not where the run found it")
    parser.add_argument(
        "--split", metavar="NAME", default="auto", choices=["auto", "val", "test", "train"],
        help="val | test | train (default: the split that the run evaluated)",
    )  # fmt: skip
    parser.add_argument(
        "--device", metavar="NAME", default="auto", choices=["auto", "cpu"],
        help="auto | cpu; auto is the accelerator where there is one (default: auto)",
    )  # fmt: skip
    given = parser.parse_args(words)
    trained = open_run(given.checkpoint, step=given.step, best=given.best)
    config, workload = trained.config, trained.workload
    data = parts.open_run_data(config, given.data_root, None if given.split == "auto" else given.split)
    workload.data = data.description  # the networks stay as they are, but this split may have another size
    judge = open_judge(config, data.description) if workload.generates else None
    workload.quality = judge
    place = Place.from_environment()
    with Runtime(place, device=given.device, precision=config.precision, threads=config.threads) as runtime:
        runtime.prepare(workload, config.channels_last, False)
        plan = parts.build_plan(config, len(data.train), workload, 1)
        loader = parts.build_loader(config, data, workload, plan, runtime)
        engine = Engine(
            runtime, TrainState(workload), loader, Silent(), SilentSaver(),
            parts.build_limits(config, plan.batch_size, plan.size), lambda step: 1.0, config.seed,
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


def _image_paths(names: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"{name}: no images in this folder ({', '.join(SUFFIXES)})")
            paths += found
        elif path.exists():
            paths.append(path)
        else:
            raise UserError(f"{name}: no such file or folder")
    return paths


@torch.no_grad()
def _probabilities(trained: Trained, paths: Sequence[Path], batch_size: int) -> Tensor:
    """(N, classes) float32 for image files, prepared as the held-out data is."""
    data = trained.data
    plain = Data(name=trained.config.data.name)
    crop = Crop(plain, data.size, 0, train=False, photographs=data.photographs)
    normalise = Augment(plain, data, 0, False, torch.device("cpu"), torch.float32, False).normalise
    network = trained.workload.eval().inference().eval()
    found = []
    for start in range(0, len(paths), batch_size):
        images = []
        for path in paths[start : start + batch_size]:
            try:
                images.append(crop(decode(path.read_bytes(), str(path), data.channels), 0, 0))
            except (BadSample, OSError) as error:
                raise UserError(f"{error}: repair or remove it") from None
        found.append(network(normalise(torch.stack(images))).float().softmax(1))
    return torch.cat(found)


def predict(words: Sequence[str]) -> int:
    parser = _Parser("python -m trainer predict", description="Label images: a table of classes and probabilities.")
    _checkpoint_arguments(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders of them")
    parser.add_argument("--top", metavar="N", type=int, default=3, help="how many classes to show (default: 3)")
    parser.add_argument("--json", action="store_true", help="a JSON object per image instead of a table")
    parser.add_argument("--batch-size", metavar="N", type=int, default=64, help="images at a time (default: 64)")
    given = parser.parse_args(words)
    if given.top < 1 or given.batch_size < 1:
        raise UserError("predict: --top and --batch-size must be 1 or more")
    paths = _image_paths(given.images)
    trained = open_run(given.checkpoint, step=given.step, best=given.best)
    if trained.workload.generates:
        raise UserError(f"{given.checkpoint}: {trained.config.workload.name} labels nothing: give a classifier's run")
    names = trained.data.classes
    best = _probabilities(trained, paths, given.batch_size).topk(min(given.top, len(names)))
    table = Table(box=None, pad_edge=False)
    table.add_column("image", overflow="fold")
    for place in range(best.values.shape[1]):
        table.add_column("label" if place == 0 else f"{place + 1}.", no_wrap=True)
    for path, values, classes in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
        labels = [(names[c], round(v, 6)) for c, v in zip(classes, values, strict=True)]
        if given.json:
            say(json.dumps({"image": str(path), "label": labels[0][0], "probabilities": dict(labels)}))
        else:
            table.add_row(str(path), *(f"{label} {value:.1%}" for label, value in labels))
    if not given.json:
        RichConsole().print(table)
    return 0


def _class_of(name: str | None, trained: Trained) -> int | None:
    """The label of a class given by name or number."""
    if name is None:
        return None
    classes = trained.data.classes
    if not getattr(trained.workload, "conditional", False):
        raise UserError(
            f"--class: {trained.config.workload.name} does not generate by class: leave it out, or use biggan"
        )
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    near = difflib.get_close_matches(name, classes, 3) or classes[:10]
    raise UserError(f"--class: {name!r} is not known; classes of {trained.data.name}: {', '.join(near)}")


def sample(words: Sequence[str]) -> int:
    parser = _Parser("python -m trainer sample", description="Generate images: a grid, or a file each.")
    _checkpoint_arguments(parser)
    parser.add_argument("--count", metavar="N", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the latents (default: 0)")
    parser.add_argument(
        "--truncation", metavar="X", type=float,
        help="draw latents from within so many standard deviations: less varied, more typical (default: from all)",
    )  # fmt: skip
    parser.add_argument(
        "--class", metavar="NAME", dest="label", help="name or number of the class (default: all in turn)"
    )
    parser.add_argument(
        "--out", metavar="PATH", default="samples.png",
        help="FILE.png for a grid, else a folder for a file each; may be a URL (default: samples.png)",
    )  # fmt: skip
    given = parser.parse_args(words)
    if given.count < 1 or (given.truncation is not None and not given.truncation > 0):
        raise UserError("sample: --count must be 1 or more and --truncation above 0")
    trained = open_run(given.checkpoint, step=given.step, best=given.best)
    workload = trained.workload.eval()
    if not workload.generates:
        raise UserError(f"{given.checkpoint}: {trained.config.workload.name} generates nothing: give the run of a GAN")
    label = _class_of(given.label, trained)
    found = []
    for start in range(0, given.count, 256):
        rows = slice(start, min(start + 256, given.count))
        found.append(
            workload.samples(Draws(given.seed, ("sample",), rows, torch.device("cpu")), label, given.truncation)
        )
    samples = torch.cat([images for images in found if isinstance(images, Tensor)])
    folder_name, _, name = given.out.rpartition("/")
    if name.lower().endswith(".png"):
        title = f"{trained.data.name}, {trained.config.workload.name}, step {trained.step}"
        Storage(folder_name or ".").write(name, pictures.render(pictures.from_samples(samples, title)))
        say(f"{given.count} samples of step {trained.step}: {given.out}")
        return 0
    if trained.data.mixture:
        raise UserError(f"--out: {given.out!r}: points are not images: give a FILE.png")
    target = Storage(given.out)
    for index, image in enumerate(samples):
        target.write(f"{index:05d}.png", pictures.plain(image))
    say(f"{given.count} samples of step {trained.step}: {given.out.rstrip('/')}/00000.png and on")
    return 0


def export(words: Sequence[str]) -> int:
    parser = _Parser("python -m trainer export", description="Write a checkpoint's network for use elsewhere.")
    _checkpoint_arguments(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--format", metavar="NAME", nargs="+", default=["safetensors"], choices=list(FORMATS),
        help="safetensors: weights and config.json | torch: a torch.export program | onnx (default: safetensors)",
    )  # fmt: skip
    given = parser.parse_args(words)
    trained = open_run(given.checkpoint, step=given.step, best=given.best)
    target = Path(given.to)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to: {given.to!r} cannot be made: {error.strerror}") from None
    network = trained.workload.eval().inference().eval().float()
    example = trained.workload.example()
    for kind in given.format:
        say(f"{kind:<12} {FORMATS[kind](network, trained, example, target)}")
    return 0


def checkpoints(words: Sequence[str]) -> int:
    parser = _Parser("python -m trainer checkpoints", description="List, verify or prune the checkpoints of a run.")
    parser.add_argument(
        "action", metavar="ACTION", choices=["list", "verify", "prune"],
        help="list: what there is | verify: read every byte; exit code 1 if any is damaged | prune: delete old ones",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="URL of a run, or for list and verify of a checkpoint in it")
    parser.add_argument(
        "--keep", metavar="N", type=int, default=3, help="prune: keep the newest N, and the best (default: 3)"
    )
    given = parser.parse_args(words)
    storage, step = locate(given.run)
    store = CheckpointStore(storage.at("checkpoints"))
    if given.action == "prune":
        if given.keep < 1:
            raise UserError(f"--keep: {given.keep} would delete every checkpoint: keep 1 or more")
        steps = store.steps()
        best = None
        if steps:
            try:
                state = store.load(steps[-1], []).state
            except Damaged as error:
                raise UserError(f"{folder(steps[-1])} is damaged, so nothing was deleted: {error}") from None
            best = history(storage).best(state["headline"], state["maximise"], steps)
        deleted = store.prune(given.keep, lambda saved: saved == best)
        say(f"deleted {len(deleted)}, kept {len(store.steps())}: {', '.join(map(folder, store.steps()))}")
        return 0
    bad = 0
    for here in [step] if step is not None else store.folders():
        names = store.storage.list(folder(here))
        if given.action == "list":
            committed = MANIFEST in names
            size = f"{store.size(here) / 2**20:.1f} MiB" if committed else ""
            status = "committed" if committed else "set aside" if DAMAGED in names else "unfinished"
            say(f"{folder(here)}  {status}  {size}".rstrip())
            continue
        problems = store.verify(here)
        bad += bool(problems)
        for problem in problems or ["sound"]:
            say(f"{folder(here)}  {problem}")
    return 1 if bad else 0


def doctor(words: Sequence[str]) -> int:
    from .doctor import examine

    words = list(words)
    ranks = _peek(words, "--ranks") or "2"
    if "--ranks" in words:
        index = words.index("--ranks")
        del words[index : index + 2]
    words = [word for word in words if not word.startswith("--ranks=")]
    if not ranks.isdecimal() or not 1 <= int(ranks) <= 64:
        raise UserError(f"--ranks: {ranks!r} is not a number of processes from 1 to 64")
    text = "Check the real config with a few steps on N gloo ranks (--ranks N, default 2) on the CPU."
    config, name = read_config(words, "python -m trainer doctor [--ranks N] [CONFIG.yaml]", text)
    return examine(config, name, int(ranks))
