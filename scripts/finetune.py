"""Fine-tunes a pretrained network on a folder of photos: `vision-attn fit` with the network's weights.

Takes what `vision-attn fit` takes, and insists on weights to start from:

    python scripts/finetune.py --config configs/finetune_clothing_vits14.yaml --data.path PHOTOS \
      --model.checkpoint WEIGHTS.safetensors
"""

import sys

from vision_attn.cli import main


def has_weights(arguments: list[str]) -> bool:
    """Returns whether the arguments name weights to start from, or a config, which may."""
    return any(
        a.startswith(("--model.checkpoint", "--model.pretrained", "--config", "-c", "--help")) for a in arguments
    )


if __name__ == "__main__":
    if not has_weights(sys.argv[1:]):
        sys.exit("finetune.py: expected weights to start from: give --model.checkpoint FILE or --model.pretrained true")
    sys.exit(main(["fit", *sys.argv[1:]]))
