"""Token merging: tokens that say the same become one while an encoder runs, so that later layers have fewer.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (https://arxiv.org/abs/2210.09461). For inference; nothing
is learned. What merged into what is told as it happens (`ReportMerge`), so that explanations find every patch.

Letters in shapes: B batch, N tokens before any merging (prefix and patches), n tokens now, C channels, D head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_attn.reporting import ReportMerge


class TokenMerging:
    """The tokens of one forward pass, and how far they have merged.

    An attention adds `bias` to its scores and hands its keys to `see`; then a call merges tokens. A merged token is the
    mean of all patches that it holds (sec. 3, "Tracking Token Size").

    Args:
        schedule: How many tokens go in each layer, first layer first; at most half of the patches go at once.
        num_prefix: Tokens before the patches, which never merge.
        report: What is told after each merging.
        tokens: (B, N, C), as they enter the first layer.

    Example:
        >>> merging = TokenMerging([2], 1, ReportMerge(), torch.zeros(1, 7, 8))
        >>> merging.see(torch.randn(1, 2, 7, 4))
        >>> merging(torch.randn(1, 7, 8)).shape, merging.sizes.sum()
        (torch.Size([1, 5, 8]), tensor(7.))
    """

    def __init__(self, schedule: Sequence[int], num_prefix: int, report: ReportMerge, tokens: Tensor) -> None:
        self.left = list(schedule)
        self.num_prefix = num_prefix
        self.report = report
        self.places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        # Counts, which bfloat16 does not hold from 257 on.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        self.sizes = torch.ones(tokens.shape[:2], device=tokens.device, dtype=dtype)
        self.started = False
        self.metric: Tensor | None = None

    def see(self, keys: Tensor) -> None:
        """Takes the keys (B, K, n, D) of a layer: their mean over the heads tells which tokens are alike."""
        self.metric = keys.detach().mean(1) if self.left and self.left[0] > 0 else None

    @property
    def bias(self) -> Tensor | None:
        """What is added to attention scores, (B, 1, 1, n): the log of each key's size (eq. 1); None where all are 1."""
        return self.sizes.log()[:, None, None] if self.started else None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns the tokens (B, n - r, C) after this layer's r have merged into others."""
        r = self.left.pop(0) if self.left else 0
        r = min(r, (tokens.shape[1] - self.num_prefix) // 2)
        if r <= 0:
            return tokens
        assert self.metric is not None
        into = bipartite_matching(self.metric, r, num_prefix=self.num_prefix)
        length = tokens.shape[1] - r
        sizes = self.sizes.new_zeros(into.shape[0], length).scatter_add(1, into, self.sizes)
        weighted = tokens * self.sizes[..., None]
        sums = weighted.new_zeros(into.shape[0], length, tokens.shape[2])
        sums = sums.scatter_add(1, into[..., None].expand_as(weighted), weighted)
        self.sizes, self.places, self.started = sizes, self.report(into.gather(1, self.places)), True
        return (sums / sizes[..., None]).to(tokens.dtype)

    def spread(self, tokens: Tensor) -> Tensor:
        """Returns a token for each of the N places, (B, N, C): every patch has that of the token it is part of."""
        if not self.started:
            return tokens
        return tokens.gather(1, self.places[..., None].expand(-1, -1, tokens.shape[2]))


def bipartite_matching(metric: Tensor, r: int, *, num_prefix: int = 0) -> Tensor:
    """Returns the new place of each token, (B, n) with numbers below n - r, after the r most alike have merged.

    Tokens at even places (A) each choose the most alike at an odd place (B) by cosine similarity; the r surest choices
    are carried out (sec. 3, "Bipartite Soft Matching"). Prefix tokens neither choose nor are chosen. The new order is
    prefix, what is left of A, B, each in its old order; the authors' code keeps that order only where there is a class
    token, and without one leaves A sorted by similarity.

    Args:
        metric: (B, n, D), by which tokens are alike: the keys, mean over the heads.
        r: How many tokens go, at most half of the patches.
        num_prefix: Tokens at the front that stay.
    """
    batch, length, _ = metric.shape
    metric = F.normalize(metric.float(), dim=-1)
    places = torch.arange(length, device=metric.device)
    of_a, of_b = places[num_prefix + num_prefix % 2 :: 2], places[num_prefix + 1 - num_prefix % 2 :: 2]
    likeness, choice = (metric[:, of_a] @ metric[:, of_b].transpose(1, 2)).max(-1)
    goes = torch.zeros_like(likeness, dtype=torch.bool).scatter(1, likeness.topk(r).indices, value=True)
    first_b = num_prefix + len(of_a) - r
    kept = num_prefix + (~goes).cumsum(1) - 1
    into = places.where(places < num_prefix, 0).repeat(batch, 1)
    into[:, of_a] = torch.where(goes, first_b + choice, kept)
    into[:, of_b] = first_b + torch.arange(len(of_b), device=metric.device)
    return into
