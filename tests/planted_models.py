"""Networks whose evidence is known: two in closed form, for fast tests, and three that are trained in a minute or less.

    tag_reader()     reads the colour of the corner and nothing else; linear in the corner's pixels
    color_finder()   finds each class's colour anywhere in `draw_color_pair`; knows two classes in one picture apart
    shortcut_cnn()   trained on true tags: reads the tag
    shortcut_vit()   the same, of attention
    shapes_cnn()     trained on plain shapes: reads the outline

Each has what `load_model` gives, `classes` and `preprocessing`, and stands in evaluation mode. Trained ones are kept
for the process; the seed and one thread make them the same each time on one machine.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import pairwise

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vision_attn.data.planted import TAG_COLORS, PlantedImage, draw_pair, draw_shortcut, pair_labels, tag_place
from vision_attn.data.shapes import SHAPES, ShapeImage, draw
from vision_attn.data.transforms import Preprocessing, eval_transforms
from vision_attn.models.factory import create_model

GREY = 128.0


def as_loaded(model: nn.Module, size: int = 64) -> nn.Module:
    """Returns the model as `load_model` would give it."""
    model.classes = SHAPES  # type: ignore[assignment]
    model.num_classes = len(SHAPES)  # type: ignore[assignment]
    whole = eval_transforms((size, size), crop_pct=1.0)  # a centre crop would cut tags off
    model.preprocessing = Preprocessing((size, size), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), whole)  # type: ignore[assignment]
    return model.eval()


def normalized(pictures: Iterable[ShapeImage | PlantedImage]) -> Tensor:
    """Returns pictures as the models' input, (B, 3, H, W)."""
    pixels = torch.from_numpy(np.stack([picture.image for picture in pictures]))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def accuracy(model: nn.Module, pictures: list) -> float:
    """Returns the share of pictures whose class comes first."""
    with torch.inference_mode():
        logits = torch.cat([model(batch) for batch in normalized(pictures).split(250)])
    return float((logits.argmax(1) == torch.tensor([picture.label for picture in pictures])).float().mean())


class TagReader(nn.Module):
    """Logits -|m - c_k|^2 + |m|^2 = 2 c_k m - |c_k|^2 of the corner's mean colour m and each tag's colour c_k.

    Colours are on the normalised scale, and the largest logit is the nearest colour's. The true relevance of a pixel x
    in the corner for class k is 2 c_k x / n, n the corner's pixels; of any other pixel it is zero.
    """

    def __init__(self, size: int = 64, corner: str = "bottom_right") -> None:
        super().__init__()
        self.place = tag_place(size, corner)
        self.head = nn.Linear(3, len(SHAPES))
        colors = (torch.tensor(TAG_COLORS).float() / 255 - 0.5) / 0.25
        with torch.no_grad():
            self.head.weight.copy_(2 * colors)
            self.head.bias.copy_(-colors.square().sum(1))

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = self.place
        return self.head(images[:, :, rows, columns].mean(dim=(2, 3)))


def tag_reader(size: int = 64, corner: str = "bottom_right") -> nn.Module:
    """Returns the network that uses the tag, the whole tag and nothing but the tag."""
    return as_loaded(TagReader(size, corner), size)


class ColorFinder(nn.Module):
    """Logits: how much of the picture has each class's colour: sum of relu(u_k (x - grey) - t_k) / 64.

    u_k is the direction of the colour from mid grey; t_k lies halfway between what the colour itself gives and the most
    that grey or another class's colour gives, so that a pixel of colour k is evidence for k and for no other class.
    """

    def __init__(self) -> None:
        super().__init__()
        grey = (GREY / 255 - 0.5) / 0.25
        colors = (torch.tensor(TAG_COLORS).float() / 255 - 0.5) / 0.25 - grey
        directions = functional.normalize(colors, dim=1)
        responses = directions @ colors.T
        own = responses.diagonal()
        others = (responses - torch.diag(own + 1e6)).amax(1).clamp_min(0)
        self.find = nn.Conv2d(3, len(SHAPES), 1)
        with torch.no_grad():
            self.find.weight.copy_(directions[:, :, None, None])
            self.find.bias.copy_(-(own + others) / 2 - grey * directions.sum(1))

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.find(images)).sum(dim=(2, 3)) / 64


def color_finder(size: int = 64) -> nn.Module:
    """Returns the network that sees two classes in one picture, each where it is."""
    return as_loaded(ColorFinder(), size)


def draw_color_pair(index: int, *, seed: int = 0, size: int = 64) -> PlantedImage:
    """Returns two discs on mid grey, in the colours of two classes and at two of the four quarters of the picture."""
    rng = np.random.default_rng([seed, index])
    labels = pair_labels(index, seed=seed)
    picture, masks = np.full((size, size, 3), int(GREY), np.uint8), {}
    for label, quarter in zip(labels, rng.permutation(4)[:2], strict=True):
        y, x = (int((place + 0.5) * size / 2) for place in divmod(int(quarter), 2))
        disc = np.zeros((size, size), np.uint8)
        cv2.circle(disc, (x, y), int(size * rng.uniform(0.1, 0.2)), 1, -1)
        masks[label] = disc > 0
        picture[masks[label]] = TAG_COLORS[label]
    return PlantedImage(picture, masks, labels[0])


@cache
def shortcut_cnn() -> nn.Module:
    """Returns a small CNN that was trained where tags are true."""
    # The whole grid goes into the head, not its mean: a corner is a place.
    build = partial(_cnn, nn.AdaptiveAvgPool2d(4))
    return _trained(build, [draw_shortcut(index) for index in range(1600)], epochs=3)


@cache
def shortcut_vit() -> nn.Module:
    """Returns a small ViT (8 x 8 patches of 8 pixels) that was trained where tags are true."""
    return _trained(_vit, [draw_shortcut(index) for index in range(1600)], epochs=12)


@cache
def shapes_cnn() -> nn.Module:
    """Returns a small CNN that was trained on plain shapes, one a picture."""
    # The strongest place of each channel, so that a second object takes nothing from the first.
    build = partial(_cnn, nn.AdaptiveMaxPool2d(1))
    return _trained(build, [draw(index) for index in range(2500)], epochs=10, turn=True)


@cache
def held_out(kind: str, count: int = 400) -> list:
    """Returns test pictures: "plain", "true", "random", "none" (tags of a shortcut) or "pairs"."""
    if kind == "plain":
        return [draw(index, split="test") for index in range(count)]
    if kind == "pairs":
        return [draw_pair(index, split="test") for index in range(count)]
    return [draw_shortcut(index, split="test", tag=kind) for index in range(count)]


def _cnn(pool: nn.Module) -> nn.Module:
    layers: list[nn.Module] = []
    widths = (3, 32, 48, 64, 96)
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=1 + (before == 3), padding=1, bias=False)]
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
        if before != 3 and after != widths[-1]:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.LazyLinear(len(SHAPES)))


def _vit() -> nn.Module:
    return create_model("va_vit_micro_stem8_64", num_classes=len(SHAPES))


def _trained(build: Callable[[], nn.Module], pictures: list, *, epochs: int, turn: bool = False) -> nn.Module:
    """Returns a network after AdamW with one cycle of the learning rate, batches of 64; `turn` adds flips and turns."""
    images, labels = normalized(pictures), torch.tensor([picture.label for picture in pictures])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        model(images[:2])  # a lazy layer learns its width
        steps = epochs * (len(images) // 64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.2)
        model.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(images))[: len(images) // 64 * 64].view(-1, 64):
                loss = functional.cross_entropy(model(_turned(images[batch]) if turn else images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                cycle.step()
    return as_loaded(model)


def _turned(images: Tensor) -> Tensor:
    """Returns a batch of which each eighth is turned or flipped another way."""
    parts = []
    for way, part in enumerate(images.chunk(8)):
        turned = part.rot90(way % 4, (2, 3))
        parts.append(turned.flip(3) if way >= 4 else turned)
    return torch.cat(parts)
