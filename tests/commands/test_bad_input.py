"""What a user may get wrong: one clear line from the first rank, exit code 2 on every rank, nothing saved is lost."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..ranks import run, start, wait_for

SHORT = ["--workload.network", "softmax", "--duration", "4 steps", "--run.url", "run"]
SECONDS = 40  # no mistake may take longer to be reported, on a busy machine
WORLDS = pytest.mark.parametrize("world", [1, 2])


def complaint(output: str) -> str:
    """The one line that rank 0 says."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    assert output.splitlines()[-1] == lines[0], output
    return lines[0].removeprefix("error: ")


def refused(words: list[str], folder: Path, world: int, environment: dict[str, str] | None = None) -> str:
    """Start the ranks, all of which must end with exit code 2; what rank 0 complains of. Other ranks say nothing."""
    ranks = start(words, folder, world, environment)
    codes = ranks.wait(SECONDS)
    assert codes == [2] * world, "\n".join(ranks.text(rank) for rank in range(world))
    for rank in range(1, world):
        assert "error:" not in ranks.text(rank), ranks.text(rank)
        assert "Traceback" not in ranks.text(rank), ranks.text(rank)
    return complaint(ranks.text())


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def image(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), shade, np.uint8)).save(path)


def image_folder(root: Path) -> Path:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            for number in range(4):
                image(root / split / label / f"{number}.png", 40 * number)
    return root


FOLDER = [
    "--data.name",
    "folder",
    "--data.root",
    "images",
    "--data.size",
    "16",
    "--batch_size",
    "4",
    "--data.workers",
    "0",
]


# The config


@WORLDS
@pytest.mark.parametrize(
    ("words", "file", "mistake"),
    [
        (["absent.yaml"], "", "no config file 'absent.yaml': check the path"),
        (["bad.yaml"], "optimizr: {lr: 1}", "optimizr: unknown setting; did you mean 'optimizer'?"),
        (["bad.yaml"], "batch_size: many", "batch_size: 'many' should be a valid integer"),
        (["bad.yaml"], "seed: 1\nseed: 2", "bad.yaml: duplicate key 'seed' in line 2: keep one of them"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path: Path, world: int, words: list[str], file: str, mistake: str) -> None:
    (tmp_path / "bad.yaml").write_text(file)
    assert refused(words, tmp_path, world) == mistake
    assert not (tmp_path / "runs").exists()


@WORLDS
def test_a_network_that_nobody_knows(tmp_path: Path, world: int) -> None:
    said = refused(["--workload.network", "cnnn"], tmp_path, world)
    assert said.startswith("workload.network: 'cnnn' is not valid: known networks: softmax, fnn, cnn, ")


@WORLDS
def test_a_network_that_the_images_do_not_fit(tmp_path: Path, world: int) -> None:
    said = refused(["--workload.network", "lenet5"], tmp_path, world)
    assert said == "workload.network: lenet5 needs images of 12 pixels or more, not 8: use cnn"


def test_a_batch_that_is_smaller_than_the_world(tmp_path: Path) -> None:
    said = refused(["--batch_size", "1"], tmp_path, 2)
    assert said == (
        "batch_size: 1 in 1 micro-batches leaves some of the 2 ranks without a sample: raise batch_size to 2 or more, "
        "or lower accumulation or the number of ranks"
    )
    said = refused(["--batch_size", "6", "--accumulation", "2", "--workload.mixup", "1"], tmp_path, 2)
    assert said.startswith("batch_size: 6 in 2 micro-batches in groups of 2 leaves some of the 2 ranks without")


# The data


@WORLDS
def test_data_that_is_not_there(tmp_path: Path, world: int) -> None:
    (tmp_path / "images").mkdir()
    said = refused([*FOLDER, *SHORT], tmp_path, world)
    assert said == (
        "data.root: no folder 'train' in 'images': an image folder is train/CLASS/*.jpg and val/ or test/, or "
        "trainA/*.jpg, trainB/, testA/ and testB/"
    )
    said = refused(["--data.name", "mnist", "--data.download", "false", "--data.root", "images"], tmp_path, world)
    assert said.startswith("data.root: mnist is not in 'images' and data.download is off: put MNIST/raw/")


@WORLDS
def test_an_empty_data_set(tmp_path: Path, world: int) -> None:
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
    said = refused([*FOLDER, *SHORT], tmp_path, world)
    assert re.fullmatch(r"data.root: \S*images/train has no class folders: an image folder is train/CLASS/\*.jpg", said)


@WORLDS
def test_a_class_folder_without_images(tmp_path: Path, world: int) -> None:
    image_folder(tmp_path / "images")
    (tmp_path / "images" / "train" / "eel").mkdir()
    said = refused([*FOLDER, *SHORT], tmp_path, world)
    assert re.match(r"data.root: the class folder \S*images/train/eel has no images \(.jpg, .jpeg, .jfif", said)


@WORLDS
def test_an_unreadable_image_is_named(tmp_path: Path, world: int) -> None:
    image_folder(tmp_path / "images")
    (tmp_path / "images" / "train" / "cat" / "2.png").write_bytes(b"no picture")
    said = refused([*FOLDER, *SHORT, "--duration", "2 epochs"], tmp_path, world)
    assert "train/cat/2.png" in said
    assert "cannot identify image file" in said


# Where the run lives


@WORLDS
def test_a_place_that_cannot_be_written_to(tmp_path: Path, world: int) -> None:
    (tmp_path / "file").write_text("in the way")
    said = refused([*SHORT, "--run.url", "file/run"], tmp_path, world)
    assert re.fullmatch(r"cannot write \S*/file/run/\.probe-\w+: NotADirectoryError: .*", said)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture
def bucket(s3_server: dict[str, str]) -> Iterator[str]:
    import s3fs

    fs = s3fs.S3FileSystem(
        key=s3_server["AWS_ACCESS_KEY_ID"], secret=s3_server["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=s3_server["AWS_ENDPOINT_URL"], skip_instance_cache=True,
    )  # fmt: skip
    if not fs.exists("bad-input"):
        fs.mkdir("bad-input")
    return "s3://bad-input/run"


@pytest.mark.parametrize(("world", "name"), [(1, "AWS_SECRET_ACCESS_KEY"), (2, "AWS_ACCESS_KEY_ID")])
def test_wrong_credentials(tmp_path: Path, world: int, name: str, s3_server: dict[str, str], bucket: str) -> None:
    said = refused([*SHORT, "--run.url", bucket], tmp_path, world, {**s3_server, name: "wrong"})
    assert re.match(r"cannot write s3://bad-input/run/\.probe-\w+: PermissionError: ", said), said


class _Refusing(http.server.BaseHTTPRequestHandler):
    """An S3 server without a single bucket; the real one of the tests makes a missing bucket on its own."""

    protocol_version = "HTTP/1.1"  # which lets the client wait for 100 before it sends

    def do_PUT(self) -> None:
        body = b"<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message></Error>"
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@WORLDS
def test_a_bucket_that_does_not_exist(tmp_path: Path, world: int) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        said = refused([*SHORT, "--run.url", "s3://no-such-bucket/run"], tmp_path, world, environment)
        server.shutdown()
    assert re.fullmatch(r"cannot write s3://no-such-bucket/run/\.probe-\w+: FileNotFoundError: .*not exist", said)


def test_no_credentials_at_all(tmp_path: Path, s3_server: dict[str, str], bucket: str) -> None:
    empty = {**s3_server, "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_CONFIG_FILE": "/dev/null"}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        empty[name] = ""
    said = refused([*SHORT, "--run.url", bucket], tmp_path, 1, empty)
    assert said.startswith("cannot write s3://bad-input/run/.probe-")
    assert "redential" in said or "Access" in said, said


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {
            "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        ranks = start(SHORT, tmp_path, 1, environment)  # the other rank never gets as far as to be told
        assert ranks.wait(SECONDS) == [2]
    assert complaint(ranks.text()) == f"MASTER_PORT: port {port} is in use: choose a free one"


# A run that is there already


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`: four steps, done."""
    folder = tmp_path_factory.mktemp("trained")
    run([*SHORT, "--seed", "1"], folder)
    return folder


@WORLDS
def test_a_run_of_another_config_is_left_alone(trained: Path, world: int) -> None:
    before = contents(trained / "run")
    said = refused([*SHORT, "--seed", "1", "--optimizer.lr", "0.5"], trained, world)
    assert re.fullmatch(
        r"run.url: the run there was started with optimizer.lr: \S+, now it is 0.5: "
        r"use another run.url, or resume all the same with --run.force_resume",
        said,
    )
    assert contents(trained / "run") == before


@WORLDS
def test_a_run_of_another_network_is_left_alone_even_when_forced(trained: Path, world: int) -> None:
    before = contents(trained / "run" / "checkpoints")
    words = [*SHORT, "--seed", "1", "--workload.network", "fnn", "--duration", "8 steps"]
    assert refused(words, trained, world).startswith(
        "run.url: the run there was started with workload.network: 'softmax'"
    )
    said = refused([*words, "--run.force_resume"], trained, world)
    assert said.startswith("run.url: the checkpoint is of another network: ")
    assert said.endswith(": use another run.url")
    assert contents(trained / "run" / "checkpoints") == before
    output = run([*SHORT, "--seed", "1"], trained)  # and the run can still be asked for as it was
    assert json.loads(output.splitlines()[-1])["step"] == 4


def test_another_config_may_be_forced_upon_a_run(tmp_path: Path) -> None:
    run(SHORT, tmp_path)
    forced = ["--duration", "6 steps", "--optimizer.lr", "0.5", "--run.force_resume"]
    output = run([*SHORT, *forced], tmp_path, 2)
    assert re.search(r"changed since the run began: optimizer.lr: \S+ -> 0.5 \(changes the result\)", output)
    assert json.loads(output.splitlines()[-1])["step"] == 6
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "MANIFEST.json").exists()


def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    words = [*SHORT, "--duration", "1000000 steps", "--checkpoint.every", "1000000 steps"]
    first = start(words, tmp_path)
    try:
        assert wait_for(lambda: (tmp_path / "run" / "metrics").exists(), first)
        lease = (tmp_path / "run" / "lease.json").read_text()
        mistakes = [refused(words, tmp_path, world) for world in (1, 2)]
        assert mistakes[0] == mistakes[1]
        assert re.fullmatch(
            rf"run.url: \S*/run is in use by process {first.processes[0].pid} on {re.escape(os.uname().nodename)}: "
            r"wait for it, or use another run.url",
            mistakes[0],
        )
        assert json.loads((tmp_path / "run" / "lease.json").read_text())["id"] == json.loads(lease)["id"]
    finally:
        first.kill(0, 15)
    assert first.wait(SECONDS) == [0]


# The commands


def test_commands_on_what_is_no_run(tmp_path: Path, trained: Path) -> None:
    image(tmp_path / "digit.png")
    way_out = "no run there: give the URL of a run (it holds config.yaml) or of one of its checkpoints"
    for words in (["evaluate", "nothing"], ["predict", "nothing", "digit.png"], ["export", "nothing", "--to", "out"],
                  ["checkpoints", "list", "nothing"]):  # fmt: skip
        assert refused(words, tmp_path, 1) == f"nothing: {way_out}"
    there = str(trained / "run")
    assert refused(["evaluate", there, "--step", "3"], tmp_path, 1) == (
        f"{there}: no checkpoint of step 3; there are: 4"
    )
    assert refused(["predict", there, "absent.png"], tmp_path, 1) == "absent.png: no such file or folder"
    assert refused(["export", there], tmp_path, 1) == "export: the following arguments are required: --to; see --help"
    assert refused(["checkpoints", "prune", there, "--keep", "0"], tmp_path, 1) == (
        "--keep: 0 would delete every checkpoint: keep 1 or more"
    )


def test_a_warm_up_that_is_longer_than_the_run(tmp_path: Path) -> None:
    text = run(["--schedule.warmup", "10 epochs", "--duration", "2 epochs"], tmp_path, code=2)
    assert text == "error: schedule.warmup: '10 epochs' is not shorter than the run, '2 epochs': shorten the warm-up\n"
