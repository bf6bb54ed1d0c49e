import pytest
import torch
from torch import nn

import vision_attn as va
from vision_attn.cli import main
from vision_attn.layers.costs import count_multiply_adds, count_parameters, layer_cost, layer_speed, peak_memory


def test_multiply_adds_of_a_convolution_are_those_counted_by_hand() -> None:
    convolution = nn.Conv2d(4, 6, 3, padding=1)
    # Each of 6 x 5 x 7 outputs sums 4 x 3 x 3 products.
    assert count_multiply_adds(convolution, torch.zeros(1, 4, 5, 7)) == 6 * 5 * 7 * 4 * 9


def test_multiply_adds_of_se_are_its_two_layers() -> None:
    assert layer_cost("se", 64, (7, 9)).multiply_adds == 2 * 64 * 4


def test_multiply_adds_of_fused_attention_are_its_projections_and_two_products() -> None:
    layer = va.create_token_layer("self", 16, num_heads=2)
    tokens = torch.zeros(1, 12, 16)
    # Four projections 16 x 16 of 12 tokens; queries by keys and weights by values, 12 x 12 of 16 numbers each.
    assert count_multiply_adds(layer, tokens, grid=(3, 4)) == 4 * 12 * 16 * 16 + 2 * 12 * 12 * 16


def test_counting_leaves_running_statistics_alone() -> None:
    norm = nn.BatchNorm2d(3)
    count_multiply_adds(norm, torch.ones(1, 3, 2, 2))
    assert norm.num_batches_tracked == 0 and norm.training


def test_parameters_are_those_that_are_trained() -> None:
    layer = nn.Linear(3, 5)
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 15


def test_peak_memory_is_that_of_the_largest_moment() -> None:
    def run() -> None:
        large = torch.zeros(1 << 20)
        del large
        torch.zeros(1 << 10)

    peak = peak_memory(run)
    assert 4 << 20 <= peak < (4 << 20) + (1 << 16)


def test_speed_is_measured_for_blocks_of_a_fixed_size() -> None:
    speed = layer_speed("bot", 16, (4, 5), batch_size=2, repeats=1)
    assert min(speed.forward, speed.training, speed.memory) > 0


def test_the_table_lists_every_block_and_every_attention(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "--channels", "32", "--size", "4,6"]) == 0
    printed = capsys.readouterr().out
    listed = {line.split()[0] for line in printed.splitlines() if line.strip()}
    assert set(va.list_layers()) <= listed and set(va.list_token_layers()) <= listed


def test_the_table_gives_parameters_and_multiply_adds_at_256_channels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "se"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["se"])
    assert line.split()[:5] == ["se", "channel", "8,464", "0.01", "M"] and "CVPR 2018" in line


def test_the_table_measures_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "eca", "--bench", "--channels", "16", "--size", "4", "--device", "cpu"]) == 0
    assert "memory MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cbm"], "expected a known layer, got 'cbm': did you mean 'cbam'"),
        (["--group", "chanel"], "expected a known group of layers, got 'chanel': did you mean 'channel'"),
        (["se", "--group", "spatial"], "expected layers in the group spatial, got se"),
        (["--channels", "0"], "expected a number of at least 1, got '0'"),
        (["--size", "a"], "expected a size such as 224"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layers", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
