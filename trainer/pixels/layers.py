"""The layers of a trained network as functions of an image, whatever kind of module each of them is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    name: str  # as in named_modules()
    shape: tuple[int, ...]  # of what it makes of one image of the network's own size: (C, H, W), or (C,)
    convolution: bool

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns; nothing for a layer that has none."""
        return self.shape[1:]


class _Complete(Exception):
    """All that was asked for is computed, and the rest of the network is not needed."""


class LayeredNetwork:
    """A network whose layers can be read, for images (B, C, H, W) in [0, 1]."""

    def __init__(
        self, network: nn.Module, shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.network = network.eval().requires_grad_(False).float().to(device)
        self.channels, self.size, self.device = shape[0], shape[1], device
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
        self.modules = {name: module for name, module in network.named_modules() if name}
        self.layers = self._try(torch.zeros(1, *shape, device=device))

    def __call__(self, images: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """What the named layers make of images. Nothing after the last of them is computed, so that the images may
        have any size which these layers take. A layer that is used twice is read at its first use."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor) -> None:
            outputs.setdefault(name, output.clone())  # the next layer may work in place
            if len(outputs) == len(set(names)):
                raise _Complete

        self._run(images, names, keep)
        return outputs

    def takes(self, height: int, width: int, names: Collection[str]) -> str:
        """Why these layers do not take images of this size; empty where they do."""
        try:
            with torch.no_grad():
                outputs = self(torch.zeros(1, self.channels, height, width, device=self.device), names)
        except (RuntimeError, ValueError, AssertionError) as error:
            return next(iter(str(error).splitlines()), type(error).__name__)
        return "" if all(output.numel() for output in outputs.values()) else "nothing is left of it"

    def _run(self, images: Tensor, names: Collection[str], keep: Callable[[str, Any], None]) -> None:
        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda module, inputs, output: keep(name, output)

        hooks = [self.modules[name].register_forward_hook(hook(name)) for name in set(names)]
        try:
            self.network((images - self.mean) / self.std)
        except _Complete:
            pass
        finally:
            for handle in hooks:
                handle.remove()

    @torch.no_grad()
    def _try(self, images: Tensor) -> tuple[Layer, ...]:
        """The layers that give numbers per image, in the order of computation."""
        shapes: dict[str, tuple[int, ...]] = {}

        def keep(name: str, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() in (2, 4) and len(output) == 1:
                shapes.setdefault(name, tuple(output.shape[1:]))

        self._run(images, self.modules, keep)
        return tuple(Layer(name, s, isinstance(self.modules[name], nn.Conv2d)) for name, s in shapes.items())


def ends_of_stages(layers: Sequence[Layer]) -> list[str]:
    """The last layer at each resolution at which there are convolutions; [] where there are none.

    In a VGG these are activations in front of the pooling, in a ResNet the stages.
    """
    grids = dict.fromkeys(layer.grid for layer in layers if layer.convolution and max(layer.grid) > 1)
    return [[layer.name for layer in layers if layer.grid == grid][-1] for grid in grids]
