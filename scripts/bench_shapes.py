"""How many embedded images one core draws a second. Prints the median and the best of several runs.

Seconds are those of the processor, so that a machine with other work to do gives its own speed.

Example: python scripts/bench_shapes.py --size 64 --images 500 --runs 9
"""

import argparse
import statistics
import time

import cv2
import torch

from vision_attn.data.shapes import draw


def main() -> None:
    """Times `draw` on one thread."""
    parser = argparse.ArgumentParser(description="Images a second that one core draws.")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--images", type=int, default=500, help="images a run")
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)

    draw(0, size=options.size)
    rates = []
    for run in range(options.runs):
        start = time.process_time()
        for index in range(options.images):
            draw(index, seed=run, size=options.size)
        rates.append(options.images / (time.process_time() - start))
    print(
        f"{options.size} px: {statistics.median(rates):.0f} images a second on one core "
        f"(best of {options.runs} runs {max(rates):.0f}, worst {min(rates):.0f})"
    )


if __name__ == "__main__":
    main()
