"""Measures what watching attention adds to an epoch of training, as a share of its time.

    python scripts/bench_watching.py [--model vit_small_patch16_224] [--photos 8] [--train 1700] [--device cpu]

One epoch is `--train` photos. Training steps and drawings are timed in turn, after one of each that warms up; the
medians count. Overlays are drawn, written and kept as in a run; loggers are not.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional as F

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.training.module import Classifier
from vision_attn.training.watching import WatchAttention, WatchConfig, redraw


def main() -> None:
    """Prints the table's line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--method", default=None, help="the network's own where left out")
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--train", type=int, default=1700, help="photos of an epoch")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()

    options = {"size": 224, "train": 64, "validation": 64, "test": 8}
    data: Any = ImageDataModule("shapes", options=options, batch_size=given.batch_size, crop_pct=1.0, num_workers=0)
    torch.manual_seed(0)
    classifier = Classifier(given.model, num_classes=data.num_classes, image_size=(224, 224)).to(given.device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-4)
    images = torch.from_numpy(np.stack([data.splits["train"].read(index) for index in range(given.batch_size)]))
    images = images.permute(0, 3, 1, 2).to(given.device)
    labels = torch.from_numpy(np.asarray(data.splits["train"].labels[: given.batch_size])).to(given.device)

    def step() -> None:
        loss = F.cross_entropy(classifier(classifier.normalize(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    steps, drawings = [], []
    with tempfile.TemporaryDirectory() as folder:
        watcher = WatchAttention(WatchConfig(method=given.method, photos=given.photos), Path(folder))
        trainer: Any = SimpleNamespace(
            is_global_zero=True, fast_dev_run=False, callbacks=[], loggers=[], datamodule=data, global_step=1,
            current_epoch=0, max_epochs=given.rounds + 1, strategy=None,
        )  # fmt: skip
        watcher.check(trainer, classifier, data)
        for number in range(given.rounds + 1):
            trainer.current_epoch = number
            steps.append(_seconds(step, given.device))
            drawings.append(_seconds(lambda: watcher.on_train_epoch_end(trainer, classifier), given.device))
        end = _seconds(lambda: redraw(watcher.folder), given.device)
    of_step, drawing = statistics.median(steps[1:]), statistics.median(drawings[1:])
    epoch = of_step * given.train / given.batch_size
    Console(soft_wrap=True).print(
        f"{given.model}, {given.photos} photos by {next(iter(watcher.methods))}, {torch.get_num_threads()} threads, "
        f"{given.device}: {drawing:.2f} s an epoch beside {epoch:.0f} s of training on {given.train} photos, "
        f"{drawing / epoch:.2%} (as long as {drawing / of_step * given.batch_size:.0f} photos of training); "
        f"{end:.1f} s for the sheet of {given.rounds + 1} epochs, once"
    )


def _seconds(work: Any, device: str) -> float:
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
