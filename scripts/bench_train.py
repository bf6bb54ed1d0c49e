"""Measures training: our trainer beside a bare loop, our loader and ViT beside torchvision's and timm's, and start-up.

    python scripts/bench_train.py [epoch] [vit] [startup] [loader --photos FOLDER]

Figures are medians of interleaved runs, as ratios within this one run, since machines differ and are shared.
"""

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torchvision import datasets
from torchvision import transforms as T

from vision_attn.data.datamodule import ImageDataModule, ImageDataset, collate
from vision_attn.data.reading import find_images
from vision_attn.data.sources import FileImages
from vision_attn.data.transforms import normalize
from vision_attn.models.vit import ViT
from vision_attn.training.module import Classifier
from vision_attn.training.optim import OptimConfig, create_optimizer, create_schedule

SECTIONS = ("epoch", "loader", "startup", "vit")


def interleaved(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each side's runs, taken in turn; a first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for name in order:
            took = sides[name]()
            if turn:
                seconds[name].append(took)
    return seconds


def bench_epoch(repeats: int) -> list[tuple[str, str, str]]:
    """Returns the row for one epoch of `va_vit_micro_stem8_64` on shapes: trainer over bare loop, the same batches.

    The trainer logs to CSV and follows the learning rates, as `vision-attn fit` does. Neither side validates, writes
    checkpoints or draws, which no loop does for nothing.
    """
    options = {"train": 1024, "validation": 0, "test": 0}
    data = ImageDataModule(source="shapes", image_size=64, batch_size=64, num_workers=0, options=options, crop_pct=1.0)
    data.train_specs = ["HorizontalFlip"]
    for i in range(len(data.splits["train"])):
        data.splits["train"].read(i)

    def network() -> Classifier:
        torch.manual_seed(0)
        return Classifier("va_vit_micro_stem8_64", num_classes=8, image_size=(64, 64), channels_last=False)

    def ours() -> float:
        model = network()
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=CSVLogger(tempfile.mkdtemp(dir=folder), name="", version=""),
            callbacks=[LearningRateMonitor("step")],
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            limit_val_batches=0,
        )
        start = time.perf_counter()
        trainer.fit(model, train_dataloaders=data.train_dataloader())
        return time.perf_counter() - start

    def bare() -> float:
        model = network()
        loader = data.train_dataloader()
        start = time.perf_counter()
        model.train()
        optimizer = create_optimizer(model.network, OptimConfig())
        schedule = create_schedule(optimizer, OptimConfig(), total_steps=len(loader), steps_per_epoch=len(loader))
        for step, (images, labels, _) in enumerate(loader):
            logits = model.network(normalize(images, mean=model.mean, std=model.std))
            loss = F.cross_entropy(logits, labels, label_smoothing=model.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
            optimizer.step()
            schedule.step_update(step + 1)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        seconds = interleaved({"ours": ours, "bare": bare}, repeats)
    return [_ratio("training epoch, trainer / bare loop", seconds["ours"], seconds["bare"], "at most 1.05")]


def bench_loader(photos: Path, repeats: int) -> list[tuple[str, str, str]]:
    """Returns rows for photos a second of processor time: ours over torchvision's ImageFolder with PIL.

    Ours ends in uint8 batches, which are normalised on the device; where the device is the CPU, that costs its cores
    too, and is counted in a row of its own. Both run in one thread; processor time, unlike the clock's, does not depend
    on what else the machine does.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    size, batch = 224, 32
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    paths = find_images([photos])
    images = FileImages(paths, torch.zeros(len(paths), dtype=torch.int64).numpy())
    plain = {"size": [size, size], "scale": [0.08, 1.0]}
    averaging = {**plain, "area_for_downscale": "image"}

    def ours(crop: dict[str, Any], min_size: int | None, *, on_device: bool = False) -> Callable[[], float]:
        dataset = ImageDataset(images, [{"RandomResizedCrop": crop}], image_size=(size, size), min_size=min_size)

        def run() -> float:
            start = time.process_time()
            for batch_images, _, _ in torch.utils.data.DataLoader(dataset, batch, collate_fn=collate):
                if not on_device:
                    normalize(batch_images, mean=mean, std=std)
            return time.process_time() - start

        return run

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "class").symlink_to(photos.resolve())
        theirs = datasets.ImageFolder(
            folder, T.Compose([T.RandomResizedCrop(size), T.ToTensor(), T.Normalize(mean, std)])
        )

        def torchvision() -> float:
            start = time.process_time()
            for _ in torch.utils.data.DataLoader(theirs, batch):
                pass
            return time.process_time() - start

        seconds = interleaved(
            {
                "torchvision": torchvision,
                "ours, uint8": ours(plain, 3 * size // 2, on_device=True),
                "ours, normalised on the CPU": ours(plain, 3 * size // 2),
                "the same, full decoding": ours(plain, None),
                "the same, areas averaged": ours(averaging, 3 * size // 2),
            },
            repeats,
        )
    rate = len(paths) / statistics.median(seconds["torchvision"])
    return [
        _ratio(
            f"loader: {name} / torchvision ({rate:.0f} photos/s)", seconds["torchvision"], seconds[name], "at least 1.8"
        )
        for name in seconds
        if name != "torchvision"
    ]


def bench_vit(repeats: int) -> list[tuple[str, str, str]]:
    """Returns rows for a ViT-S/16 on 8 images of 224 px, forward pass and training step: ours over timm's."""
    torch.manual_seed(0)
    name = "vit_small_patch16_224"
    theirs = timm.create_model(name)
    ours = ViT.from_timm(name, theirs.state_dict())
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(1000, (8,))

    def forward(model: torch.nn.Module) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            with torch.inference_mode():
                model.eval()(images)
            return time.perf_counter() - start

        return run

    def step(model: torch.nn.Module) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            F.cross_entropy(model.train()(images), labels).backward()
            model.zero_grad()
            return time.perf_counter() - start

        return run

    rows = []
    for what, side in (("forward pass", forward), ("training step", step)):
        seconds = interleaved({"ours": side(ours), "timm": side(theirs)}, 3 * repeats)
        rows.append(_ratio(f"ViT-S/16 {what}, ours / timm", seconds["ours"], seconds["timm"], "at most 1.02"))
    return rows


def bench_startup(repeats: int) -> list[tuple[str, str, str]]:
    """Returns rows for `import vision_attn`, above Python's own start, and `vision-attn --help`, in seconds."""

    def run(*command: str) -> Callable[[], float]:
        def once() -> float:
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

        return once

    sides = {
        "python": run(sys.executable, "-c", "pass"),
        "import": run(sys.executable, "-c", "import vision_attn"),
        "help": run(sys.executable, "-m", "vision_attn.cli", "--help"),
    }
    seconds = {name: statistics.median(values) for name, values in interleaved(sides, max(5, repeats)).items()}
    return [
        ("import vision_attn, above an empty Python", f"{seconds['import'] - seconds['python']:.3f} s", "under 0.2 s"),
        ("vision-attn --help, whole process", f"{seconds['help']:.3f} s", "under 1 s"),
    ]


def _ratio(name: str, above: list[float], below: list[float], target: str) -> tuple[str, str, str]:
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    spread = f"{min(pairs):.3f} to {max(pairs):.3f}"
    return name, f"{statistics.median(pairs):.3f} ({spread}, {len(pairs)} pairs)", target


def main() -> None:
    """Runs the sections asked for and prints their table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("sections", nargs="*", default=[], help=", ".join(SECTIONS))
    parser.add_argument("--photos", type=Path, help="a folder of photos for the loader")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    sections = options.sections or [name for name in SECTIONS if name != "loader" or options.photos]
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    table = Table("figure", "measured", "target")
    for section in sections:
        if section not in SECTIONS:
            parser.error(f"expected sections among {', '.join(SECTIONS)}, got {section!r}")
        if section == "epoch":
            rows = bench_epoch(options.repeats)
        elif section == "vit":
            rows = bench_vit(options.repeats)
        elif section == "loader":
            if options.photos is None:
                parser.error("expected a folder of photos for the loader, got none: give --photos")
            rows = bench_loader(options.photos, options.repeats)
        else:
            rows = bench_startup(options.repeats)
        for row in rows:
            table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
