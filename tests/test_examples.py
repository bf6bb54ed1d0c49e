"""The notebooks of examples/: what they keep is what they show when they run, and nothing of where they ran."""

import re
import sys
from pathlib import Path

import nbformat
import pytest
import timm
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from examples import EXAMPLES, executed, notebooks, weights_of_the_hub  # noqa: E402


def shown(notebook):
    """What kind of thing each cell shows."""
    kinds = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Lines of a run come in as many pieces as the clock will have it.
            found = {(one.output_type, *sorted(one.get("data", {}))) for one in cell.outputs}
            kinds.append(found - {("stream",)} if "run(" in cell.source else found)
    return kinds


@pytest.mark.parametrize("name", notebooks())
def test_a_notebook_has_been_run_from_top_to_bottom(name):
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [one for cell in cells for one in cell.outputs]
    assert not [one for one in outputs if one.output_type == "error" or one.get("name") == "stderr"]
    assert any("image/png" in one.get("data", {}) for one in outputs)
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert not re.search(r"/(home|tmp|root|Users|work)/", text)
    assert len(text) < 800_000
    assert f"examples/{name}" in (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")


def test_a_model_of_any_name_takes_ten_lines():
    first = next(
        cell for cell in nbformat.read(EXAMPLES / "any_model.ipynb", as_version=4).cells if "import" in cell.source
    )
    assert len([line for line in first.source.splitlines() if line.strip()]) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", notebooks())
def test_a_notebook_shows_what_it_keeps(name, tmp_path):
    """Without the real weights the hub's place holds random ones: what is shown is then of the same kind."""
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "tf_efficientnet_lite0.safetensors")
    with weights_of_the_hub(tmp_path / "kept", tmp_path):
        found = executed(name, tmp_path / "run")
    assert shown(found) == shown(nbformat.read(EXAMPLES / name, as_version=4))
    assert not [one for cell in found.cells for one in cell.get("outputs", ()) if one.get("name") == "stderr"]


@pytest.mark.real
def test_real_weights_say_what_the_notebook_says(real_dir, tmp_path):
    with weights_of_the_hub(tmp_path / "kept", real_dir / "weights"):
        found = executed("any_model.ipynb", tmp_path / "run")
    kept = nbformat.read(EXAMPLES / "any_model.ipynb", as_version=4)
    answers = [re.findall(r"([a-z ]+) (\d+) %", str(notebook.cells[1].outputs)) for notebook in (found, kept)]
    assert len(answers[0]) >= 3 and answers[0] == answers[1]
