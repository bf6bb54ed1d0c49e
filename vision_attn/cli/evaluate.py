"""`vision-attn evaluate`: is the picture true?"""

import argparse
import sys
from typing import Any

from vision_attn.cli.explain import method_option
from vision_attn.cli.values import add_named_model, class_names, device, open_named_model, positive, size
from vision_attn.errors import UsageError


def add_evaluate(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "evaluate",
        help="which explanation to believe for this model and these photos, beside controls",
        description="Measures how true each method's maps are on your photos, beside maps that know nothing of the "
        "model: noise, a centred blob, edges. Ends in a table with 95 % intervals, plots, and a verdict in three "
        "sentences. The same command goes on where it was stopped. Exit code 3: some photos could not be read.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an artefact (runs/<name>/export), a run's checkpoint (runs/<name>/checkpoints/best.ckpt), or a timm name",
    )
    parser.add_argument("photos", metavar="PHOTOS", nargs="+", help="photos, folders of photos, quoted patterns")
    parser.add_argument(
        "--methods",
        help="names with commas between them; all that suit the model and take few passes where left out, 'all' for "
        "the slow ones, too; random, center and edges are always there",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the methods, as for explain; can be given again",
    )
    parser.add_argument("--target", help="the class to ask about, by name or index (predicted: of each photo)")
    parser.add_argument(
        "--masks",
        metavar="DIR",
        help="masks of the photos: PNGs (0 background; 255, or class labels), or VOC XML boxes",
    )
    parser.add_argument(
        "--mask-kind",
        default="auto",
        choices=("auto", "object", "classes"),
        help="object: whatever is not background is the object; classes: values 1, 2, ... are classes (auto)",
    )
    parser.add_argument(
        "--mask-classes", metavar="FILE", help="names of the values 1, 2, ..., one a line (the model's classes)"
    )
    parser.add_argument(
        "--missing-masks",
        default="refuse",
        choices=("refuse", "skip"),
        help="what a photo without a mask means (refuse)",
    )
    parser.add_argument("--samples", type=positive, metavar="N", help="how many photos, chosen by --seed (all)")
    parser.add_argument("--steps", type=positive, default=10, help="steps of deletion and insertion (10)")
    parser.add_argument("--groups", type=positive, default=10, help="groups of SaCo (10)")
    parser.add_argument(
        "--cells", type=size, metavar="N|ROWS,COLS", help="blocks that are removed whole (the model's patches, or 14)"
    )
    parser.add_argument(
        "--baseline",
        default="own_mean",
        help="what stands where pixels were removed: own_mean (default: the photo's mean "
        "colour), mean, blur, noise, black",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        help="of the passes on photos in parts: auto (bfloat16 where the processor multiplies it itself), float32, "
        "bfloat16; maps are made in the model's own",
    )
    parser.add_argument(
        "--sanity-photos",
        type=_count,
        default=8,
        metavar="N",
        help="photos for randomised weights and noise (8; 0: none)",
    )
    parser.add_argument("--no-health", action="store_true", help="do not look at the attention itself")
    parser.add_argument("--seed", type=_count, default=0, help="of the choice of photos, noise and intervals (0)")
    parser.add_argument("--out", help="folder for the numbers, tables and plots; a new evaluation/ where left out")
    parser.add_argument("--batch-size", type=positive, default=32, help="images a forward pass (32)")
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, cuda:1, mps")
    add_named_model(parser)
    parser.set_defaults(carry_out=_evaluate)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from vision_attn.evaluate import Protocol, evaluate_photos
    from vision_attn.evaluate.writing import lines, tables, told
    from vision_attn.files import free_path

    if options.mask_classes and not options.masks:
        raise UsageError("expected --masks with --mask-classes, got none: give the folder of masks")
    cells = (options.cells, options.cells) if isinstance(options.cells, int) else options.cells
    protocol = Protocol(
        steps=options.steps,
        groups=options.groups,
        cells=tuple(cells) if cells else None,
        baseline=options.baseline,
        precision=options.precision,
        sanity_photos=options.sanity_photos,
        seed=options.seed,
    )
    given = dict(method_option(text) for text in options.option)
    out = options.out or str(free_path("evaluation"))
    model = open_named_model(options)
    try:
        done = evaluate_photos(
            model.to(device(options.device)),
            options.photos,
            out,
            methods=options.methods,
            options=given,
            target=options.target,
            masks=options.masks,
            mask_kind=options.mask_kind,
            mask_classes=class_names(options.mask_classes),
            missing_masks=options.missing_masks,
            samples=options.samples,
            protocol=protocol,
            health=not options.no_health,
            batch_size=options.batch_size,
        )
    except KeyboardInterrupt:
        again = "the same command" if options.out else f"the same command with --out {out}"
        print(f"vision-attn: stopped; {again} goes on from here", file=sys.stderr)
        return 130
    # A pipe or a file has no width: nothing is cut off there.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for table in tables(done.evaluation):
        console.print(table)
    for line in lines(done.evaluation):
        console.print(line, soft_wrap=True, markup=False)
    for remark in done.health.remarks if done.health else ():
        console.print(f"Attention: {remark}", soft_wrap=True, markup=False)
    before = f", {done.done_before} were measured before" if done.done_before else ""
    print(f"{done.evaluation.photos} photos in {done.seconds:.0f} s{before}")
    print(told(done.files))
    for reason in done.damaged.values():
        print(f"vision-attn: {reason}", file=sys.stderr)
    return 3 if done.damaged else 0
