"""The only source of randomness: pure functions of keys, so nothing about it has to be saved, restored or synchronised.

Data order and augmentation hash (seed, sample, visit) with SplitMix64 (Steele, Lea and Flood 2014): integers only, the
same on every device, library version and number of ranks. What a step draws (latents, dropout masks) comes from torch
generators seeded by (seed, step, phase, time, name, block of rows).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 64  # rows of the global batch that share a generator; a rank draws only the blocks that it has rows in


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def key(*parts: object) -> int:
    """A 63-bit integer that depends on every part and on their order."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts keep the sign; SplitMix64 wants zeros


def splitmix64(x: Tensor) -> Tensor:
    """Hash each int64 element; arithmetic wraps modulo 2**64."""
    x = x + _GAMMA
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """The order of an epoch: the int64 ids 0..size-1, sorted by their hashes."""
    ids = torch.arange(size)
    return torch.argsort(splitmix64(ids ^ key(seed, "order", epoch)), stable=True)


def uniforms(seed: int, ids: Tensor, visits: Tensor, name: str, count: int) -> Tensor:
    """`(len(ids), count)` float64 in [0, 1), a function of (seed, sample, visit, name, column) alone."""
    rows = splitmix64(splitmix64(ids ^ key(seed, name)) ^ visits)
    columns = torch.arange(count, device=ids.device)
    return _shift(splitmix64(rows[:, None] ^ splitmix64(columns)), 11).double() * 2.0**-53


@dataclass(frozen=True)
class Draws:
    """Randomness inside a step, for this rank's rows of one micro-batch of the global batch.

    Every method names its draw; two draws of one name in one phase are the same numbers. Shapes are per sample: the
    result is `(rows, *shape)`.
    """

    seed: int
    scope: tuple[object, ...]  # (step, phase, time, micro-batch)
    rows: slice  # this rank's rows of the micro-batch
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def step(self) -> int:
        """The training step; 0 outside of training."""
        return self.scope[0] if isinstance(self.scope[0], int) else 0

    @property
    def micro_batch(self) -> int:
        """Which micro-batch of the global batch this is; 0 outside of training."""
        return self.scope[-1] if isinstance(self.scope[-1], int) else 0

    @property
    def index(self) -> tuple[int, int]:
        """The step and the micro-batch, which phases have in common."""
        return self.step, self.micro_batch

    def due(self, every: int) -> bool:
        """Whether this is one of every so many steps."""
        return self.step % every == 0

    def of(self, count: int) -> Draws:
        """The same draws for the rows 0..count-1."""
        return replace(self, rows=slice(0, count))

    def _blocks(self, name: str) -> tuple[list[torch.Generator], slice]:
        first, last = self.rows.start // BLOCK, max(self.rows.stop - 1, self.rows.start) // BLOCK
        generators = [
            torch.Generator(self.device).manual_seed(key(self.seed, *self.scope, name, block))
            for block in range(first, last + 1)
        ]
        return generators, slice(self.rows.start - first * BLOCK, self.rows.stop - first * BLOCK)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        generators, mine = self._blocks(name)
        size, device, dtype = (BLOCK, *shape), self.device, self.dtype
        return torch.cat([torch.randn(size, generator=g, device=device, dtype=dtype) for g in generators])[mine]

    def uniform(self, name: str, shape: Sequence[int]) -> Tensor:
        """Uniform in [0, 1)."""
        generators, mine = self._blocks(name)
        size, device, dtype = (BLOCK, *shape), self.device, self.dtype
        return torch.cat([torch.rand(size, generator=g, device=device, dtype=dtype) for g in generators])[mine]

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Uniform int64 in 0..high-1."""
        generators, mine = self._blocks(name)
        size = (BLOCK, *shape)
        return torch.cat([torch.randint(high, size, generator=g, device=self.device) for g in generators])[mine]

    def shared(self, name: str) -> random.Random:
        """A Python generator that is the same on every rank, for a decision about the whole micro-batch."""
        return random.Random(key(self.seed, *self.scope, name))
