"""Fine-tunes a pretrained network on a folder of photos: `vision-attn fit` with the network's weights.

Takes what `vision-attn fit` takes, and insists on weights to start from:

    python scripts/finetune.py --config configs/finetune_clothing_vits14.yaml --data.path PHOTOS \
      --model.checkpoint WEIGHTS.safetensors
"""

import sys
from itertools import pairwise
from pathlib import Path

import yaml

from vision_attn.cli import main


def has_weights(arguments: list[str]) -> bool:
    """Returns whether the arguments, or the configs that they name, give weights to start from."""
    if any(argument.startswith(("--model.checkpoint", "--model.pretrained", "--help")) for argument in arguments):
        return True
    paths = [value for name, value in pairwise(arguments) if name in ("--config", "-c")]
    paths += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    configs = [yaml.safe_load(Path(path).read_text(encoding="utf-8")) for path in paths if Path(path).is_file()]
    models = [config.get("model") or {} for config in configs if isinstance(config, dict)]
    return any(model.get("checkpoint") or model.get("pretrained") for model in models)


if __name__ == "__main__":
    if not has_weights(sys.argv[1:]):
        sys.exit("finetune.py: expected weights to start from: give --model.checkpoint FILE or --model.pretrained true")
    sys.exit(main(["fit", *sys.argv[1:]]))
