"""`export`: a network in the formats that other programs read; each is read back and compared where possible."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.options import UserError
from ..data.description import ImageDescription, TokenDescription
from ..run.opened import Trained, open_run
from .common import Parser, checkpoint_arguments, say

Inputs = dict[str, Tensor]  # of the network that is exported, by name


def _safetensors(network: nn.Module, trained: Trained, example: Inputs, target: Path) -> str:
    from safetensors.torch import save_file

    data = trained.data
    about: dict[str, Any] = {
        "workload": trained.config.workload.model_dump(mode="json"),
        "input": {"shapes": [["batch", *tensor.shape[1:]] for tensor in example.values()]},
        "data": data.name, "checkpoint": trained.name,
    }  # fmt: skip
    if isinstance(data, TokenDescription):
        about["vocabulary"] = data.vocabulary
    if isinstance(data, ImageDescription):
        about["classes"] = data.classes
        if not trained.workload.generates:
            data = data.normalised_to(trained.workload.input_range)
            about["input"] = {"shape": ["batch", *data.shape], "mean": data.mean, "std": data.std, "range": [0, 1]}
    save_file(
        {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in network.state_dict().items()},
        target / "weights.safetensors",
    )
    (target / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    return f"{target / 'weights.safetensors'}, {target / 'config.json'}"


def _torch(network: nn.Module, trained: Trained, example: Inputs, target: Path) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes .*_flat_weights")  # of a recurrent layer; harmless
        program = torch.export.export(network, tuple(example.values()), dynamic_shapes=_any_batch(example))
    path = target / "model.pt2"
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return f"{path}; outputs differ by {_difference(network, loaded, example)}"


def _onnx(network: nn.Module, trained: Trained, example: Inputs, target: Path) -> str:
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError:
        raise UserError("--format: onnx needs another package: pip install 'trainer[onnx]'") from None
    path = target / "model.onnx"
    states = [f"next_{name}" for name in list(example)[1:]] if isinstance(trained.data, TokenDescription) else []
    outputs = ["images" if trained.workload.generates else "logits", *states]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(
            network, tuple(example.values()), str(path), input_names=list(example), output_names=outputs,
            dynamo=True, dynamic_shapes=_any_batch(example), external_data=False, verbose=False,
        )  # fmt: skip
    try:
        import onnxruntime
    except ImportError:
        return f"{path}; not compared, for onnxruntime is not installed"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def other(*inputs: Tensor) -> Any:
        return session.run(None, {name: tensor.numpy() for name, tensor in zip(example, inputs, strict=True)})

    return f"{path}; outputs differ by {_difference(network, other, example)}"


@torch.no_grad()
def _difference(network: nn.Module, other: Any, example: Inputs) -> str:
    results = [program(*example.values()) for program in (network, other)]
    ours, theirs = ([result] if isinstance(result, Tensor) else result for result in results)
    differences = [(a - torch.as_tensor(b)).abs().max() for a, b in zip(ours, theirs, strict=True)]
    return f"{float(max(differences)):.1e} at most"


def _any_batch(example: Inputs) -> tuple[dict[int, Any], ...]:
    return tuple({0: torch.export.Dim.DYNAMIC} for _ in example)


FORMATS: dict[str, Callable[[nn.Module, Trained, Inputs, Path], str]] = {
    "safetensors": _safetensors,
    "torch": _torch,
    "onnx": _onnx,
}  # each writes into a folder and says what it has written


def main(words: Sequence[str]) -> int:
    parser = Parser("python -m trainer export", description="Write a checkpoint's network for use elsewhere.")
    checkpoint_arguments(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--format", metavar="NAME", nargs="+", default=["safetensors"], choices=list(FORMATS),
        help="safetensors: weights and config.json | torch: a torch.export program | onnx (default: safetensors)",
    )  # fmt: skip
    options = parser.parse_args(words)
    trained = open_run(options.checkpoint, step=options.step, best=options.best)
    target = Path(options.to)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to: {options.to!r} cannot be made: {error.strerror}") from None
    network = trained.workload.eval().inference().eval().float()
    try:
        example = trained.workload.example()
    except NotImplementedError:
        name = trained.config.workload.name
        raise UserError(f"{options.checkpoint}: {name} defines no example(), which exporting needs") from None
    for kind in options.format:
        say(f"{kind:<12} {FORMATS[kind](network, trained, example, target)}")
    return 0
