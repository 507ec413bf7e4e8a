"""Delivery: the same batches by every way, from any number of workers, on any number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import lmdb
import pytest
import torch
from torch import Tensor

from trainer.config.options import DataOptions, UserError
from trainer.data.dataset import Memory
from trainer.data.loader import BatchLoader
from trainer.data.plan import BatchPlan
from trainer.data.sources import open_data

from .. import pictures_on_disk as disk

CPU = torch.device("cpu")
AUGMENTED = {"pad_crop": 2, "flip": True, "erase": 0.5}
Global = dict[str, Tensor]


def make(
    root: object = "", rank: int = 0, world: int = 1, batch_size: int = 12, accumulation: int = 1, group: int = 1,
    evaluation_batch: int = 50, channels_last: bool = False, split: str = "auto", **settings: Any,
) -> BatchLoader:  # fmt: skip
    options = DataOptions(**{"workers": 0, "download": False, **settings})
    data = open_data(options, str(root), split)
    plan = BatchPlan(5, len(data.train), batch_size, accumulation, group)
    return BatchLoader(
        data, plan, options, rank=rank, world=world, device=CPU, dtype=torch.float32, channels_last=channels_last,
        evaluation_batch=evaluation_batch,
    )  # fmt: skip


def joined(loaders: list[BatchLoader], first: int, count: int) -> list[Global]:
    """Global batches, put together from the ranks' rows of every micro-batch; asserts that the rows fit together."""
    batches = []
    for deliveries in zip(*(itertools.islice(loader.train(first), count) for loader in loaders), strict=True):
        parts = []
        for micro in zip(*deliveries, strict=True):
            end = 0
            for rows, batch in micro:
                assert rows.start == end
                end = rows.stop
                assert all(len(column) == rows.stop - rows.start for column in batch.values())
                parts.append(batch)
        batches.append({name: torch.cat([part[name] for part in parts]) for name in ("image", "label", "id")})
    return batches


def train(count: int = 4, first: int = 0, **settings: Any) -> list[Global]:
    return joined([make(**settings)], first, count)


def assert_same(actual: list[Global], expected: list[Global]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert {name: a[name].equal(b[name]) for name in b} == {"image": True, "label": True, "id": True}


SETS: dict[str, dict[str, Any]] = {
    "digits": {"name": "digits", **AUGMENTED},
    "fake": {"name": "fake", "size": 8, "samples": 30, **AUGMENTED},
}


@pytest.fixture(params=sorted(SETS))
def small(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SETS[request.param]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return disk.folder(str(tmp_path_factory.mktemp("pictures")), {"train": 9, "val": 5})


# The same batches, whichever way.


def test_resident_and_streamed_batches_are_equal_to_the_byte(small: dict[str, Any]) -> None:
    resident = train(resident="yes", **small)
    assert_same(train(resident="auto", **small), resident)
    assert_same(train(resident="no", **small), resident)
    assert_same(train(resident="no", workers=2, **small), resident)
    assert not resident[0]["image"].equal(train(resident="yes", **{**small, "flip": False})[0]["image"])


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_batches_under_a_policy_do_not_depend_on_the_workers(small: dict[str, Any], policy: str) -> None:
    alone = train(count=2, policy=policy, **small)
    assert_same(train(count=2, policy=policy, workers=2, **small), alone)
    assert not alone[0]["image"].equal(train(count=1, **small)[0]["image"])


def test_batches_of_photographs_do_not_depend_on_the_workers(pictures: str) -> None:
    settings: dict[str, Any] = {"root": pictures, "name": "folder", "size": 8, "policy": "trivial", **AUGMENTED}
    assert_same(train(workers=2, **settings), train(workers=0, **settings))


def test_resident_photographs_equal_streamed_ones_where_they_do_not_vary(pictures: str) -> None:
    settings: dict[str, Any] = {"root": pictures, "name": "folder", "size": 8, "resized_crop": False, **AUGMENTED}
    resident = train(resident="yes", **settings)
    assert_same(train(resident="auto", **settings), resident)
    assert_same(train(resident="no", workers=1, **settings), resident)


def test_micro_batches_hold_the_samples_of_the_same_global_batches(small: dict[str, Any]) -> None:
    whole = train(batch_size=13, **small)
    for resident in ("yes", "no"):
        assert_same(train(batch_size=13, accumulation=4, resident=resident, **small), whole)
        assert_same(train(batch_size=13, accumulation=4, group=2, resident=resident, **small), whole)
    micro_batches = next(make(batch_size=13, accumulation=4, **small).train(0))
    assert [rows.stop - rows.start for rows, _ in micro_batches] == [3, 3, 3, 4]


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_starting_at_a_batch_equals_skipping_those_before(small: dict[str, Any], resident: str) -> None:
    assert_same(train(count=2, first=3, resident=resident, **small), train(count=5, resident=resident, **small)[3:])


@pytest.mark.parametrize("resident", ["yes", "no"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_ranks_rows_make_up_the_global_batch_of_one_rank(
    small: dict[str, Any], world: int, resident: str, accumulation: int
) -> None:
    settings = {"batch_size": 13, "accumulation": accumulation, "resident": resident, **small}
    ranks = [make(rank=rank, world=world, **settings) for rank in range(world)]
    assert_same(joined(ranks, 1, 3), joined([make(**settings)], 1, 3))


def test_the_ranks_rows_of_photographs_make_up_the_global_batch(pictures: str) -> None:
    settings: dict[str, Any] = {"root": pictures, "name": "folder", "size": 8, **AUGMENTED}
    ranks = [make(rank=rank, world=3, workers=rank, **settings) for rank in range(3)]
    assert_same(joined(ranks, 0, 3), joined([make(**settings)], 0, 3))


def test_a_batch_holds_what_the_data_set_has_under_its_ids() -> None:
    loader = make(name="digits")
    data = loader.data
    assert isinstance(data.train, Memory)
    batch = joined([loader], 0, 1)[0]
    mean, std = data.description.mean[0], data.description.std[0]
    assert batch["label"].equal(data.train["label"][batch["id"]])
    expected = (data.train["image"][batch["id"]].double() / 255 - mean) / std
    assert (batch["image"].double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_batches_are_channels_last_where_asked(resident: str) -> None:
    settings: dict[str, Any] = {"name": "fake", "size": 8, "samples": 30, **AUGMENTED}
    loader = make(channels_last=True, resident=resident, accumulation=2, **settings)
    assert all(b["image"].is_contiguous(memory_format=torch.channels_last) for _, b in next(loader.train(0)))
    assert all(b["image"].is_contiguous(memory_format=torch.channels_last) for _, b in loader.evaluate())
    assert_same(joined([loader], 0, 2), train(count=2, **settings))


def test_a_random_crop_of_a_small_set_is_done_where_it_is_asked_for() -> None:
    plain = train(count=1, name="digits")[0]
    cropped = train(count=1, name="digits", resized_crop=True)
    assert not cropped[0]["image"].equal(plain["image"])
    assert cropped[0]["label"].equal(plain["label"])
    assert_same(train(count=1, name="digits", resized_crop=True, workers=1), cropped)


@pytest.mark.parametrize("settings", [{"policy": "trivial"}, {"resized_crop": True}])
def test_resident_images_that_differ_at_every_visit_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^data.resident: yes needs images that are the same at every visit"):
        make(name="digits", resident="yes", **settings)


# Evaluation.


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("resident", ["yes", "no"])
@pytest.mark.parametrize("evaluation_batch", [3, 5, 7, 100])
def test_evaluation_shows_every_sample_once(world: int, resident: str, evaluation_batch: int) -> None:
    settings: dict[str, Any] = {"name": "fake", "size": 4, "samples": 88, "evaluation_batch": evaluation_batch}
    ranks = [make(rank=rank, world=world, resident=resident, **settings, **AUGMENTED) for rank in range(world)]
    data = ranks[0].data
    assert isinstance(data.held_out, Memory)
    seen: list[int] = []
    lengths = []
    for shares in zip(*(loader.evaluate() for loader in ranks), strict=True):
        start = end = len(seen)
        for rows, batch in shares:
            assert rows.start == end
            end = rows.stop
            if rows.start < rows.stop:
                seen += batch["id"].tolist()
                assert batch["label"].equal(data.held_out["label"][batch["id"]])
                expected = (data.held_out["image"][batch["id"]].double() / 255 - 0.5) / 0.25
                assert (batch["image"].double() - expected).abs().max() < 1e-6
        lengths.append(end - start)
    assert seen == list(range(22))
    assert lengths == [min(evaluation_batch, 22 - start) for start in range(0, 22, evaluation_batch)]


def test_evaluation_of_photographs_does_not_depend_on_the_workers(pictures: str) -> None:
    def images(workers: int) -> Tensor:
        loader = make(pictures, name="folder", size=8, workers=workers, evaluation_batch=4, **AUGMENTED)
        return torch.cat([batch["image"] for _, batch in loader.evaluate()])

    assert images(0).shape == (10, 3, 8, 8)
    assert images(2).equal(images(0))


def test_a_policy_changes_training_only_and_leaves_evaluation_resident() -> None:
    loader = make(name="digits", policy="trivial")
    assert [part is not None for part in loader.resident] == [False, True]
    plain = make(name="digits")
    for (_, actual), (_, expected) in zip(loader.evaluate(), plain.evaluate(), strict=True):
        assert actual["image"].equal(expected["image"])


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_pixels_are_held_out_images_as_a_person_sees_them(resident: str) -> None:
    loader = make(name="digits", resident=resident, **AUGMENTED)
    assert isinstance(loader.data.held_out, Memory)
    actual = loader.pixels(iter([3, 598, 0]))
    assert actual.equal(loader.data.held_out["image"][[3, 598, 0]].float() / 255)


# Images that cannot be read.


@pytest.fixture(params=sorted(disk.bad_images()))
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """An image folder with one bad image, the second of the class cat, and that image's path."""
    root = disk.folder(str(tmp_path), {"train": 4, "val": 2})
    name = f"train/cat/001-{request.param}"
    disk.write(root, {name: disk.bad_images()[request.param]})
    return root, f"{tmp_path}/{name}"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_by_the_next_and_counted_once(bad: tuple[str, str], workers: int) -> None:
    root, path = bad
    loader = make(root, name="folder", size=8, batch_size=9, workers=workers, resized_crop=False, bad_images=1)
    batches = joined([loader], 0, 5)  # five epochs: it is met five times
    assert len(loader.bad_samples()) == 1
    assert next(iter(loader.problems)).startswith(f"{path}: ")
    for batch in batches:
        images = dict(zip(batch["id"].tolist(), batch["image"], strict=True))
        labels = dict(zip(batch["id"].tolist(), batch["label"].tolist(), strict=True))
        assert sorted(images) == list(range(9))
        assert images[1].equal(images[2])
        assert labels == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1, 7: 1, 8: 1}
    assert_same(joined([make(root, name="folder", size=8, batch_size=9, resized_crop=False)], 0, 5), batches)


def test_a_budget_of_none_names_the_bad_image(bad: tuple[str, str]) -> None:
    root, path = bad
    loader = make(root, name="folder", size=8, batch_size=9)
    joined([loader], 0, 1)
    message = loader.bad_images(loader.bad_samples())
    assert message.startswith(f"data.bad_images: 1 images cannot be read, 0 are allowed: {path}: ")
    assert message.endswith(": repair or remove them, or raise data.bad_images")
    with pytest.raises(UserError) as caught:
        make(root, name="folder", size=8, resized_crop=False, resident="yes")
    assert str(caught.value) == message


def test_a_replacement_brings_its_own_label(tmp_path: Path) -> None:
    root = disk.folder(str(tmp_path), {"train": 2, "val": 1})
    disk.write(root, {"train/cat/001.png": b"bad", "train/dog/001.png": b"bad"})
    batch = joined([make(root, name="folder", size=8, batch_size=4, resized_crop=False, resident="no")], 0, 1)[0]
    labels = dict(zip(batch["id"].tolist(), batch["label"].tolist(), strict=True))
    assert labels == {0: 0, 1: 1, 2: 1, 3: 0}  # the last one is followed by the first


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_one_good_image_is_refused_in_one_line(tmp_path: Path, workers: int) -> None:
    root = disk.write(str(tmp_path), {f"{s}/{c}/0.png": b"" for s in ("train", "val") for c in ("cat", "dog")})
    loader = make(root, name="folder", size=8, batch_size=2, workers=workers)
    with pytest.raises(
        UserError, match=r"^data.root: no image of many in a row can be read; the first is .*0\.png: .*$"
    ):
        next(loader.train(0))


def test_an_image_that_disappears_during_the_run_is_named(tmp_path: Path) -> None:
    root = disk.folder(str(tmp_path), {"train": 2, "val": 1})
    loader = make(root, name="folder", size=8, batch_size=4)
    (tmp_path / "train/dog/000.png").unlink()
    joined([loader], 0, 2)
    assert list(loader.problems) == [
        f"{tmp_path}/train/dog/000.png: [Errno 2] No such file or directory: '{tmp_path}/train/dog/000.png'"
    ]


# Remote data and databases in forked workers.


def remote_folder(root: str) -> dict[str, Any]:
    disk.folder(root, {"train": 4, "val": 2})
    return {"root": root, "name": "folder", "size": 8}


def remote_shards(root: str) -> dict[str, Any]:
    files = {f"{split}/0.tar": disk.tar(disk.shard(range(8))) for split in ("train", "val")}
    return {"root": disk.write(root, files), "name": "shards", "size": 8}


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "memory":
        yield "memory://loader"
        fsspec.filesystem("memory").rm("/loader", recursive=True)
        return
    for name, value in request.getfixturevalue("s3_server").items():
        monkeypatch.setenv(name, value)
    yield f"s3://warm-up/loader-{request.node.name.partition('[')[0]}"


@pytest.mark.timeout(
    25, func_only=True
)  # a connection that a worker spoils is found out after 16 seconds, and replaced
@pytest.mark.parametrize("build", [remote_folder, remote_shards])
def test_forked_workers_read_storage_that_their_parent_has_used(
    remote: str, build: Callable[[str], dict[str, Any]]
) -> None:
    settings = build(f"{remote}/{build.__name__}")
    parent = make(**settings, workers=2)
    alone = train(**settings)  # the parent reads, and goes on reading, through its own connections
    assert_same(joined([parent], 0, 4), alone)
    assert parent.pixels([0, 1]).shape == (2, 3, 8, 8)
    assert sum(len(batch["id"]) for _, batch in parent.evaluate()) == parent.evaluation_samples
    assert_same(train(**settings), alone)
    assert parent.bad_samples() == []


def test_forked_workers_read_databases_that_their_parent_has_used(tmp_path: Path) -> None:
    for name, split in itertools.product(("bedroom", "tower"), ("train", "val")):
        folder = tmp_path / "lsun" / f"{name}_{split}_lmdb"
        folder.mkdir(parents=True)
        with lmdb.open(str(folder), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
            for seed in range(4):
                transaction.put(f"{seed}".encode(), disk.png(seed))
    settings: dict[str, Any] = {"root": tmp_path, "name": "lsun", "size": 8}
    parent = make(**settings, workers=2)
    alone = train(**settings)
    assert parent.pixels([0]).shape == (1, 3, 8, 8)
    assert_same(joined([parent], 0, 4), alone)
    assert sum(len(batch["id"]) for _, batch in parent.evaluate()) == 8
    assert parent.bad_samples() == []


def test_a_network_that_fails_in_a_worker_is_one_line_for_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = remote_folder("memory://unplugged")
    loader = make(**settings, workers=1)

    def unplugged(*_: object, **__: object) -> bytes:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("trainer.data.stored.PAUSES", ())
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", unplugged)
    with pytest.raises(
        UserError, match=r"^data.root: 'memory://unplugged' does not answer: .*\.png: no route to host$"
    ):
        next(loader.train(0))
