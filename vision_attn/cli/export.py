"""`vision-attn export MODEL`."""

import argparse
from pathlib import Path
from typing import Any

from vision_attn.cli.values import add_named_model, open_named_model, positive
from vision_attn.errors import UsageError

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


def add_export(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "export",
        help="a model as ONNX or torch.export with its map of attention, or on the hub",
        description="Writes a model as one file that returns the logits and, where all its tokens attend to each "
        "other, the rollout map; or puts its folder on the hub.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an artefact (runs/<name>/export), a run's checkpoint (runs/<name>/checkpoints/best.ckpt), or a timm name",
    )
    parser.add_argument("--format", help="onnx (ONNX Runtime) or torch (torch.export's .pt2)")
    parser.add_argument("--out", help="a new file; beside the model's folder, or in this one, where left out")
    parser.add_argument("--method", help="rollout, or none for the logits alone (rollout where the model has one)")
    parser.add_argument("--head-fusion", default="mean", help="of the rollout: mean (default), max or min")
    parser.add_argument(
        "--inputs", default="uint8", help="uint8 (default: RGB pixels, normalised inside) or float32 (normalised)"
    )
    parser.add_argument("--dtype", default="float32", help="what is computed in: float32 (default), float16, bfloat16")
    parser.add_argument("--opset", type=positive, help="of ONNX")
    parser.add_argument("--push", metavar="USER/NAME", help="put the artefact's folder on the hub")
    parser.add_argument("--public", action="store_true", help="for everyone to see; private where left out")
    add_named_model(parser)
    parser.set_defaults(carry_out=_export)


def _export(options: argparse.Namespace) -> int:
    if (options.format is None) == (options.push is None):
        raise UsageError(
            f"expected --format onnx, --format torch or --push USER/NAME, got {'both' if options.push else 'none'}: "
            "give one"
        )
    if options.push is not None:
        from vision_attn.export.hub import push_to_hub

        print(push_to_hub(options.model, options.push, private=not options.public).line)
        return 0
    from vision_attn.export.graph import export_graph
    from vision_attn.files import free_path

    model = open_named_model(options)
    suffix = _SUFFIXES.get(options.format, f".{options.format}")
    written = export_graph(
        model,
        options.out or free_path(Path(f"{Path(options.model).absolute().name}{suffix}")),
        format=options.format,
        method=options.method,
        head_fusion=options.head_fusion,
        inputs=options.inputs,
        dtype=options.dtype,
        opset=options.opset,
    )
    if written.note:
        print(written.note)
    print(written.line)
    return 0
