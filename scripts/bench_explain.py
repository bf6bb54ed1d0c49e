"""Measures explanations beside the plain fused forward pass, and beside peers: time and peak memory, as ratios.

    python scripts/bench_explain.py [rollout] [large] [classes] [huge] [folder --photos FOLDER]
    python scripts/bench_explain.py huge gigantic --device cuda

Times are medians of interleaved runs; a first round warms up and is dropped. Peak memory is the process's, above what
it held with model and images in memory and a plain forward pass behind it, each case in a process of its own. Peers
that are not installed are named and left out: `pip install --no-deps grad-cam ttach torchcam fast-vit-rollout` brings
them (grad-cam wants scikit-learn as well).
"""

import argparse
import copy
import ctypes
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.models import VisionTransformer
from torchvision.transforms.functional import to_pil_image

from vision_attn.attribution import explain
from vision_attn.data.reading import find_images
from vision_attn.data.transforms import Preprocessing
from vision_attn.look import explain_photos

MODEL = "vit_small_patch14_dinov2"
DEVICE = "cpu"  # what --device says
Run = Callable[[], object]


class Hooked:
    """What the peers build on: the input of every `attn_drop`, for which attention must not be fused."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unfused(model)
        self.attentions: list[Tensor] = []
        for name, module in self.model.named_modules():
            if name.endswith("attn_drop"):
                module.register_forward_hook(lambda _module, args, _output: self.attentions.append(args[0]))

    def rollout(self, images: Tensor, discard_ratio: float = 0.0) -> Tensor:
        """Returns the class token's row of the full matrix product, as vit-explain computes it but for every image."""
        self.attentions.clear()
        with torch.no_grad():
            self.model(images)
            result = torch.eye(self.attentions[0].shape[-1])
            for attention in self.attentions:
                fused = attention.mean(1)
                if discard_ratio:
                    flat = fused.flatten(1)
                    _, lowest = flat.topk(int(flat.shape[-1] * discard_ratio), -1, largest=False)
                    flat.scatter_(1, lowest, 0.0)
                mixed = fused + torch.eye(fused.shape[-1])
                result = (mixed / mixed.sum(-1, keepdim=True)) @ result
        self.attentions.clear()
        return result[:, 0, 1:]


def unfused(model: nn.Module) -> nn.Module:
    """Returns a copy of a timm model that computes its attention step by step."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return model


def plain(model: nn.Module, images: Tensor) -> Run:
    """Returns the plain forward pass, without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(images)

    return run


def vit(size: int, name: str = MODEL) -> nn.Module:
    """Returns a ViT-S with random weights for images of this size."""
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size, num_classes=10).eval().to(DEVICE)


def rollout_runs(size: int, batch_size: int) -> dict[str, Run]:
    """Returns rollout by us and by the peers."""
    model, images = vit(size), torch.randn(batch_size, 3, size, size, device=DEVICE)
    hooked = Hooked(model)
    runs: dict[str, Run] = {
        "plain forward": plain(model, images),
        "ours": lambda: explain(model, images),
        "ours, discard 0.9": lambda: explain(model, images, discard_ratio=0.9),
        "ours, max over heads": lambda: explain(model, images, head_fusion="max"),
        "vit-explain's algorithm": lambda: hooked.rollout(images),
        "vit-explain's algorithm, discard 0.9": lambda: hooked.rollout(images, 0.9),
        "timm AttentionExtract and full product": extract_runs(model, images),
    }
    if fast := peer("fast_vit_rollout"):
        kept = {ratio: fast.ViTAttentionRollout(unfused(model), discard_ratio=ratio) for ratio in (0.0, 0.9)}
        runs["fast-vit-rollout"] = lambda: kept[0.0](images)
        # torch.quantile takes at most 2**24 numbers.
        if (size // 14) ** 4 < 2**24:
            runs["fast-vit-rollout, discard 0.9"] = lambda: kept[0.9](images)
    return runs


def extract_runs(model: nn.Module, images: Tensor) -> Run:
    """Returns the attention of timm's extractor (its names and defaults, unfused), multiplied out."""
    from timm.utils import AttentionExtract

    extract = AttentionExtract(unfused(model), method="hook")

    def run() -> Tensor:
        with torch.no_grad():
            result = torch.eye((images.shape[-1] // 14) ** 2 + 1)
            for attention in extract(images).values():
                mixed = attention.mean(1) + torch.eye(attention.shape[-1])
                result = (mixed / 2) @ result
        return result[:, 0, 1:]

    return run


def class_runs(size: int, batch_size: int) -> dict[str, Run]:
    """Returns the class-specific methods by us and by the peers, on one ViT-S of torchvision's form."""
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=size, patch_size=14, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision starts with zeros, which give no gradients
    model = model.eval().to(DEVICE)
    images = torch.randn(batch_size, 3, size, size, device=DEVICE)
    runs: dict[str, Run] = {"plain forward": plain(model, images)}
    for method in ("generic", "legrad", "grad_rollout", "grad_cam"):
        runs[f"ours, {method}"] = lambda method=method: explain(model, images, method=method, target=1)  # type: ignore[misc]
    if cams := peer("torchcam.methods"):
        legrad = cams.LeGrad(model, list(model.encoder.layers), enable_hooks=False)
        runs["torch-cam, LeGrad"] = lambda: switched(legrad, lambda: torchcam(legrad, model, images))
    if peer("pytorch_grad_cam"):
        cam = grad_cam_peer(model, model.encoder.layers[-1].ln_1)
        runs["pytorch-grad-cam, GradCAM"] = lambda: cam(images)
    return runs


def switched(extractor: Any, run: Run) -> object:
    """Returns what `run` gives while a peer's hooks are on: left on, they would slow the others down."""
    extractor.enable_hooks()
    try:
        return run()
    finally:
        extractor.disable_hooks()


def torchcam(extractor: Any, model: nn.Module, images: Tensor) -> object:
    """Returns torch-cam's maps for class 1."""
    return extractor([1] * len(images), model(images))


def grad_cam_peer(model: nn.Module, layer: nn.Module) -> Callable[[Tensor], np.ndarray]:
    """Returns pytorch-grad-cam's Grad-CAM for class 1 of a ViT with a class token."""
    cams = importlib.import_module("pytorch_grad_cam")
    targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")

    def grid(tokens: Tensor) -> Tensor:
        side = round((tokens.shape[1] - 1) ** 0.5)
        return tokens[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)

    def run(images: Tensor) -> np.ndarray:
        # Made anew at each call: its hooks would slow the others down.
        with cams.GradCAM(model=model, target_layers=[layer], reshape_transform=grid) as cam:
            return cam(input_tensor=images, targets=[targets.ClassifierOutputTarget(1)] * len(images))

    return run


def huge_runs(size: int) -> dict[str, Run]:
    """Returns rollout of one large photo through a ViT-S/16."""
    model, images = vit(size, "vit_small_patch16_224"), torch.randn(1, 3, size, size, device=DEVICE)
    return {"plain forward": plain(model, images), "ours": lambda: explain(model, images)}


CASES: dict[str, Callable[[], dict[str, Run]]] = {
    "rollout": lambda: rollout_runs(224, 8),
    "large": lambda: rollout_runs(1022, 1),
    "classes": lambda: class_runs(224, 8),
    "huge": lambda: huge_runs(2048),
    "gigantic": lambda: huge_runs(4096),
}


def peer(module: str) -> Any:
    """Returns a peer's module, or None, said once, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if module not in _MISSING:
            print(f"left out: {module} ({error})", file=sys.stderr)
            _MISSING.add(module)
        return None


_MISSING: set[str] = set()


def interleaved(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each run, taken in turn; a first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in runs if turn % 2 else reversed(runs):
            start = time.perf_counter()
            runs[name]()
            if DEVICE != "cpu":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak(case: str, name: str) -> float:
    """Returns the MiB that a run of a case takes at its peak above model and images, in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    answer = subprocess.run(
        [sys.executable, __file__, case, "--peak-of", name, "--device", DEVICE],
        capture_output=True,
        text=True,
        env=environment,
    )
    return float(answer.stdout.split()[-1]) if answer.returncode == 0 else float("nan")


def own_peak(run: Run, warm_up: Run) -> float:
    """Returns the MiB by which this process grows at the peak of `run`, from the kernel's high-water mark (Linux).

    On another device: the memory of its tensors. The libraries' own buffers are made by `warm_up`.
    """
    warm_up()
    if DEVICE != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def compare(case: str, repeats: int, *, memory: bool, only: str) -> Table:
    """Returns the table of a case: the plain forward pass, and the runs whose names begin with one of `only`."""
    runs = {
        name: run
        for name, run in CASES[case]().items()
        if name.startswith(("plain forward", *(part.strip() for part in only.split(","))))
    }
    seconds = interleaved(runs, repeats)
    table = Table("run", "ms", "times plain", "lowest to highest", "peak MiB", "times plain", title=case)
    peaks = {name: peak(case, name) if memory else float("nan") for name in runs}
    base = seconds["plain forward"]
    for name, took in seconds.items():
        ratios = sorted(mine / plain for mine, plain in zip(took, base, strict=True))
        table.add_row(
            name,
            f"{statistics.median(took) * 1e3:.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            f"{peaks[name]:.0f}",
            f"{peaks[name] / peaks['plain forward']:.2f}",
        )
    return table


def folder_table(photos: list[Path], repeats: int) -> Table:
    """Returns photos a second from files to overlays on disk, as large as the photos: ours, and each peer's usual loop.

    The peers' loops are those of their own examples, one photo after the other: PIL, torchvision's transforms, their
    method, their overlay, a file.
    """
    model, cnn = vit(224), timm.create_model("tf_efficientnet_lite0", num_classes=10).eval()
    for one in (model, cnn):
        one.classes = tuple(f"class {i}" for i in range(10))  # type: ignore[assignment]
        one.layout = None  # type: ignore[assignment]
        one.preprocessing = Preprocessing(image_size=(224, 224))  # type: ignore[assignment]
    transform = T.Compose(
        [T.Resize((224, 224)), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )

    def ours(method: str, network: nn.Module = model) -> Run:
        def run() -> None:
            with tempfile.TemporaryDirectory() as out:
                explain_photos(network, photos, Path(out) / "overlays", method=method, progress=False)

        return run

    def loop(draw: Callable[[Image.Image, Tensor, Path], None]) -> Run:
        def run() -> None:
            with tempfile.TemporaryDirectory() as out:
                for i, path in enumerate(photos):
                    photo = Image.open(path).convert("RGB")
                    draw(photo, transform(photo)[None], Path(out) / f"{i}.png")

        return run

    runs: dict[str, Run] = {f"ours, {method}": ours(method) for method in ("rollout", "grad_cam")}
    if fast := peer("fast_vit_rollout"):
        rolled = fast.ViTAttentionRollout(unfused(model), discard_ratio=0.0)

        def draw_fast(photo: Image.Image, pixels: Tensor, file: Path) -> None:
            _, picture = rolled(pixels, original_image=np.asarray(photo), return_vis=True)
            cv2.imwrite(str(file), picture)

        runs["fast-vit-rollout"] = loop(draw_fast)
    hooked = Hooked(model)

    def draw_explain(photo: Image.Image, pixels: Tensor, file: Path) -> None:
        mask = hooked.rollout(pixels)[0].reshape(16, 16).numpy()
        heat = cv2.resize(mask / mask.max(), photo.size)
        colours = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_JET)
        picture = colours.astype(np.float32) / 255 + np.asarray(photo, np.float32)[..., ::-1] / 255
        cv2.imwrite(str(file), (255 * picture / picture.max()).astype(np.uint8))

    runs["vit-explain's algorithm and overlay"] = loop(draw_explain)
    if peer("pytorch_grad_cam"):
        cam = grad_cam_peer(model, model.blocks[-1].norm1)  # type: ignore[index,union-attr]
        show = importlib.import_module("pytorch_grad_cam.utils.image").show_cam_on_image

        def draw_cam(photo: Image.Image, pixels: Tensor, file: Path) -> None:
            heat = cv2.resize(cam(pixels)[0], photo.size)
            cv2.imwrite(str(file), show(np.asarray(photo, np.float32) / 255, heat, use_rgb=True)[..., ::-1])

        runs["pytorch-grad-cam, GradCAM"] = loop(draw_cam)
    runs["EfficientNet-Lite0: ours, grad_cam"] = ours("grad_cam", cnn)
    if cams := peer("pytorch_grad_cam"):

        def draw_cnn(photo: Image.Image, pixels: Tensor, file: Path) -> None:
            with cams.GradCAM(model=cnn, target_layers=[cnn.bn2]) as cam:
                heat = cv2.resize(cam(input_tensor=pixels, targets=None)[0], photo.size)
            cv2.imwrite(str(file), show(np.asarray(photo, np.float32) / 255, heat, use_rgb=True)[..., ::-1])

        runs["EfficientNet-Lite0: pytorch-grad-cam, GradCAM"] = loop(draw_cnn)
    if cams_of_torchcam := peer("torchcam.methods"):
        overlay_mask = importlib.import_module("torchcam.utils").overlay_mask

        def draw_torchcam(photo: Image.Image, pixels: Tensor, file: Path) -> None:
            with cams_of_torchcam.GradCAM(cnn, target_layer="bn2") as extractor:
                logits = cnn(pixels)
                heat = extractor(int(logits[0].argmax()), logits)[0]
            overlay_mask(photo, to_pil_image(heat[0], mode="F"), alpha=0.5).save(file)

        runs["EfficientNet-Lite0: torch-cam, GradCAM"] = loop(draw_torchcam)
    seconds = interleaved(runs, repeats)
    table = Table("run", "photos a second", "lowest to highest", title=f"{len(photos)} photos to overlays on disk")
    for name, took in seconds.items():
        speeds = sorted(len(photos) / second for second in took)
        table.add_row(name, f"{statistics.median(speeds):.1f}", f"{speeds[0]:.1f} to {speeds[-1]:.1f}")
    return table


def main() -> None:
    """Prints one table for each case."""
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["rollout"], choices=[*CASES, "folder"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--photos", type=Path, help="photos for the folder case")
    parser.add_argument("--count", type=int, default=48, help="how many of them")
    parser.add_argument("--only", default="", help="how the names of runs begin, with commas between them; all")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--device", default=DEVICE, help="cpu (default), or cuda for huge and gigantic")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    DEVICE = options.device
    if options.peak_of:
        runs = CASES[options.cases[0]]()
        print(own_peak(runs[options.peak_of], runs["plain forward"]))
        return
    for case in options.cases:
        if case == "folder":
            if options.photos is None:
                parser.error("expected --photos FOLDER for the folder case, got none: give a folder of photos")
            table = folder_table(find_images([options.photos])[: options.count], options.repeats)
        else:
            table = compare(case, options.repeats, memory=not options.no_memory, only=options.only)
        Console().print(table)


if __name__ == "__main__":
    main()
