"""What a batch may hold: a pair of images, images of two independent sets, windows that each row reads in order."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.config.options import DataOptions
from trainer.data.dataset import DataSet, Encoded, Memory, Split, subsample
from trainer.data.description import ImageDescription, TokenDescription, from_json, to_json
from trainer.data.loader import BatchLoader
from trainer.data.plan import BatchPlan, StreamPlan

SIZE = 6


def images(count: int, start: int = 0) -> Tensor:
    """Image i is of its number, but for a mark in its corner, so that a mirrored one can be told."""
    pixels = torch.arange(start, start + count, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, SIZE, SIZE)
    pixels[:, :, 0, 0] = 255
    return pixels


def description(train: Split, held_out: Split) -> ImageDescription:
    return ImageDescription("made up", len(train), len(held_out), 1, SIZE, ("a",), (0.0,), (1.0,))


def loader_of(data: DataSet, plan: BatchPlan, rank: int = 0, world: int = 1, **options: object) -> BatchLoader:
    return BatchLoader(
        data, plan, DataOptions.model_validate({"workers": 0, **options}), rank=rank, world=world,
        device=torch.device("cpu"), dtype=torch.float64, channels_last=False, evaluation_batch=4,
    )  # fmt: skip


class StoredPairs:
    """Two images a sample, encoded; the second sample's target is no image."""

    image_fields = ("input", "target")
    channels = 1

    def __init__(self, count: int, corrupt: int | None = None) -> None:
        self.labels, self.corrupt = torch.zeros(count, dtype=torch.int64), corrupt

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"pair {index}"

    def fetch(self, indices: Sequence[int], field: str) -> list[Encoded]:
        return [self.encoded(index, 100 if field == "target" else 0, field) for index in indices]

    def encoded(self, index: int, start: int, field: str) -> Encoded:
        if index == self.corrupt and field == "target":
            return b"no image"
        image = Image.fromarray(images(1, start + index)[0, 0].numpy())
        if field == "input":
            return image  # as one that cuts a file into two may give it
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()


def pairs(stored: bool, corrupt: int | None = None) -> DataSet:
    parts: list[Split] = [StoredPairs(10, corrupt), StoredPairs(5)]
    if not stored:
        parts = [Memory({"input": images(n), "target": images(n, 100)}, ("input", "target")) for n in (10, 5)]
    return DataSet(description(*parts), *parts, split="test")


@pytest.mark.parametrize("stored", [False, True])
def test_both_images_of_a_pair_are_augmented_alike(stored: bool) -> None:
    loader = loader_of(pairs(stored), BatchPlan(0, 10, 10), flip=True, pad_crop=1, resized_crop=False)
    ((_, batch),) = next(loader.train(0))
    assert batch.keys() >= {"input", "target", "id"}
    first, second = (batch[name].mul(255).round().long() for name in ("input", "target"))
    inside = (first > 0) & (first < 255) | (second > 0) & (second < 255)
    assert torch.equal((second - first)[inside & (second < 255)].unique(), torch.tensor([100]))
    marks = [(image == 255).nonzero().tolist() for image in (first, second)]
    assert marks[0] == marks[1]
    assert len({tuple(mark[2:]) for mark in marks[0]}) > 2  # mirrored and moved, and not all in one way


def test_a_pair_with_a_corrupt_image_is_replaced_as_a_whole() -> None:
    loader = loader_of(pairs(True, corrupt=3), BatchPlan(0, 10, 10), resized_crop=False)
    ((_, batch),) = next(loader.train(0))
    shades = [batch[name][:, 0, 1, 1].mul(255).round().long() for name in ("input", "target")]
    assert torch.equal(shades[1] - shades[0], torch.full((10,), 100))
    assert (shades[0] == 4).sum() == 2
    assert (shades[0] == 3).sum() == 0
    assert loader.bad_samples() == [f"pair 3: {next(iter(loader.problems)).partition(': ')[2]}"]


def two_sets(first: int = 12, second: int = 8) -> DataSet:
    own = [Memory({"image": images(n), "label": torch.zeros(n, dtype=torch.int64)}) for n in (first, 5)]
    other = [Memory({"image": images(n, 100)}) for n in (second, 3)]
    partner = DataSet(description(*other), *other, split="test")
    return DataSet(description(*own), *own, split="test", partner=partner)


def test_images_of_two_sets_have_orders_of_their_own() -> None:
    loader = loader_of(two_sets(), BatchPlan(0, 12, 4))
    batches = loader.train(0)
    shades: dict[str, list[int]] = {"image": [], "partner_image": []}
    for _ in range(6):
        ((_, batch),) = next(batches)
        for name, values in shades.items():
            values += batch[name][:, 0, 1, 1].mul(255).round().long().tolist()
    assert sorted(shades["image"][:12]) == sorted(shades["image"][12:]) == list(range(12))
    assert [sorted(shades["partner_image"][start : start + 8]) for start in (0, 8, 16)] == [list(range(100, 108))] * 3
    assert shades["image"][:8] != [shade - 100 for shade in shades["partner_image"][:8]]


def test_two_sets_of_one_size_are_not_in_step() -> None:
    ((_, batch),) = next(loader_of(two_sets(12, 12), BatchPlan(0, 12, 12)).train(0))
    first, second = (batch[name][:, 0, 1, 1].mul(255).round().long() for name in ("image", "partner_image"))
    assert not torch.equal(second, first + 100)
    assert sorted(second.tolist()) == sorted((first + 100).tolist())


def test_two_sets_are_shared_by_ranks_and_evaluated_once_with_the_smaller_one_repeated() -> None:
    whole = loader_of(two_sets(), BatchPlan(0, 12, 4, accumulation=2))
    parts = [loader_of(two_sets(), BatchPlan(0, 12, 4, accumulation=2), rank, 2) for rank in range(2)]
    for micro, *own in zip(next(whole.train(3)), *(next(part.train(3)) for part in parts), strict=True):
        for name, value in micro[1].items():
            assert torch.equal(torch.cat([batch[name] for _, batch in own]), value)
    seen = [(batch["id"].tolist(), batch["partner_image"][:, 0, 1, 1].mul(255).round().long().tolist())
            for _, batch in whole.evaluate()]  # fmt: skip
    assert seen == [([0, 1, 2, 3], [100, 101, 102, 100]), ([4], [101])]


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_held_out_samples_can_be_had_by_their_ids(resident: str) -> None:
    loader = loader_of(two_sets(), BatchPlan(0, 12, 4), resident=resident)
    batch = loader.held_out(iter([4, 1]))
    assert batch["id"].tolist() == [4, 1]
    shades = {name: batch[name][:, 0, 1, 1].mul(255).round().tolist() for name in ("image", "partner_image")}
    assert shades == {"image": [4, 1], "partner_image": [101, 101]}
    pair = loader_of(pairs(True), BatchPlan(0, 10, 10), flip=True).held_out([3])
    assert (pair["target"] - pair["input"])[0, 0, 1, 1].mul(255).round() == 100


# Windows in order


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_row_reads_consecutive_windows_and_then_its_neighbours(world: int, accumulation: int) -> None:
    plan = StreamPlan(0, 20, 5, accumulation)
    batches = [plan.samples(k)[0] for k in range(12)]
    assert batches[0].tolist() == [0, 4, 8, 12, 16]
    assert all(sorted(torch.cat(batches[start : start + 4]).tolist()) == list(range(20)) for start in (0, 4, 8))
    for before, after in itertools.pairwise(batches):
        assert torch.equal(after, (before + 1) % 20)
    assert plan.samples(4, 2)[1].tolist() == [1] * 10
    assert torch.equal(plan.samples(3, 3)[0], torch.cat(batches[3:6]))
    rows = torch.cat([plan.rank_rows(rank, world) for rank in range(world)])
    assert sorted(rows.tolist()) == list(range(5))


@pytest.mark.parametrize("size", [1, 3, 7, 8, 9, 12, 13])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_an_evaluation_in_order_has_each_window_once_and_each_row_on_one_rank(size: int, world: int) -> None:
    plans = [StreamPlan(0, 20, 5).evaluation_batches(size, 4, rank, world) for rank in range(world)]
    assert sorted(i for batches in plans for ids, _ in batches for i in ids.tolist()) == list(range(size))
    spans = [span for batches in plans for _, span in batches]
    assert sorted(i for span in spans for i in range(span.start, span.stop)) == list(range(size))
    alone = StreamPlan(0, 20, 5).evaluation_batches(size, 4, 0, 1)
    for k, (ids, _) in enumerate(alone):
        assert torch.equal(torch.cat([batches[k][0] for batches in plans]), ids)
    for batches in plans:
        for (before, _), (after, _) in itertools.pairwise(batches):
            assert torch.equal(after, before[: len(after)] + 1)  # each row continues where it was


def test_a_subsample_of_a_text_is_its_beginning() -> None:
    parts = [Memory({"tokens": torch.arange(n)[:, None]}, ()) for n in (20, 10)]
    data = DataSet(TokenDescription("text", 20, 10, ("a",), 1), *parts, split="tail", streams=True)
    assert subsample(data, 4).held_out["tokens"].flatten().tolist() == [0, 1, 2, 3]  # type: ignore[index]


def test_a_description_survives_json_and_an_older_runs_can_be_read() -> None:
    text = TokenDescription("text", 20, 10, ("a", "b"), 5)
    assert from_json(to_json(text)) == text
    shown = description(Memory({"image": images(3)}), Memory({"image": images(2)}))
    assert from_json(to_json(shown)) == shown
    assert to_json(shown).keys() == {
        "name", "channels", "size", "classes", "mean", "std", "training", "evaluated", "photographs", "mixture",
        "paired", "domains",
    }  # fmt: skip
