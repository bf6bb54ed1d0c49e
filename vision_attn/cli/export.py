"""`vision-attn export MODEL`."""

import argparse
from typing import Any

from vision_attn.cli.values import add_named_model, open_named_model, positive
from vision_attn.errors import UsageError


def add_export(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "export",
        help="a model as ONNX or torch.export with its map of attention, its card, or on the hub",
        description="Writes a model as one file that returns the logits and, where all its tokens attend to each "
        "other, the rollout map; or writes an artefact's card anew, or puts its folder on the hub.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an artefact (runs/<name>/export), a run's checkpoint (runs/<name>/checkpoints/best.ckpt), or a timm name",
    )
    parser.add_argument("--format", help="onnx (ONNX Runtime) or torch (torch.export's .pt2)")
    parser.add_argument("--out", help="a new file; a new one in the artefact where left out")
    parser.add_argument("--method", help="rollout, or none for the logits alone (rollout where the model has one)")
    parser.add_argument("--head-fusion", default="mean", help="of the rollout: mean (default), max or min")
    parser.add_argument(
        "--inputs", default="uint8", help="uint8 (default: RGB pixels, normalised inside) or float (normalised)"
    )
    parser.add_argument("--dtype", default="float32", help="what is computed in: float32 (default) or float16")
    parser.add_argument("--opset", type=positive, help="of ONNX")
    parser.add_argument("--push", metavar="USER/NAME", help="put the artefact's folder on the hub")
    parser.add_argument("--card", action="store_true", help="write the artefact's card, after a test or so")
    parser.add_argument("--license", help="for --card: of the weights, in the hub's words, such as apache-2.0")
    parser.add_argument("--no-samples", action="store_true", help="for --card and --push: show no photos of the data")
    parser.add_argument("--public", action="store_true", help="for everyone to see; private where left out")
    add_named_model(parser)
    parser.set_defaults(carry_out=_export)


def _export(options: argparse.Namespace) -> int:
    wanted = [flag for flag in ("format", "push", "card") if getattr(options, flag)]
    if len(wanted) != 1:
        raise UsageError(
            f"expected one of --format onnx, --format torch, --card and --push USER/NAME, got "
            f"{' and '.join(f'--{flag}' for flag in wanted) or 'none'}: give one"
        )
    if options.push:
        from vision_attn.export.hub import push_to_hub

        sent = push_to_hub(options.model, options.push, private=not options.public, samples=not options.no_samples)
        print(sent.line)
        return 0
    if options.card:
        from vision_attn.export.card import SAMPLES, write_card

        samples = 0 if options.no_samples else SAMPLES
        print(f"card: {write_card(options.model, samples=samples, license=options.license)}")
        return 0
    from vision_attn.export.graph import export_graph, graph_path

    written = export_graph(
        open_named_model(options),
        options.out or graph_path(options.model, options.format),
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
