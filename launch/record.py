"""What `launch` keeps of a run, in the folder `launch` of its directory: the job, its script, its logs, its ids."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import Refused
from .job import Job
from .site import read_yaml

SCRIPT, JOB, IDS = "job.sbatch", "job.json", "jobs"


def folder_of(name: str, run: str) -> str:
    """Within the run's directory; for a run at a remote URL within the local runs/NAME."""
    return f"{run if '://' not in run else f'runs/{name}'}/launch"


def write(job: Job, script: str) -> str:
    """Keep the job and its script; returns the script's path."""
    folder = Path(job.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JOB).write_text(json.dumps(asdict(job), indent=1) + "\n")
        (folder / SCRIPT).write_text(script)
        (folder / SCRIPT).chmod(0o755)
    except OSError as error:
        raise Refused(f"--run.url: {job.folder}: cannot be written: {error.strerror}") from None
    return str(folder / SCRIPT)


def add_id(folder: str, job: str) -> None:
    with Path(folder, IDS).open("a") as file:
        file.write(f"{job}\n")


def ids(folder: str) -> list[str]:
    """Of the jobs that were submitted for a run, oldest first."""
    path = Path(folder, IDS)
    return path.read_text().split() if path.exists() else []


def find(run: str) -> tuple[str, dict[str, Any]]:
    """The folder and the job of a run, by its name or its directory. Raises Refused."""
    for folder in (Path("runs", run, "launch"), Path(run, "launch"), Path(run)):
        if (folder / JOB).is_file():
            try:
                return str(folder), json.loads((folder / JOB).read_text())
            except ValueError:
                raise Refused(f"{folder / JOB}: damaged: submit the run again with `launch slurm`") from None
    there = sorted(str(path.parts[-3]) for path in Path("runs").glob(f"*/launch/{JOB}"))
    raise Refused(f"{run}: no run of that name was submitted from here; known: {', '.join(there) or 'none'}")


def check_unused(job: Job) -> None:
    """Raises Refused where the directory holds the run of another config.

    Compares the settings that the file and the flags name with the config that the run was started with; the trainer
    compares all of them when it resumes.
    """
    stored_path = Path(job.folder).parent / "config.yaml"
    if "--run.force_resume" in job.arguments:
        return
    if not stored_path.exists():  # submitted, and not yet begun
        earlier = Path(job.folder, JOB)
        if earlier.exists() and ids(job.folder):
            was = json.loads(earlier.read_text())["arguments"]
            if _settings(was) != _settings(job.arguments):
                raise Refused(f"--name: {job.name!r} is in use: it was submitted with {' '.join(was)!r}: "
                              f"choose another --name")  # fmt: skip
        return
    from trainer.config.options import is_safe

    stored = _flat(read_yaml(str(stored_path)))
    for name, value in _settings(job.arguments).items():
        if name in stored and not is_safe(name) and not _same(stored[name], value):
            raise Refused(
                f"--name: {job.name!r} is in use by another config: {name} is {stored[name]!r} there, "
                f"now it is {value!r}: choose another --name"
            )


def config_file(arguments: tuple[str, ...] | list[str]) -> str | None:
    """The config among the trainer's arguments: where there is one, it comes first."""
    first = arguments[0] if arguments else ""
    return first if first and not first.startswith("-") else None


def flag(arguments: tuple[str, ...] | list[str], name: str) -> str | None:
    """The value of a flag of the trainer's."""
    found = None
    for index, word in enumerate(arguments):
        if word.startswith(f"--{name}="):
            found = word.partition("=")[2]
        elif word == f"--{name}" and index + 1 < len(arguments):
            found = arguments[index + 1]
    return found


def _settings(arguments: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """What the file and the flags say, by dotted name."""
    file = config_file(arguments)
    found = _flat(read_yaml(file)) if file else {}
    for index, word in enumerate(arguments):
        if not word.startswith("--"):
            continue
        name, given, value = word[2:].partition("=")
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        found[name.replace("-", "_")] = value if given else "true" if following.startswith("--") else following
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _same(stored: Any, given: Any) -> bool:
    """Whether a text may be what was stored: 3e-4 is 0.0003, yes is true; of lists nothing is said."""
    if isinstance(stored, list) or isinstance(given, list):
        return True
    return _plain(stored) == _plain(given)


def _plain(value: Any) -> Any:
    text = re.sub(r"(?<=\d)_(?=\d)", "", str(value)).strip().lower()
    try:
        return float(text)
    except ValueError:
        return {"yes": "true", "on": "true", "no": "false", "off": "false", "null": "none"}.get(text, text)
