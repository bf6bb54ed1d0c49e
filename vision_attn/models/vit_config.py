"""The choices of a `ViT`, checked as they are made; what `vit.py` builds from and `from_timm.py` fills in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from timm.layers.activations import GELUTanh, QuickGELU
from torch import nn

from vision_attn.errors import UsageError
from vision_attn.layers.tokens import TOKEN_LAYERS
from vision_attn.models.weights import INTERPOLATIONS
from vision_attn.registry import unknown

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU}
MLPS = ("mlp", "swiglu")
POOLINGS = ("token", "avg", "map", "")
POSITIONS = ("learn", "sincos2d", "none")
ROTARY = ("axial", "mixed")
STEMS = ("patch", "conv")
INITS = ("trunc_normal", "xavier")

_SHARE = "share from 0 to below 1"
# Kind, least value (None: above 0), and both in words.
_RANGES: dict[str, tuple[type, int | None, str]] = {
    **dict.fromkeys(("embed_dim", "depth", "num_heads", "in_chans"), (Integral, 1, "whole number above 0")),
    **dict.fromkeys(("num_classes", "reg_tokens", "stem_extra"), (Integral, 0, "whole number from 0")),
    **dict.fromkeys(("mlp_ratio", "norm_eps"), (Real, None, "number above 0")),
    **{
        f"{part}_rate": (Real, 0, _SHARE)
        for part in ("drop", "pos_drop", "patch_drop", "proj_drop", "attn_drop", "drop_path")
    },
}


@dataclass(frozen=True)
class ViTConfig:
    """All choices of a `ViT`. Names and meanings are timm's where timm has the option.

    Attributes:
        img_size: (H, W) that the position grid is built for; other sizes are resampled as they come.
        patch_size: (P, P), or one number for both.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves the head out, and the model returns pooled features.
        embed_dim: C.
        depth: Number of blocks.
        num_heads: K, a divisor of `embed_dim`.
        mlp_ratio: Hidden width of the MLPs over C.
        attn_layer: Which attention each layer has: "self", all tokens to all, or another of `list_token_layers()`. One
            name, or at most `depth` that take turns: ("window", "window", "self") makes every third layer global.
        attn_options: Options of those layers by name, as in {"window": {"window_size": 7}}.
        qkv_bias: Whether queries, keys and values have a bias.
        k_bias: Whether the keys have one, where queries and values do; without, as in EVA-02, the keys' third of
            `qkv.bias` is there, zero, and never used.
        proj_bias: Whether the attention's output projection and the MLPs have one.
        scale_attn_norm: LayerNorm on what the heads give, before the output projection.
        mlp: "mlp", or "swiglu", fc2(silu(gate) * value) with gate and value the halves of fc1 (Shazeer 2020,
            https://arxiv.org/abs/2002.05202); its hidden width is that of one half.
        scale_mlp_norm: LayerNorm before the last layer of the MLPs, as in EVA-02 (Fang et al. 2023,
            https://arxiv.org/abs/2303.11331).
        qk_norm: LayerNorm on queries and keys, a head (Dehghani et al. 2023, https://arxiv.org/abs/2302.05442).
        init_values: Start of LayerScale (Touvron et al. 2021, https://arxiv.org/abs/2103.17239); None for none.
        class_token: Whether a class token leads the sequence.
        reg_tokens: Registers after it (Darcet et al. 2024, https://arxiv.org/abs/2309.16588).
        no_embed_class: Positions for the patches only, as in DeiT III and DINOv2 with registers.
        pos_embed: "learn", "sincos2d" (fixed, Beyer et al. 2022, https://arxiv.org/abs/2205.01580) or "none".
        rope: Rotary positions in every layer of "self" and "window" attention, in place of or beside `pos_embed`:
            "axial" or "mixed" (Heo et al. 2024, https://arxiv.org/abs/2403.13298); None for none.
        rope_options: Options of `AxialRotary` or `MixedRotary`, as in {"temperature": 10_000.0}.
        pos_interpolation: How positions reach another grid: "timm" (antialiased bicubic) or "hf" (plain bicubic).
        dynamic_img_size: Whether images of another size than `img_size` are taken.
        global_pool: "token" (class token), "avg" (mean of the patches), "map" (multi-head attention pooling, Zhai et
            al. 2022, https://arxiv.org/abs/2106.04560) or "" (all tokens reach the head).
        pre_norm: LayerNorm before the blocks, as in CLIP.
        final_norm: Whether there is a last LayerNorm at all.
        fc_norm: Last LayerNorm after the pooling instead of before; None means with "avg" only.
        stem: "patch", one strided convolution, or "conv", a 3 x 3 convolution of stride 2 for each halving (Xiao et al.
            2021, https://arxiv.org/abs/2106.14881).
        stem_extra: Further 3 x 3 convolutions of stride 1 at the end of the conv stem.
        weight_init: How linear layers of the blocks start: "trunc_normal" (0.02, as timm) or "xavier" (uniform,
            queries, keys and values each as a matrix of its own, as the paper's code); narrow networks learn sooner
            with it.
        act: Of MLPs, "gelu", "gelu_tanh" or "quick_gelu"; in "swiglu" the gate has a SiLU whatever this is.
        norm_eps: Epsilon of all LayerNorms.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the positions.
        patch_drop_rate: Share of patches left out in training (Li et al. 2023, https://arxiv.org/abs/2212.00794).
        proj_drop_rate: Dropout after the projections of attention and MLP.
        attn_drop_rate: Dropout on the attention.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 (Huang et al. 2016,
            https://arxiv.org/abs/1603.09382).

    Raises:
        UsageError: a choice is unknown or two do not go together.
    """

    img_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    attn_layer: str | tuple[str, ...] = "self"
    attn_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    qkv_bias: bool = True
    k_bias: bool = True
    proj_bias: bool = True
    scale_attn_norm: bool = False
    mlp: str = "mlp"
    scale_mlp_norm: bool = False
    qk_norm: bool = False
    init_values: float | None = None
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    pos_embed: str = "learn"
    rope: str | None = None
    rope_options: Mapping[str, Any] = field(default_factory=dict)
    pos_interpolation: str = "timm"
    dynamic_img_size: bool = True
    global_pool: str = "token"
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    stem: str = "patch"
    stem_extra: int = 0
    weight_init: str = "trunc_normal"
    act: str = "gelu"
    norm_eps: float = 1e-6
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    patch_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", pair_of(self.img_size))
        object.__setattr__(self, "patch_size", pair_of(self.patch_size))
        for kind, name, choices in (
            ("pooling", self.global_pool, POOLINGS),
            ("kind of positions", self.pos_embed, POSITIONS),
            ("kind of rotary positions", ROTARY[0] if self.rope is None else self.rope, ROTARY),
            ("MLP", self.mlp, MLPS),
            ("interpolation of positions", self.pos_interpolation, INTERPOLATIONS),
            ("stem", self.stem, STEMS),
            ("weight_init", self.weight_init, INITS),
            ("activation", self.act, ACTIVATIONS),
        ):
            if not isinstance(name, str) or name not in choices:
                raise unknown(kind, str(name), [choice for choice in choices if choice])
        self._check_values()
        grid_of(self.img_size, self.patch_size)
        self._check_attention()
        if self.embed_dim % self.num_heads:
            raise UsageError(
                f"expected num_heads to divide embed_dim={self.embed_dim}, got {self.num_heads}: change one of them"
            )
        if self.mlp_width < 1:
            raise UsageError(f"expected a mlp_ratio that leaves a hidden width, got {self.mlp_ratio}: raise it")
        if self.global_pool == "token" and not self.class_token:
            raise UsageError("expected a class token for global_pool='token', got none: use 'avg', or class_token=True")
        if self.pos_embed == "sincos2d" and self.embed_dim % 4:
            raise UsageError(f"expected embed_dim divisible by 4 for sincos2d, got {self.embed_dim}: round it")
        height, width = self.patch_size
        if self.stem_extra and self.stem != "conv":
            raise UsageError(f"expected stem='conv' for stem_extra={self.stem_extra}, got {self.stem!r}: leave it out")
        if self.stem == "conv" and (height != width or height < 2 or height & (height - 1)):
            raise UsageError(
                f"expected a square patch with a power of two for the conv stem, got {height} x {width}: use 8 or 16"
            )

    def _check_values(self) -> None:
        """Raises a UsageError where a switch, a number or a table of options is something else."""
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            if name in _RANGES:
                kind, least, what = _RANGES[name]
                fits = isinstance(value, kind) and not isinstance(value, bool)
                fits = fits and (value > 0 if least is None else value >= least)
                if not fits or (what == _SHARE and not value < 1):
                    raise UsageError(f"expected {name} as a {what}, got {value!r}: correct it")
            elif isinstance(entry.default, bool) and not isinstance(value, bool):
                raise UsageError(f"expected {name} as true or false, got {value!r}: choose one")
            elif name.endswith("_options") and not isinstance(value, Mapping):
                raise UsageError(f"expected {name} as options by name, got {value!r}: give {{name: value}}")
        start: Any = self.init_values
        if start is not None and (not isinstance(start, Real) or start < 0):
            raise UsageError(f"expected init_values as a number from 0, got {start!r}: 1e-5 is usual")

    def _check_attention(self) -> None:
        """Raises a UsageError where a layer's attention is unknown, or options are for none of them."""
        given = self.attn_layer
        if not isinstance(given, str | tuple | list):
            raise UsageError(f"expected attn_layer as one name or several that take turns, got {given!r}: use 'self'")
        names = (given,) if isinstance(given, str) else tuple(given)
        object.__setattr__(self, "attn_layer", names[0] if len(names) == 1 else names)
        for name in names or ("",):
            if not isinstance(name, str) or name not in TOKEN_LAYERS:
                raise unknown("attention", str(name), TOKEN_LAYERS)
        if len(names) > self.depth:
            raise UsageError(
                f"expected attention for {self.depth} layers at most, got {len(names)} names: leave some out, or raise "
                "depth"
            )
        for name, options in self.attn_options.items():
            if name not in names:
                raise UsageError(
                    f"expected attn_options for {' or '.join(sorted({*names}))}, got {name!r}: leave it out, or "
                    "name it in attn_layer"
                )
            if not isinstance(options, Mapping):
                raise UsageError(
                    f"expected attn_options of {name!r} as options by name, got {options!r}: give {{name: value}}"
                )
        for name in sorted({*names} if self.patch_drop_rate else ()):
            biased = name == "self" and self.attn_options.get(name, {}).get("relative_bias")
            if TOKEN_LAYERS.info(name).get("grid") or biased:
                what = "a relative_bias" if biased else f"{name!r} attention"
                raise UsageError(
                    f"expected no patch_drop_rate with {what}, which needs the whole grid, got "
                    f"{self.patch_drop_rate}: leave one of them out"
                )
        if not self.k_bias and self.qkv_bias and {*names} != {"self"}:
            raise UsageError(
                f"expected k_bias=true for {' or '.join(sorted({*names} - {'self'}))} attention, got false: leave it "
                "out, or set qkv_bias=false too"
            )
        if self.rope is None and self.rope_options:
            raise UsageError(
                "expected rope='axial' or 'mixed' for rope_options, got none: choose one, or leave them out"
            )
        if self.rope is not None and not any(TOKEN_LAYERS.info(name).get("rope") for name in names):
            raise UsageError(
                f"expected a layer that takes rotary positions (self, window) for rope={self.rope!r}, got "
                f"{' and '.join(sorted({*names}))}: leave rope out, or add such a layer"
            )

    @property
    def attn_layers(self) -> tuple[str, ...]:
        """The attention of each layer."""
        names = (self.attn_layer,) if isinstance(self.attn_layer, str) else self.attn_layer
        return tuple(names[i % len(names)] for i in range(self.depth))

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLPs."""
        # Rounded, where timm truncates: a ratio that was read off a layer must give its width back.
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(h, w), the patches of an image of `img_size`."""
        return grid_of(self.img_size, self.patch_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return int(self.class_token) + self.reg_tokens

    @property
    def num_embedded_prefix(self) -> int:
        """Prefix tokens that have a position of their own."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    @property
    def norms_after_pooling(self) -> bool:
        """Whether the last LayerNorm is `fc_norm` instead of `norm`."""
        return self.global_pool == "avg" if self.fc_norm is None else self.fc_norm


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the patches (h, w) in an image (H, W).

    Raises:
        UsageError: the patch does not divide the image; the message gives the nearest sizes that it does.
    """
    (height, width), (tall, wide) = image_size, patch_size
    if height % tall or width % wide or not height or not width:
        below = [max(side // step, 1) * step for side, step in ((height, tall), (width, wide))]
        above = [-(-max(side, 1) // step) * step for side, step in ((height, tall), (width, wide))]
        near = " or ".join(dict.fromkeys(f"{rows} x {columns}" for rows, columns in (below, above)))
        raise UsageError(
            f"expected image sides divisible by the patch {tall} x {wide}, got {height} x {width}: resize to {near}"
        )
    return height // tall, width // wide


def pair_of(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) from one number or two."""
    pair: tuple[Any, ...] = tuple(size) if isinstance(size, tuple | list) else (size, size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in pair)
    if len(pair) != 2 or not whole:
        raise UsageError(f"expected a positive size or (height, width), got {size}: give one number or two")
    return pair[0], pair[1]
