"""TokenLayout: which tokens are what."""

import json

import pytest
import torch

from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout


def test_patches_are_the_tokens_after_the_prefix_row_by_row():
    layout = TokenLayout(prefix=("class", "register"), grid=(2, 3))
    assert layout.num_tokens == 8
    assert layout.patches(torch.arange(8)).tolist() == [[2, 3, 4], [5, 6, 7]]
    assert layout.patches(torch.zeros(4, 5, 8)).shape == (4, 5, 2, 3)


def test_query_is_the_class_token_where_there_is_one_else_the_mean():
    assert TokenLayout(prefix=("register", "class"), grid=(1, 1)).query == "class"
    assert TokenLayout(prefix=(), grid=(1, 1)).query == "mean"
    assert TokenLayout(prefix=("class",), grid=(1, 1), query="mean").query == "mean"


def test_layout_survives_json():
    layout = TokenLayout(prefix=("class", "distillation"), grid=(3, 5), query="distilled")
    assert TokenLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix": (), "grid": (0, 3)}, "positive integers"),
        ({"prefix": (), "grid": (3,)}, "positive integers"),
        (
            {"prefix": (), "grid": (2, 2), "query": "latent"},
            "expected a query of class, distilled, mean, class_mean, map",
        ),
        ({"prefix": (), "grid": (2, 2), "query": "class"}, "expected a 'class' token"),
        ({"prefix": ("register",), "grid": (2, 2), "query": "class_mean"}, "expected a 'class' token"),
        ({"prefix": ("class",), "grid": (2, 2), "query": "distilled"}, "expected a 'distillation' token"),
    ],
)
def test_layout_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        TokenLayout(**arguments)


def test_row_of_another_length_is_refused():
    with pytest.raises(UsageError, match=r"expected rows of 5 tokens \(1 prefix \+ 2 x 2\), got 4"):
        TokenLayout(prefix=("class",), grid=(2, 2)).patches(torch.zeros(4))
