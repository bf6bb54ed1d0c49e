"""The command line starts fast and ends in one line."""

import subprocess
import sys

import pytest

from vision_attn.cli import main


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_package_and_asking_for_help_loads_nothing_heavy():
    statement = "import vision_attn, vision_attn.cli\ntry: vision_attn.cli.main(['--help'])\nexcept SystemExit: pass"
    heavy = {"torch", "timm", "numpy", "cv2", "matplotlib", "pytorch_lightning", "albumentations", "rich"}
    assert not modules_after(statement) & heavy


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("fit", "validate", "test", "predict", "explain"))


@pytest.mark.parametrize(
    "arguments", [[], ["explian"], ["explain"], ["explain", "x"], ["explain", "x", "y", "--metod", "z"]]
)
def test_wrong_words_end_in_one_line(arguments, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1


@pytest.mark.parametrize("script", ["train", "finetune", "overlay"])
def test_the_scripts_are_doors_to_the_same_commands(script):
    ended = subprocess.run([sys.executable, f"scripts/{script}.py"], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "expected" in ended.stderr or "required" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
