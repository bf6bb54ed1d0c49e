"""How long rollout takes beside the plain forward pass: medians of interleaved runs, as multiples.

Run: python scripts/bench_explain.py [--size 224] [--batch-size 8] [--repeats 9]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch

from vision_attn.attribution import explain


def main() -> None:
    """Prints one line for each way to run rollout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = timm.create_model(args.model, img_size=args.size, num_classes=10).eval()
    images = torch.randn(args.batch_size, 3, args.size, args.size)

    def plain() -> None:
        with torch.no_grad():
            model(images)

    runs: dict[str, Callable[[], object]] = {
        "plain forward": plain,
        "rollout": lambda: explain(model, images),
        "rollout, max": lambda: explain(model, images, head_fusion="max"),
        "rollout, discard 0.9": lambda: explain(model, images, discard_ratio=0.9),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    plain_time = statistics.median(times["plain forward"])
    print(f"{args.model}, {args.size} px, batch {args.batch_size}, {args.threads} threads, {args.repeats} repeats")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:<22} {median * 1e3:9.1f} ms  {median / plain_time:5.2f} x")


if __name__ == "__main__":
    main()
