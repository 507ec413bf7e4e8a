"""Images per second on a GPU: ours beside a bare loop, timm and Lightning, which take turns, and where our time goes.

All train the same network in bf16 and channels_last with a fused optimizer. The others get one batch that lies on the
GPU already; ours draws, augments and normalises its batches from a set on the GPU and logs every 50 steps, as it does
in a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.common import Block, Cost, steps_of
from benchmarks.ours import Ours, ours
from benchmarks.plain import dcgan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-5}
ADAM = {"name": "adam", "lr": 2e-4, "betas": [0.5, 0.999]}
R3GAN = {"name": "r3gan", "width": 256, "gamma": [0.05, 0.005], "augment_p": 0.55, "beta2": 0.99, "ramp": 8000}
BIGGAN = {
    "name": "biggan", "width": 256, "constant_width": True, "hierarchical": False, "latent": 128,
    "discriminator_steps": 4, "augment": ["color", "translation", "cutout"],
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "resnet50 224": {"batch_size": 256, "optimizer": SGD, "workload": {"network": "resnet50"},
                     "data": {"size": 224, "classes": 1000, "samples": 1024}},
    "resnet18 32": {"batch_size": 512, "optimizer": SGD, "workload": {"network": "resnet18"},
                    "data": {"size": 32, "samples": 20000, "pad_crop": 4, "flip": True}},
    "dcgan 64": {"batch_size": 128, "optimizer": ADAM, "workload": {"name": "dcgan", "width": 64},
                 "data": {"size": 64, "samples": 10000}},
    "r3gan 32": {"batch_size": 256, "optimizer": ADAM, "workload": R3GAN, "data": {"size": 32, "samples": 10000}},
    "biggan 32": {"batch_size": 64, "optimizer": ADAM, "workload": BIGGAN, "data": {"size": 32, "samples": 10000}},
    "stylegan 32": {"batch_size": 64, "optimizer": ADAM, "workload": {"name": "stylegan"},
                    "data": {"size": 32, "samples": 10000}},
}  # fmt: skip
TINY = {"batch_size": 4, "data": {"size": 32, "samples": 64, "classes": 10}}


def settings_of(case: str, quick: bool) -> dict[str, Any]:
    own = CASES[case]
    data = {"name": "fake", "channels": 3, **own["data"], **(TINY["data"] if quick else {})}
    batch = TINY["batch_size"] if quick else own["batch_size"]
    return {**own, "data": data, "batch_size": batch, "device": "auto", "precision": "bf16", "channels_last": True}


def batch_of(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    size, count = settings["data"]["size"], settings["batch_size"]
    images = torch.randn(count, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(settings["data"].get("classes", 10), (count,), device=DEVICE)


def on_the_clock(block: Block) -> Block:
    """A block that ends when the GPU has finished."""

    def timed(steps: int) -> Cost:
        synchronize()
        began = time.perf_counter()
        block(steps)
        synchronize()
        return Cost((time.perf_counter() - began) / steps, 0.0)

    return timed


def synchronize() -> None:
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


def network_of(settings: dict[str, Any]) -> nn.Module:
    """The very network that ours trains."""
    from trainer.run.build import recipe
    from trainer.run.opened import load_config

    values = {"workload": {"name": "classifier", **settings["workload"]}, "data": {**settings["data"], "samples": 64}}
    network = recipe(load_config(json.dumps(values), "speed"), 1).workload.inference()
    return network.train().to(DEVICE).to(memory_format=torch.channels_last)


def loop(
    settings: dict[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[None]:
    """The steps of a classifier on one batch, without end."""
    images, labels = batch_of(settings)
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-5, fused=True)
    while True:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def compiled_network(settings: dict[str, Any]) -> nn.Module:
    network = network_of(settings)
    network.compile()
    return network


def timm_loop(settings: dict[str, Any]) -> Iterator[None]:
    """timm's network and optimizer."""
    import timm
    from timm.optim import create_optimizer_v2

    network = timm.create_model(settings["workload"]["network"], num_classes=settings["data"]["classes"])
    network = network.to(DEVICE).to(memory_format=torch.channels_last)
    return loop(settings, network, create_optimizer_v2(network, opt="sgd", lr=0.1, momentum=0.9, weight_decay=5e-5))


def lightning(settings: dict[str, Any], network: nn.Module) -> Block:
    """Lightning's loop with nothing else to do: no logger, no bar, no checkpoints."""
    import lightning as pl

    pair = batch_of(settings)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-5, fused=True)

        def on_train_batch_start(self, batch: object, index: int) -> None:
            if index == 3:
                synchronize()
                self.began = time.perf_counter()

    module = Module()

    def block(steps: int) -> Cost:
        trainer = pl.Trainer(
            accelerator="auto", devices=1, precision="bf16-mixed", max_steps=steps + 3, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader([pair] * (steps + 3), batch_size=None))
        synchronize()
        return Cost((time.perf_counter() - module.began) / steps, 0.0)

    return block


def bare_dcgan(settings: dict[str, Any]) -> Iterator[None]:
    """As tutorials write it, in bf16, with the networks of ours and without `.item()`."""
    size = settings["data"]["size"]
    nets = [network.to(DEVICE).to(memory_format=torch.channels_last) for network in dcgan(size, 3)]
    generator, discriminator = nets
    optimizers = [torch.optim.Adam(n.parameters(), 2e-4, (0.5, 0.999), fused=True) for n in (discriminator, generator)]
    images, _ = batch_of(settings)
    real, fake = torch.ones(len(images), device=DEVICE), torch.zeros(len(images), device=DEVICE)

    def judged(x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = discriminator(x).view(-1)
        return F.binary_cross_entropy_with_logits(logits.float(), target)

    while True:
        discriminator.zero_grad()
        judged(images, real).backward()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            fakes = generator(torch.randn(len(images), 100, 1, 1, device=DEVICE))
        judged(fakes.detach(), fake).backward()
        optimizers[0].step()
        generator.zero_grad()
        judged(fakes, real).backward()
        optimizers[1].step()
        yield


def contenders(case: str, quick: bool, compiled: bool, stack: contextlib.ExitStack) -> dict[str, Callable[[], Block]]:
    settings = settings_of(case, quick)

    def own(**changes: Any) -> Block:
        run: Ours = stack.enter_context(ours("", {**settings, **changes}))
        return run.block

    made: dict[str, Callable[[], Block]] = {"ours": own}
    if DEVICE.type == "cuda":
        made["ours, graphs"] = lambda: own(cuda_graphs=True)
    if compiled:
        made["ours, compiled"] = lambda: own(compile=True)
    if case.startswith("resnet"):
        made["bare"] = lambda: on_the_clock(steps_of(loop(settings, network_of(settings))))
        made["lightning"] = lambda: lightning(settings, network_of(settings))
        if compiled:
            made["bare, compiled"] = lambda: on_the_clock(steps_of(loop(settings, compiled_network(settings))))
    if case == "resnet50 224":
        made["timm"] = lambda: on_the_clock(steps_of(timm_loop(settings)))
    if case == "dcgan 64":
        made["bare"] = lambda: on_the_clock(steps_of(bare_dcgan(settings)))
    return made


def profile(block: Block, steps: int = 10) -> dict[str, Any]:
    """How much of the time the GPU computes, how many kernels a step launches, and which take longest."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as trace:
        began = time.perf_counter()
        block(steps)
        synchronize()
        wall = time.perf_counter() - began
    events = trace.key_averages()
    kernels = [e for e in events if e.self_device_time_total > 0 and str(e.device_type) != "DeviceType.CPU"]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    copies = sum(event.count for event in events if "emcpy" in event.key and "cuda" in event.key)
    waits = sum(event.count for event in events if "Synchronize" in event.key)
    top = sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]
    done = steps + 3  # those that warm the block up are in the trace
    return {
        "busy": busy / wall, "launches": launches / done, "copies": copies / done, "synchronisations": waits / done,
        "kernels": {e.key[:90]: [round(e.self_device_time_total / done, 1), e.count] for e in top},
    }  # fmt: skip


def measure(case: str, quick: bool, compiled: bool, rounds: int, seconds: float) -> dict[str, Any]:
    settings, result = settings_of(case, quick), {}
    with contextlib.ExitStack() as stack:
        blocks: dict[str, Block] = {}
        for name, make in contenders(case, quick, compiled, stack).items():
            began = time.perf_counter()
            try:
                blocks[name] = make()
                blocks[name](3)
            except Exception as error:  # the others go on
                blocks.pop(name, None)
                result[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                continue
            result[name] = {"first": round(time.perf_counter() - began, 1), "runs": []}
        lengths = {name: max(3, round(seconds / block(3).wall)) for name, block in blocks.items()}
        for _ in range(rounds):
            for name, block in blocks.items():
                result[name]["runs"].append(settings["batch_size"] / block(lengths[name]).wall)
        for name in blocks:
            result[name]["images_per_second"] = round(statistics.median(result[name]["runs"]), 1)
        if DEVICE.type == "cuda" and "ours" in blocks:
            result["profile"] = profile(blocks["ours"])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.speed", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute a net")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn, of which each contender has three")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    compiled = not options.quick and not options.no_compile
    results: dict[str, Any] = {}
    for case in options.cases:
        began = time.perf_counter()
        results[case] = measure(
            case, options.quick, compiled, 1 if options.quick else 3, 0.1 if options.quick else options.seconds
        )
        (options.out / "speed.json").write_text(json.dumps(results, indent=1))
        print(f"{case} ({time.perf_counter() - began:.0f} s)")
        for name, value in results[case].items():
            shown = value.get("images_per_second", value) if name != "profile" else value
            print(f"  {name:14} {shown}", flush=True)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
