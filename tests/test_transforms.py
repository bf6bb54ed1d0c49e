"""Pipelines written in YAML, and the geometry they leave."""

import json

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as tv

from vision_attn.data.transforms import (
    Preprocessing,
    build_pipeline,
    eval_transforms,
    find_geometry,
    normalize,
    train_transforms,
)
from vision_attn.errors import UsageError


def planted(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    top, left, bottom, right = box
    image[top:bottom, left:right] = 255
    return image


@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
@pytest.mark.parametrize(("height", "width"), [(300, 480), (480, 300), (97, 211)])
def test_geometry_carries_a_planted_square_back_to_its_place(mode, height, width):
    box = (height // 2 - 12, width // 2 - 4, height // 2 + 20, width // 2 + 28)
    image = planted(height, width, box)
    preprocessing = Preprocessing((128, 96), transforms=eval_transforms((128, 96), resize_mode=mode))
    pixels, geometry = preprocessing(image)
    back, seen = geometry.to_original(pixels[0].float())
    # What was not cut off comes back within the blur of one resampling.
    truth = torch.from_numpy(image[..., 0]).float()
    assert ((back - truth).abs()[seen] > 128).float().mean() < 0.01
    ys, xs = torch.nonzero(back > 128, as_tuple=True)
    assert abs(float(ys.float().mean()) - (box[0] + box[2] - 1) / 2) < 1
    assert abs(float(xs.float().mean()) - (box[1] + box[3] - 1) / 2) < 1


def test_a_centre_crop_leaves_the_rest_unseen():
    preprocessing = Preprocessing((100, 100), transforms=eval_transforms(100, crop_pct=0.5))
    _, geometry = preprocessing(np.zeros((200, 400, 3), np.uint8))
    _, seen = geometry.to_original(torch.zeros(1, 1))
    # A 200 x 400 photo becomes 200 x 400, of which 100 x 100 in the middle is kept.
    assert seen.sum() == 100 * 100
    assert seen[50:150, 150:250].all()


def test_the_default_evaluation_is_torchvisions_resize_and_centre_crop():
    image = np.random.default_rng(0).integers(0, 256, (320, 400, 3), dtype=np.uint8)
    image = np.kron(image[::8, ::8], np.ones((8, 8, 1), np.uint8))
    ours, _ = Preprocessing((224, 224))(image)
    theirs = tv.center_crop(tv.resize(torch.from_numpy(image).permute(2, 0, 1), 256, antialias=True), [224, 224])
    assert (ours.float() - theirs.float()).abs().mean() < 3


def test_normalisation_is_that_of_torchvision():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.4), (0.3, 0.2, 0.5)
    expected = tv.normalize(images.double() / 255, mean, std)
    torch.testing.assert_close(normalize(images, mean=mean, std=std).double(), expected, atol=1e-5, rtol=0)


def test_preprocessing_survives_json():
    preprocessing = Preprocessing((64, 48), (0.5,) * 3, (0.25,) * 3, eval_transforms((64, 48), resize_mode="pad"))
    restored = Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict())))
    image = np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    assert restored == preprocessing
    assert torch.equal(restored(image)[0], preprocessing(image)[0])


def test_a_seed_gives_the_same_augmentation():
    image = np.random.default_rng(2).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    first, second = build_pipeline(train_transforms(32), seed=3), build_pipeline(train_transforms(32), seed=3)
    assert all(np.array_equal(first(image=image)["image"], second(image=image)["image"]) for _ in range(4))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("HorizontlFlip", "did you mean 'HorizontalFlip'"),
        ({"HorizontalFlip": {"pp": 1}}, "options that HorizontalFlip takes"),
        ({"RandomResizedCrop": {"size": [0, 3]}}, "must be >= 1"),
        ({"Resize": {"height": 8, "width": 8, "interpolation": "cubic"}}, "did you mean 'bicubic'"),
        (7, "Name: {option: value}"),
    ],
)
def test_a_wrong_transform_is_told_in_one_line(spec, message):
    with pytest.raises(UsageError, match=message) as caught:
        build_pipeline([spec])
    assert "\n" not in str(caught.value)


def test_a_pipeline_of_another_size_is_refused():
    with pytest.raises(UsageError, match="end with a crop"):
        Preprocessing((64, 64), transforms=[{"Resize": {"height": 32, "width": 32}}])(np.zeros((9, 9, 3), np.uint8))


def test_geometry_is_exact_for_a_hand_computed_crop():
    pipeline = build_pipeline([{"SmallestMaxSize": {"max_size": 50}}, {"CenterCrop": {"height": 40, "width": 40}}])
    _, geometry = find_geometry(pipeline, np.zeros((100, 200, 3), np.uint8))
    # Halved to 50 x 100; the crop starts 5 down and 30 across.
    np.testing.assert_allclose(geometry.matrix, [[0.5, 0, -30], [0, 0.5, -5]], atol=1e-5)
