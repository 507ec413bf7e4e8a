"""The jobs whose scripts are kept in slurm/: `python -m tests.golden_jobs` regenerates them."""

from __future__ import annotations

from pathlib import Path

from launch import sbatch
from launch.job import Job
from launch.site import Container, Site
from launch.sweep import tasks

FOLDER = Path(__file__).parents[1] / "slurm"
PYTHON = ".venv/bin/python"
SITE = Site(partition="gpu", account="vision")


def job(name: str, *arguments: str, **options: object) -> Job:
    return Job(name=name, run=f"runs/{name}", arguments=arguments, folder=f"runs/{name}/launch",
               **{"minutes": 240, **options})  # type: ignore[arg-type]  # fmt: skip


RESNET = "configs/cifar10_resnet18.yaml"
GOLDEN: dict[str, tuple[Job, Site, str]] = {
    "single_node": (job("cifar10_resnet18", RESNET, gpus_per_node=4, ranks_per_node=4, cpus_per_rank=8), SITE, PYTHON),
    "two_nodes": (
        job("cifar10_resnet18", RESNET, "--batch_size", "1024", nodes=2, gpus_per_node=4, ranks_per_node=4,
            cpus_per_rank=8, chain=3),
        Site(partition="gpu", account="vision", qos="long", constraint="a100", modules=("cuda/13.0",),
             environment={"NCCL_SOCKET_IFNAME": "ib0"}, setup=("ulimit -n 65536",), sbatch=("--exclusive",)),
        PYTHON,
    ),
    "shrinking": (
        job("cifar10_resnet18", RESNET, nodes=4, gpus_per_node=8, ranks_per_node=8, cpus_per_rank=8),
        Site(partition="gpu", account="vision", after_node_failure="shrink"), PYTHON,
    ),
    "srun_direct": (
        job("imagenet_resnet50", "configs/imagenet_resnet50.yaml", nodes=2, gpus_per_node=4, ranks_per_node=4,
            cpus_per_rank=8, starter="srun", minutes=2880, signal_seconds=300),
        SITE, PYTHON,
    ),
    "cpu": (
        job("fashion_cnn", "configs/fashion_cnn.yaml", ranks_per_node=8, cpus_per_rank=2, minutes=30, requeue=False,
            crashes=0),
        Site(partition="cpu"), PYTHON,
    ),
    "array": (
        job("fashion_lr", "configs/fashion_cnn.yaml", minutes=60, parallel=2, ranks_per_node=2,
            tasks=tasks("fashion_lr", "runs/fashion_lr", ["optimizer.lr=1e-4,3e-4", "seed=0,1"])),
        Site(partition="cpu"), PYTHON,
    ),
    "apptainer": (
        job("cifar10_resnet18", RESNET, nodes=2, gpus_per_node=4, ranks_per_node=4, cpus_per_rank=8),
        Site(partition="gpu", container=Container("apptainer", "images/trainer.sif", ("/scratch:/scratch",))),
        "python3",
    ),
    "enroot": (
        job("cifar10_resnet18", RESNET, nodes=2, gpus_per_node=4, ranks_per_node=4, cpus_per_rank=8),
        Site(partition="gpu", container=Container("enroot", "images/trainer.sqsh", ("/scratch:/scratch",))),
        "python3",
    ),
}  # fmt: skip


def write() -> None:
    for name, (job, site, python) in GOLDEN.items():
        (FOLDER / f"{name}.sbatch").write_text(sbatch.script(job, site, python))


if __name__ == "__main__":
    write()
