"""What is refused before a run has written anything."""

from pathlib import Path
from typing import Any

import yaml

from vision_attn.errors import UsageError


def check_epochs(trainer: Any) -> None:
    """Refuses a trainer that would never train, or never validate: without validation there are no best weights."""
    epochs = trainer.max_epochs
    if epochs is not None and epochs < 1:
        raise UsageError(f"expected trainer.max_epochs of at least 1, got {epochs}")
    if trainer.limit_val_batches == 0 or (epochs and (trainer.check_val_every_n_epoch or 1) > epochs):
        raise UsageError(
            "expected validation in the run, which decides on the best weights, got trainer options without: leave "
            "trainer.limit_val_batches and trainer.check_val_every_n_epoch out"
        )


def check_same_split(config: Any, run_dir: Path) -> None:
    """Refuses to set photos aside in another way than the run did: they would be among those that it was trained on."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return
    then, now = yaml.safe_load(path.read_text(encoding="utf-8")).get("data", {}), config.data
    if (then.get("source"), then.get("path")) != (now.source, now.path):
        return
    for key in ("seed", "validation_share", "test_share"):
        if key in then and then[key] != now[key]:
            raise UsageError(
                f"expected data.{key} {then[key]}, as in the run, got {now[key]}: photos that it was trained on would "
                "be counted; give other photos with --data.path, or fit again"
            )
