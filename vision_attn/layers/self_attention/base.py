"""What self-attention on maps shares: maps to tokens and back, positions relative to each other, and what lies where.

Letters in shapes: B batch, C channels, H W map, N = H W places, h heads, d = C / h width of a head, Q queries, K keys.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_attn.layout import KeyPositions


def to_tokens(x: Tensor, num_heads: int) -> Tensor:
    """Returns a map (B, h d, H, W) as tokens (B, h, N, d).

    They are laid out so that a token's channels lie side by side: without that torch's fused kernels decline, and the
    weights would be formed whole.
    """
    return x.flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3).contiguous()


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Returns tokens (B, h, N, d) as a map (B, h d, H, W)."""
    return tokens.transpose(2, 3).reshape(len(tokens), -1, height, width)


def every_place(height: int, width: int) -> KeyPositions:
    """Returns the positions of attention in which every place sees every place."""
    places = torch.arange(height * width)[None]
    return KeyPositions((height, width), keys=places, queries=places)


class RelativePositions(nn.Module):
    """Queries and keys whose products are q · k plus q · (r_row + r_column), learned vectors for each offset.

    A query at (i, j) and a key at (y, x) of its window get q · (rows[y - i + h - 1] + columns[x - j + w - 1]). Instead
    of forming this for all pairs, (B, heads, Q, K), a query gets one more number for each row and each column of keys,
    and a key gets as many that are 1 for its own row and its own column, else 0. The product of the longer vectors is
    the same, and fused kernels can compute it in memory linear in the places.

    Source: Srinivas et al., CVPR 2021, figure 4; Shaw et al., NAACL 2018 (https://arxiv.org/abs/1803.02155).

    Args:
        queries: Rows and columns of queries, (h, w).
        keys: Rows and columns of keys. Row 0 of them is the first that the first query sees.
        dim: d.
    """

    def __init__(self, queries: tuple[int, int], keys: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.queries, self.keys = queries, keys
        self.rows = nn.Parameter(torch.empty(queries[0] + keys[0] - 1, dim))
        self.columns = nn.Parameter(torch.empty(queries[1] + keys[1] - 1, dim))
        nn.init.trunc_normal_(self.rows, std=dim**-0.5)
        nn.init.trunc_normal_(self.columns, std=dim**-0.5)

    def forward(self, queries: Tensor, keys: Tensor, positions_of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the longer queries (B, h, Q, d + rows + columns) and keys (B, h, K, d + rows + columns).

        Args:
            queries: (B, h, Q, d).
            keys: (B, h, K, d).
            positions_of: The queries that the positions are multiplied with, where they are others (not scaled).
        """
        grid = (queries if positions_of is None else positions_of).unflatten(2, self.queries)
        rows = torch.einsum("bhijd,iyd->bhijy", grid, self.rows[_offsets(self.queries[0], self.keys[0], queries)])
        columns = torch.einsum("bhijd,jxd->bhijx", grid, self.columns[_offsets(self.queries[1], self.keys[1], queries)])
        number_rows, number_columns = self.keys
        own_row = torch.eye(number_rows, dtype=keys.dtype, device=keys.device).repeat_interleave(number_columns, 0)
        own_column = torch.eye(number_columns, dtype=keys.dtype, device=keys.device).repeat(number_rows, 1)
        own = torch.cat([own_row, own_column], 1).expand(*keys.shape[:2], -1, -1)
        longer = torch.cat([queries, rows.flatten(2, 3).to(queries), columns.flatten(2, 3).to(queries)], -1)
        return longer, torch.cat([keys, own], -1)


def _offsets(queries: int, keys: int, like: Tensor) -> Tensor:
    """Returns which entry of a table of offsets belongs to each query and key on one axis, (Q, K)."""
    query, key = torch.arange(queries, device=like.device), torch.arange(keys, device=like.device)
    return key[None] - query[:, None] + queries - 1


def attend_relative(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns softmax(Q Kᵀ + mask) V, (B, h, Q, d), of queries and keys that are longer than the values.

    The values are made as long with zeros: torch's fused kernel on CPUs wants one length.
    """
    longer = F.pad(values, (0, keys.shape[-1] - values.shape[-1]))
    attended = F.scaled_dot_product_attention(queries, keys, longer, attn_mask=mask, scale=1.0)
    return attended[..., : values.shape[-1]]
