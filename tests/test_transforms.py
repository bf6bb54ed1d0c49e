"""Pipelines written in YAML, and the geometry they leave."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

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
        ("RandAugmentt", "did you mean 'RandAugment'"),
        ("TrivialAugment", "did you mean 'TrivialAugmentWide'"),
        ({"RandAugment": {"num_op": 2}}, "options that RandAugment takes, got .*unexpected keyword argument 'num_op'"),
        ({"RandAugment": {"magnitude": 31}}, "magnitude is a whole number from 0 to 30"),
        ({"RandAugment": {"num_ops": 0}}, "num_ops is a whole number from 1"),
        ({"RandAugment": {"p": 2}}, r"p is within \[0, 1\]"),
        ({"RandAugment": {"interpolation": "cubic"}}, "'cubic' is not a valid InterpolationMode"),
        ({"AutoAugment": {"policy": "coco"}}, "'coco' is not a valid AutoAugmentPolicy"),
        ({"RandomErasing": {"scale": [0.5, 0.1]}}, "options that RandomErasing takes"),
    ],
)
def test_a_wrong_transform_is_told_in_one_line(spec, message):
    with pytest.raises(UsageError, match=message) as caught:
        build_pipeline([spec])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["RandAugment", "TrivialAugmentWide", "AutoAugment", "AugMix"])
def test_a_policy_is_torchvisions_and_draws_from_the_pipelines_seed(name):
    image = np.random.default_rng(3).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    pipeline, seen = build_pipeline([{name: {"interpolation": "bilinear", "fill": [1, 2, 3]}}]), []
    policy = pipeline.transforms[0].transform
    pipeline.transforms[0].transform = lambda picture: seen.append(torch.initial_seed()) or policy(picture)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    outs = []
    for seed in (1, 2, 1):
        pipeline.set_random_seed(seed)
        outs.append(pipeline(image=image)["image"])
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(outs[0], outs[2])
    assert not np.array_equal(outs[0], outs[1])
    assert outs[0].flags.writeable
    options = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": [1, 2, 3]}
    torch.manual_seed(seen[0])
    assert np.array_equal(np.asarray(getattr(v2, name)(**options)(Image.fromarray(image))), outs[0])


def test_a_policys_share_of_photos_is_its_p():
    image = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pipeline = build_pipeline([{"AutoAugment": {"p": 0.25}}], seed=0)
    pipeline.transforms[0].transform = lambda picture: Image.new("RGB", picture.size)
    assert sum(pipeline(image=image)["image"].max() == 0 for _ in range(200)) == pytest.approx(50, abs=15)


def test_erasing_leaves_noise_in_a_rectangle_of_the_area_that_was_asked_for():
    image = np.full((50, 60, 3), 100, np.uint8)
    pipeline = build_pipeline([{"RandomErasing": {"p": 1.0, "scale": [0.1, 0.2], "ratio": [0.5, 2.0]}}], seed=0)
    for _ in range(20):
        out = pipeline(image=image)["image"]
        ys, xs = np.nonzero((out != 100).any(2))
        box = out[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        assert 0.08 < box[..., 0].size / 3000 < 0.22
        assert (box != 100).any(2).mean() > 0.99
        assert 60 < box.std() < 90
    black = build_pipeline([{"RandomErasing": {"p": 1.0, "value": 0}}], seed=0)(image=image)["image"]
    assert set(np.unique(black)) == {0, 100}


def test_a_pipeline_of_another_size_is_refused():
    with pytest.raises(UsageError, match="end with a crop"):
        Preprocessing((64, 64), transforms=[{"Resize": {"height": 32, "width": 32}}])(np.zeros((9, 9, 3), np.uint8))


def test_geometry_is_exact_for_a_hand_computed_crop():
    pipeline = build_pipeline([{"SmallestMaxSize": {"max_size": 50}}, {"CenterCrop": {"height": 40, "width": 40}}])
    _, geometry = find_geometry(pipeline, np.zeros((100, 200, 3), np.uint8))
    # Halved to 50 x 100; the crop starts 5 down and 30 across.
    np.testing.assert_allclose(geometry.matrix, [[0.5, 0, -30], [0, 0.5, -5]], atol=1e-5)
