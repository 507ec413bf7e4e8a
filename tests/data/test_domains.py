"""One set as two domains: two classes by name, two halves, or folders A and B; and what cannot be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.options import DataOptions, UserError
from trainer.data.dataset import DataSet, Memory, Split, subsample
from trainer.data.description import ImageDescription, from_json, to_json
from trainer.data.sources import open_data

from .. import pictures_on_disk as disk


def options(name: str, *domains: str, **settings: Any) -> DataOptions:
    return DataOptions(name=name, domains=domains, **settings)


def partner(data: DataSet) -> DataSet:
    assert data.partner is not None
    return data.partner


def described(data: DataSet) -> ImageDescription:
    assert isinstance(data.description, ImageDescription)
    return data.description


def images(split: Split) -> torch.Tensor:
    assert isinstance(split, Memory)
    return split["image"]


def test_two_classes_become_two_domains_with_as_many_held_out_samples() -> None:
    whole, data = open_data(options("digits"), "", "auto"), open_data(options("digits", "3", "8", size=16), "", "auto")
    for own, label in ((data, 3), (partner(data), 8)):
        assert isinstance(own.train, Memory)
        assert own.train["label"].unique().tolist() == [label]
        assert len(own.train) == own.description.train_size == int((whole.train["label"] == label).sum())  # type: ignore[index]
        assert images(own.train).shape[1:] == (1, 16, 16)
        assert len(own.held_out) == own.description.eval_size
    assert len(data.held_out) == len(partner(data).held_out)
    assert described(data).domains == ("3", "8")
    assert from_json(to_json(data.description)) == data.description


def test_halves_have_no_image_in_common_and_all_of_them_together() -> None:
    whole, data = open_data(options("digits"), "", "auto"), open_data(options("digits", "halves"), "", "auto")
    assert images(data.train).equal(images(whole.train)[0::2])
    assert images(partner(data).train).equal(images(whole.train)[1::2])
    assert images(partner(data).held_out).equal(images(whole.held_out)[1::2])
    assert len(data.held_out) == len(partner(data).held_out) == 299  # of 599
    assert described(data).domains == ("even samples", "odd samples")


def test_fewer_samples_to_evaluate_are_fewer_of_both_domains() -> None:
    data = subsample(open_data(options("digits", "3", "8"), "", "auto"), 7)
    assert (len(data.held_out), len(partner(data).held_out), partner(data).description.eval_size) == (7, 7, 7)


def test_classes_of_an_image_folder_are_read_where_they_are(tmp_path: Path) -> None:
    root = disk.folder(str(tmp_path), {"train": 3, "test": 2}, ("cat", "cow", "dog"))
    data = open_data(options("folder", "dog", "cat", size=8), root, "auto")
    for own, name in ((data, "dog"), (partner(data), "cat")):
        names = [own.train.name(i).rpartition("train/")[2] for i in range(len(own.train))]  # type: ignore[union-attr]
        assert names == [f"{name}/{i:03}.png" for i in range(3)]


def test_the_published_layout_is_a_folder_of_the_classes_a_and_b(tmp_path: Path) -> None:
    counts = {"trainA": 3, "trainB": 4, "testA": 2, "testB": 1}
    files = {f"{part}/{i}.png": disk.png(i) for part, count in counts.items() for i in range(count)}
    data = open_data(options("folder", "A", "B", size=8), disk.write(str(tmp_path), files), "auto")
    assert (len(data.train), len(partner(data).train), data.split) == (3, 4, "test")
    assert (len(data.held_out), len(partner(data).held_out)) == (1, 1)
    assert data.train.name(0).endswith("/trainA/0.png")  # type: ignore[union-attr]
    assert partner(data).held_out.name(0).endswith("/testB/0.png")  # type: ignore[union-attr]


def complaint(root: object, wanted: DataOptions) -> str:
    with pytest.raises(UserError) as caught:
        open_data(wanted, str(root), "auto")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_class_that_a_set_lacks_is_named_with_those_near_it(tmp_path: Path) -> None:
    root = disk.folder(str(tmp_path), {"train": 2, "test": 1}, ("cat", "dog"))
    assert complaint(root, options("folder", "cat", "dogs")) == (
        "data.domains: 'dogs' is no class of folder; there are: dog"
    )
    assert complaint("", options("digits", "A", "B")).endswith("there are: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9")


def test_a_domain_without_an_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "trainA").mkdir()
    files = {f"{part}/0.png": disk.png(0) for part in ("trainA", "testA")}
    root = disk.write(str(tmp_path), files)
    assert complaint(root, options("folder", "A", "B")) == "data.domains: 'B' is no class of folder; there are: A"
    (tmp_path / "trainB").mkdir()
    assert f"the class folder {root}/trainB has no images" in complaint(root, options("folder", "A", "B"))
    disk.write(root, {"trainB/0.png": disk.png(0)})
    assert complaint(root, options("folder", "A", "B")) == (
        "data.domains: folder has no 'B' in its test split: add images, or name another class"
    )


def test_points_are_no_domains() -> None:
    assert complaint("", options("ring8", "halves")) == "data.domains: ring8 is no set of images: remove data.domains"


@pytest.mark.parametrize("names", [["horse"], ["horse", "horse"], ["a", "b", "c"], "horse,horse"])
def test_domains_are_two_different_classes_or_halves(names: object) -> None:
    with pytest.raises(ValueError, match="must be two different classes, such as"):
        DataOptions.model_validate({"domains": names})


def test_classes_of_digits_may_be_written_as_numbers() -> None:
    assert DataOptions.model_validate({"domains": [3, 8]}).domains == ("3", "8")
    assert DataOptions.model_validate({"domains": "halves"}).domains == ("halves",)
