"""What is refused before a run has written anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vision_attn.errors import UsageError
from vision_attn.training.checkpoints import BEST, LAST


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


def check_has_weights(model: Any) -> None:
    """Refuses to freeze what has not learned anything yet."""
    keys = {
        f"model.freeze {model.freeze}": bool(model.freeze),
        f"model.tuning.mode {model.tuning.mode}": model.tuning.mode in ("linear_probe", "last_blocks"),
        "model.lora": model.lora is not None,
    }
    if any(keys.values()) and not (model.checkpoint or model.pretrained):
        raise UsageError(
            "expected weights to start from where modules are frozen, got "
            f"{next(key for key, used in keys.items() if used)} with neither model.checkpoint nor model.pretrained: "
            "give one"
        )


def check_same_split(config: Any, run_dir: Path) -> None:
    """Refuses to set photos aside in another way than the run did: they would be among those that it was trained on."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return
    then, now = yaml.safe_load(path.read_text(encoding="utf-8")).get("data", {}), config.data
    if (then.get("source"), then.get("path")) != (now.source, now.path):
        return
    for key in ("seed", "validation_share", "test_share", "fold", "folds"):
        if key in then and then[key] != now[key]:
            raise UsageError(
                f"expected data.{key} {then[key]}, as in the run, got {now[key]}: photos that it was trained on would "
                "be counted; give other photos with --data.path, or fit again"
            )
    before, after = (
        {k: v for k, v in (options or {}).items() if k not in _SAME_PHOTOS}
        for options in (then.get("options"), now.options)
    )
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            raise UsageError(
                f"expected data.options.{key} {before.get(key)}, as in the run, got {after.get(key)}: photos that it "
                "was trained on could be counted; give other photos with --data.path, or fit again"
            )


# Options that say where the photos are, not which.
_SAME_PHOTOS = ("root", "cache_dir", "download")


def check_resumed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses to go on with a run that has no checkpoint, or with another config than it was started with.

    Args:
        config: The run's, as plain values.
        defaults: What its keys are where nobody sets them, for keys that the run's config.yaml does not know yet.
    """
    run_dir = Path(config["run_dir"])
    last, saved = run_dir / LAST, run_dir / "config.yaml"
    given = str(config["ckpt_path"])
    if given != "last" and Path(given).resolve() != last.resolve():
        raise UsageError(
            f"expected --ckpt_path last, which goes on with the run in {run_dir}, got {given}: a new run starts from "
            f"its weights with --model.checkpoint {given}"
        )
    if not saved.is_file():
        raise UsageError(
            f"expected a run to go on with at {run_dir}, got none: give --config runs/<name>/config.yaml or --run_dir"
        )
    if not last.is_file():
        raise UsageError(
            f"expected a checkpoint to go on from at {last}, got none, for the run had not got that far: remove "
            f"{run_dir} and start again, with checkpoint_every_n_steps for checkpoints within an epoch"
        )
    then = {**flat(defaults), **flat(yaml.safe_load(saved.read_text(encoding="utf-8")))}
    now = flat(config)
    differing = [
        key for key in sorted({*then, *now}) if then.get(key) != now.get(key) and not key.startswith(_SAME_RESULT)
    ]
    if differing:
        told = "; ".join(f"{key}: expected {then.get(key)}, got {now.get(key)}" for key in differing[:4])
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        advice = (
            "the learning rate falls until trainer.max_epochs: to train longer, start a new run with "
            f"--model.checkpoint {run_dir / BEST}"
            if "trainer.max_epochs" in differing
            else f"leave it as in {saved}, or start a new run"
        )
        raise UsageError(f"expected the config that the run was started with ({told}{more}): {advice}")


def check_same_photos(run: Mapping[str, Any], photos: Mapping[str, Any], seed: int, world_size: int) -> None:
    """Refuses to go on with other photos, another seed or another number of processes than the checkpoint's."""
    for split, (count, fingerprint) in run["photos"].items():
        now = photos.get(split, [0, ""])
        if now != [count, fingerprint]:
            got = f"{now[0]}" if now[0] != count else "as many with other names or labels"
            raise UsageError(
                f"expected the {count} photos of {split} that the run was started with, got {got}: put them back, or "
                "start a new run"
            )
    if run["world_size"] != world_size:
        raise UsageError(
            f"expected {run['world_size']} processes, as in the run, got {world_size}: its batches would be of another "
            "size; set trainer.devices and trainer.num_nodes, or start a new run"
        )
    if run["seed"] != seed:
        raise UsageError(f"expected seed_everything {run['seed']}, as in the run, got {seed}: leave it as it was")


def flat(config: Any, above: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings by their dotted names."""
    if isinstance(config, Mapping) and (config or not above):
        return {
            name: value
            for key, part in config.items()
            for name, value in flat(part, f"{above}.{key}" if above else str(key)).items()
        }
    return {above: config}


# Beginnings of keys that change where, how fast and beside what a run is trained, and not what comes out of it.
_SAME_RESULT = (
    "ckpt_path",
    "run_dir",
    "config",
    "checkpoint_every_n_steps",
    "watch",
    "evaluation",
    "tune",
    "data.path",
    "data.num_workers",
    "data.check",
    "data.damaged",
    "data.report",
    "data.eval_batch_size",
    "model.grad_checkpointing",
    "model.checkpoint",
    "model.pretrained",
    "weights_only",
    # How many processes there are is compared with the checkpoint's.
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.barebones",
    "trainer.default_root_dir",
    "trainer.detect_anomaly",
    "trainer.enable_",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.model_registry",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
)
