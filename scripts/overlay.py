"""Draws where a model looks: `python scripts/overlay.py EXPORT PHOTOS...` is `vision-attn explain EXPORT PHOTOS...`."""

import sys

from vision_attn.cli import main

if __name__ == "__main__":
    sys.exit(main(["explain", *sys.argv[1:]]))
