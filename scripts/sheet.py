"""Draws a contact sheet of an artefact's overlays on photos that lie in class folders.

    python scripts/sheet.py runs/clothing_vits14/export CLOTHING/test sheet.png --each 2

The photos are the first of every class by name, so that nobody chose them.
"""

import argparse
import sys
from pathlib import Path

from vision_attn import UsageError, load_model
from vision_attn.data.reading import find_images
from vision_attn.look import look
from vision_attn.viz.plots import SheetItem, contact_sheet


def main() -> int:
    """Writes the sheet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an artefact: runs/<name>/export")
    parser.add_argument("photos", type=Path, help="a folder of class folders")
    parser.add_argument("sheet", type=Path, help="the picture to write")
    parser.add_argument("--each", type=int, default=2, help="photos of each class (default: %(default)s)")
    parser.add_argument("--method", default="rollout", help="the method (default: %(default)s)")
    options = parser.parse_args()
    try:
        model = load_model(options.model)
        folders = sorted(folder for folder in options.photos.iterdir() if folder.is_dir())
        photos = [photo for folder in folders for photo in find_images([folder])[: options.each]]
        items = [
            SheetItem(
                image=done.image,
                map=done.map(options.method),
                geometry=done.geometry,
                truth=done.path.parent.name,
                prediction=done.prediction,
                probability=done.probability,
            )
            for done in look(model, photos, {}, method=options.method)
        ]
        print(contact_sheet(options.sheet, items, items_per_row=4, cell=128, title=f"{options.method}, first photos"))
    except (UsageError, OSError) as error:
        print(f"sheet.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
