"""The files that `launch` keeps in the folder `launch` of a run's directory: the job, its script, logs and ids."""

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
    """Write the job and its script; returns the script's path. Raises Refused."""
    folder = Path(job.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JOB).write_text(json.dumps(asdict(job), indent=1) + "\n")
        (folder / SCRIPT).write_text(script)
        (folder / SCRIPT).chmod(0o755)
    except OSError as error:
        raise Refused(f"--run.url: {job.folder}: cannot be written: {error.strerror}") from None
    return str(folder / SCRIPT)


def add_id(folder: str, job_id: str) -> None:
    with Path(folder, IDS).open("a") as file:
        file.write(f"{job_id}\n")


def ids(folder: str) -> list[str]:
    """The ids of the jobs that were submitted for a run, oldest first."""
    path = Path(folder, IDS)
    return path.read_text().split() if path.exists() else []


def find(run: str) -> tuple[str, dict[str, Any]]:
    """The folder and the job of a run, by its name or its directory. Raises Refused."""
    for folder in (Path("runs", run, "launch"), Path(run, "launch"), Path(run)):
        if (folder / JOB).is_file():
            try:
                return str(folder), json.loads((folder / JOB).read_text())
            except ValueError:
                raise Refused(f"{folder / JOB}: corrupt: submit the run again with `launch slurm`") from None
    known = sorted(str(path.parts[-3]) for path in Path("runs").glob(f"*/launch/{JOB}"))
    raise Refused(f"{run}: no run of that name was submitted from here; known: {', '.join(known) or 'none'}")


def check_unused(job: Job) -> None:
    """Raises Refused if the directory contains the run of another config.

    Compares the settings in the config file and the flags with the config that the run was started with; the trainer
    compares all settings when it resumes.
    """
    stored_path = Path(job.folder).parent / "config.yaml"
    if "--run.force_resume" in job.arguments:
        return
    if not stored_path.exists():  # submitted, but not started yet
        earlier = Path(job.folder, JOB)
        if earlier.exists() and ids(job.folder):
            submitted = json.loads(earlier.read_text())["arguments"]
            if _settings(submitted) != _settings(job.arguments):
                raise Refused(f"--name: {job.name!r} is in use: it was submitted with {' '.join(submitted)!r}: "
                              f"choose another --name")  # fmt: skip
        return
    from trainer.config.options import is_safe

    stored = _flatten(read_yaml(str(stored_path)))
    for name, value in _settings(job.arguments).items():
        if name in stored and not is_safe(name) and not _may_be_equal(stored[name], value):
            raise Refused(
                f"--name: {job.name!r} is in use by another config: {name} is {stored[name]!r} there, "
                f"now it is {value!r}: choose another --name"
            )


def config_file(arguments: tuple[str, ...] | list[str]) -> str | None:
    """The config among the trainer's arguments: it is the first of them, where there is one."""
    first = arguments[0] if arguments else ""
    return first if first and not first.startswith("-") else None


def flag_value(arguments: tuple[str, ...] | list[str], name: str) -> str | None:
    """The value of one of the trainer's flags, where it is set; of several, the last."""
    value = None
    for index, argument in enumerate(arguments):
        if argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        elif argument == f"--{name}" and index + 1 < len(arguments):
            value = arguments[index + 1]
    return value


def _settings(arguments: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """The values that the config file and the flags set, by dotted name."""
    file = config_file(arguments)
    settings = _flatten(read_yaml(file)) if file else {}
    for index, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        settings[name.replace("-", "_")] = value if equals else "true" if following.startswith("--") else following
    return settings


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _may_be_equal(stored: Any, value: Any) -> bool:
    """Whether a value, perhaps the text of a flag, may be the stored one: 3e-4 is 0.0003, yes is true, any list is."""
    if isinstance(stored, list) or isinstance(value, list):
        return True
    return _normalized(stored) == _normalized(value)


def _normalized(value: Any) -> Any:
    text = re.sub(r"(?<=\d)_(?=\d)", "", str(value)).strip().lower()
    try:
        return float(text)
    except ValueError:
        return {"yes": "true", "on": "true", "no": "false", "off": "false", "null": "none"}.get(text, text)
