"""What collects all tokens: the class token's attention, and that of learned latents."""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vision_attn.layers.base import check_positive
from vision_attn.layers.tokens.base import attend, check_mask, check_tokens, join_heads, split_heads, width_of_heads


class ClassAttention(nn.Module):
    """The class token attends to all tokens, itself among them, (B, N, C) -> (B, 1, C): softmax(q kᵀ / sqrt(D)) v.

    Cost: N C. Attention: (B, K, 1, N), recorded as "cross".

    Source: Touvron et al., "Going deeper with Image Transformers", ICCV 2021
    (https://arxiv.org/abs/2103.17239). Parameters: 4 C² + 4 C, 3 C less without the bias of q, k, v. State-dict keys
    are timm's.

    Args:
        dim: C.
        num_heads: K.
        qkv_bias: Whether queries, keys and values have a bias.
        attn_drop: Dropout on the attention.
        proj_drop: Dropout after the projection.

    Raises:
        UsageError: heads do not divide the channels.

    Example:
        >>> ClassAttention(192, num_heads=4)(torch.zeros(2, 197, 192)).shape
        torch.Size([2, 1, 192])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = width_of_heads(dim, num_heads)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Returns the new class token, (B, 1, C).

        Args:
            x: (B, N, C), the class token first.
            mask: What broadcasts to (B, K, 1, N): boolean, True takes part, or added to the scores.
        """
        check_tokens(x, self.dim)
        q, k, v = (split_heads(part, self.head_dim) for part in (self.q(x[:, :1]), self.k(x), self.v(x)))
        check_mask(mask, q, k)
        return self.proj_drop(self.proj(join_heads(attend(q, k, v, self.attn_drop, mask))))


class MapPooling(nn.Module):
    """Multi-head attention pooling: a learned latent attends to all tokens, then a residual MLP, (B, N, C) -> (B, C).

    y = attend(latent, x), and y + MLP(LN(y)). Cost: N C for each latent. Attention: (B, K, L, N), recorded as "cross".

    Sources: Lee et al., "Set Transformer", ICML 2019, eq. 11 (https://arxiv.org/abs/1810.00825), as the MAP head of
    Zhai et al., "Scaling Vision Transformers", CVPR 2022 (https://arxiv.org/abs/2106.04560). Parameters:
    (4 + 2 mlp_ratio) C² + (7 + mlp_ratio + L) C. State-dict keys are timm's.

    Args:
        dim: C.
        num_heads: K.
        num_latents: L; more than one give (B, L, C).
        mlp_ratio: Hidden width of the MLP over C.
        qkv_bias: Whether queries, keys and values have a bias.
        norm_eps: Epsilon of the LayerNorm.
        act: Activation of the MLP.

    Raises:
        UsageError: heads do not divide the channels.

    Example:
        >>> MapPooling(192, num_heads=3)(torch.zeros(2, 196, 192)).shape
        torch.Size([2, 192])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        num_latents: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        act: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        check_positive("num_latents", num_latents)
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = width_of_heads(dim, num_heads)
        self.latent = nn.Parameter(torch.empty(1, num_latents, dim))
        nn.init.trunc_normal_(self.latent, std=dim**-0.5)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), act_layer=act)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Returns what the latents collect, (B, C), or (B, L, C) where there are several.

        Args:
            x: (B, N, C).
            mask: What broadcasts to (B, K, L, N): boolean, True takes part, or added to the scores.
        """
        check_tokens(x, self.dim)
        q = split_heads(self.q(self.latent), self.head_dim).expand(x.shape[0], -1, -1, -1)
        k, v = (split_heads(part, self.head_dim) for part in self.kv(x).split(self.dim, dim=-1))
        check_mask(mask, q, k)
        pooled = self.proj(join_heads(attend(q, k, v, None, mask)))
        pooled = pooled + self.mlp(self.norm(pooled))
        return pooled[:, 0] if pooled.shape[1] == 1 else pooled
