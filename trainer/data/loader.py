"""Delivery of a plan's batches to one rank: resident (index a tensor on the device) or streaming (loader workers).

Both give the same batches. `TRAIN` and evaluation share the code; what differs is the order and the augmentation.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import DataOptions, UserError
from ..workload import Batch
from .plan import BatchPlan, share
from .sources import BadSample, DataSet, Memory, Stored
from .transforms import Augment, Crop, apply_policy

Sample = tuple[int, int]  # id and visit
Read = tuple[Tensor, Tensor, Tensor, Tensor, list[str]]  # images, labels, ids, visits, what could not be read


class Reader(Dataset[tuple[Tensor, int, int, int, str]]):
    """Images by (id, visit), as (C, size, size) uint8 after what is done per image. Runs in loader workers."""

    def __init__(self, split: Memory | Stored, crop: Crop) -> None:
        self.split, self.crop = split, crop

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, int, int, int, str]:
        """The image, its label, id, visit, and what was wrong; a bad image is replaced by the next good one."""
        index, visit = sample
        problem, other = "", index
        for _ in range(1000):
            try:
                return self.read(other, visit), int(self.split.labels[other]), index, visit, problem
            except BadSample as error:
                problem, other = problem or str(error), (other + 1) % len(self.split)
        raise RuntimeError(f"1,000 images in a row cannot be read, the first is {problem}")

    def read(self, index: int, visit: int) -> Tensor:
        if isinstance(self.split, Memory):
            return apply_policy(self.crop.policy, self.split.images[index], self.crop.seed, index, visit)
        return self.crop(self.split.image(index), index, visit)


def _collate(samples: list[tuple[Tensor, int, int, int, str]]) -> Read:
    images, labels, ids, visits, problems = zip(*samples, strict=True)
    numbers = (torch.tensor(column) for column in (labels, ids, visits))
    return torch.stack(images), *numbers, [problem for problem in problems if problem]  # type: ignore[return-value]


class _Batches(Sampler[list[Sample]]):
    """What each call of the loader has to read; may be endless."""

    def __init__(self, batches: Iterable[list[Sample]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter(self.batches)


def _start_worker(_: int) -> None:
    """Signals are for the ranks: a worker that dies of one would take its rank along before it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


class BatchLoader:
    """Batches of one rank. `evaluation_samples` is the size of the held-out split."""

    def __init__(
        self, data: DataSet, plan: BatchPlan, options: DataOptions, *, rank: int, world: int, device: torch.device,
        dtype: torch.dtype, channels_last: bool, evaluation_batch: int,
    ) -> None:  # fmt: skip
        self.data, self.plan, self.options = data, plan, options
        self.rank, self.world, self.device = rank, world, device
        self.batch_size, self.epoch_samples = plan.batch_size, plan.size
        self.evaluation_samples, self.evaluation_batch = len(data.held_out), evaluation_batch
        size, seed = data.description.size, plan.seed
        crops = [Crop(options, size, seed, train) for train in (True, False)]
        self.readers = [Reader(data.train, crops[0]), Reader(data.held_out, crops[1])]
        self.augments = [
            Augment(options, data.description, seed, train, device, dtype, channels_last) for train in (True, False)
        ]
        self.problems: dict[str, None] = {}  # what could not be read, in the order of discovery
        small = isinstance(data.train, Memory) and options.policy == "none"
        if options.resident == "yes" and (options.policy != "none" or (data.photographs and crops[0].random)):
            raise UserError(
                "data.resident: yes needs images that are the same at every visit: "
                "set data.resized_crop to false and data.policy to none"
            )
        self.resident = [
            self._load(reader) if options.resident == "yes" or (options.resident == "auto" and small) else None
            for reader in self.readers
        ]

    def _load(self, reader: Reader) -> Memory:
        """A split as tensors on the device; photographs are decoded once, by the loader's workers."""
        split = reader.split
        if isinstance(split, Memory):
            return Memory(split.images.to(self.device), split.labels.to(self.device))
        images, labels = [], []
        for batch in self._stream(reader, ([(i, 0) for i in ids] for ids in _chunks(len(split), 256))):
            images.append(batch[0])
            labels.append(batch[1])
        if len(self.problems) > self.options.bad_images:
            raise UserError(self.bad_images())
        return Memory(torch.cat(images).to(self.device), torch.cat(labels).to(self.device))

    def bad_images(self) -> str:
        """What is wrong, for the user."""
        first = "; ".join(itertools.islice(self.problems, 5))
        return (
            f"data.bad_images: {len(self.problems)} images cannot be read, {self.options.bad_images} are allowed: "
            f"{first}: repair or remove them, or raise data.bad_images"
        )

    def faults(self) -> int:
        return len(self.problems)

    def _stream(self, reader: Reader, batches: Iterable[list[Sample]]) -> Iterator[Read]:
        workers = self.options.workers
        loader: DataLoader[Any] = DataLoader(
            reader, batch_sampler=_Batches(batches), num_workers=workers, collate_fn=_collate,
            pin_memory=self.device.type == "cuda", worker_init_fn=_start_worker,
            prefetch_factor=4 if workers else None,
        )  # fmt: skip
        for images, labels, ids, visits, problems in loader:
            self.problems.update(dict.fromkeys(problems))
            yield images, labels, ids, visits, problems

    def train(self, first: int) -> Iterator[list[tuple[slice, Batch]]]:
        """Global batches from the `first` on, without end: this rank's rows of every micro-batch."""
        plan = self.plan
        rows = [plan.rows(m, self.rank, self.world) for m in range(plan.accumulation)]
        whole = [m.start for m in plan.micro_batches]
        cuts = [slice(start + r.start, start + r.stop) for start, r in zip(whole, rows, strict=True)]
        resident, augment = self.resident[0], self.augments[0]
        if resident is not None:
            for k in itertools.count(first):
                ids, visits = plan.samples(k)
                yield [(r, self._index(resident, augment, ids[c], visits[c])) for r, c in zip(rows, cuts, strict=True)]
        ends = list(itertools.accumulate(r.stop - r.start for r in rows))
        parts = [slice(end - (r.stop - r.start), end) for r, end in zip(rows, ends, strict=True)]
        for read in self._stream(self.readers[0], self._samples(first, cuts)):
            batch = self._send(augment, read)
            yield [(r, {name: value[p] for name, value in batch.items()}) for r, p in zip(rows, parts, strict=True)]

    def _samples(self, first: int, cuts: list[slice]) -> Iterator[list[Sample]]:
        for k in itertools.count(first):
            ids, visits = (torch.cat([column[c] for c in cuts]).tolist() for column in self.plan.samples(k))
            yield list(zip(ids, visits, strict=True))

    def _index(self, split: Memory, augment: Augment, ids: Tensor, visits: Tensor | None) -> Batch:
        there = ids.to(self.device, non_blocking=True)
        return {"image": augment(split.images[there], ids, visits), "label": split.labels[there], "id": there}

    def _send(self, augment: Augment, read: Read) -> Batch:
        images, labels, ids, visits, _ = read
        there = (t.to(self.device, non_blocking=True) for t in (images, labels, ids))
        pixels, labels, on_device = there
        return {"image": augment(pixels, ids, visits), "label": labels, "id": on_device}

    def evaluate(self) -> Iterator[tuple[slice, Batch]]:
        """The held-out split in order, each sample once; the last batch may leave some ranks without rows."""
        spans = []
        for start in range(0, self.evaluation_samples, self.evaluation_batch):
            count = min(self.evaluation_batch, self.evaluation_samples - start)
            spans.append((start, share(count, self.rank, self.world)))
        resident, augment = self.resident[1], self.augments[1]
        if resident is not None:
            for start, rows in spans:
                yield rows, self._index(resident, augment, torch.arange(start + rows.start, start + rows.stop), None)
            return
        wanted = [[(i, 0) for i in range(start + rows.start, start + rows.stop)] for start, rows in spans]
        reads = self._stream(self.readers[1], (samples for samples in wanted if samples))
        for (_, rows), samples in zip(spans, wanted, strict=True):
            yield rows, self._send(augment, next(reads)) if samples else {}

    def pixels(self, ids: Iterable[int]) -> Tensor:
        """Held-out images in [0, 1], (N, C, H, W), as a person would see them."""
        resident, reader = self.resident[1], self.readers[1]
        images = [resident.images[i].cpu() if resident is not None else reader[i, 0][0] for i in ids]
        return torch.stack(images).float() / 255


def _chunks(count: int, length: int) -> Iterator[range]:
    return (range(start, min(start + length, count)) for start in range(0, count, length))
