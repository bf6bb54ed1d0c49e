"""Mixed photos are what the papers say, and their labels say what is in them."""

import numpy as np
import pytest
import timm.data.mixup
import torch
from torch.nn import functional as F

from vision_attn.cli import main
from vision_attn.data.mixing import MixingConfig, mix
from vision_attn.errors import UsageError

CLASSES = 5


def batch(size=4, height=12, width=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8, generator=generator)
    return images, torch.arange(size) % CLASSES, torch.ones(size)


def mixed(config, images, labels, weights, seed=(0, 0, 7)):
    return mix(images, labels, weights, config, num_classes=CLASSES, seed=seed)


def test_mixup_is_the_papers_equation_with_the_share_that_the_label_says():
    images, labels, weights = batch()
    pixels, shares, _ = mixed(MixingConfig(mixup_alpha=1.0), images, labels, weights)
    share = float(shares[0, 0])
    assert 0.02 < share < 0.98
    torch.testing.assert_close(
        shares, share * F.one_hot(labels, CLASSES) + (1 - share) * F.one_hot(labels.roll(1), CLASSES)
    )
    expected = share * images.double() + (1 - share) * images.roll(1, 0).double()
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    # To the nearest grey level: what is lost is no more than half of one.
    assert (pixels.double() - expected).abs().max() <= 0.5 + 1e-4


def test_a_cutmix_label_is_the_area_that_was_not_cut_out():
    generator = np.random.default_rng(0)
    for seed in range(20):
        images, labels, weights = batch(3, *generator.integers(5, 20, 2))
        pixels, shares, _ = mixed(MixingConfig(cutmix_alpha=1.0), images, labels, weights, (seed,))
        own = (pixels == images).all(1)
        other = (pixels == images.roll(1, 0)).all(1)
        assert (own | other).all()
        torch.testing.assert_close(shares[torch.arange(3), labels], own.float().mean((1, 2)), atol=0.01, rtol=0)
        ys, xs = torch.nonzero(~own[0], as_tuple=True)
        if len(ys):
            # A rectangle.
            assert len(ys) == (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)


@pytest.mark.parametrize("cut", [False, True])
def test_pixels_and_labels_are_those_of_timm_for_the_same_share_and_rectangle(cut, monkeypatch):
    # Of two photos, timm's partner (the mirrored batch) is ours (the one before).
    images, labels, weights = batch(2, 20, 20)
    config = MixingConfig(cutmix_alpha=1.0) if cut else MixingConfig(mixup_alpha=1.0)
    pixels, shares, _ = mixed(config, images, labels, weights)
    share = float(shares[0, 0])
    assert 0.02 < share < 0.98
    theirs = timm.data.mixup.Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0, num_classes=CLASSES)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (share, cut))
    ys, xs = torch.nonzero((pixels[0] != images[0]).any(0), as_tuple=True)
    box = (int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1)
    monkeypatch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", lambda *args, **kwargs: (box, share))
    expected, targets = theirs(images.float(), labels)
    torch.testing.assert_close(shares, targets)
    torch.testing.assert_close(pixels.float(), expected, atol=0.51, rtol=0)


def test_several_labels_are_mixed_as_shares():
    images, _, weights = batch(2)
    labels = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0]])
    _, shares, _ = mixed(MixingConfig(mixup_alpha=1.0), images, labels, weights)
    share = float(shares[0, 0])
    torch.testing.assert_close(shares, torch.tensor([[share, 1, 1 - share, 0, 0], [1 - share, 1, share, 0, 0]]))


def test_the_loss_is_that_of_both_photos_with_their_weights():
    images, labels, _ = batch(3)
    weights = torch.tensor([1.0, 3.0, 0.0])
    logits = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(1))
    share = float(mixed(MixingConfig(mixup_alpha=1.0), images, labels, torch.ones(3))[1][0, 0])
    _, shares, counted = mixed(MixingConfig(mixup_alpha=1.0), images, labels, weights)
    own = weights * F.cross_entropy(logits, labels, reduction="none")
    others = weights.roll(1) * F.cross_entropy(logits, labels.roll(1), reduction="none")
    torch.testing.assert_close(
        counted * F.cross_entropy(logits, shares, reduction="none"), share * own + (1 - share) * others
    )
    torch.testing.assert_close(counted.sum(), weights.sum())
    _, shares, counted = mixed(MixingConfig(mixup_alpha=1.0), images, labels, torch.zeros(3))
    assert counted.tolist() == [0, 0, 0]
    assert torch.isfinite(shares).all()


def test_how_often_and_which_is_as_the_config_says():
    images, labels, weights = batch(2)
    config = MixingConfig(mixup_alpha=1.0, cutmix_alpha=1.0, prob=0.5, switch_prob=0.25)
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    for seed in range(200):
        pixels, shares, _ = mixed(config, images, labels, weights, (seed,))
        copied = ((pixels == images) | (pixels == images.roll(1, 0))).float().mean()
        kinds["none" if shares is labels else "cutmix" if copied > 0.99 else "mixup"] += 1
    assert kinds["none"] == pytest.approx(100, abs=25)
    assert kinds["cutmix"] == pytest.approx(25, abs=15)


def test_shares_are_drawn_from_the_beta_distribution():
    images, labels, weights = batch(2, 4, 4)
    for alpha in (0.2, 4.0):
        config = MixingConfig(mixup_alpha=alpha)
        shares = [float(mixed(config, images, labels, weights, (seed,))[1][0, 0]) for seed in range(150)]
        assert np.mean(shares) == pytest.approx(0.5, abs=0.08)
        assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.3)


def test_the_draw_depends_on_the_seed_alone_and_leaves_random_states():
    images, labels, weights = batch()
    config = MixingConfig(mixup_alpha=1.0, cutmix_alpha=1.0)
    first = mixed(config, images, labels, weights, (1, 2, 3))
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    second = mixed(config, images, labels, weights, (1, 2, 3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[1], mixed(config, images, labels, weights, (1, 2, 4))[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_alpha": -0.1}, "mixup_alpha of at least 0, got -0.1"),
        ({"cutmix_alpha": -1.0}, "cutmix_alpha of at least 0, got -1.0"),
        ({"mixup_alpha": 1.0, "prob": 1.5}, r"prob within \[0, 1\], got 1.5"),
        ({"mixup_alpha": 1.0, "switch_prob": -0.5}, "switch_prob within"),
        ({}, "got neither: leave data.mixing out"),
    ],
)
def test_shares_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        MixingConfig(**options)


@pytest.mark.slow
def test_what_the_config_refuses_is_told_in_one_line(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("data: {source: shapes, options: {size: 16, train: 8, validation: 8}, mixing: {mixup_alpha: -1}}")
    assert main(["data", "report", "--config", str(config)]) == 2
    assert capsys.readouterr().err == (
        "vision-attn: expected data.mixing.mixup_alpha of at least 0, got -1.0: 0 is none\n"
    )
