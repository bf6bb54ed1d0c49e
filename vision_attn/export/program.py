"""A traced network as `torch.export`'s ExportedProgram: torch alone loads it, and compiles or lowers it further."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FACTS_FILE = "facts.json"
"""What the file says of itself, in it: `torch.export.load(path, extra_files={"facts.json": ""})` gives it."""


def to_bytes(traced: Any, facts: Mapping[str, str]) -> bytes:
    """Returns a traced network as a `.pt2` file that says `facts` of itself."""
    file = io.BytesIO()
    torch.export.save(traced, file, extra_files={FACTS_FILE: json.dumps(dict(facts), ensure_ascii=False)})
    return file.getvalue()


def runner(content: bytes) -> Callable[[Tensor], dict[str, Tensor]]:
    """Returns a function from images to outputs by name, which runs a `.pt2` file."""
    module = torch.export.load(io.BytesIO(content)).module()

    def run(images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return module(images)

    return run
