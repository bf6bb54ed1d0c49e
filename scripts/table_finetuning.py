"""Makes the table of docs/results.md: ways to fine-tune on the same photos with the same budget.

    python scripts/table_finetuning.py CLOTHING --vit vits14_saliency_fp16.safetensors \
      --effnet tf_efficientnet_lite0.safetensors [--rows vit_lora,effnet] [--epochs 2] [--image-size 140]

Each row is a process of its own: `vision-attn fit`, then `test`. Time is that of the fit, start-up and export included.
Rows go one after another, so that each has the machine as the others had it; rows that are there already are kept.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CONFIGS = Path(__file__).parents[1] / "configs"
VIT, EFFNET = "finetune_clothing_vits14.yaml", "finetune_clothing_effnetlite0.yaml"

FLAT = {"model.optim.layer_decay": 1.0}  # one learning rate for all layers

# What a row has that its config has not. All train the whole network unless it says otherwise.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_probe": (VIT, {"model.tuning": {"mode": "linear_probe"}, **FLAT, "model.optim.lr": 3e-3}),
    "vit_lora": (VIT, {"model.lora": {"rank": 8, "alpha": 16}, **FLAT, "model.optim.lr": 1e-3}),
    "vit_layer_decay": (VIT, {}),
    "vit_full": (VIT, {**FLAT, "model.optim.lr": 5e-5}),
    "effnet": (EFFNET, {}),
    "effnet_eca": (EFFNET, {"model.attention": {"name": "eca", "where": "stages"}}),
}


def augmentation(size: int) -> list[Any]:
    """Returns the configs' augmentation at another image size."""
    crop = {"size": [size, size], "scale": [0.4, 1.0], "interpolation": "bicubic", "area_for_downscale": "image"}
    colour = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02, "p": 0.5}
    return [{"RandomResizedCrop": crop}, "HorizontalFlip", {"ColorJitter": colour}]


def fit(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns what a row's run took and reached; it is kept as JSON beside the run."""
    config, changes = ROWS[row]
    run_dir = options.out / row
    weights = options.vit if config == VIT else options.effnet
    settings = {
        "data.path": options.photos,
        "data.image_size": options.image_size,
        "data.train_transforms": json.dumps(augmentation(options.image_size)),
        "data.crop_pct": 1.0,
        "data.num_workers": 0,
        "model.checkpoint": weights,
        "model.freeze": "null",
        "trainer.max_epochs": options.epochs,
        "run_dir": run_dir,
    }
    settings |= {key: json.dumps(value) for key, value in changes.items()}
    given = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "vision_attn.cli"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, "fit", "--config", str(CONFIGS / config), *given], check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "test", "--config", str(run_dir / "config.yaml")], check=True)
    took = {
        "seconds": seconds,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        # Of the largest process so far: only a row of its own process tells its own.
        "peak_gib": after.ru_maxrss / 2**20,
    }
    (run_dir / "took.json").write_text(json.dumps(took))
    return took


def main() -> None:
    """Trains the rows that are not there yet, and prints all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--vit", type=Path, required=True)
    parser.add_argument("--effnet", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=140)
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    options = parser.parse_args()
    rows = options.rows.split(",")
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"expected rows among {', '.join(ROWS)}, got {', '.join(unknown)}")
    table = Table(title=f"{options.epochs} epochs at {options.image_size} px")
    for title in ("", "test top-1", "95 %", "macro F1", "wall s", "processor s", "peak GiB"):
        table.add_column(title, justify="left" if not title else "right")
    for row in rows:
        run_dir = options.out / row
        if not (run_dir / "took.json").is_file():
            # A process of its own for each, so that its peak is its own.
            one = [*sys.argv, "--rows", row]
            if len(rows) > 1:
                subprocess.run([sys.executable, *one], check=True, env=os.environ)
            else:
                fit(row, options)
        took = json.loads((run_dir / "took.json").read_text())
        test = json.loads((run_dir / "test.json").read_text())
        low, high = test["top1_interval_95"]
        table.add_row(
            row,
            f"{test['correct'] / test['total']:.1%} ({test['correct']})",
            f"{low:.1%} to {high:.1%}",
            f"{test['test/f1']:.1%}",
            *(f"{took[key]:.0f}" for key in ("seconds", "processor_seconds")),
            f"{took['peak_gib']:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
