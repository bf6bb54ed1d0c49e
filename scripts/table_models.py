"""Writes docs/models.md: what the capture sees in each architecture, and which explanation methods work on it.

    python scripts/table_models.py docs/models.md
    python scripts/table_models.py table.md --only swin,vit_tiny

Models have random weights and see one random image of their own input size, fused attention on. Nothing is stated that
did not run: a method stands under "works" if it gave a map, and under the table with its error if it did not.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import nn

from vision_attn.attribution import METHODS, explain, find_layout
from vision_attn.attribution.tokens import is_known
from vision_attn.capture import AttentionCapture, AttentionRecord
from vision_attn.errors import AttentionNotFoundError, UsageError
from vision_attn.files import write_whole

TIMM = {
    "ViT": "vit_tiny_patch16_224",
    "DeiT, distilled": "deit_tiny_distilled_patch16_224",
    "DeiT-3": "deit3_small_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv2, registers": "vit_small_patch14_reg4_dinov2",
    "DINOv3": "vit_small_patch16_dinov3",
    "EVA-02": "eva02_tiny_patch14_224",
    "SigLIP": "vit_base_patch16_siglip_224",
    "BEiT": "beit_base_patch16_224",
    "ViT, relative positions": "vit_relpos_small_patch16_224",
    "ViT, RoPE": "vit_small_patch16_rope_224",
    "FlexiViT": "flexivit_small",
    "NaFlexViT": "naflexvit_base_patch16_gap",
    "ViTamin": "vitamin_small_224",
    "SAM's encoder": "samvit_base_patch16_224",
    "CaiT": "cait_xxs24_224",
    "XCiT": "xcit_nano_12_p16_224",
    "CrossViT": "crossvit_tiny_240",
    "PiT": "pit_ti_224",
    "TNT": "tnt_s_patch16_224",
    "ConViT": "convit_tiny",
    "VOLO": "volo_d1_224",
    "Twins-SVT": "twins_svt_small",
    "Twins-PCPVT": "twins_pcpvt_small",
    "PVT v2": "pvt_v2_b0",
    "NesT": "nest_tiny",
    "Swin": "swin_tiny_patch4_window7_224",
    "Swin v2": "swinv2_tiny_window8_256",
    "MaxViT": "maxvit_pico_rw_256",
    "CoAtNet": "coatnet_pico_rw_224",
    "DaViT": "davit_tiny",
    "GCViT": "gcvit_xxtiny",
    "MViT v2": "mvitv2_tiny",
    "Hiera": "hiera_tiny_224",
    "LeViT": "levit_128s",
    "LeViT, convolutional": "levit_conv_128s",
    "MobileViT": "mobilevit_xxs",
    "MobileViT v2": "mobilevitv2_050",
    "TinyViT": "tiny_vit_5m_224",
    "EdgeNeXt": "edgenext_xx_small",
    "EfficientFormer": "efficientformer_l1",
    "CAFormer": "caformer_s18",
    "BoTNet": "botnet26t_256",
    "HaloNet": "halonet26t",
    "SE-ResNet": "seresnet18",
    "EfficientNet": "efficientnet_b0",
    "ResNet": "resnet18",
}
TORCHVISION = {
    "ViT": "vit_b_16",
    "Swin": "swin_t",
    "Swin v2": "swin_v2_t",
    "MaxViT": "maxvit_t",
    "MobileNetV3": "mobilenet_v3_small",
}
TRANSFORMERS = {
    "ViT": (transformers.ViTConfig, transformers.ViTForImageClassification),
    "DeiT": (transformers.DeiTConfig, transformers.DeiTForImageClassification),
    "DINOv2": (transformers.Dinov2Config, transformers.Dinov2ForImageClassification),
    "CLIP vision": (transformers.CLIPVisionConfig, transformers.CLIPForImageClassification),
    "BEiT": (transformers.BeitConfig, transformers.BeitForImageClassification),
    "Swin": (transformers.SwinConfig, transformers.SwinForImageClassification),
}


@dataclass(frozen=True)
class Candidate:
    """A model that can be built.

    Args:
        library: Where it comes from.
        family: What people call it.
        name: What the library calls this variant.
        build: Returns it.
        size: The side of its images.
    """

    library: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    size: int


@dataclass(frozen=True)
class Row:
    """What was found out about a model."""

    candidate: Candidate
    layers: str
    tokens: str
    works: tuple[str, ...]
    errors: tuple[tuple[str, str], ...]


def candidates() -> list[Candidate]:
    """Returns the models of the table, in its order."""
    found = []
    for family, name in TIMM.items():
        settings = timm.get_pretrained_cfg(name)
        assert settings is not None
        size = settings.input_size[-1]
        build = partial(timm.create_model, name, num_classes=1000)  # SAM's encoder has none of its own
        found.append(Candidate("timm", family, name, build, size))
    for family, name in TORCHVISION.items():
        size = 256 if name == "swin_v2_t" else 224
        found.append(Candidate("torchvision", family, name, partial(torchvision.models.get_model, name), size))
    for family, (config, model) in TRANSFORMERS.items():
        found.append(Candidate("transformers", family, model.__name__, partial(_transformers, config, model), 224))
    return found


def _transformers(config: type, model: type) -> nn.Module:
    if config is transformers.CLIPVisionConfig:
        whole = transformers.CLIPConfig(text_config={"num_hidden_layers": 1})
        whole.num_labels = 1000
        return model(whole)
    sizes = {"image_size": 224} if config is transformers.Dinov2Config else {}
    return model(config(num_labels=1000, **sizes))


def table_row(candidate: Candidate) -> Row:
    """Returns what the capture sees in a model, and what each method makes of it."""
    torch.manual_seed(0)
    model = candidate.build().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():  # a head of zeros answers the same for any image
            nn.init.normal_(module.weight, std=0.02)
    images = torch.randn(1, 3, candidate.size, candidate.size)
    # How much is asked of the slow methods does not change whether they work.
    quick: dict[str, dict[str, Any]] = {"integrated_gradients": {"steps": 1}, "occlusion": {"window": candidate.size}}
    works, errors = [], []
    for method in METHODS.names():
        try:
            explain(model, images, method=method, target=0, **quick.get(method, {}))
            works.append(method)
        except UsageError as error:
            errors.append((method, str(error)))
    records: list[AttentionRecord] = []
    with torch.no_grad(), AttentionCapture(model, keep=lambda record: None) as capture:
        model(images)
    with suppress(AttentionNotFoundError):
        records = capture.records
    return Row(candidate, _layers(records), _tokens(model, images, records), tuple(works), tuple(errors))


def _layers(records: Iterable[AttentionRecord]) -> str:
    counts = Counter(record.kind for record in records)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"


def _tokens(model: nn.Module, images: torch.Tensor, records: Iterable[AttentionRecord]) -> str:
    """Returns the layout where it is known, else how many queries and keys there are, layer after layer."""
    if is_known(model):
        with suppress(UsageError):
            layout = find_layout(model, images)
            prefix = "".join(f"{name} + " for name in layout.prefix)
            return f"{prefix}{layout.grid[0]} x {layout.grid[1]}, {layout.query}"
    lengths = [
        f"{record.query_length}"
        if record.query_length == record.key_length
        else f"{record.query_length} to {record.key_length}"
        for record in records
    ]
    return ", ".join(name for name, _ in groupby(lengths)) or "none"


def markdown(rows: Iterable[Row], *, seconds: float) -> str:
    """Returns the page."""
    rows = list(rows)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torchvision", "transformers"))
    lines = [
        "# What is seen in which model",
        "",
        "Written by `python scripts/table_models.py docs/models.md`; every line ran: random weights, one image of the",
        "model's own input size, fused attention on. Layers are counted by kind: self, cross (queries are not the",
        "keys: a pooling latent, a class token that joins late, keys pooled to fewer), window (within parts of the",
        "image), channel (between channels). Tokens are the layout where it is known (prefix, grid, what answers for",
        "the image), else the lengths of queries and keys, layer after layer.",
        "",
        f"{date.today():%Y-%m-%d}, {versions}; {len(rows)} models in {seconds / 60:.0f} minutes.",
    ]
    for library, group in groupby(rows, key=lambda row: row.candidate.library):
        lines += ["", f"## {library}", "", "| | model | px | layers | tokens | works |", "|---|---|---|---|---|---|"]
        for row in group:
            c = row.candidate
            methods = "all" if not row.errors else ", ".join(row.works)
            lines.append(f"| {c.family} | `{c.name}` | {c.size} | {row.layers} | {row.tokens} | {methods} |")
    by_error: dict[str, list[str]] = {}
    for row in rows:
        for method, error in row.errors:
            by_error.setdefault(f"{method}: {error}", []).append(row.candidate.name)
    if by_error:
        lines += ["", "## What the others say", ""]
    for error, names in by_error.items():
        lines += [f"- {', '.join(f'`{name}`' for name in names)}", f"  - {error}"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="the page to write: docs/models.md")
    parser.add_argument("--only", default="", help="only models whose name holds one of these, with commas between")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    rows = []
    for candidate in candidates():
        if any(part in candidate.name for part in options.only.split(",")):
            rows.append(table_row(candidate))
            print(f"{candidate.library} {candidate.name}: {rows[-1].layers}; {', '.join(rows[-1].works)}", flush=True)
    options.page.unlink(missing_ok=True)
    write_whole(options.page, markdown(rows, seconds=time.perf_counter() - start).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
