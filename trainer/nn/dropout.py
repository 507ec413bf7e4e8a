"""Modules that take what they draw from Draws, so that neither ranks nor restarts change it: dropout and its kin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..randomness import Draws


class Drawn(nn.Module):
    """A module that draws: `drawing` gives it the draws of a forward pass."""

    draws: Draws | None = None


class Dropout(Drawn):
    """Dropout (Srivastava et al. 2014) of elements, or with `mode` of 'channels', samples ('row') or the 'batch'; of
    sequences (B, steps, width) also of elements that are the same in all 'steps'.

    As the `noise` of a generator it stays in evaluation, unless there are no draws, as in an exported network.
    """

    def __init__(self, probability: float, name: str, mode: str = "", noise: bool = False) -> None:
        super().__init__()
        self.probability, self.name, self.mode, self.noise = probability, name, mode, noise

    def extra_repr(self) -> str:
        return f"p={self.probability}, {self.mode or 'elements'}"

    def forward(self, x: Tensor) -> Tensor:
        drops = self.training or (self.noise and self.draws is not None)
        if not drops or not self.probability:
            return x
        assert self.draws is not None, "call the network inside `with drawing(network, draws)`"
        keep = 1 - self.probability
        if self.mode == "batch":
            return x / keep if self.draws.shared(self.name).random() < keep else x * 0
        ones = [1] * (x.dim() - 1)
        shapes = {"": [*x.shape[1:]], "channels": [x.shape[1], *ones[1:]], "row": ones, "steps": [1, *x.shape[2:]]}
        shape = shapes[self.mode]
        return x * ((self.draws.uniform(self.name, shape) < keep).to(x.dtype) / keep)


def use_draws(network: nn.Module) -> nn.Module:
    """Replace every dropout and stochastic depth below `network` by ours, in place."""
    for path, parent in list(network.named_modules()):
        for name, child in list(parent.named_children()):
            full_name = f"{path}.{name}"
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p, full_name))
            elif type(child) in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
                setattr(parent, name, Dropout(child.p, full_name, "channels"))
            elif type(child).__name__ == "StochasticDepth":  # torchvision's, not imported for its name alone
                setattr(parent, name, Dropout(child.p, full_name, child.mode))
    return network


# Kept, since walking a network takes 20 microseconds.
_drawn_of: WeakKeyDictionary[nn.Module, list[Drawn]] = WeakKeyDictionary()


@contextlib.contextmanager
def drawing(network: nn.Module, draws: Draws) -> Iterator[None]:
    """Give the modules of a network that draw their draws for one forward pass."""
    drawn = _drawn_of.get(network)
    if drawn is None:
        drawn = _drawn_of[network] = [module for module in network.modules() if isinstance(module, Drawn)]
    for module in drawn:
        module.draws = draws
    try:
        yield
    finally:
        for module in drawn:
            module.draws = None
