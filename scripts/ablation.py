"""What blocks bring: one small ResNet with each of them, on the same pictures, seeds and schedule.

    python scripts/ablation.py CIFAR10 --out ablation.csv [--blocks none se cbam] [--seeds 3] [--epochs 30]

CIFAR10 is a folder (train/<class>, test/<class>) or the tar archive of one. The network is a ResNet of basic blocks
for 32 px (He et al. 2016, section 4.2, with timm's blocks); a block of ours stands where its paper puts it in a ResNet:
after the last batch norm of a residual branch, before the sum. Within a seed all networks start from the same weights,
and see the same pictures in the same order. Runs that are in the CSV already are not run again.

Intervals are bootstraps over test pictures, each with its answers under all seeds: they say how far another set of test
pictures could move a number. How far other seeds could, each seed's difference shows.
"""

import argparse
import csv
import io
import statistics
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from vision_attn.errors import UsageError
from vision_attn.layers.costs import count_multiply_adds, count_parameters
from vision_attn.layers.factory import create_layer

BLOCKS = ("none", "se", "eca", "cbam", "coord", "triplet", "simam", "gc", "ema")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SETTINGS = ("block", "seed", "epochs", "train_pictures", "depth", "width", "batch_size", "lr")
COLUMNS = (*SETTINGS, "parameters", "multiply_adds", "seconds", "right")


def main() -> None:
    """Trains what is not in the CSV yet, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pictures", type=Path, help="folder with train/<class> and test/<class>, or its tar archive")
    parser.add_argument("--out", type=Path, default=Path("ablation.csv"), help="results, a line a run")
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--train-pictures", type=int, default=50_000, help="the first so many of a shuffled list")
    parser.add_argument("--depth", type=int, default=3, help="residual blocks a stage (3: ResNet-20)")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    train, test = read_pictures(options.pictures)
    train = shuffled(*train, options.train_pictures)
    rows = read_rows(options.out)
    for seed in range(options.seeds):
        for block in options.blocks:
            if not any(is_run(row, block, seed, options) for row in rows):
                row = run(block, seed, train, test, options)
                rows.append(row)
                append_row(options.out, row)
    here = [row for row in rows if any(is_run(row, row["block"], seed, options) for seed in range(options.seeds))]
    Console(width=160).print(table(here, options))


def is_run(row: dict[str, str], block: str, seed: int, options: argparse.Namespace) -> bool:
    """Whether a line of the CSV is the run of this block and seed with these options."""
    return all(row[name] == value for name, value in settings(block, seed, options).items())


def settings(block: str, seed: int, options: argparse.Namespace) -> dict[str, str]:
    """Returns what a run is told by, as the CSV has it."""
    values = {"block": block, "seed": seed, **{name: getattr(options, name) for name in SETTINGS[2:]}}
    return {name: str(value) for name, value in values.items()}


def run(
    block: str, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], options: Any
) -> dict[str, str]:
    """Trains and tests one network, and returns its line of the CSV."""
    device = torch.device(options.device)
    network = resnet(block, seed, depth=options.depth, width=options.width)
    counts = count_parameters(network), count_multiply_adds(network, torch.zeros(1, 3, 32, 32))
    network = network.to(device).to(memory_format=torch.channels_last)
    began = time.perf_counter()
    fit(network, *train, seed=seed, epochs=options.epochs, batch_size=options.batch_size, lr=options.lr, device=device)
    seconds = time.perf_counter() - began
    right = answers(network, *test, device=device)
    print(f"{block} seed {seed}: {right.float().mean():.2%} in {seconds:.0f} s", flush=True)
    bits = np.packbits(right.numpy()).tobytes().hex()
    return {
        **settings(block, seed, options),
        "parameters": str(counts[0]),
        "multiply_adds": str(counts[1]),
        "seconds": f"{seconds:.1f}",
        "right": f"{len(right)}:{bits}",
    }


def resnet(block: str, seed: int, *, depth: int, width: int) -> nn.Module:
    """Returns a ResNet of three stages for 32 px with `block` in every residual branch; all else starts the same."""

    def build(**block_args: Any) -> nn.Module:
        torch.manual_seed(seed)
        # timm has four stages; the last is taken off with what follows from it.
        channels = (width, 2 * width, 4 * width, 4 * width)
        network: Any = ResNet(
            BasicBlock,  # type: ignore[arg-type]
            (depth, depth, depth, 1),
            num_classes=10,
            stem_width=width,
            channels=channels,
            block_args=block_args,
        )
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
        network.maxpool, network.layer4 = nn.Identity(), nn.Identity()
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        return network

    plain = build()
    if block == "none":
        return plain
    # timm hands over device and dtype as well, which are left as they are.
    network = build(attn_layer=lambda channels, **_: create_layer(block, channels))
    network.load_state_dict(plain.state_dict(), strict=False)
    return network


def fit(
    network: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    lr: float,
    device: Any,
) -> None:
    """Trains with SGD, one cycle of the learning rate, random crops and flips, as usual for CIFAR."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}],
        lr=lr, momentum=0.9, nesterov=True,
    )  # fmt: skip
    steps = epochs * (len(pictures) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    random = torch.Generator().manual_seed(seed)
    network.train()
    for batch, target in batches(pictures, labels, epochs, batch_size, random):
        batch = batch.to(device, memory_format=torch.channels_last)
        with autocast:
            loss = F.cross_entropy(network(batch), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def batches(
    pictures: Tensor, labels: Tensor, epochs: int, size: int, random: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of normalised pictures, moved by up to 4 px and half of them mirrored."""
    padded = F.pad(pictures, (4, 4, 4, 4))
    for _ in range(epochs):
        order = torch.randperm(len(pictures), generator=random)
        for chosen in order.split(size)[: len(pictures) // size]:
            top, left = torch.randint(0, 9, (2, len(chosen), 1, 1), generator=random)
            rows, columns = top + torch.arange(32)[:, None], left + torch.arange(32)
            mirrored = torch.rand(len(chosen), generator=random) < 0.5
            columns = torch.where(mirrored[:, None, None], columns.flip(-1), columns)
            batch = padded[chosen[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
            yield normalized(batch), labels[chosen]


def normalized(pictures: Tensor) -> Tensor:
    """Returns uint8 pictures (B, 3, 32, 32) as the network wants them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pictures / 255 - mean) / std


def answers(network: nn.Module, pictures: Tensor, labels: Tensor, *, device: torch.device) -> Tensor:
    """Returns which of the pictures get the right class, (N,) bool."""
    network.eval()
    right = []
    with torch.no_grad():
        for batch, target in zip(pictures.split(500), labels.split(500), strict=True):
            batch = normalized(batch).to(device, memory_format=torch.channels_last)
            right.append(network(batch).argmax(1).cpu() == target)
    return torch.cat(right)


def read_pictures(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns (pictures (N, 3, 32, 32) uint8, labels (N,)) of train and of test."""
    files: dict[str, bytes] = {}
    if path.is_dir():
        files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.jp*g")}
    elif path.is_file():
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.lower().endswith((".jpg", ".jpeg")):
                    content = archive.extractfile(member)
                    files[member.name] = b"" if content is None else content.read()
    splits: dict[str, list[tuple[str, bytes]]] = {"train": [], "test": []}
    for name in sorted(files):
        *_, split, label, _file = Path(name).parts if len(Path(name).parts) > 2 else ("", "", "")
        if split in splits:
            splits[split].append((label, files[name]))
    if not all(splits.values()):
        raise UsageError(f"expected train/<class>/*.jpg and test/<class>/*.jpg in {path}, got {len(files)} pictures")
    classes = sorted({label for label, _ in splits["train"]})
    return tuple(decoded(splits[split], classes) for split in ("train", "test"))  # type: ignore[return-value]


def decoded(pictures: list[tuple[str, bytes]], classes: list[str]) -> tuple[Tensor, Tensor]:
    """Returns pictures and labels from (class, JPEG) pairs."""
    read = [np.asarray(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)) for _, content in pictures]
    labels = torch.tensor([classes.index(label) for label, _ in pictures])
    return torch.from_numpy(np.stack(read)[..., ::-1].transpose(0, 3, 1, 2).copy()), labels


def shuffled(pictures: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns so many pictures of a shuffled list, the same for every block and seed."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:count]
    return pictures[order], labels[order]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Returns the runs of a CSV that this script wrote."""
    if not path.is_file():
        return []
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    if rows and tuple(rows[0]) != COLUMNS:
        raise UsageError(
            f"expected results of this script in {path}, got columns {', '.join(rows[0])}: use another --out"
        )
    return rows


def append_row(path: Path, row: dict[str, str]) -> None:
    """Adds a run to the CSV."""
    new = not path.is_file()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict[str, str]], options: argparse.Namespace) -> Table:
    """Returns accuracy, its interval, the difference to "none" with its interval, and costs, a line a block."""
    right: dict[str, dict[int, np.ndarray]] = {}
    seconds: dict[str, list[float]] = {}
    for row in rows:
        count, bits = row["right"].split(":")
        flags = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))[: int(count)]
        right.setdefault(row["block"], {})[int(row["seed"])] = flags.astype(float)
        seconds.setdefault(row["block"], []).append(float(row["seconds"]))
    printed = Table(
        title=f"ResNet-{6 * options.depth + 2}, width {options.width}, {options.train_pictures:,} pictures, "
        f"{options.epochs} epochs in batches of {options.batch_size}, lr {options.lr}, {options.seeds} seeds, "
        f"{options.device}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in (
        "block",
        "accuracy (95 %)",
        "to none (95 %)",
        "each seed",
        "parameters",
        "multiply-adds",
        "time to none",
    ):
        printed.add_column(name, justify="left" if name == "block" else "right", no_wrap=True)
    plain = right.get("none", {})
    for block, runs in right.items():
        first = next(row for row in rows if row["block"] == block)
        difference, each = "", ""
        if (shared := sorted(runs.keys() & plain.keys())) and block != "none":
            gains = np.stack([runs[seed] - plain[seed] for seed in shared])
            difference, each = with_interval(gains, "+"), " ".join(f"{gain:+.1%}" for gain in gains.mean(1))
        times = [a / b for a, b in zip(seconds[block], seconds.get("none", []), strict=False)]
        printed.add_row(
            block,
            with_interval(np.stack(list(runs.values())), ""),
            difference,
            each,
            f"{int(first['parameters']):,}",
            f"{int(first['multiply_adds']) / 1e6:.1f} M",
            f"{statistics.median(times):.2f}" if times else "",
        )
    return printed


def with_interval(values: np.ndarray, sign: str) -> str:
    """Returns the mean of values (seeds, pictures) with its 95 % interval, from a bootstrap over pictures."""
    of_pictures, random = values.mean(0), np.random.default_rng(0)
    count = len(of_pictures)
    means = [of_pictures[random.integers(0, count, count)].mean() for _ in range(2000)]
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{of_pictures.mean():{sign}.1%} ({low:{sign}.1%} to {high:{sign}.1%})"


if __name__ == "__main__":
    main()
