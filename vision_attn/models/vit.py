"""The Vision Transformer encoder, one file from images to logits.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929), with the parts that later
networks added, each one an option of `ViTConfig`. State-dict keys are timm's, so weights go both ways, and the model
answers to what timm's tools ask of a model (layer decay, features, heads, checkpointing).

Letters in shapes: B batch, C channels (token width), H W image, P patch, h w grid of patches, N tokens (prefix and
patches), K heads, D head width (C = K D).
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, GluMlp, LayerNorm, LayerScale, Mlp, PatchDropoutWithIndices, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision_attn.errors import UsageError
from vision_attn.layers.base import check_options
from vision_attn.layers.merging import TokenMerging
from vision_attn.layers.rotary import AxialRotary, MixedRotary, Rotation
from vision_attn.layers.tokens import TOKEN_LAYERS, Attention, MapPooling, create_token_layer
from vision_attn.layers.tokens.base import join_heads
from vision_attn.layout import TokenLayout
from vision_attn.models.from_timm import options_of, refuse_other_keys
from vision_attn.models.vit_config import ACTIVATIONS, ViTConfig, grid_of, pair_of
from vision_attn.models.weights import load_into, resample_positions
from vision_attn.registry import unknown
from vision_attn.reporting import ReportMerge


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
            PatchDropoutWithIndices(c.patch_drop_rate, num_prefix_tokens=c.num_prefix_tokens)
            if c.patch_drop_rate
            else None
        )
        blocks = [Block(c, i) for i in range(c.depth)]
        self.rope = _rotary(c, blocks)
        self.norm_pre = _norm(c, when=c.pre_norm)
        self.blocks = nn.Sequential(*blocks)
        self.norm = _norm(c, when=c.final_norm and not c.norms_after_pooling)
        self.attn_pool = _map_pooling(c) if c.global_pool == "map" else None
        self.fc_norm = _norm(c, when=c.final_norm and c.norms_after_pooling)
        self.head_drop = nn.Dropout(c.drop_rate)
        self.head = _head(c.embed_dim, c.num_classes)

        self.merged_tokens: tuple[int, ...] = ()
        self.report_merge = ReportMerge()
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

        The logits are timm's: the difference is below 1e-5 of their norm in float32, and below 1e-10 in float64 (with
        rotary positions 1e-6, since timm computes their angles in float32).

        Args:
            name: A timm name of its `VisionTransformer` or `Eva` family, such as "deit3_small_patch16_224",
                "eva02_base_patch14_448" or "vit_small_patch16_dinov3". No download.
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
        options = options_of(theirs, name)
        with torch.device("meta"):
            ours = cls(**options)
        refuse_other_keys(ours, theirs, name)
        model = cls(**{**options, **overrides})
        keep = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "license")
        model.pretrained_cfg.update({k: v for k, v in theirs.default_cfg.items() if k in keep})
        if checkpoint is not None:
            load_into(model, checkpoint, skip=skip, source_grid=source_grid)
        return model

    @property
    def config(self) -> dict[str, Any]:
        """All options, ready for JSON: `ViT(**model.config)` builds the same model, without its weights."""
        return {name: _plain(value) for name, value in asdict(self.options).items()}

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
        tokens, kept = self._embed(images)
        way = self._way(images, tokens, kept)
        for block, rope in zip(self.blocks, way.rotations, strict=False):
            tokens = self._through(block, tokens, rope, way)
        return way.spread(self.norm(tokens))

    def embed(self, images: Tensor) -> Tensor:
        """Returns what enters the first block, (B, N, C): prefix tokens and patches, with positions."""
        return self._embed(images)[0]

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns what `embed` does, and in training the patches (B, n) that patch dropout left."""
        grid = self._grid(images)
        tokens = self.patch_embed(images)
        prefix = [
            token.expand(tokens.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None
        ]
        positions = self._positions(grid)
        if positions is not None and self.no_embed_class:
            tokens = tokens + positions
        if prefix:
            tokens = torch.cat([*prefix, tokens], dim=1)
        if positions is not None and not self.no_embed_class:
            tokens = tokens + positions
        tokens = self.pos_drop(tokens)
        tokens, kept = (tokens, None) if self.patch_drop is None else self.patch_drop(tokens)
        return self.norm_pre(tokens), kept

    def _way(self, images: Tensor, tokens: Tensor, kept: Tensor | None) -> "_Way":
        """Returns what the blocks are told on the way of these tokens."""
        grid = self._grid(images)
        rotations: Sequence[Rotation | None] = [None] * len(self.blocks)
        if self.rope is not None:
            turned: Any = self.rope(grid, num_prefix=self.num_prefix_tokens, device=tokens.device, dtype=tokens.dtype)
            rotations = [turned] * len(self.blocks) if isinstance(turned, Rotation) else turned
            if kept is not None:
                rotations = [_rotation_of(rotation, kept, self.num_prefix_tokens) for rotation in rotations if rotation]
        if not self.merged_tokens:
            return _Way(grid, rotations)
        if self.training:
            raise UsageError(
                "expected evaluation mode for a model that merges tokens, got training: call eval(), or "
                "merge_tokens(0) to train"
            )
        merging = TokenMerging(self.merged_tokens, self.num_prefix_tokens, self.report_merge, tokens)
        return _Way(grid, rotations, merging)

    def _through(self, block: nn.Module, tokens: Tensor, rope: Rotation | None, way: "_Way") -> Tensor:
        """Returns the tokens after one block."""
        if self.grad_checkpointing and self.training:
            return checkpoint(block, tokens, rope=rope, grid=way.grid)
        return block(tokens, rope=rope, grid=way.grid, merging=way.merging)

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

    def merge_tokens(self, r: int | Sequence[int]) -> "ViT":
        """Makes the model merge r tokens a layer into others that are like them, and returns it; 0 ends that.

        For inference: logits change a little, layers have fewer tokens and run faster. What leaves the last block has a
        token for every patch again, that of the merged token which holds it, so that the mean of patches, a MAP head
        and `forward_intermediates` see each patch. Captured attention says what merged (`AttentionRecord.merged`), and
        explanations have the full grid. `merged_tokens` holds the schedule; it is no part of `config` or state dict.

        Source: Bolya et al., ICLR 2023; see `layers.merging`.

        Args:
            r: Tokens that go in each layer, or a number for each layer; at most half of the patches go at once.

        Raises:
            UsageError: r is negative or of another number of layers, or the model's layers are not plain
                self-attention with positions that are added once (rotary ones and relative biases have no place for a
                merged token).

        Example:
            >>> model = ViT(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2).eval().merge_tokens(8)
            >>> model(torch.zeros(1, 3, 32, 32)).shape
            torch.Size([1, 1000])
        """
        depth = len(self.blocks)
        schedule: list[Any] = list(r) if isinstance(r, Sequence) else [r] * depth
        if len(schedule) != depth or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 0 for n in schedule):
            raise UsageError(
                f"expected tokens to merge as a whole number from 0, or {depth}, one for each layer, got {r!r}: "
                "8 is a start for 196 patches"
            )
        lacking = [
            what
            for what, found in (
                ("rotary positions", self.rope is not None),
                ("window or other attention", not self.attends_globally),
                ("relative biases", any(getattr(block.attn, "relative_bias", None) for block in self.blocks)),
            )
            if found
        ]
        if lacking and any(schedule):
            raise UsageError(
                "expected self-attention with positions that are added once in every layer to merge tokens, got "
                f"{' and '.join(lacking)}: use this model as it is"
            )
        self.merged_tokens = tuple(int(n) for n in schedule) if any(schedule) else ()
        return self

    @property
    def attends_globally(self) -> bool:
        """Whether every token attends to every other in each layer."""
        return set(self.options.attn_layers) == {"self"}

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
                for name, parameter in block.named_parameters():
                    # Queries, keys and values are three matrices in one weight, gate and value two.
                    widths: Sequence[int] = (len(parameter),)
                    if name == "attn.qkv.weight":
                        widths = getattr(block.attn, "widths", (len(parameter) // 3,) * 3)
                    elif name == "mlp.fc1.weight" and self.options.mlp == "swiglu":
                        widths = (len(parameter) // 2,) * 2
                    for matrix in parameter.split(list(widths)) if parameter.ndim == 2 else ():
                        nn.init.xavier_uniform_(matrix)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that weight decay must not touch, beside biases and norms: positions and tokens."""
        learned = ("relative_bias.table", "attn.latents", "rope.freqs")
        found = {name for name, _ in self.named_parameters() if name.endswith(learned)}
        return {"pos_embed", "cls_token", "reg_token"} | found

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
        if patch_size is not None and pair_of(patch_size) != self.options.patch_size:
            raise UsageError(f"expected patches of {self.options.patch_size}, got {patch_size}: build a new model")
        if img_size is None:
            return
        options = replace(self.options, img_size=pair_of(img_size), attn_options=self._built_for())
        positions = self._positions(options.grid_size)
        if isinstance(self.pos_embed, nn.Parameter):
            assert positions is not None
            self.pos_embed = nn.Parameter(positions.detach().clone(), requires_grad=self.pos_embed.requires_grad)
        else:
            self.pos_embed = positions
        self.options = options
        self.patch_embed.set_img_size(options.img_size)
        self._record()

    def _built_for(self) -> dict[str, dict[str, Any]]:
        """Returns `attn_options` with the grid that a layer's own positions are built for, so that it stays theirs."""
        own = {name: dict(options) for name, options in self.options.attn_options.items()}
        for name in {*self.options.attn_layers}:
            if "grid_size" in inspect.signature(TOKEN_LAYERS.get(name)).parameters:
                own.setdefault(name, {}).setdefault("grid_size", self.options.grid_size)
        return own

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
        tokens, kept = self._embed(images)
        way = self._way(images, tokens, kept)
        outputs = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            tokens = self._through(block, tokens, way.rotations[i], way)
            if i in wanted:
                outputs.append(way.spread(self.norm(tokens) if norm else tokens))
        prefixes = [output[:, : self.num_prefix_tokens] for output in outputs]
        outputs = [output[:, self.num_prefix_tokens :] for output in outputs]
        if output_fmt == "NCHW":
            grid = self._grid(images)
            outputs = [output.transpose(1, 2).unflatten(2, grid).contiguous() for output in outputs]
        taken: list[Any] = list(zip(outputs, prefixes, strict=True)) if return_prefix_tokens else outputs
        return taken if intermediates_only else (way.spread(self.norm(tokens)), taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last wanted one, and the norm and head on request; returns the block numbers."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self._shorten(last + 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return wanted

    def _shorten(self, depth: int) -> None:
        """Removes all blocks but the first `depth`, and the options and positions of the others."""
        c = self.options
        self.blocks = self.blocks[:depth]
        self.merged_tokens = self.merged_tokens[:depth]
        names = c.attn_layers[:depth]
        changes: dict[str, Any] = {
            "depth": depth,
            "attn_layer": names if len({*names}) > 1 else names[0],
            "attn_options": {name: own for name, own in c.attn_options.items() if name in names},
        }
        if not any(block.turns for block in self.blocks):
            self.rope = None
            changes.update(rope=None, rope_options={})
        elif isinstance(self.rope, MixedRotary):
            kept, freqs = self.rope.freqs.detach()[:, :depth].clone(), self.rope.freqs
            self.rope.freqs = nn.Parameter(kept, requires_grad=freqs.requires_grad)
        self.options = replace(c, **changes)

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
    """x + attention(norm(x)), then x + MLP(norm(x)), each with LayerScale and DropPath; (B, N, C) to (B, N, C).

    Args:
        c: The model's options.
        index: Which layer it is, from 0.
    """

    def __init__(self, c: ViTConfig, index: int) -> None:
        super().__init__()
        drop_path = c.drop_path_rate * index / max(c.depth - 1, 1)
        name = c.attn_layers[index]
        self.num_prefix = c.num_prefix_tokens
        self.norm1 = _norm(c)
        self.attn = SelfAttention(c, index) if name == "self" else _token_layer(c, name, index)
        self.turns = bool(TOKEN_LAYERS.info(name).get("rope"))
        self.ls1 = LayerScale(c.embed_dim, init_values=c.init_values) if c.init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = _norm(c)
        self.mlp = _mlp(c)
        self.ls2 = LayerScale(c.embed_dim, init_values=c.init_values) if c.init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rope: Rotation | None = None,
        grid: tuple[int, int] | None = None,
        merging: TokenMerging | None = None,
    ) -> Tensor:
        """Returns the tokens after the block, (B, N, C), or fewer where they merge.

        Args:
            x: (B, N, C).
            rope: The layer's rotary positions.
            grid: (h, w) of the patches.
            merging: How the tokens have merged so far.
        """
        given = {"merging": merging} if merging is not None else {}
        rope = rope if self.turns else None
        attended = self.attn(self.norm1(x), grid=grid, num_prefix=self.num_prefix, rope=rope, **given)
        x = x + self.drop_path1(self.ls1(attended))
        if merging is not None:
            x = merging(x)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class SelfAttention(Attention):
    """softmax(q k^T / sqrt(D)) v for each head (Vaswani et al. 2017), which merging can see; (B, N, C) to (B, N, C)."""

    def __init__(self, c: ViTConfig, index: int) -> None:
        options = _layer_options(c, "self", index)
        check_options("self", Attention, options)
        super().__init__(c.embed_dim, **options)
        if c.qkv_bias and not c.k_bias:
            self.qkv = _UnbiasedKeys(c.embed_dim, sum(self.widths))
            self.qkv.widths = self.widths

    def forward(self, x: Tensor, *args: Any, merging: TokenMerging | None = None, **given: Any) -> Tensor:
        """Returns the mixed tokens, (B, N, C); arguments are those of `layers.tokens.Attention`."""
        if merging is None:
            return super().forward(x, *args, **given)
        q, k, v = self._project(x)
        merging.see(k)
        return self._finish(join_heads(self._mix(q, k, v, merging.bias)), x)


class _UnbiasedKeys(nn.Linear):
    """Queries, keys and values side by side, of which the keys have no bias: their part of it is there and not used."""

    widths: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        """Returns (B, N, widths)."""
        of_q, of_k, of_v = self.bias.split(self.widths)
        return F.linear(input, self.weight, torch.cat((of_q, torch.zeros_like(of_k), of_v)))


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


def _norm(c: ViTConfig, dim: int | None = None, *, when: bool = True) -> nn.Module:
    return LayerNorm(dim or c.embed_dim, eps=c.norm_eps) if when else nn.Identity()


def _mlp(c: ViTConfig) -> nn.Module:
    norm: Any = partial(LayerNorm, eps=c.norm_eps) if c.scale_mlp_norm else None
    bias, drop = c.proj_bias, c.proj_drop_rate
    if c.mlp == "swiglu":
        width = 2 * c.mlp_width
        return GluMlp(c.embed_dim, width, act_layer=nn.SiLU, gate_last=False, norm_layer=norm, bias=bias, drop=drop)
    return Mlp(c.embed_dim, c.mlp_width, act_layer=ACTIVATIONS[c.act], norm_layer=norm, bias=bias, drop=drop)


def _map_pooling(c: ViTConfig) -> MapPooling:
    act = ACTIVATIONS[c.act]
    return MapPooling(c.embed_dim, num_heads=c.num_heads, mlp_ratio=c.mlp_ratio, norm_eps=c.norm_eps, act=act)


def _token_layer(c: ViTConfig, name: str, index: int) -> nn.Module:
    return create_token_layer(name, c.embed_dim, **_layer_options(c, name, index))


def _layer_options(c: ViTConfig, name: str, index: int) -> dict[str, Any]:
    """Returns what the attention of layer `index` is made with: the model's options that it has, and its own.

    Raises:
        UsageError: the model's options ask for something that it does not have.
    """
    common = {
        "num_heads": c.num_heads,
        "qkv_bias": c.qkv_bias,
        "proj_bias": c.proj_bias,
        "qk_norm": c.qk_norm,
        "scale_norm": c.scale_attn_norm,
        "norm_eps": c.norm_eps,
        "attn_drop": c.attn_drop_rate,
        "proj_drop": c.proj_drop_rate,
        "grid_size": c.grid_size,
        "depth": index,
    }
    plain = {"qkv_bias": True, "proj_bias": True, "qk_norm": False, "scale_norm": False, "attn_drop": 0.0}
    known = inspect.signature(TOKEN_LAYERS.get(name)).parameters
    for option, value in plain.items():
        if option not in known and common[option] != value:
            raise UsageError(
                f"expected {option}={value} for layers of {name!r} attention, which have no other, "
                f"got {common[option]}: change it, or the attention"
            )
    own = _tuples(c.attn_options.get(name, {}))
    _refuse_given(own, ("dim", "kv_dim"), f"attn_options of {name!r}")
    return {option: value for option, value in common.items() if option in known} | own


def _rotary(c: ViTConfig, blocks: Sequence[nn.Module]) -> AxialRotary | MixedRotary | None:
    """Returns the rotary positions of the layers that turn by them.

    Raises:
        UsageError: an option is unknown, or the layers' heads differ.
    """
    if c.rope is None:
        return None
    options = _tuples(c.rope_options)
    _refuse_given(options, ("head_dim", "dim", "num_heads", "depth"), "rope_options")
    check_options(f"{c.rope} rotary positions", AxialRotary if c.rope == "axial" else MixedRotary, options)
    layers: list[Any] = [block.attn for block in blocks if block.turns]
    widths = sorted({layer.head_dim for layer in layers})
    if len(widths) > 1:
        raise UsageError(
            f"expected heads of one width in all layers with rotary positions, got {widths}: change attn_options"
        )
    if c.rope == "axial":
        return AxialRotary(widths[0], **options)
    heads = sorted({layer.num_heads for layer in layers})
    if len(heads) > 1 or any(layer.grouped for layer in layers):
        got = "heads that share keys" if len(heads) == 1 else heads
        raise UsageError(
            f"expected as many heads, each with its own keys, in all layers for rope='mixed', got {got}: use 'axial', "
            "or change attn_options"
        )
    return MixedRotary(heads[0] * widths[0], heads[0], c.depth, **options)


def _refuse_given(options: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Raises a UsageError where options have what the model itself gives."""
    for name in names:
        if name in options:
            raise UsageError(
                f"expected no {name} in {where}, which the model gives, got {options[name]!r}: leave it out"
            )


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options with tuples for lists, which JSON makes of them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _rotation_of(rotation: Rotation, kept: Tensor, num_prefix: int) -> Rotation:
    """Returns the angles of the prefix and of the patches (B, n) that are left, (B, 1 or K, num_prefix + n, D)."""
    places = torch.cat(
        [torch.arange(num_prefix, device=kept.device).expand(kept.shape[0], -1), kept + num_prefix], dim=1
    )
    sin, cos = (
        part[places][:, None] if part.ndim == 2 else part[:, places].transpose(0, 1)
        for part in (rotation.sin, rotation.cos)
    )
    return Rotation(sin, cos, rotation.rotate_half)


@dataclass(frozen=True)
class _Way:
    """What the blocks are told beside the tokens.

    Args:
        grid: (h, w).
        rotations: The rotary positions of each layer.
        merging: What merges the tokens; None where they stay.
    """

    grid: tuple[int, int]
    rotations: Sequence[Rotation | None]
    merging: TokenMerging | None = None

    def spread(self, tokens: Tensor) -> Tensor:
        """Returns the tokens with one for every patch again, (B, N, C)."""
        return tokens if self.merging is None else self.merging.spread(tokens)


def _plain(value: Any) -> Any:
    """Returns an option as JSON has it."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value


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
