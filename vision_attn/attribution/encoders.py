"""The encoder inside a model: its blocks, and what turns their tokens into logits.

Methods that ask each layer for its own opinion (LeGrad), or that want the tokens before the last block (Grad-CAM), need
both. Encoders are recognised by their class, in libraries that are loaded already: what was never imported cannot have
built the model. Where a head is written out here, it says what the library's own `forward` does after the last block.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Encoder:
    """A transformer encoder of which tokens go in and out of every block.

    Args:
        module: The encoder, which is the model or a part of it.
        blocks: In order; each gives tokens (B, N, C), itself or as the first of a tuple, prefix tokens first.
        head: Tokens (B, N, C) as the last block gives them to logits (B, classes). It includes the modules that follow
            the encoder in an `nn.Sequential`; what a wrapper of another kind does to the logits is not seen.
    """

    module: nn.Module
    blocks: tuple[nn.Module, ...]
    head: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """Encoders of one library that are built alike.

    Args:
        library: Whose conventions they follow: "ours", "timm", "torchvision" or "transformers".
        module: Name of the Python module that defines the class, "" for any.
        name: Name of the class.
        pool: transformers: from normalised tokens to what the classifier takes: "class", "mean" (all tokens but the
            class token), "class_mean" (both, side by side), "distilled" or "pooler".
        body: transformers: attribute of the classifier that holds the model without its classifier.
    """

    library: str
    module: str
    name: str
    pool: str = ""
    body: str = ""


def _transformers(module: str, name: str, body: str, pool: str) -> Family:
    folder = module.removesuffix("_vision")
    return Family("transformers", f"transformers.models.{folder}.modeling_{module}", name, pool, body)


FAMILIES: tuple[Family, ...] = (
    Family("timm", "timm.models.vision_transformer", "VisionTransformer"),
    Family("timm", "timm.models.vision_transformer_relpos", "VisionTransformerRelPos"),
    Family("timm", "timm.models.eva", "Eva"),
    Family("timm", "timm.models.beit", "Beit"),
    Family("timm", "timm.models.naflexvit", "NaFlexVit"),
    Family("timm", "timm.models.cait", "Cait"),
    Family("timm", "timm.models.xcit", "Xcit"),
    Family("torchvision", "torchvision.models.vision_transformer", "VisionTransformer"),
    _transformers("vit", "ViTForImageClassification", "vit", "class"),
    _transformers("deit", "DeiTForImageClassification", "deit", "class"),
    _transformers("deit", "DeiTForImageClassificationWithTeacher", "deit", "distilled"),
    _transformers("dinov2", "Dinov2ForImageClassification", "dinov2", "class_mean"),
    _transformers(
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        "dinov2_with_registers",
        "class_mean",
    ),
    _transformers("beit", "BeitForImageClassification", "beit", "pooler"),
    _transformers("data2vec_vision", "Data2VecVisionForImageClassification", "data2vec_vision", "pooler"),
    _transformers("clip", "CLIPForImageClassification", "vision_model", "mean"),
    _transformers("siglip", "SiglipForImageClassification", "vision_model", "mean"),
    _transformers("vit_msn", "ViTMSNForImageClassification", "vit", "class"),
    _transformers("ijepa", "IJepaForImageClassification", "ijepa", "mean"),
)
_OURS = Family("ours", "", "")


def find_encoder(model: nn.Module) -> Encoder | None:
    """Returns the encoder of `model`, or None where it is none that is known.

    Known are our own (anything with a `token_layout` method and the names that go with it), timm's VisionTransformer
    with all that is built from it (DeiT with and without distillation token, DeiT-3, DINOv2 and v3, registers, SigLIP,
    FlexiViT, ViTamin), its relative-position sibling, Eva, BEiT, NaFlexViT, CaiT and XCiT, torchvision's
    VisionTransformer, and the image classifiers of `transformers` built on ViT, DeiT, DINOv2 (with registers), BEiT,
    Data2Vec, CLIP, SigLIP, MSN and I-JEPA; bare or inside another module (Lightning, DistributedDataParallel, PEFT, a
    Sequential) that holds exactly one of them.

    In CaiT and XCiT the blocks hold patches alone; the class token joins in the class attention, which is in `head`.
    """
    known = find_known(model)
    if known is None:
        return None
    module, family, names = known
    if not all(hasattr(module, name) for name in ("blocks", "norm", "forward_head")) and family is _OURS:
        return None
    blocks, head = _PARTS[family.library](module, family)
    after = tuple(_following(model, names))

    def logits(tokens: Tensor) -> Tensor:
        result = head(tokens)
        for step in after:
            result = step(result)
        return result

    return Encoder(module=module, blocks=blocks, head=logits if after else head)


def find_known(model: nn.Module) -> tuple[Any, Family, str] | None:
    """Returns the one known encoder in `model`, its family and its qualified name, or None."""
    found = all_known(model)
    return found[0] if len(found) == 1 else None


def all_known(model: nn.Module) -> list[tuple[Any, Family, str]]:
    """Returns the known encoders in `model` that are no part of another, their families and qualified names."""
    loaded = [
        (getattr(sys.modules[family.module], family.name, None), family)
        for family in FAMILIES
        if family.module in sys.modules
    ]

    def family_of(module: nn.Module) -> Family | None:
        if callable(getattr(module, "token_layout", None)):
            return _OURS
        return next((family for known, family in loaded if known and isinstance(module, known)), None)

    found: list[tuple[Any, Family, str]] = []
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for _, _, outer in found)
        if not inside and (family := family_of(module)) is not None:
            found.append((module, family, name))
    return found


def body_of(module: Any, family: Family) -> Any:
    """Returns the part of a classifier of `transformers` that has the embeddings and the blocks."""
    return getattr(module, family.body)


def _following(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Gives what runs after the module called `name`, in the Sequentials that it is in, from the inside out."""
    parts = name.split(".") if name else []
    for depth in reversed(range(len(parts))):
        parent = model.get_submodule(".".join(parts[:depth]))
        if type(parent).forward is nn.Sequential.forward:
            names = [child for child, _ in parent.named_children()]
            yield from list(parent.children())[names.index(parts[depth]) + 1 :]


Parts = tuple[tuple[nn.Module, ...], Callable[[Tensor], Tensor]]


def _timm_parts(module: Any, _family: Family) -> Parts:
    """Returns blocks and head of an encoder of timm, or of ours, which has the same names."""
    blocks = tuple(module.blocks)
    if getattr(module, "blocks_token_only", None) is not None or getattr(module, "cls_attn_blocks", None) is not None:
        return blocks, lambda tokens: module.forward_head(module.norm(module.forward_cls(tokens)))
    return blocks, lambda tokens: module.forward_head(module.norm(tokens))


def _torchvision_parts(module: Any, _family: Family) -> Parts:
    """Returns blocks and head of torchvision's VisionTransformer."""
    return tuple(module.encoder.layers), lambda tokens: module.heads(module.encoder.ln(tokens)[:, 0])


def transformers_prefix(module: Any, family: Family) -> tuple[str, ...]:
    """Returns the names of the prefix tokens of an image classifier of transformers."""
    embeddings = body_of(module, family).embeddings
    prefix = (
        ["class"] if any(getattr(embeddings, n, None) is not None for n in ("cls_token", "class_embedding")) else []
    )
    prefix += ["distillation"] if getattr(embeddings, "distillation_token", None) is not None else []
    registers = getattr(embeddings, "register_tokens", None)
    prefix += ["register"] * (0 if registers is None else registers.shape[1])
    return tuple(prefix)


def _transformers_parts(module: Any, family: Family) -> Parts:
    """Returns blocks and head of an image classifier of transformers."""
    body = body_of(module, family)
    encoder = getattr(body, "encoder", body)
    blocks = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    num_prefix = len(transformers_prefix(module, family))
    # CLIP's classifier takes the tokens before `post_layernorm`, which only its pooled output goes through.
    unnormalised = family.name.startswith("CLIP")
    norm = nn.Identity() if unnormalised else getattr(body, "layernorm", None) or body.post_layernorm

    def head(tokens: Tensor) -> Tensor:
        tokens = norm(tokens)
        if family.pool == "distilled":
            classes = module.cls_classifier(tokens[:, 0])
            return (classes + module.distillation_classifier(tokens[:, 1])) / 2
        if family.pool == "pooler":
            pooled = body.pooler(tokens)
        elif family.pool == "class":
            pooled = tokens[:, 0]
        else:
            pooled = tokens[:, num_prefix:].mean(1)
            if family.pool == "class_mean":
                pooled = torch.cat([tokens[:, 0], pooled], 1)
        return module.classifier(pooled)

    return tuple(blocks), head


_PARTS: dict[str, Callable[[Any, Family], Parts]] = {
    "ours": _timm_parts,
    "timm": _timm_parts,
    "torchvision": _torchvision_parts,
    "transformers": _transformers_parts,
}
