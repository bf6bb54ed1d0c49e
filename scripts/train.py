"""Trains a classifier: `python scripts/train.py --config configs/shapes_vit.yaml` is `vision-attn fit --config ...`."""

import sys

from vision_attn.cli import main

if __name__ == "__main__":
    sys.exit(main(["fit", *sys.argv[1:]]))
