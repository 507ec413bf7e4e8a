"""Delivery of a plan's batches to one rank: resident (index a tensor on the device) or streaming (loader workers).

Both give the same batches. Training and evaluation share the code; what differs is the order and the augmentation.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..config.options import DataOptions, UserError
from ..randomness import key
from .dataset import DataSet, Encoded, Memory, Split, Stored, plan_of
from .decoding import BadSample, decode
from .description import Batch, ImageDescription
from .plan import BatchPlan
from .transforms import Augment, Crop, apply_policy

LOOKED_AT = 8  # images, for what is strange about all of them
TOGETHER_BYTES = 4 << 20  # of float32 images that the resident path prepares at once
Sample = tuple[int, int]  # id and visit
Read = tuple[dict[str, Tensor], Tensor, Tensor, list[str]]  # fields, ids, visits, what could not be read


class Reader(Dataset[Any]):
    """Samples by (id, visit): images as (C, size, size) uint8 after what is done per image. Runs in loader workers."""

    def __init__(self, split: Split, crop: Crop | None) -> None:
        self.split, self.crop = split, crop
        self.inherited: list[Any] = []  # in a worker: what must outlive it
        # Whether an image differs from visit to visit.
        self.varies = crop is not None and (crop.random or crop.policy != "none")

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
        if isinstance(self.split, Memory):
            return self._from_memory(self.split, samples, ids), ids, visits, []
        return self._from_storage(self.split, samples, ids, visits)

    def sizes(self, ids: Sequence[int]) -> list[int]:
        """The shorter sides in pixels of stored images as they are, of those that can be read."""
        if isinstance(self.split, Memory):
            return []
        sizes = []
        for index, data in zip(ids, self.split.fetch(ids, self.split.image_fields[0]), strict=True):
            with contextlib.suppress(BadSample):
                sizes.append(min(decode(data, self.split.name(index), self.split.channels).size))
        return sizes

    def _from_memory(self, split: Memory, samples: list[Sample], ids: Tensor) -> dict[str, Tensor]:
        fields = {name: tensor[ids] for name, tensor in split.fields.items()}
        if self.varies:
            for name in split.image_fields:
                varied = [self._varied(image, *sample) for image, sample in zip(fields[name], samples, strict=True)]
                fields[name] = torch.stack(varied)
        return fields

    def _from_storage(self, split: Stored, samples: list[Sample], ids: Tensor, visits: Tensor) -> Read:
        columns = [split.fetch(ids.tolist(), field) for field in split.image_fields]
        images, sources, problems = [], [], []
        for (index, visit), *encoded in zip(samples, *columns, strict=True):
            decoded, source, problem = self._decoded(split, encoded, index, visit)
            images.append(decoded)
            sources.append(source)
            problems += [problem] if problem else []
        stacked = (torch.stack(column) for column in zip(*images, strict=True))
        fields = {**dict(zip(split.image_fields, stacked, strict=True)), "label": split.labels[sources]}
        return fields, ids, visits, problems

    def _varied(self, pixels: Tensor, index: int, visit: int) -> Tensor:
        assert self.crop is not None
        if not self.crop.random:
            return apply_policy(self.crop.policy, pixels, self.crop.seed, index, visit)
        from PIL import Image

        return self.crop(Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()), index, visit)

    def _decoded(
        self, split: Stored, encoded: Sequence[Encoded], index: int, visit: int
    ) -> tuple[list[Tensor], int, str]:
        """The images, the sample that they are of, and what was wrong; a bad one is replaced by the next good one."""
        assert self.crop is not None
        problem, other = "", index
        for _ in range(min(1000, len(split))):
            try:
                name = split.name(other)
                images = [decode(data, name, split.channels, self.crop.background) for data in encoded]
                _check_shapes(images, name)
                return [self.crop(image, other, visit) for image in images], other, problem
            except BadSample as error:
                problem, other = problem or str(error), (other + 1) % len(split)
                encoded = [split.fetch([other], field)[0] for field in split.image_fields]
        raise UserError(f"data.root: no image of many in a row can be read; the first is {problem}")


def _check_shapes(images: Sequence[Any], name: str) -> None:
    """Images of one sample are cropped alike, which takes one shape, if not one size."""
    width, height = images[0].size
    for image in images[1:]:
        if not 0.98 < image.width * height / (image.height * width) < 1.02:
            raise BadSample(f"{name}: of {width}x{height} and {image.width}x{image.height} pixels, two shapes")


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
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
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
        dtype: torch.dtype, channels_last: bool, evaluation_batch: int,
        input_range: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        self.data, self.plan, self.options = data, plan, options
        self.rank, self.world, self.device = rank, world, device
        self.batch_size, self.epoch_samples = plan.batch_size, plan.size
        self.evaluation_samples, self.evaluation_batch = data.description.eval_size, evaluation_batch
        self.problems: dict[str, None] = {}  # what could not be read, in the order of discovery
        crops, self.augments = self._per_image(input_range, dtype, channels_last)
        self.readers = [Reader(data.train, crops[0]), Reader(data.held_out, crops[1])]
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
        self.partner = self._partner(input_range, dtype, channels_last)

    def _per_image(
        self, input_range: tuple[float, float] | None, dtype: torch.dtype, channels_last: bool
    ) -> tuple[list[Crop | None], list[Augment | None]]:
        """What is done to each image where it is read, and to batches on the device: in training and in evaluation."""
        d, seed = self.data.description, self.plan.seed
        if not isinstance(d, ImageDescription):
            return [None, None], [None, None]
        crops: list[Crop | None] = [Crop(self.options, d.size, seed, train, d.variable_size) for train in (True, False)]
        d = d.normalised_to(input_range)
        augments: list[Augment | None] = [
            Augment(self.options, d, seed, train, self.device, dtype, channels_last) for train in (True, False)
        ]
        return crops, augments

    def _partner(
        self, input_range: tuple[float, float] | None, dtype: torch.dtype, channels_last: bool
    ) -> BatchLoader | None:
        """The loader of the set whose fields join the batches, each set shuffled by itself."""
        if self.data.partner is None:
            return None
        own = self.plan
        plan = plan_of(self.data.partner, key(own.seed, "partner"), own.batch_size, own.accumulation, own.group)
        return BatchLoader(
            self.data.partner, plan, self.options, rank=self.rank, world=self.world, device=self.device, dtype=dtype,
            channels_last=channels_last, evaluation_batch=self.evaluation_batch, input_range=input_range,
        )  # fmt: skip

    def _load(self, reader: Reader) -> Memory:
        """A split as tensors on the device; stored images are decoded once, by the loader's workers."""
        split = reader.split
        if isinstance(split, Memory):
            return Memory({name: tensor.to(self.device) for name, tensor in split.fields.items()}, split.image_fields)
        parts = list(self._stream(reader, ([(i, 0) for i in ids] for ids in _chunks(len(split), 256))))
        if len(self.problems) > self.options.bad_images:
            raise UserError(self.bad_images(self.problems))
        fields = {name: torch.cat([fields[name] for fields, *_ in parts]).to(self.device) for name in parts[0][0]}
        return Memory(fields, split.image_fields)

    def bad_images(self, problems: Iterable[str]) -> str:
        """What is wrong, for the user, with the problems of all ranks."""
        different = dict.fromkeys(problems)
        first = "; ".join(itertools.islice(different, 5))
        return (
            f"data.bad_images: {len(different)} images cannot be read, {self.options.bad_images} are allowed: "
            f"{first}: repair or remove them, or raise data.bad_images"
        )

    def oddities(self) -> list[str]:
        """What a look at a few training images finds strange, for the user."""
        split, d = self.data.train, self.data.description
        if not isinstance(d, ImageDescription) or d.size == 1 or len(split) < 2:
            return []
        reader = Reader(split, self.readers[1].crop)
        ids = [i * len(split) // LOOKED_AT for i in range(min(LOOKED_AT, len(split)))]
        images = reader.read([(i, 0) for i in ids])[0]["image"]
        found = []
        if bool((images == images[:, :, :1, :1]).all()):
            found.append(f"of {len(ids)} training images looked at, each has one colour in all of its pixels")
        elif bool((images == images[0]).all()):
            found.append(f"the {len(ids)} training images looked at are all equal")
        largest = max(reader.sizes(ids), default=d.size)
        if largest * 2 <= d.size:
            found.append(
                f"images of {largest} pixels are enlarged to {d.size}, which costs time and shows nothing more: "
                f"set data.size to {largest}"
            )
        return found

    def bad_samples(self) -> list[str]:
        return [*self.problems, *(self.partner.problems if self.partner else ())]

    def _stream(self, reader: Reader, batches: Iterable[list[Sample]]) -> Iterator[Read]:
        workers = self.options.workers
        loader: DataLoader[Any] = DataLoader(
            reader, batch_sampler=_Batches(batches), num_workers=workers, collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda", worker_init_fn=_start_worker,
            prefetch_factor=4 if workers else None,
            # Python 3.14 would spawn workers: the data set would be copied, and memory:// be empty in them.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )  # fmt: skip
        for read in loader:
            if isinstance(read, UserError):
                raise read
            self.problems.update(dict.fromkeys(read[3]))
            yield read

    def train(self, first: int) -> Iterator[list[tuple[slice, Batch]]]:
        """Global batches from the `first` on, without end: this rank's rows of every micro-batch."""
        plan, split = self.plan, self.resident[0]
        rows = [plan.rows(m, self.rank, self.world) for m in range(plan.accumulation)]
        sizes = [r.stop - r.start for r in rows]
        own = plan.rank_rows(self.rank, self.world)
        several, wholes = self._resident(split, first, own) if split is not None else (1, self._streamed(first, own))
        partners = self.partner.train(first) if self.partner else None
        for batch in wholes:
            parts = zip(*(torch.split(value, sizes * several) for value in batch.values()), strict=True)
            for _ in range(several):
                own_batches: list[tuple[slice, Batch]] = [(r, dict(zip(batch, next(parts), strict=True))) for r in rows]
                yield own_batches if partners is None else _joined(own_batches, next(partners))

    def _resident(self, split: Memory, first: int, own: Tensor) -> tuple[int, Iterator[Batch]]:
        """Several batches are indexed and augmented at once: of small ones, the calls would cost more than the work."""
        several = max(1, TOGETHER_BYTES // (4 * len(own) * sum(t[0].numel() for t in split.fields.values())))

        def batches() -> Iterator[Batch]:
            for k in itertools.count(first, several):
                ids, visits = (column.view(several, -1)[:, own] for column in self.plan.samples(k, several))
                yield self._index(split, self.augments[0], ids.flatten(), visits.flatten())

        return several, batches()

    def _streamed(self, first: int, own: Tensor) -> Iterator[Batch]:
        samples = (
            list(zip(*(column[own].tolist() for column in self.plan.samples(k)), strict=True))
            for k in itertools.count(first)
        )
        reader = self.readers[0]
        return (self._send(reader.split.image_fields, self.augments[0], read) for read in self._stream(reader, samples))

    def _index(self, split: Memory, augment: Augment | None, ids: Tensor, visits: Tensor | None) -> Batch:
        on_device = ids.to(self.device, non_blocking=True)
        fields = {name: tensor.index_select(0, on_device) for name, tensor in split.fields.items()}
        return self._batch(fields, split.image_fields, augment, ids, visits, on_device)

    def _send(self, image_fields: Sequence[str], augment: Augment | None, read: Read) -> Batch:
        fields, ids, visits, _ = read
        fields = {name: tensor.to(self.device, non_blocking=True) for name, tensor in fields.items()}
        return self._batch(fields, image_fields, augment, ids, visits, ids.to(self.device, non_blocking=True))

    def _batch(
        self, fields: dict[str, Tensor], image_fields: Sequence[str], augment: Augment | None, ids: Tensor,
        visits: Tensor | None, on_device: Tensor,
    ) -> Batch:  # fmt: skip
        """The fields with their images augmented, all those of a sample alike; `ids` stay where they were made."""
        for name in image_fields:
            assert augment is not None, "a set with images is described by an ImageDescription"
            fields[name] = augment(fields[name], ids, visits)
        return {**fields, "id": on_device}

    def evaluate(self) -> Iterator[tuple[slice, Batch]]:
        """The held-out split, each sample once, with this rank's rows in the order of the whole.

        The last batch may leave some ranks without rows.
        """
        batches = self._evaluation_batches(self.evaluation_samples)
        own = self._in_order(self.readers[1], self.resident[1], batches)
        if self.partner is None:
            yield from own
            return
        other, size = self.partner, self.partner.evaluation_samples
        beside = other._in_order(other.readers[1], other.resident[1], [(ids % size, span) for ids, span in batches])
        for (rows, batch), (_, more) in zip(own, beside, strict=True):
            yield rows, {**_renamed(more), **batch}

    def _evaluation_batches(self, count: int) -> list[tuple[Tensor, slice]]:
        return self.plan.evaluation_batches(count, self.evaluation_batch, self.rank, self.world)

    @property
    def evaluation_rows(self) -> int:
        """The most rows that this rank has in a batch of the evaluation."""
        return max(len(ids) for ids, _ in self._evaluation_batches(self.evaluation_samples))

    def real(self, held_out: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the held-out images, or of as many training images, evenly spread and as they are.

        Each batch comes with its positions in the whole, which are the ids of held-out images.
        """
        count = self.evaluation_samples
        if held_out:
            batches = self.evaluate()
        else:
            count = min(count, self.epoch_samples)
            ids = torch.arange(count) * self.epoch_samples // count
            spans = [(ids[positions], span) for positions, span in self._evaluation_batches(count)]
            batches = self._in_order(Reader(self.data.train, self.readers[1].crop), self.resident[0], spans)
        for rows, batch in batches:
            if rows.start < rows.stop:
                yield batch["image"], torch.arange(rows.start, rows.stop, device=self.device)

    def _in_order(
        self, reader: Reader, resident: Memory | None, batches: Sequence[tuple[Tensor, slice]]
    ) -> Iterator[tuple[slice, Batch]]:
        """These samples of each batch without augmentation, and which rows of the whole they are."""
        augment = self.augments[1]
        if resident is not None:
            for ids, span in batches:
                yield span, self._index(resident, augment, ids, None)
            return
        samples = [[(i, 0) for i in ids.tolist()] for ids, _ in batches]
        reads = self._stream(reader, (batch for batch in samples if batch))
        for (_, span), batch in zip(batches, samples, strict=True):
            yield span, self._send(reader.split.image_fields, augment, next(reads)) if batch else {}

    def pixels(self, ids: Iterable[int]) -> Tensor:
        """Held-out images in [0, 1], (N, C, H, W), as a person would see them."""
        resident, reader = self.resident[1], self.readers[1]
        if resident is not None:
            index = torch.tensor(list(ids), dtype=torch.int64, device=self.device)
            return resident[resident.image_fields[0]][index].cpu().float() / 255
        return reader.read([(i, 0) for i in ids])[0][reader.split.image_fields[0]].float() / 255

    def held_out(self, ids: Iterable[int]) -> Batch:
        """Held-out samples as an evaluation has them, for one rank alone and without loader workers."""
        index = torch.tensor(list(ids), dtype=torch.int64)
        resident, reader, augment = self.resident[1], self.readers[1], self.augments[1]
        if resident is not None:
            batch = self._index(resident, augment, index, None)
        else:
            read = reader.read([(i, 0) for i in index.tolist()])
            batch = self._send(reader.split.image_fields, augment, read)
        if self.partner is None:
            return batch
        return {**_renamed(self.partner.held_out(i % self.partner.evaluation_samples for i in index.tolist())), **batch}


def _joined(
    own: Sequence[tuple[slice, Batch]], partner: Sequence[tuple[slice, Batch]]
) -> list[tuple[slice, Batch]]:  # fmt: skip
    return [(rows, {**_renamed(other), **batch}) for (rows, batch), (_, other) in zip(own, partner, strict=True)]


def _renamed(batch: Batch) -> Batch:
    return {f"partner_{name}": value for name, value in batch.items()}


def _chunks(count: int, length: int) -> Iterator[range]:
    return (range(start, min(start + length, count)) for start in range(0, count, length))
