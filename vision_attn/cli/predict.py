"""`vision-attn predict MODEL PHOTOS...`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from vision_attn.cli.values import add_named_model, device, open_named_model, positive


def is_of_a_run(arguments: Sequence[str]) -> bool:
    """Returns whether `predict` is asked for the photos of a run's config, instead of any photos."""
    return any(text.split("=")[0] in ("-c", "--config") or text.startswith("--data.") for text in arguments)


def add_predict(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "predict",
        help="a CSV of classes and probabilities, of any photos or of a run's",
        description="Writes the most probable classes of photos and their probabilities, calibrated where the model's "
        "run measured how. With --config runs/<name>/config.yaml instead: for the photos of that run's data, on as "
        "many devices as its trainer has. Exit code 3: some photos could not be read.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an artefact (runs/<name>/export), a run's checkpoint (runs/<name>/checkpoints/best.ckpt), or a timm name",
    )
    parser.add_argument("photos", metavar="PHOTOS", nargs="+", help="photos, folders of photos, quoted patterns")
    parser.add_argument("--out", help="a new file; a new predictions.csv where left out")
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="classes a photo (5)")
    parser.add_argument(
        "--tta",
        default="none",
        metavar="KIND",
        help="views that are averaged: none (default), flip, scales, five_crop, ten_crop",
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="photos a forward pass (16)")
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, mps")
    add_named_model(parser)
    parser.set_defaults(carry_out=_predict)


def _predict(options: argparse.Namespace) -> int:
    from vision_attn.files import free_path
    from vision_attn.look.predicting import predict_photos

    model = open_named_model(options)
    predicted = predict_photos(
        model.to(device(options.device)),
        options.photos,
        options.out or free_path("predictions.csv"),
        top=options.top,
        tta=options.tta,
        batch_size=options.batch_size,
    )
    print(predicted.line)
    for reason in predicted.damaged.values():
        print(f"vision-attn: {reason}", file=sys.stderr)
    return 3 if predicted.damaged else 0
