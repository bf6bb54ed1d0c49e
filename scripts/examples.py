"""Runs the notebooks of examples/ from top to bottom and keeps in them what their cells show.

    python scripts/examples.py [NAME.ipynb ...] [--weights DIR]

They run in a folder of their own; runs and pictures that they write go with it. Where there is no way to the hub,
`--weights` names a folder with <timm name>.safetensors: they are put where the hub's client keeps what it fetched, and
the notebooks need not know.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import nbformat
import timm
from nbclient import NotebookClient
from nbformat import NotebookNode
from rich.console import Console

from vision_attn.files import write_whole

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SECONDS = 900  # a cell that takes longer has failed


def main() -> None:
    """Runs them and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of examples/ (all)")
    parser.add_argument("--weights", type=Path, help="folder with weights in the hub's place")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, weights_of_the_hub(Path(folder), options.weights):
        for name in options.names or notebooks():
            found = executed(name, Path(folder))
            write_whole(EXAMPLES / name, nbformat.writes(found) + "\n")
            Console().print(f"{name}: {len(found.cells)} cells, {(EXAMPLES / name).stat().st_size / 1e3:.0f} kB")


def notebooks() -> list[str]:
    """Returns the names of all of them."""
    return sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def executed(name: str, folder: Path) -> NotebookNode:
    """Returns a notebook with what its cells show when they run, below `folder`, as if from a checkout.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has failed.
    """
    place = folder / Path(name).stem
    (place / "examples").mkdir(parents=True)
    (place / "configs").symlink_to(ROOT / "configs")
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(place / "examples")}})
    client.record_timing = False
    client.execute()
    return notebook


@contextmanager
def weights_of_the_hub(folder: Path, weights: Path | None) -> Iterator[None]:
    """Lets what is started meanwhile find weights where the hub's client keeps what it fetched, and ask nobody."""
    if weights is None:
        yield
        return
    for file in sorted(weights.glob("*.safetensors")):
        configured = timm.get_pretrained_cfg(file.stem) if timm.is_model(file.stem) else None
        if configured is None or configured.hf_hub_id is None:
            continue
        kept = folder / "hub" / f"models--{configured.hf_hub_id.replace('/', '--')}"
        (kept / "refs").mkdir(parents=True)
        (kept / "refs" / "main").write_text("kept")
        (kept / "snapshots" / "kept").mkdir(parents=True)
        shutil.copy(file, kept / "snapshots" / "kept" / "model.safetensors")
    with patch.dict(os.environ, {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}):
        yield


if __name__ == "__main__":
    main()
