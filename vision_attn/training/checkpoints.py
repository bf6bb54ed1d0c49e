"""Checkpoints of a run: how they are written, which ones there are, and whether they can be gone on with."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from vision_attn.errors import UsageError
from vision_attn.files import new_file

BEST = Path("checkpoints", "best.ckpt")
LAST = Path("checkpoints", "last.ckpt")


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the one that it replaces, and moves it into place once the disk has all of it.

    Whatever ends the process meanwhile, a whole checkpoint has the name: the earlier one, or this one. The disk needs
    room for one more checkpoint than is kept.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes a checkpoint, whole or not at all."""
        with new_file(path, durable=True) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch's writer says in its own words that it could not write, and keeps the disk's as the context.
                raise _os_error(error) or error from error


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def check_checkpoint(path: Path, classes: Sequence[str], state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Returns what is in a checkpoint, its tensors still on the disk.

    Args:
        path: The file.
        classes: Those of the photos.
        state: Those of the classifier that it is to be loaded into.

    Raises:
        UsageError: it is not there, is damaged, holds more than plain tensors, is no run's, or is that of other classes
            or of another network.
    """
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
    if state is not None:
        _check_fits(path, content["state_dict"], state)
    return content


def _check_fits(path: Path, saved: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuses the weights of another network."""
    for key in dict.fromkeys(key for key in (*state, *saved) if key.startswith("network.")):
        there, wanted = saved.get(key), state.get(key)
        if there is None or wanted is None or there.shape != wanted.shape:
            got, expected = ("nothing" if one is None else str(tuple(one.shape)) for one in (there, wanted))
            raise UsageError(
                f"expected the weights of the config's network at {path}, got those of another ({key}: expected "
                f"{expected}, got {got}): give the checkpoint of this run, or correct model.name and model.options"
            )
