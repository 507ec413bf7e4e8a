"""Delivery of a plan's batches to one rank: resident (index a tensor on the device) or streaming (loader workers).

Both give the same batches. `TRAIN` and evaluation share the code; what differs is the order and the augmentation.
"""

from __future__ import annotations

import gc
import itertools
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..config.options import DataOptions, UserError
from .dataset import DataSet, Encoded, Memory, Stored
from .description import Batch
from .plan import BatchPlan, share
from .stored import BadSample, decode
from .transforms import Augment, Crop, apply_policy

TOGETHER_BYTES = 4 << 20  # of float32 images that the resident path prepares at once
HALF = (0.5,)  # mean and deviation that bring [0, 1] to [-1, 1]
Sample = tuple[int, int]  # id and visit
Read = tuple[Tensor, Tensor, Tensor, Tensor, list[str]]  # images, labels, ids, visits, what could not be read


class Reader(Dataset[Any]):
    """Images by (id, visit), as (C, size, size) uint8 after what is done per image. Runs in loader workers."""

    def __init__(self, split: Memory | Stored, crop: Crop) -> None:
        self.split, self.crop = split, crop
        self.inherited: list[Any] = []  # in a worker: what must outlive it
        self.varies = crop.random or crop.policy != "none"  # whether an image differs from visit to visit

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, samples: list[Sample]) -> Read | UserError:
        """A batch. What a worker raises would reach the user as a traceback, so it is handed over instead."""
        try:
            return self.read(samples)
        except UserError as error:
            return error

    def read(self, samples: list[Sample]) -> Read:
        ids, visits = torch.tensor(samples).unbind(1)
        split = self.split
        images, sources, problems = [], [], []
        if isinstance(split, Memory):
            if not self.varies:
                return split.images[ids], split.labels[ids], ids, visits, []
            images = [self._varied(split.images[index], index, visit) for index, visit in samples]
            return torch.stack(images), split.labels[ids], ids, visits, []
        for (index, visit), data in zip(samples, split.fetch(ids.tolist()), strict=True):
            image, source, problem = self._decoded(split, data, index, visit)
            images.append(image)
            sources.append(source)
            problems += [problem] if problem else []
        return torch.stack(images), split.labels[sources], ids, visits, problems

    def _varied(self, pixels: Tensor, index: int, visit: int) -> Tensor:
        if not self.crop.random:
            return apply_policy(self.crop.policy, pixels, self.crop.seed, index, visit)
        from PIL import Image

        return self.crop(Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()), index, visit)

    def _decoded(self, split: Stored, data: Encoded, index: int, visit: int) -> tuple[Tensor, int, str]:
        """The image, the sample that it is of, and what was wrong; a bad image is replaced by the next good one."""
        problem, other = "", index
        for _ in range(min(1000, len(split))):
            try:
                return self.crop(decode(data, split.name(other), split.channels), other, visit), other, problem
            except BadSample as error:
                problem, other = problem or str(error), (other + 1) % len(split)
                (data,) = split.fetch([other])
        raise UserError(f"data.root: no image of many in a row can be read; the first is {problem}")


def _as_it_is(read: Any) -> Any:
    return read  # the reader makes whole batches


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
    _keep_inherited_file_systems()


def _keep_inherited_file_systems() -> None:
    """Hold on to the parent's file systems, which fsspec drops in a forked process.

    Dropped, they would close their connections, and so take these out of the epoll set that they share with the
    parent's event loop: the parent's next request, a checkpoint's for example, would then wait until it times out.
    """
    fsspec, worker = sys.modules.get("fsspec"), get_worker_info()
    if fsspec is not None and worker is not None:
        kind, reader = fsspec.AbstractFileSystem, worker.dataset
        assert isinstance(reader, Reader)
        reader.inherited = [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


class BatchLoader:
    """Batches of one rank. `evaluation_samples` is the size of the held-out split."""

    def __init__(
        self, data: DataSet, plan: BatchPlan, options: DataOptions, *, rank: int, world: int, device: torch.device,
        dtype: torch.dtype, channels_last: bool, evaluation_batch: int, symmetric: bool = False,
    ) -> None:  # fmt: skip
        self.data, self.plan, self.options = data, plan, options
        self.rank, self.world, self.device = rank, world, device
        self.batch_size, self.epoch_samples = plan.batch_size, plan.size
        self.evaluation_samples, self.evaluation_batch = data.description.eval_size, evaluation_batch
        size, seed = data.description.size, plan.seed
        description = replace(data.description, mean=HALF, std=HALF) if symmetric else data.description
        crops = [Crop(options, size, seed, train, data.description.variable_size) for train in (True, False)]
        self.readers = [Reader(data.train, crops[0]), Reader(data.held_out, crops[1])]
        self.augments = [
            Augment(options, description, seed, train, device, dtype, channels_last) for train in (True, False)
        ]
        self.problems: dict[str, None] = {}  # what could not be read, in the order of discovery
        if options.policy != "none":
            import torchvision.transforms.v2  # noqa: F401 - a second here saves one in every worker that is forked
        if options.resident == "yes" and self.readers[0].varies:
            raise UserError(
                "data.resident: yes needs images that are the same at every visit: "
                "set data.resized_crop to false and data.policy to none"
            )
        self.resident = [
            self._load(reader) if options.resident == "yes" or (options.resident == "auto" and small) else None
            for reader, small in ((r, isinstance(r.split, Memory) and not r.varies) for r in self.readers)
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

    def bad_samples(self) -> list[str]:
        return list(self.problems)

    def _stream(self, reader: Reader, batches: Iterable[list[Sample]]) -> Iterator[Read]:
        workers = self.options.workers
        loader: DataLoader[Any] = DataLoader(
            reader, batch_sampler=_Batches(batches), num_workers=workers, collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda", worker_init_fn=_start_worker,
            prefetch_factor=4 if workers else None,
            # Python 3.14 would start workers afresh: the data set would be copied, and memory:// be empty in them.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )  # fmt: skip
        for read in loader:
            if isinstance(read, UserError):
                raise read
            self.problems.update(dict.fromkeys(read[4]))
            yield read

    def train(self, first: int) -> Iterator[list[tuple[slice, Batch]]]:
        """Global batches from the `first` on, without end: this rank's rows of every micro-batch."""
        plan, split = self.plan, self.resident[0]
        rows = [plan.rows(m, self.rank, self.world) for m in range(plan.accumulation)]
        sizes = [r.stop - r.start for r in rows]
        mine = torch.cat(
            [torch.arange(m.start + r.start, m.start + r.stop) for m, r in zip(plan.micro_batches, rows, strict=True)]
        )
        several, wholes = self._resident(split, first, mine) if split is not None else (1, self._streamed(first, mine))
        for batch in wholes:
            parts = zip(*(torch.split(value, sizes * several) for value in batch.values()), strict=True)
            for _ in range(several):
                yield [(r, dict(zip(batch, next(parts), strict=True))) for r in rows]

    def _resident(self, split: Memory, first: int, mine: Tensor) -> tuple[int, Iterator[Batch]]:
        """Several batches are indexed and augmented at once: of small ones, the calls would cost more than the work."""
        several = max(1, TOGETHER_BYTES // (4 * len(mine) * split.images[0].numel()))

        def batches() -> Iterator[Batch]:
            for k in itertools.count(first, several):
                ids, visits = (column.view(several, -1)[:, mine] for column in self.plan.samples(k, several))
                yield self._index(split, self.augments[0], ids.flatten(), visits.flatten())

        return several, batches()

    def _streamed(self, first: int, mine: Tensor) -> Iterator[Batch]:
        samples = (
            list(zip(*(column[mine].tolist() for column in self.plan.samples(k)), strict=True))
            for k in itertools.count(first)
        )
        return (self._send(self.augments[0], read) for read in self._stream(self.readers[0], samples))

    def _index(self, split: Memory, augment: Augment, ids: Tensor, visits: Tensor | None) -> Batch:
        there = ids.to(self.device, non_blocking=True)
        pixels, labels = split.images.index_select(0, there), split.labels.index_select(0, there)
        return {"image": augment(pixels, ids, visits), "label": labels, "id": there}

    def _send(self, augment: Augment, read: Read) -> Batch:
        images, labels, ids, visits, _ = read
        there = (t.to(self.device, non_blocking=True) for t in (images, labels, ids))
        pixels, labels, on_device = there
        return {"image": augment(pixels, ids, visits), "label": labels, "id": on_device}

    def evaluate(self) -> Iterator[tuple[slice, Batch]]:
        """The held-out split in order, each sample once, with this rank's rows of the split.

        The last batch may leave some ranks without rows.
        """
        return self._in_order(self.readers[1], self.resident[1], torch.arange(self.evaluation_samples))

    def real(self, held_out: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the held-out images, or of as many training images, evenly spread and as they are.

        Each batch comes with its places in the whole, which are the ids of held-out images.
        """
        count = self.evaluation_samples
        if held_out:
            batches = self.evaluate()
        else:
            count = min(count, self.epoch_samples)
            ids = torch.arange(count) * self.epoch_samples // count
            batches = self._in_order(Reader(self.data.train, self.readers[1].crop), self.resident[0], ids)
        for rows, batch in batches:
            if rows.start < rows.stop:
                yield batch["image"], torch.arange(rows.start, rows.stop, device=self.device)

    def _in_order(self, reader: Reader, resident: Memory | None, ids: Tensor) -> Iterator[tuple[slice, Batch]]:
        """These samples without augmentation, and this rank's rows of them."""
        spans, augment = [], self.augments[1]
        for start in range(0, len(ids), self.evaluation_batch):
            rows = share(min(self.evaluation_batch, len(ids) - start), self.rank, self.world)
            spans.append(slice(start + rows.start, start + rows.stop))
        if resident is not None:
            for rows in spans:
                yield rows, self._index(resident, augment, ids[rows], None)
            return
        wanted = [[(i, 0) for i in ids[rows].tolist()] for rows in spans]
        reads = self._stream(reader, (samples for samples in wanted if samples))
        for rows, samples in zip(spans, wanted, strict=True):
            yield rows, self._send(augment, next(reads)) if samples else {}

    def pixels(self, ids: Iterable[int]) -> Tensor:
        """Held-out images in [0, 1], (N, C, H, W), as a person would see them."""
        resident, reader = self.resident[1], self.readers[1]
        if resident is not None:
            return resident.images[torch.tensor(list(ids), dtype=torch.int64, device=self.device)].cpu().float() / 255
        return reader.read([(i, 0) for i in ids])[0].float() / 255


def _chunks(count: int, length: int) -> Iterator[range]:
    return (range(start, min(start + length, count)) for start in range(0, count, length))
