"""Attention among merged tokens, as attention among the patches that they hold.

A model that merges tokens computes what it would with a token for every patch, of which those of one group (the patches
of a merged token) are equal: each attends as the merged token does, receives an equal share of what that receives, and
the logit's gradient parts among them in the same way. The explanation of the merged model is that of this other one, so
that it has the full grid, and sums are kept. Nothing of it needs to exist whole: rows are gathered into groups, pass a
layer, and are spread again.

Letters: B batch, N tokens before any merging, n after it, K heads. `merged` is (B, N), the group of each token.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vision_attn.capture import AttentionRecord
from vision_attn.reporting import ReportMerge


def num_tokens(record: AttentionRecord) -> int:
    """Returns the number of keys before any merging."""
    return record.key_length if record.merged is None else record.merged.shape[1]


def group_sizes(merged: Tensor, like: Tensor) -> Tensor:
    """Returns how many tokens each group has, (B, n), in the type of `like` (B, n, ...), which says n."""
    ones = torch.ones(merged.shape, dtype=like.dtype, device=like.device)
    return ones.new_zeros(merged.shape[0], like.shape[1]).scatter_add(1, merged, ones)


def gathered(row: Tensor, merged: Tensor, count: int) -> Tensor:
    """Returns a row over tokens (B, N) as a row over `count` groups (B, n): the sum of each."""
    return row.new_zeros(row.shape[0], count).scatter_add(1, merged, row)


def spread(row: Tensor, merged: Tensor) -> Tensor:
    """Returns a row over groups (B, n) as a row over tokens (B, N): equal shares to the tokens of each."""
    return (row / group_sizes(merged, row)).gather(1, merged)


def of_members(features: Tensor, merged: Tensor) -> Tensor:
    """Returns features (B, n, C) for every token, (B, N, C): those of its group."""
    return features.gather(1, merged[..., None].expand(-1, -1, features.shape[-1]))


def group_means(features: Tensor, merged: Tensor, count: int) -> Tensor:
    """Returns features of tokens (B, N, C) as those of `count` groups, (B, n, C): the mean of each."""
    places = merged[..., None].expand_as(features)
    sums = features.new_zeros(len(features), count, features.shape[-1]).scatter_add(1, places, features)
    return sums / group_sizes(merged, sums)[..., None]


def expanded(matrix: Tensor, merged: Tensor) -> Tensor:
    """Returns attention (B, n, n) as that among all tokens, (B, N, N): rows are their group's, columns equal shares."""
    shares = matrix / group_sizes(merged, matrix)[:, None]
    rows = of_members(shares, merged)
    return rows.gather(2, merged[:, None].expand(-1, rows.shape[1], -1))


@contextmanager
def merges_seen(model: nn.Module) -> Iterator[Callable[[], Tensor | None]]:
    """Gives a function that returns the groups (B, N) of the tokens as they run through `model`, None before any."""
    current: list[Tensor | None] = [None]

    def begin(_module: nn.Module, _args: Any) -> None:
        current[0] = None

    def see(_module: nn.Module, _args: Any, output: Tensor) -> None:
        current[0] = output

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin).remove)
        for module in model.modules():
            if isinstance(module, ReportMerge):
                stack.callback(module.register_forward_hook(see).remove)
        yield lambda: current[0]
