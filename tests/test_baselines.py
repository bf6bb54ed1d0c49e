"""What stands where pixels were removed, by hand and beside SciPy."""

import pytest
import torch
from scipy import ndimage

from vision_attn.attribution.controls import random
from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout
from vision_attn.metrics.baselines import BASELINES, blurred, fill

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_blur_equals_scipys_gaussian_of_a_tenth_of_the_longer_side():
    images = noise(2, 3, 30, 40).double()
    # A sigma of 4 and a radius of 12; SciPy calls the reflection without the border pixel "mirror".
    expected = ndimage.gaussian_filter(images.numpy(), sigma=(0, 0, 4, 4), truncate=3, mode="mirror")
    torch.testing.assert_close(fill(images, "blur"), torch.from_numpy(expected))
    torch.testing.assert_close(blurred(images, 4.0), torch.from_numpy(expected))


def test_mean_and_black_are_what_normalisation_makes_of_a_colour():
    pixels = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    images = (pixels - mean) / std
    assert fill(images, "mean").abs().max() == 0
    black = fill(images, "black", mean=MEAN, std=STD)
    assert black.shape == images.shape
    torch.testing.assert_close(black * std + mean, torch.zeros_like(pixels), atol=1e-6, rtol=0)


def test_own_mean_is_one_colour_an_image_and_keeps_its_mean():
    images = noise(3, 3, 6, 4) + torch.arange(3.0)[:, None, None, None]
    own = fill(images, "own_mean")
    assert own.shape == images.shape
    assert torch.equal(own, own[:, :, :1, :1].expand_as(own))
    expected = [[float(sum(channel.flatten().tolist()) / 24) for channel in image] for image in images]
    torch.testing.assert_close(own[:, :, 0, 0], torch.tensor(expected))


def test_noise_is_gaussian_and_follows_from_the_image_and_the_seed_alone():
    images = noise(4, 3, 64, 64)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = fill(images, "noise", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.mean().abs() < 0.02
    assert found.std() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(fill(images.flip(0), "noise", seed=3).flip(0), found)
    assert torch.equal(fill(images[2:3], "noise", seed=3), found[2:3])
    correlation = torch.corrcoef(torch.cat([found.flatten(1), fill(images, "noise", seed=4).flatten(1)]))
    assert (correlation - torch.eye(8)).abs().max() < 0.05  # other images, other seeds: other noise


def test_noise_is_another_than_that_of_the_random_control():
    images = noise(1, 3, 64, 64)
    grid = TokenLayout(("class",), (14, 14))
    control = random(torch.nn.Identity(), images, layout=grid).flatten()
    for start in range(3):
        part = fill(images, "noise").flatten()[start * 196 : (start + 1) * 196]
        assert torch.corrcoef(torch.stack([control, part]))[0, 1].abs() < 0.25


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_is_the_same_in_any_batch_and_keeps_the_type(baseline):
    for dtype in (torch.float32, torch.float64):
        images = noise(3, 3, 20, 16).to(dtype)
        kept = images.clone()
        found = fill(images, baseline, mean=MEAN, std=STD)
        assert found.dtype == dtype
        assert found.shape == images.shape
        torch.testing.assert_close(fill(images[1:2], baseline, mean=MEAN, std=STD), found[1:2])
        found.add_(1.0)  # no view of the images
        assert torch.equal(images, kept)


@pytest.mark.parametrize(
    ("images", "baseline", "message"),
    [
        (torch.zeros(1, 3, 4, 4), "blurr", "expected a known baseline, got 'blurr': did you mean 'blur'"),
        (torch.zeros(1, 3, 4, 4), "black", "expected mean and std of the normalisation for baseline 'black'"),
        (torch.zeros(3, 4, 4), "mean", r"got torch.float32 \(3, 4, 4\): add a batch dimension"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "mean", "normalise first"),
    ],
)
def test_bad_input_is_refused(images, baseline, message):
    with pytest.raises(UsageError, match=message):
        fill(images, baseline)
