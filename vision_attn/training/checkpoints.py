"""Checkpoints of a run: which ones there are, and whether they can be gone on with."""

from collections.abc import Sequence
from pathlib import Path

import torch

from vision_attn.errors import UsageError

BEST = Path("checkpoints", "best.ckpt")
LAST = Path("checkpoints", "last.ckpt")


def check_checkpoint(path: Path, classes: Sequence[str]) -> None:
    """Raises a `UsageError` where a checkpoint is not there, is not ours with plain tensors, or is of other classes."""
    if not path.is_file():
        raise UsageError(f"expected a checkpoint at {path}, got nothing: give --ckpt_path, or fit the run first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a different one for each kind of damage
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"expected a checkpoint of plain tensors (no code to unpickle) at {path}, got: {reason}"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UsageError(f"expected a checkpoint of a run at {path}, got another file: give runs/<name>/{BEST}")
    trained_on = tuple(content.get("classes", classes))
    if trained_on != tuple(classes):
        raise UsageError(
            f"expected photos of the run's classes ({', '.join(trained_on)}), got {', '.join(classes)}: make the class "
            "folders the same"
        )
