"""Augmentation against slow references, one image at a time, written from the description and not from the code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from trainer.config.options import DataOptions
from trainer.data.description import ImageDescription
from trainer.data.transforms import Augment, Crop, apply_policy
from trainer.randomness import uniforms

from ..pictures_on_disk import picture

CPU = torch.device("cpu")
SEED = 3


def description(channels: int = 3, size: int = 9) -> ImageDescription:
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    return ImageDescription("made up", 100, 10, channels, size, ("a", "b"), mean, std)


def augment(options: DataOptions, train: bool = True, dtype: torch.dtype = torch.float32, channels_last: bool = False,
            channels: int = 3) -> Augment:  # fmt: skip
    return Augment(options, description(channels), SEED, train, CPU, dtype, channels_last)


def batch(count: int = 64, channels: int = 3, size: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return images, torch.arange(100, 100 + count), torch.arange(count) % 3


def chance(index: int, visit: int) -> list[float]:
    return uniforms(SEED, torch.tensor([index]), torch.tensor([visit]), "augment", 8)[0].tolist()


def normalised(image: np.ndarray) -> np.ndarray:
    mean, std = (np.array(v)[: len(image), None, None] for v in (description().mean, description().std))
    return (image / 255 - mean) / std


def reference(options: DataOptions, image: np.ndarray, chances: list[float]) -> np.ndarray:
    """Pad, crop, mirror, normalise and erase one image, pixel by pixel."""
    _, height, width = image.shape
    pad = options.pad_crop
    down, right = int(chances[0] * (2 * pad + 1)) - pad, int(chances[1] * (2 * pad + 1)) - pad
    moved = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                moved[:, y, x] = image[:, y + down, x + right]
    if options.flip and chances[2] < 0.5:
        moved = moved[:, :, ::-1]
    result = normalised(moved)
    if chances[3] < options.erase:
        area = (0.02 + 0.31 * chances[4]) * height * width
        ratio = math.exp((2 * chances[5] - 1) * math.log(3.3))
        box_height, box_width = math.sqrt(area * ratio), math.sqrt(area / ratio)
        for y in range(height):
            for x in range(width):
                if (
                    abs(y + 0.5 - chances[6] * height) < box_height / 2
                    and abs(x + 0.5 - chances[7] * width) < box_width / 2
                ):
                    result[:, y, x] = 0
    return result


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [DataOptions(pad_crop=2), DataOptions(flip=True), DataOptions(erase=0.5), DataOptions(erase=1.0),
     DataOptions(pad_crop=4, flip=True, erase=0.7)],
    ids=["pad and crop", "flip", "erase half", "erase all", "everything"],
)  # fmt: skip
def test_a_batch_is_augmented_as_its_images_one_by_one(options: DataOptions, channels: int) -> None:
    images, ids, visits = batch(channels=channels)
    augmented = augment(options, dtype=torch.float64, channels=channels)(images, ids, visits)
    rows = zip(images.numpy(), ids.tolist(), visits.tolist(), augmented.numpy(), strict=True)
    for image, index, visit, result in rows:
        expected = reference(options, image, chance(index, visit))
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


def test_about_half_of_the_images_are_mirrored_and_a_share_is_erased() -> None:
    images, ids, visits = (
        torch.full((4000, 1, 8, 8), 200, dtype=torch.uint8),
        torch.arange(4000),
        torch.zeros(4000).long(),
    )
    images[:, :, :, 0] = 0
    mirrored = augment(DataOptions(flip=True), channels=1)(images, ids, visits)[:, 0, 0, 0] > 0
    erased = (augment(DataOptions(erase=0.25), channels=1)(images, ids, visits) == 0).flatten(1).any(1)
    assert abs(float(mirrored.double().mean()) - 0.5) < 0.04
    assert abs(float(erased.double().mean()) - 0.25) < 0.035


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_normalisation_is_that_of_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    normal = augment(DataOptions(), dtype=dtype).normalise(images)
    assert normal.dtype == dtype
    np.testing.assert_allclose(
        normal[0].double().numpy(), normalised(images[0].double().numpy()), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("options", [DataOptions(), DataOptions(pad_crop=2, flip=True, erase=0.5)])
def test_the_memory_format_is_the_one_asked_for_and_changes_no_value(options: DataOptions) -> None:
    images, ids, visits = batch()
    last = augment(options, channels_last=True)(images, ids, visits)
    first = augment(options, channels_last=False)(images, ids, visits)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous()
    assert last.equal(first)


def test_nothing_is_augmented_in_evaluation() -> None:
    images, ids, _ = batch()
    options = DataOptions(pad_crop=2, flip=True, erase=1.0)
    eval_size = augment(options, train=False)
    assert eval_size(images, ids, None).equal(eval_size.normalise(images))


def test_an_augmented_image_depends_on_seed_sample_and_visit_and_on_nothing_else() -> None:
    images, ids, visits = batch()
    options = DataOptions(pad_crop=2, flip=True, erase=0.5)
    whole = augment(options)(images, ids, visits)
    backwards = augment(options)(images.flip(0), ids.flip(0), visits.flip(0)).flip(0)
    alone = torch.cat([augment(options)(images[i : i + 1], ids[i : i + 1], visits[i : i + 1]) for i in range(64)])
    assert whole.equal(backwards)
    assert whole.equal(alone)
    other_seed = Augment(options, description(), SEED + 1, True, CPU, torch.float32, False)
    for other in (augment(options)(images, ids, visits + 1), augment(options)(images, ids + 1, visits)):
        assert (other != whole).flatten(1).any(1).double().mean() > 0.9
    assert not other_seed(images, ids, visits).equal(whole)


def crop(size: int, train: bool, resized_crop: bool | None = None, policy: str = "none", seed: int = SEED) -> Crop:
    options = DataOptions(resized_crop=resized_crop, policy=policy)  # type: ignore[arg-type]
    return Crop(options, size, seed, train, variable_size=True)


def test_the_centre_crop_of_a_small_size_is_the_whole_middle_square() -> None:
    image = picture(0, width=14, height=10)
    cropped = crop(10, train=False)(image, 0, 0)
    assert cropped.numpy().transpose(1, 2, 0).tolist() == np.asarray(image)[:, 2:12].tolist()


def test_the_centre_crop_of_224_pixels_is_seven_eighths_of_the_shorter_side() -> None:
    image = picture(0, width=300, height=256)
    cropped = crop(224, train=False)(image, 0, 0)
    assert cropped.numpy().transpose(1, 2, 0).tolist() == np.asarray(image)[16:240, 38:262].tolist()


def test_training_without_the_random_crop_is_cropped_like_evaluation() -> None:
    image = picture(0, width=30, height=20)
    assert crop(8, train=True, resized_crop=False)(image, 5, 7).equal(crop(8, train=False)(image, 0, 0))


@settings(deadline=None)
@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 10**6), st.integers(0, 1000))
def test_random_crops_stay_within_the_image(width: int, height: int, index: int, visit: int) -> None:
    left, top, right, bottom = crop(8, train=True)._random_box(width, height, index, visit)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize(("width", "height"), [(1, 1000), (1000, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [8, 128])
def test_an_image_of_any_shape_becomes_a_square(width: int, height: int, train: bool, size: int) -> None:
    for channels, mode in ((1, "L"), (3, "RGB")):
        image = Image.new(mode, (width, height), 77 if channels == 1 else (77, 77, 77))
        cropped = crop(size, train)(image, 1, 2)
        assert cropped.dtype == torch.uint8
        assert cropped.shape == (channels, size, size)
        assert (cropped == 77).all()


def test_random_crops_cover_the_areas_and_aspect_ratios_of_the_paper() -> None:
    boxes = [crop(8, train=True)._random_box(300, 200, index, 0) for index in range(2000)]
    areas = np.array([(right - left) * (bottom - top) for left, top, right, bottom in boxes]) / 60000
    ratios = np.array([(right - left) / (bottom - top) for left, top, right, bottom in boxes])
    assert 0.079 < areas.min() < 0.1
    assert 0.85 < areas.max() < 0.9  # 4/3 of the height squared is 8/9 of the image
    assert 0.74 < ratios.min() < 0.77
    assert 1.30 < ratios.max() < 1.35
    random = np.random.default_rng(0)
    expected_areas, shapes = (
        random.uniform(0.08, 1, 10**5) * 60000,
        np.exp(random.uniform(-1, 1, 10**5) * math.log(4 / 3)),
    )
    fits = (np.sqrt(expected_areas * shapes) <= 300) & (np.sqrt(expected_areas / shapes) <= 200)
    assert areas.mean() == pytest.approx(expected_areas[fits].mean() / 60000, abs=0.02)


def test_a_random_crop_depends_on_seed_sample_and_visit() -> None:
    image = picture(0, width=60, height=50)
    crops = [crop(8, train=True, seed=seed)(image, index, visit) for seed, index, visit in
             [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]  # fmt: skip
    assert len({tuple(pixels.flatten().tolist()) for pixels in crops}) == 4
    assert crop(8, train=True, seed=0)(image, 0, 0).equal(crops[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_a_policy_depends_on_seed_sample_and_visit_and_leaves_torchs_generator_alone(
    policy: str, channels: int
) -> None:
    image = torch.randint(256, (channels, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before = torch.get_rng_state()
    images = [apply_policy(policy, image, 0, index, 0) for index in range(20)]
    torch.manual_seed(99)
    again = [apply_policy(policy, image, 0, index, 0) for index in range(20)]
    torch.set_rng_state(before)
    assert all(a.equal(b) for a, b in zip(images, again, strict=True))
    assert all(pixels.shape == image.shape and pixels.dtype == torch.uint8 for pixels in images)
    assert len({tuple(pixels.flatten().tolist()) for pixels in images}) > 10
    others = [[apply_policy(policy, image, seed, i, visit) for i in range(20)] for seed, visit in ((1, 0), (0, 1))]
    assert not any(all(a.equal(b) for a, b in zip(images, other, strict=True)) for other in others)


def test_no_policy_returns_the_image_itself() -> None:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    assert apply_policy("none", image, 0, 0, 0) is image
