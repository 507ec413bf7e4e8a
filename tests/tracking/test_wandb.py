"""W&B gets every record of the metric log once, whatever ends a run; and nothing that happens to W&B harms a run."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.storage.metric_log import read_records
from trainer.storage.objects import Storage
from trainer.tracking.wandb_client import WORKER, redacted, run_id

from ..ranks import Ranks, free_port, run, start, wait_for
from ..wandb_tools import KEY, Server, Stored, as_row, pictures, read_runs, values

SHORT = ["--duration", "60 steps", "--checkpoint.every", "20 steps", "--log.every", "10 steps", "--evaluate.every",
         "30 steps", "--workload.network", "softmax", "--optimizer.lr", "0.002", "--batch_size", "32",
         "--run.url", "run"]  # fmt: skip
ENDLESS = [*SHORT, "--duration", "1000000 steps", "--checkpoint.every", "250 steps", "--evaluate.every", "500 steps",
           "--log.every", "20 steps"]  # fmt: skip
INIT_SECONDS, FINISH_SECONDS = 4, 5


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, str]:
    """An environment without a key."""
    return {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "no-netrc"), "WANDB_API_KEY": "",
            "WANDB_CONFIG_DIR": str(tmp_path / "home"), "WANDB_CACHE_DIR": str(tmp_path / "home"),
            "TRAINER_WANDB__MODE": "offline", "WANDB_INIT_TIMEOUT": str(INIT_SECONDS),
            "WANDB_FINISH_TIMEOUT": str(FINISH_SECONDS)}  # fmt: skip


@pytest.fixture
def generous(alone: dict[str, str]) -> dict[str, str]:
    """The same with bounds that a busy machine does not reach."""
    return alone | {"WANDB_INIT_TIMEOUT": "60", "WANDB_FINISH_TIMEOUT": "60"}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def logged(folder: Path) -> list[dict[str, Any]]:
    """The metric log of a run, as W&B should have it."""
    segments = sorted((folder / "run" / "metrics").glob("*.jsonl"))
    return [as_row(record) for path in segments for record in read_records(path.read_bytes())]


def delivered(segments: list[Stored]) -> list[dict[str, Any]]:
    return [values(row) for stored in segments for row in stored.rows]


def helpers(ranks: Ranks, word: str) -> list[psutil.Process]:
    """Processes below the first rank whose command line has this word."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(ranks.processes[0].pid).children(recursive=True)
        return [process for process in children if word in " ".join(process.cmdline())]
    return []


def check_unharmed(output: str, seconds: float, since: float, status: str = "done") -> None:
    """The run has ended well; it warns in one line, shows nothing of W&B's own, and was not held up."""
    lines = output.splitlines()
    assert json.loads(lines[-1])["status"] == status
    warnings = [line for line in lines if "warning" in line]
    assert len(warnings) == 1, output
    assert warnings[0].startswith("warning: W&B ")
    assert "Traceback" not in output
    assert "wandb:" not in output
    assert time.monotonic() - since < seconds


def test_an_offline_run_has_every_record_once_and_config_pictures_and_checkpoint(
    tmp_path: Path, generous: dict[str, str]
) -> None:
    output = run([*SHORT, "--data.root", "s3://me:secret@host/digits?token=abc"], tmp_path, environment=generous)
    (stored,) = read_runs(tmp_path / "run")
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30, 30, 40, 50, 60, 60]
    assert delivered([stored]) == rows
    assert [row["_step"] for row in stored.rows] == list(range(8))
    assert stored.id == json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    assert stored.config["optimizer"]["lr"] == 0.002
    assert stored.config["data"]["root"] == "s3://host/digits?..."
    shown = {name.split(".")[0] for name in pictures(stored.rows)}
    assert shown == {"pictures/learning_curves", "pictures/confusion", "pictures/mistakes"}
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/pictures/*.png"))) == 3
    checkpoint = f"file://{tmp_path}/run/checkpoints/step-00000060"
    assert f"{checkpoint}/MANIFEST.json" in stored.references
    assert stored.summary["accuracy"] == json.loads(output.splitlines()[-1])["accuracy"]
    assert stored.exit_code == 0
    assert "wandb:" not in output
    assert "warning" not in output


def test_a_picture_that_moves_is_a_video(tmp_path: Path, generous: dict[str, str]) -> None:
    words = ["--workload.name", "stylegan", "--workload.width", "4", "--workload.max_width", "4", "--data.size", "8"]
    run([*words, "--duration", "1 steps", "--run.url", "run", "--evaluate.samples", "20"], tmp_path,
        environment=generous)  # fmt: skip
    (stored,) = read_runs(tmp_path / "run")
    assert "pictures/latent_walk" in {name.split(".")[0] for name in pictures(stored.rows)}
    assert (tmp_path / "run/samples/latent_walk.gif").read_bytes().startswith(b"GIF89a")
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/videos/pictures/*.gif"))) == 1


def test_a_run_that_is_stopped_resumes_as_the_same_run_without_a_gap_or_a_double(
    tmp_path: Path, generous: dict[str, str]
) -> None:
    ranks = start(ENDLESS, tmp_path, environment=generous)
    assert wait_for(lambda: bool(read_runs(tmp_path / "run")), ranks)
    for process in helpers(ranks, WORKER):  # a scheduler may send it to every process of a job
        process.send_signal(signal.SIGTERM)
    ranks.kill(0, signal.SIGTERM)
    assert ranks.wait() == [0]
    before, stopped = len(logged(tmp_path)), json.loads(ranks.text().splitlines()[-1])["step"]
    run([*ENDLESS, "--duration", f"{stopped + 500} steps"], tmp_path, environment=generous)
    first, second = read_runs(tmp_path / "run")
    rows = logged(tmp_path)
    assert first.id == second.id
    assert 0 < len(first.rows) <= before < len(rows)
    assert delivered([first, second]) == rows
    assert [row["_step"] for row in first.rows + second.rows] == list(range(len(rows)))


def test_two_ranks_are_one_run(tmp_path: Path, generous: dict[str, str]) -> None:
    run(SHORT, tmp_path, world=2, environment=generous)
    (stored,) = read_runs(tmp_path / "run")
    assert delivered([stored]) == logged(tmp_path)


def test_an_online_run_continues_after_a_restart(tmp_path: Path, generous: dict[str, str], server: Server) -> None:
    environment = generous | server.environment | {"TRAINER_WANDB__MODE": "auto"}
    output = run(SHORT, tmp_path, environment=environment)
    ((name, lines),) = server.rows.items()
    assert f"{server.environment['WANDB_BASE_URL']}/tester/trainer/runs/{name}" in output
    assert [values(row) for row in server.history(name)] == logged(tmp_path)
    assert server.configs[name]["batch_size"]["value"] == 32
    assert server.references == [f"file://{tmp_path}/run/checkpoints/step-00000060"], server.unknown
    assert server.complete == {name: 0}
    for line in (5, 6, 7):  # as if the machine had died before they were sent
        del lines[line]
    run([*SHORT, "--duration", "100 steps"], tmp_path, environment=environment)
    rows = server.history(name)
    assert list(server.rows) == [name]
    assert server.starts == [name, name]
    assert [values(row) for row in rows] == logged(tmp_path)
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    assert rows[-1]["step"] == 100
    assert server.unknown == []


def test_what_was_committed_arrives_though_training_is_killed(
    tmp_path: Path, generous: dict[str, str], server: Server
) -> None:
    environment = generous | server.environment | {"TRAINER_WANDB__MODE": "online"}
    ranks = start(ENDLESS, tmp_path, environment=environment)
    assert wait_for(lambda: "W&B: http" in ranks.text(), ranks)
    processes = helpers(ranks, "wandb")
    ranks.kill(0, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)
    ((name, lines),) = server.rows.items()
    assert len(lines) >= 5  # the first checkpoint's
    assert server.complete == {name: 1}
    assert [values(row) for row in server.history(name)] == logged(tmp_path)[: len(lines)]


def test_a_server_that_is_down_means_an_offline_run(tmp_path: Path, alone: dict[str, str]) -> None:
    environment = alone | {
        "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": KEY, "TRAINER_WANDB__MODE": "online",
    }  # fmt: skip
    since = time.monotonic()
    output = run(SHORT, tmp_path, environment=environment)
    check_unharmed(output, INIT_SECONDS + FINISH_SECONDS + 15, since)
    assert "logging offline" in output
    assert delivered(read_runs(tmp_path / "run")[-1:]) == logged(tmp_path)


def test_a_server_that_hangs_delays_the_end_by_no_more_than_the_bounds(
    tmp_path: Path, alone: dict[str, str], server: Server
) -> None:
    server.mode = "hang"
    environment = alone | server.environment | {"TRAINER_WANDB__MODE": "online"}
    since = time.monotonic()
    check_unharmed(run(SHORT, tmp_path, environment=environment), INIT_SECONDS + FINISH_SECONDS + 15, since)


def test_an_outage_during_a_run_delays_its_end_by_no_more_than_the_bound(
    tmp_path: Path, alone: dict[str, str], server: Server
) -> None:
    environment = alone | server.environment | {"TRAINER_WANDB__MODE": "online", "WANDB_INIT_TIMEOUT": "60"}
    ranks = start(ENDLESS, tmp_path, environment=environment)
    assert wait_for(lambda: "W&B: http" in ranks.text(), ranks)
    server.mode = "refuse"
    before = len(logged(tmp_path))
    assert wait_for(lambda: len(logged(tmp_path)) > before + 20, ranks)
    since = time.monotonic()
    ranks.kill(0, signal.SIGTERM)
    assert ranks.wait() == [0]
    check_unharmed(ranks.text(), FINISH_SECONDS + 10, since, status="preempted")


@pytest.mark.parametrize("victim", ["wandb-core", WORKER])
def test_a_killed_worker_is_a_warning(tmp_path: Path, generous: dict[str, str], victim: str) -> None:
    ranks = start(ENDLESS, tmp_path, environment=generous)
    assert wait_for(lambda: bool(helpers(ranks, victim)), ranks)
    for process in helpers(ranks, victim):
        process.kill()
    assert wait_for(lambda: "warning" in ranks.text(), ranks)
    before = len(logged(tmp_path))
    assert wait_for(lambda: len(logged(tmp_path)) > before, ranks)
    since = time.monotonic()
    ranks.kill(0, signal.SIGTERM)
    assert ranks.wait() == [0]
    check_unharmed(ranks.text(), FINISH_SECONDS + 10, since, status="preempted")


def test_online_without_a_key_is_offline_with_a_warning(tmp_path: Path, alone: dict[str, str]) -> None:
    since = time.monotonic()
    output = run(SHORT, tmp_path, environment=alone | {"TRAINER_WANDB__MODE": "online"})
    check_unharmed(output, INIT_SECONDS + FINISH_SECONDS + 15, since)
    assert "warning: W&B has no key" in output
    assert delivered(read_runs(tmp_path / "run")) == logged(tmp_path)


def test_a_folder_that_wandb_cannot_write_is_a_warning(tmp_path: Path, alone: dict[str, str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("not a folder")
    since = time.monotonic()
    check_unharmed(run(SHORT, tmp_path, environment=alone), INIT_SECONDS + FINISH_SECONDS + 15, since)


def test_a_run_keeps_its_id_and_one_that_cannot_be_kept_is_no_error(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first = run_id(storage)
    assert run_id(storage) == first
    (tmp_path / "wandb.json").write_text("{torn")
    second = run_id(storage)
    assert second != first
    assert run_id(storage) == second
    (tmp_path / "wandb.json").unlink()
    (tmp_path / "wandb.json").mkdir()
    assert len(run_id(storage)) == 10


def test_secrets_are_redacted() -> None:
    config = {
        "api_key": "k", "nested": [{"password": "p", "token": None}], "url": "s3://me:p@host/a?X-Amz-Signature=s",
        "lr": 0.1,
    }  # fmt: skip
    assert redacted(config) == {
        "api_key": "***", "nested": [{"password": "***", "token": None}], "url": "s3://host/a?...",
        "lr": 0.1,
    }  # fmt: skip


def test_the_worker_starts_without_torch_and_wandb() -> None:
    """It would compete with the ranks for memory and cores; wandb is imported once the signals are blocked."""
    code = f"import sys, {WORKER}; print({{'torch', 'numpy', 'wandb'}} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"
