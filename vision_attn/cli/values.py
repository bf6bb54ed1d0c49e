"""What stands behind a flag: numbers, sizes, devices, files of names."""

import argparse
from typing import Any

from vision_attn.errors import UsageError


def positive(text: str) -> int:
    """Returns a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def boolean(text: str) -> bool:
    """Returns true or false."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text == "true"


def _numbers(text: str, kind: Any) -> tuple[Any, ...]:
    return tuple(kind(part) for part in text.split(","))


def scale(text: str) -> Any:
    """Returns the scale of overlays: a word, a percentile or its two ends."""
    if text in ("image", "set"):
        return text
    try:
        values = _numbers(text, float)
    except ValueError:
        values = ()
    if len(values) not in (1, 2):
        raise argparse.ArgumentTypeError(f"expected image, set, a percentile or LOW,HIGH, got {text!r}")
    return values[0] if len(values) == 1 else values


def patch(text: str) -> tuple[int, int]:
    """Returns the row and the column of a patch."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected ROW,COL of a patch, such as 7,5, got {text!r}")
    return int(parts[0]), int(parts[1])


def size(text: str) -> int | list[int]:
    """Returns one side, or [height, width]."""
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected a size such as 224 or HEIGHT,WIDTH, got {text!r}")
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


def class_names(path: str | None) -> list[str] | None:
    """Returns the lines of a file that are not empty."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"expected a text file with a class name a line at {path}, got an error ({reason})") from error


def device(name: str, local_rank: int = 0) -> Any:
    """Returns the device of a name; of "auto" the GPU where there is one, to each process of a machine its own."""
    import torch

    if name == "auto":
        # A scheduler may show each process its own GPU alone.
        cuda = torch.cuda.is_available()
        return torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"expected a device that is there, got --device {name} ({reason}): use auto or cpu") from error
    return found


def add_named_model(parser: argparse.ArgumentParser) -> None:
    """Adds what the name of a network, instead of an artefact, needs besides."""
    named = parser.add_argument_group("where MODEL is a name")
    named.add_argument("--checkpoint", metavar="FILE", help="its weights, from a file")
    named.add_argument(
        "--pretrained", type=boolean, metavar="true|false", help="its weights from the hub (true without --checkpoint)"
    )
    named.add_argument("--classes", metavar="FILE", help="names of its classes, one a line (ImageNet's for 1,000)")
    named.add_argument("--image-size", type=size, metavar="N|H,W", help="of its input (its own)")


def open_named_model(options: argparse.Namespace) -> Any:
    """Returns the model that MODEL and the options of `add_named_model` stand for."""
    from vision_attn.models.factory import open_model

    return open_model(
        options.model,
        checkpoint=options.checkpoint,
        pretrained=options.pretrained,
        classes=class_names(options.classes),
        image_size=options.image_size,
    )
