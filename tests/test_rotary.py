"""Rotary positions: angles equal to timm's and to complex numbers written out, and scores that know offsets alone."""

import cmath
import math

import numpy as np
import pytest
import torch
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    apply_rot_embed_cat,
)

from vision_attn.errors import UsageError
from vision_attn.layers.rotary import AxialRotary, MixedRotary, rotate

EVA02 = {"temperature": 10_000, "order": "yx", "reference_grid": (4, 4)}
DINOV3 = {"coordinates": "centered", "order": "yx", "rotate_half": True}
GRID = (5, 7)


def _timm(x, table, num_prefix, *, half=False):
    turned = apply_rot_embed_cat(x[:, :, num_prefix:], table, half=half)
    return torch.cat((x[:, :, :num_prefix], turned), dim=2)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (EVA02, RotaryEmbeddingCat(16, temperature=10_000, in_pixels=False, ref_feat_shape=[4, 4])),
        ({}, RotaryEmbeddingCat(16, temperature=100, in_pixels=False, grid_indexing="xy")),
        (
            {"offset": 1.0, "rotate_half": True},
            RotaryEmbeddingCat(
                16, temperature=100, in_pixels=False, grid_indexing="xy", grid_offset=1.0, rotate_half=True
            ),
        ),
        (DINOV3, RotaryEmbeddingDinoV3(16)),
        ({**DINOV3, "temperature": 30.0, "offset": 0.2}, RotaryEmbeddingDinoV3(16, temperature=30.0, grid_offset=0.2)),
    ],
    ids=["eva02", "heo", "xy with offset and halves", "dinov3", "dinov3 with offset"],
)
@pytest.mark.parametrize("num_prefix", [0, 3])
def test_axial_angles_equal_timms(ours, theirs, num_prefix):
    x = torch.randn(2, 3, num_prefix + 35, 16)
    wanted = _timm(x, theirs.get_embed(GRID), num_prefix, half=theirs.rotate_half)
    torch.testing.assert_close(rotate(x, AxialRotary(16, **ours)(GRID, num_prefix=num_prefix)), wanted)


@pytest.mark.parametrize("order", ["xy", "yx"])
def test_mixed_angles_equal_timms_with_the_same_frequencies(order):
    theirs = RotaryEmbeddingMixed(48, depth=2, num_heads=3, grid_indexing={"xy": "xy", "yx": "ij"}[order])
    ours = MixedRotary(48, 3, 2, order=order)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 36, 16)
    for layer, rope in enumerate(ours(GRID, num_prefix=1)):
        torch.testing.assert_close(rotate(x, rope), _timm(x, theirs.get_embed(GRID)[layer], 1))


def test_mixed_frequencies_start_as_the_papers():
    torch.manual_seed(0)
    freqs = MixedRotary(32, 2, 3, temperature=10.0).freqs.detach()
    assert freqs.numel() == 3 * 32  # L C
    magnitudes = 10.0 ** -(torch.arange(4) * 4 / 16)
    torch.testing.assert_close(freqs.norm(dim=0), magnitudes.repeat(2).expand(3, 2, 8))
    # The second half of the pairs turns at a right angle to the first, in every head at another angle.
    assert (freqs[..., :4] * freqs[..., 4:]).sum(0).abs().max() < 1e-6
    assert torch.atan2(freqs[1, ..., 0], freqs[0, ..., 0]).unique().numel() == 6


@pytest.mark.parametrize("rotate_half", [False, True])
def test_a_pair_is_turned_as_a_complex_number(rotate_half):
    x = np.random.default_rng(0).normal(size=(6, 8))  # a grid of 2 x 3, D = 8
    rope = AxialRotary(8, temperature=50.0, rotate_half=rotate_half)((2, 3), dtype=torch.float64)
    wanted = np.empty_like(x)
    for token in range(6):
        row, column = divmod(token, 3)
        for pair in range(4):
            place = (column, row)[pair // 2]
            angle = place * 50.0 ** -((pair % 2) / 2)
            first, second = (pair, pair + 4) if rotate_half else (2 * pair, 2 * pair + 1)
            turned = complex(x[token, first], x[token, second]) * cmath.exp(1j * angle)
            wanted[token, first], wanted[token, second] = turned.real, turned.imag
    np.testing.assert_allclose(rotate(torch.from_numpy(x)[None, None], rope)[0, 0].numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, EVA02, DINOV3, "mixed"])
def test_scores_depend_on_the_offset_alone(settings):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    if settings == "mixed":
        rope = MixedRotary(16, 1, 1)(GRID, dtype=torch.float64)[0]
    else:
        rope = AxialRotary(16, **settings)(GRID, dtype=torch.float64)
    # The same query and the same key at every place.
    q, k = (rotate(part.expand(1, 1, 35, 16), rope) for part in (q, k))
    scores = (q @ k.transpose(2, 3)).detach().view(5, 7, 5, 7)
    for down in range(-4, 5):
        for right in range(-6, 7):
            same = [
                scores[row, column, row + down, column + right]
                for row in range(max(0, -down), min(5, 5 - down))
                for column in range(max(0, -right), min(7, 7 - right))
            ]
            assert max(same) - min(same) < 1e-10
    assert scores[0, 0].flatten().unique().numel() == 35


def test_prefix_tokens_and_the_length_of_tokens_stay():
    x = torch.randn(2, 3, 37, 16)
    for rope in (AxialRotary(16)(GRID, num_prefix=2), MixedRotary(48, 3, 1)(GRID, num_prefix=2)[0]):
        turned = rotate(x, rope)
        assert torch.equal(turned[:, :, :2], x[:, :, :2])
        assert not torch.equal(turned[:, :, 3:], x[:, :, 3:])
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_a_model_in_bfloat16_has_angles_in_float32():
    axial = AxialRotary(16).to(torch.bfloat16)(GRID, dtype=torch.bfloat16)
    mixed = MixedRotary(48, 3, 1).to(torch.bfloat16)(GRID, dtype=torch.bfloat16)[0]
    assert axial.sin.dtype == mixed.cos.dtype == torch.float32
    assert rotate(torch.randn(1, 3, 35, 16, dtype=torch.bfloat16), axial).dtype == torch.bfloat16


def test_mixed_frequencies_learn():
    rope = MixedRotary(48, 3, 2)
    rotate(torch.randn(1, 3, 35, 16), rope(GRID)[1]).square().sum().sub(rope(GRID)[1].sin.sum()).backward()
    assert rope.freqs.grad[:, 1].abs().min() > 0
    assert rope.freqs.grad[:, 0].abs().max() == 0


def test_coordinates_are_moved_and_stretched_in_training_alone():
    plain = AxialRotary(16, **DINOV3)(GRID).sin
    rope = AxialRotary(16, **DINOV3, shift=0.1, jitter=1.2, rescale=2.0)
    assert torch.equal(rope.eval()(GRID).sin, plain)
    assert not torch.equal(rope.train()(GRID).sin, plain)


@pytest.mark.parametrize(
    ("options", "most"), [({"shift": 0.25}, 0.25), ({"jitter": 1.5}, math.log(1.5)), ({"rescale": 2.0}, math.log(2))]
)
def test_training_draws_stay_in_their_range(options, most):
    torch.manual_seed(0)
    rope = AxialRotary(8, **DINOV3, **options).train()
    plain = torch.tensor([[2 * math.pi * 0.5, -2 * math.pi * 0.5]], dtype=torch.float64)
    drawn = torch.stack([rope._augmented(plain)[0] for _ in range(200)])
    change = (drawn - plain) / (2 * math.pi) if "shift" in options else (drawn / plain).log()
    assert change.abs().max() <= most + 1e-9
    assert change.max() > 0.8 * most
    assert change.min() < -0.8 * most
    together = torch.allclose(change[:, 0], change[:, 1])
    assert together == ("rescale" in options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AxialRotary(6), "multiple of 4 channels"),
        (lambda: MixedRotary(36, 6, 1), "multiple of 4 channels"),
        (lambda: MixedRotary(32, 3, 1), "num_heads to divide 32"),
        (lambda: AxialRotary(8, coordinates="centred"), "did you mean 'centered'"),
        (lambda: AxialRotary(8, order="ij"), "choose one of xy, yx"),
        (lambda: AxialRotary(8, coordinates="centered", reference_grid=(4, 4)), "coordinates='index'"),
        (lambda: rotate(torch.zeros(1, 2, 36, 8), AxialRotary(8)((5, 7))), "36 tokens of 8 channels, got \\(35, 8\\)"),
    ],
)
def test_bad_input_is_one_line(make, message):
    with pytest.raises(UsageError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
