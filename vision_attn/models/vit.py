"""The Vision Transformer encoder, one file from images to logits.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929), with the parts that later
networks added, each one an option of `ViTConfig`. State-dict keys are timm's, so weights go both ways, and the model
answers to what timm's tools ask of a model (layer decay, features, heads, checkpointing).

Letters in shapes: B batch, C channels (token width), H W image, P patch, h w grid of patches, N tokens (prefix and
patches), K heads, D head width (C = K D).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm, LayerScale, Mlp, PatchDropout, trunc_normal_
from timm.layers.activations import GELUTanh, QuickGELU
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import PatchEmbed as TimmPatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layout import TokenLayout
from vision_attn.models.weights import INTERPOLATIONS, load_into, resample_positions
from vision_attn.registry import unknown

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU}
POOLINGS = ("token", "avg", "map", "")
POSITIONS = ("learn", "sincos2d", "none")
STEMS = ("patch", "conv")
INITS = ("trunc_normal", "xavier")


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
        qkv_bias: Whether queries, keys and values have a bias.
        proj_bias: Whether the attention's output projection and the MLPs have one.
        qk_norm: LayerNorm on queries and keys, a head (Dehghani et al. 2023, https://arxiv.org/abs/2302.05442).
        init_values: Start of LayerScale (Touvron et al. 2021, https://arxiv.org/abs/2103.17239); None for none.
        class_token: Whether a class token leads the sequence.
        reg_tokens: Registers after it (Darcet et al. 2024, https://arxiv.org/abs/2309.16588).
        no_embed_class: Positions for the patches only, as in DeiT III and DINOv2 with registers.
        pos_embed: "learn", "sincos2d" (fixed, Beyer et al. 2022, https://arxiv.org/abs/2205.01580) or "none".
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
        act: "gelu", "gelu_tanh" or "quick_gelu".
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
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    init_values: float | None = None
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    pos_embed: str = "learn"
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
        object.__setattr__(self, "img_size", _pair(self.img_size))
        object.__setattr__(self, "patch_size", _pair(self.patch_size))
        for kind, name, choices in (
            ("pooling", self.global_pool, POOLINGS),
            ("kind of positions", self.pos_embed, POSITIONS),
            ("interpolation of positions", self.pos_interpolation, INTERPOLATIONS),
            ("stem", self.stem, STEMS),
            ("weight_init", self.weight_init, INITS),
            ("activation", self.act, ACTIVATIONS),
        ):
            if name not in choices:
                raise unknown(kind, name, [choice for choice in choices if choice])
        grid_of(self.img_size, self.patch_size)
        for name in ("embed_dim", "depth", "num_heads", "mlp_ratio"):
            value = getattr(self, name)
            kind = "number" if name == "mlp_ratio" else "whole number"
            is_kind = isinstance(value, Real if kind == "number" else Integral)
            if not is_kind or not value > 0:
                raise UsageError(f"expected {name} as a {kind} above 0, got {value!r}: correct it")
        if self.embed_dim % self.num_heads:
            raise UsageError(
                f"expected num_heads to divide embed_dim={self.embed_dim}, got {self.num_heads}: change one of them"
            )
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


class ViT(nn.Module):
    """A Vision Transformer: images (B, in_chans, H, W) to logits (B, num_classes).

    Image sides may be any multiples of the patch; positions are resampled to the image's grid.

    Args:
        device: Where to put the parameters.
        dtype: Their type.
        **options: The fields of `ViTConfig`; an unknown one is a UsageError that offers close names.

    Example:
        >>> model = ViT(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
        >>> model(torch.zeros(1, 3, 32, 48)).shape
        torch.Size([1, 5])
        >>> model.token_layout((32, 48)).grid
        (4, 6)
    """

    def __init__(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        super().__init__()
        known = [field.name for field in fields(ViTConfig)]
        for name in options:
            if name not in known:
                raise unknown("option of ViT", name, known)
        c = self.options = ViTConfig(**options)

        # Names that timm's tools read.
        self.num_classes = c.num_classes
        self.in_chans = c.in_chans
        self.global_pool = c.global_pool
        self.embed_dim = self.num_features = self.head_hidden_size = c.embed_dim
        self.num_prefix_tokens = c.num_prefix_tokens
        self.num_reg_tokens = c.reg_tokens
        self.has_class_token = c.class_token
        self.no_embed_class = c.no_embed_class
        self.dynamic_img_size = c.dynamic_img_size
        self.grad_checkpointing = False
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": c.embed_dim, "reduction": max(c.patch_size)} for i in range(c.depth)
        ]

        self.patch_embed = PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.embed_dim)) if c.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, c.reg_tokens, c.embed_dim)) if c.reg_tokens else None
        self.pos_embed: Tensor | None
        if c.pos_embed == "sincos2d":
            # A buffer, so that no optimizer and no unfreezing can train it; it is saved under timm's key all the same.
            prefix = torch.zeros(1, c.num_embedded_prefix, c.embed_dim)
            self.register_buffer("pos_embed", torch.cat([prefix, sincos2d(c.grid_size, c.embed_dim)[None]], dim=1))
        elif c.pos_embed == "learn":
            num_positions = c.num_embedded_prefix + c.grid_size[0] * c.grid_size[1]
            self.pos_embed = nn.Parameter(torch.empty(1, num_positions, c.embed_dim))
        else:
            self.pos_embed = None
        self.pos_drop = nn.Dropout(c.pos_drop_rate)
        self.patch_drop = (
            PatchDropout(c.patch_drop_rate, num_prefix_tokens=c.num_prefix_tokens)
            if c.patch_drop_rate
            else nn.Identity()
        )
        self.norm_pre = _norm(c, when=c.pre_norm)
        steps = max(c.depth - 1, 1)
        self.blocks = nn.Sequential(*[Block(c, drop_path=c.drop_path_rate * i / steps) for i in range(c.depth)])
        self.norm = _norm(c, when=c.final_norm and not c.norms_after_pooling)
        self.attn_pool = AttentionPool(c) if c.global_pool == "map" else None
        self.fc_norm = _norm(c, when=c.final_norm and c.norms_after_pooling)
        self.head_drop = nn.Dropout(c.drop_rate)
        self.head = _head(c.embed_dim, c.num_classes)

        self.init_weights()
        self.pretrained_cfg: dict[str, Any] = _pretrained_cfg(c)
        self.default_cfg = self.pretrained_cfg
        self._record()
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    @classmethod
    def from_timm(
        cls,
        name: str,
        checkpoint: str | Path | Mapping[str, Tensor] | None = None,
        *,
        skip: Sequence[str] = (),
        source_grid: tuple[int, int] | None = None,
        **overrides: Any,
    ) -> "ViT":
        """Returns a ViT with the architecture of a timm model, and its weights where a checkpoint is given.

        The logits are timm's: to 1e-5 in float32 and to 1e-10 in float64.

        Args:
            name: A timm name of its `VisionTransformer` family, such as "deit3_small_patch16_224". No download.
            checkpoint: A file or state dict with that model's keys; loaded strictly (`weights.load_into`).
            skip: Beginnings of checkpoint keys to leave out, such as "head." with another number of classes.
            source_grid: (h, w) of the checkpoint's positions, where they are neither on the model's grid nor square.
            **overrides: Fields of `ViTConfig` that shall differ, such as `img_size`, `num_classes`, `drop_path_rate`.

        Raises:
            UsageError: the name is unknown, or the model has parts that `ViT` lacks; the message names them.
            CheckpointMismatchError: the checkpoint does not fit; the message lists the keys.

        Example:
            >>> model = ViT.from_timm("vit_tiny_patch16_224", num_classes=10)
            >>> model.embed_dim
            192
        """
        if not timm.is_model(name):
            raise unknown("timm model", name, timm.list_models())
        with torch.device("meta"):
            theirs: Any = timm.create_model(name)
        options = _options_of(theirs, name)
        with torch.device("meta"):
            ours = cls(**options)
        _refuse_other_keys(ours, theirs, name)
        model = cls(**{**options, **overrides})
        keep = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "license")
        model.pretrained_cfg.update({k: v for k, v in theirs.default_cfg.items() if k in keep})
        if checkpoint is not None:
            load_into(model, checkpoint, skip=skip, source_grid=source_grid)
        return model

    @property
    def config(self) -> dict[str, Any]:
        """All options, ready for JSON: `ViT(**model.config)` builds the same model, without its weights."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.options).items()}

    def token_layout(self, image_size: tuple[int, int] | None = None) -> TokenLayout:
        """Returns which tokens are what for images of `image_size` (H, W), by default `img_size`.

        Raises:
            UsageError: the patch does not divide the image.
        """
        c = self.options
        prefix = ("class",) * c.class_token + ("register",) * c.reg_tokens
        query = {"token": "class", "avg": "mean", "map": "map", "": ""}[c.global_pool]
        return TokenLayout(prefix=prefix, grid=grid_of(image_size or c.img_size, c.patch_size), query=query)

    # From images to logits.

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (B, num_classes) of normalised `images` (B, in_chans, H, W).

        Raises:
            UsageError: the batch has another rank, type or number of channels, or the patch does not divide it.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Returns the tokens after all blocks and `norm`, (B, N, C)."""
        tokens = self.embed(images)
        if self.grad_checkpointing and self.training:
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            tokens = self.blocks(tokens)
        return self.norm(tokens)

    def embed(self, images: Tensor) -> Tensor:
        """Returns what enters the first block, (B, N, C): prefix tokens and patches, with positions."""
        grid = self._grid(images)
        tokens = self.patch_embed(images)
        prefix = [token.expand(len(tokens), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        positions = self._positions(grid)
        if positions is not None and self.no_embed_class:
            tokens = tokens + positions
        if prefix:
            tokens = torch.cat([*prefix, tokens], dim=1)
        if positions is not None and not self.no_embed_class:
            tokens = tokens + positions
        return self.norm_pre(self.patch_drop(self.pos_drop(tokens)))

    def pool(self, tokens: Tensor) -> Tensor:
        """Returns (B, C) from tokens (B, N, C); the tokens as they are where `global_pool` is ""."""
        if self.attn_pool is not None:
            return self.attn_pool(tokens[:, self.num_prefix_tokens :])
        if self.global_pool == "token":
            return tokens[:, 0]
        if self.global_pool == "avg":
            return tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return tokens

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns logits from the tokens of `forward_features`, or with `pre_logits` what the classifier would read."""
        features = self.head_drop(self.fc_norm(self.pool(tokens)))
        return features if pre_logits else self.head(features)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Returns the grid (h, w) of a batch, and says what is wrong with one that cannot be."""
        c = self.options
        if images.ndim != 4 or images.shape[1] != c.in_chans:
            advice = "add a batch dimension with images[None]" if images.ndim == 3 else "stack and convert the images"
            raise UsageError(f"expected (B, {c.in_chans}, H, W) images, got {tuple(images.shape)}: {advice}")
        if not images.is_floating_point():
            raise UsageError(f"expected normalised float images, got {images.dtype}: convert and normalise them first")
        height, width = images.shape[-2:]
        if not c.dynamic_img_size and (height, width) != c.img_size:
            raise UsageError(
                f"expected images of {c.img_size[0]} x {c.img_size[1]}, got {height} x {width}: "
                "resize them, call set_input_size, or build with dynamic_img_size=True"
            )
        return grid_of((height, width), c.patch_size)

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Returns the positions for a grid, resampled where it is not the one the model was built for."""
        c = self.options
        if self.pos_embed is None or grid == self.patch_embed.grid_size:
            return self.pos_embed
        return resample_positions(
            self.pos_embed,
            grid,
            self.patch_embed.grid_size,
            num_prefix=c.num_embedded_prefix,
            interpolation=c.pos_interpolation,
        )

    # What timm's tools ask for.

    def init_weights(self) -> None:
        """Draws new weights: tokens next to 0, linear layers as `weight_init` says, others from a normal of 0.02."""
        if isinstance(self.pos_embed, nn.Parameter):
            trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.options.weight_init == "xavier":
            for block in self.blocks:
                assert isinstance(block, Block)
                for matrix in (*block.attn.qkv.weight.chunk(3), block.attn.proj.weight, *block.mlp.parameters()):
                    if matrix.ndim == 2:
                        nn.init.xavier_uniform_(matrix)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that weight decay must not touch, beside biases and norms."""
        return {"pos_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns timm's patterns that sort parameters by depth, for layer-wise learning-rate decay."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: in training, blocks are computed again in the backward pass instead of kept."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Returns the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one, and the pooling where it is given; the norms stay where they are.

        Raises:
            UsageError: the pooling is unknown, needs a class token that is not there, or is "map", which has weights of
                its own and cannot be added later.
        """
        changes: dict[str, Any] = {"num_classes": num_classes}
        if global_pool is not None:
            if global_pool == "map" and self.attn_pool is None:
                raise UsageError("expected a model built with global_pool='map', got another: build it anew")
            changes.update(global_pool=global_pool, fc_norm=self.options.norms_after_pooling)
        self.options = replace(self.options, **changes)
        self.num_classes, self.global_pool = num_classes, self.options.global_pool
        if self.global_pool != "map":
            self.attn_pool = None
        like = self.patch_embed.proj.weight
        self.head = _head(self.embed_dim, num_classes).to(device=like.device, dtype=like.dtype).train(self.training)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self._record()

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Makes (H, W) the size that the model is built for, and resamples the stored positions once.

        Raises:
            UsageError: the patch does not divide the size, or another patch size is asked for.
        """
        if patch_size is not None and _pair(patch_size) != self.options.patch_size:
            raise UsageError(f"expected patches of {self.options.patch_size}, got {patch_size}: build a new model")
        if img_size is None:
            return
        options = replace(self.options, img_size=_pair(img_size))
        positions = self._positions(options.grid_size)
        if isinstance(self.pos_embed, nn.Parameter):
            assert positions is not None
            self.pos_embed = nn.Parameter(positions.detach().clone(), requires_grad=self.pos_embed.requires_grad)
        else:
            self.pos_embed = positions
        self.options = options
        self.patch_embed.set_img_size(options.img_size)
        self._record()

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Returns (tokens, list of block outputs) as timm does; it is what `features_only=True` calls.

        Args:
            images: (B, in_chans, H, W).
            indices: Block numbers, how many of the last, or None for all.
            return_prefix_tokens: Whether each output is a pair (patches, prefix tokens).
            norm: Whether `norm` is applied to the outputs.
            stop_early: Whether blocks after the last wanted one are left out.
            output_fmt: "NCHW" for (B, C, h, w) or "NLC" for (B, h * w, C).
            intermediates_only: Whether only the list is returned.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise unknown("output format", output_fmt, ("NCHW", "NLC"))
        wanted, last = feature_take_indices(len(self.blocks), indices)
        tokens = self.embed(images)
        outputs = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            tokens = checkpoint(block, tokens) if self.grad_checkpointing and self.training else block(tokens)
            if i in wanted:
                outputs.append(self.norm(tokens) if norm else tokens)
        prefixes = [output[:, : self.num_prefix_tokens] for output in outputs]
        outputs = [output[:, self.num_prefix_tokens :] for output in outputs]
        if output_fmt == "NCHW":
            grid = self._grid(images)
            outputs = [output.transpose(1, 2).unflatten(2, grid).contiguous() for output in outputs]
        taken: list[Any] = list(zip(outputs, prefixes, strict=True)) if return_prefix_tokens else outputs
        return taken if intermediates_only else (self.norm(tokens), taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last wanted one, and the norm and head on request; returns the block numbers."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        self.options = replace(self.options, depth=last + 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return wanted

    def _record(self) -> None:
        """Tells timm's own tools the options as they are now (its exporter and data config read these two)."""
        self._model_args = self.config
        self._traits = {
            **getattr(self, "_traits", {}),
            "img_size": self.options.img_size,
            "first_conv": _pretrained_cfg(self.options)["first_conv"],
        }


class PatchEmbed(nn.Module):
    """Images (B, in_chans, H, W) to patch tokens (B, h * w, C).

    The plain stem is one convolution as wide as its stride, P x P. The conv stem halves the image with 3 x 3
    convolutions of stride 2, BatchNorm and ReLU, doubling the channels up to C, goes on with `stem_extra` of stride 1,
    and ends in a 1 x 1 convolution.
    """

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.patch_size = c.patch_size
        self.strict_img_size = not c.dynamic_img_size
        self.set_img_size(c.img_size)
        bias = not c.pre_norm
        self.stem: nn.Module
        if c.stem == "patch":
            self.stem = nn.Identity()
            self.proj = nn.Conv2d(c.in_chans, c.embed_dim, kernel_size=c.patch_size, stride=c.patch_size, bias=bias)
        else:
            halvings = c.patch_size[0].bit_length() - 1
            widths = [max(c.embed_dim >> (halvings - 1 - i), 1) for i in range(halvings)]
            widths += [c.embed_dim] * c.stem_extra
            layers: list[nn.Module] = []
            for i, (wide_in, wide_out) in enumerate(zip([c.in_chans, *widths], widths, strict=False)):
                stride = 2 if i < halvings else 1
                conv = nn.Conv2d(wide_in, wide_out, kernel_size=3, stride=stride, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(wide_out), nn.ReLU(inplace=True)]
            self.stem = nn.Sequential(*layers)
            self.proj = nn.Conv2d(c.embed_dim, c.embed_dim, kernel_size=1, bias=bias)

    def set_img_size(self, img_size: tuple[int, int]) -> None:
        """Sets the image size (H, W) that the grid stands for."""
        self.img_size = img_size
        self.grid_size = grid_of(img_size, self.patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, images: Tensor) -> Tensor:
        """Returns the patches row by row, (B, h * w, C)."""
        return self.proj(self.stem(images)).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), each with LayerScale and DropPath; (B, N, C) to (B, N, C)."""

    def __init__(self, c: ViTConfig, *, drop_path: float) -> None:
        super().__init__()
        self.norm1 = _norm(c)
        self.attn = Attention(c)
        self.ls1 = LayerScale(c.embed_dim, init_values=c.init_values) if c.init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = _norm(c)
        self.mlp = _mlp(c, bias=c.proj_bias, drop=c.proj_drop_rate)
        self.ls2 = LayerScale(c.embed_dim, init_values=c.init_values) if c.init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the tokens after the block, (B, N, C)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v for each head, fused (Vaswani et al. 2017); (B, N, C) to (B, N, C)."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.num_heads = c.num_heads
        self.head_dim = c.embed_dim // c.num_heads
        self.qkv = nn.Linear(c.embed_dim, 3 * c.embed_dim, bias=c.qkv_bias)
        self.q_norm = _norm(c, self.head_dim, when=c.qk_norm)
        self.k_norm = _norm(c, self.head_dim, when=c.qk_norm)
        self.attn_drop = nn.Dropout(c.attn_drop_rate)
        self.proj = nn.Linear(c.embed_dim, c.embed_dim, bias=c.proj_bias)
        self.proj_drop = nn.Dropout(c.proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mixed tokens, (B, N, C)."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class AttentionPool(nn.Module):
    """One learned query attends to all patches, then a residual MLP; (B, N, C) to (B, C).

    The MAP head of Zhai et al. 2022, "Scaling Vision Transformers", as in SigLIP.
    """

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.num_heads = c.num_heads
        self.head_dim = c.embed_dim // c.num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, c.embed_dim))
        nn.init.trunc_normal_(self.latent, std=c.embed_dim**-0.5)
        self.q = nn.Linear(c.embed_dim, c.embed_dim)
        self.kv = nn.Linear(c.embed_dim, 2 * c.embed_dim)
        self.proj = nn.Linear(c.embed_dim, c.embed_dim)
        self.norm = _norm(c)
        self.mlp = _mlp(c, bias=True, drop=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the query collects, (B, C)."""
        B, N, C = x.shape
        q = self.q(self.latent.expand(B, -1, -1)).reshape(B, 1, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).reshape(B, N, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, C))
        return x + self.mlp(self.norm(x))


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


def sincos2d(grid: tuple[int, int], dim: int, *, temperature: float = 10_000.0) -> Tensor:
    """Returns fixed positions (h * w, dim): sine and cosine of column and row at dim / 4 frequencies.

    Beyer, Zhai and Kolesnikov 2022, "Better plain ViT baselines for ImageNet-1k": frequency i is
    temperature ** (-i / (dim / 4 - 1)); the order is sin x, cos x, sin y, cos y.
    """
    quarter = dim // 4
    frequencies = temperature ** -(torch.arange(quarter) / max(quarter - 1, 1))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    y, x = (steps.flatten()[:, None] * frequencies for steps in (rows, columns))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) from one number or two."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise UsageError(f"expected a positive size or (height, width), got {size}: give one number or two")
    return pair[0], pair[1]


def _norm(c: ViTConfig, dim: int | None = None, *, when: bool = True) -> nn.Module:
    return LayerNorm(dim or c.embed_dim, eps=c.norm_eps) if when else nn.Identity()


def _mlp(c: ViTConfig, *, bias: bool, drop: float) -> nn.Module:
    # Rounded, where timm truncates: a ratio that was read off a layer must give its width back.
    hidden = round(c.embed_dim * c.mlp_ratio)
    return Mlp(c.embed_dim, hidden, act_layer=ACTIVATIONS[c.act], bias=bias, drop=drop)


def _head(dim: int, num_classes: int) -> nn.Module:
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


def _pretrained_cfg(c: ViTConfig) -> dict[str, Any]:
    """Returns timm's description of a model: its input, normalisation, first and last layer."""
    return {
        "architecture": "va_vit",
        "num_classes": c.num_classes,
        "input_size": (c.in_chans, *c.img_size),
        "fixed_input_size": False,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj" if c.stem == "patch" else "patch_embed.stem.0",
        "classifier": "head",
    }


def _options_of(theirs: Any, name: str) -> dict[str, Any]:
    """Returns the options that make our ViT the same network as a timm VisionTransformer.

    Raises:
        UsageError: it has parts that ours lacks.
    """
    if type(theirs) is not VisionTransformer:
        kind = "a distillation token" if hasattr(theirs, "dist_token") else f"class {type(theirs).__name__}"
        raise _refusal(name, [f"{kind} (only timm's VisionTransformer is read)"])
    block = theirs.blocks[0]
    if type(block) is not TimmBlock or type(theirs.patch_embed) is not TimmPatchEmbed:
        raise _refusal(name, [type(block).__name__, type(theirs.patch_embed).__name__])
    attn: Any = block.attn
    mlp: Any = block.mlp
    norm = block.norm1
    activations = {kind: word for word, kind in ACTIVATIONS.items()}
    lacking = {
        f"attention {type(attn).__name__}": type(attn) is not TimmAttention,
        "a norm or gate on the attention's output": not _absent(getattr(attn, "norm", None))
        or getattr(attn, "gate", None) is not None,
        f"MLP {type(mlp).__name__}": type(mlp) is not Mlp,
        "a norm inside the MLP": not _absent(getattr(mlp, "norm", None)),
        f"activation {type(getattr(mlp, 'act', None)).__name__}": type(getattr(mlp, "act", None)) not in activations
        or getattr(mlp.act, "approximate", "none") != "none",
        f"norm {type(norm).__name__}": type(norm) not in (LayerNorm, nn.LayerNorm),
        "a norm in the patch embedding": not _absent(theirs.patch_embed.norm),
        "padding of the image": theirs.patch_embed.dynamic_img_pad,
        f"pooling {theirs.global_pool!r}": theirs.global_pool not in POOLINGS,
        "pooling over prefix tokens": theirs.pool_include_prefix,
    }
    if any(lacking.values()):
        raise _refusal(name, [part for part, absent in lacking.items() if absent])
    final_norms = [not _absent(theirs.norm), not _absent(theirs.fc_norm)]
    (rows, columns), patch = theirs.patch_embed.grid_size, theirs.patch_embed.patch_size
    return {
        # Some of timm's sizes leave a remainder that its convolution drops (384 with patch 14): take what it sees.
        "img_size": (rows * patch[0], columns * patch[1]),
        "patch_size": patch,
        "in_chans": theirs.in_chans,
        "num_classes": theirs.num_classes,
        "embed_dim": theirs.embed_dim,
        "depth": len(theirs.blocks),
        "num_heads": attn.num_heads,
        "mlp_ratio": mlp.fc1.out_features / theirs.embed_dim,
        "qkv_bias": attn.qkv.bias is not None,
        "proj_bias": attn.proj.bias is not None,
        "qk_norm": not _absent(attn.q_norm),
        "init_values": None if _absent(block.ls1) else block.ls1.init_values,
        "class_token": theirs.has_class_token,
        "reg_tokens": theirs.num_reg_tokens,
        "no_embed_class": theirs.no_embed_class,
        "pos_embed": "none" if theirs.pos_embed is None else "learn",
        "global_pool": theirs.global_pool,
        "pre_norm": not _absent(theirs.norm_pre),
        "final_norm": any(final_norms),
        "fc_norm": final_norms[1],
        "act": activations[type(mlp.act)],
        "norm_eps": norm.eps,
    }


def _refuse_other_keys(ours: nn.Module, theirs: nn.Module, name: str) -> None:
    """Raises a UsageError where a timm model has parameters that ours would not, whatever part they belong to."""
    mine, its = ({key: tuple(t.shape) for key, t in model.state_dict().items()} for model in (ours, theirs))
    differing = sorted(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key))
    if differing:
        raise _refusal(name, [f"other parameters ({', '.join(differing[:5])}{', ...' if differing[5:] else ''})"])


def _refusal(name: str, parts: Sequence[str]) -> UsageError:
    return UsageError(
        f"expected a timm model with parts that ViT has, got {name!r} with {', '.join(parts)}: "
        f"use it as it is, timm.create_model({name!r})"
    )


def _absent(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)
