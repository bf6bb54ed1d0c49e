"""Every code block of README.md and docs/ is run, page by page, from top to bottom, in a folder that the page assumes.

Python blocks are executed, sharing one namespace a page. Commands of console blocks are carried out; those of `PARSED`
cannot be here, and are read by the command's own parser, as are those of `SLOW` in the quick tests. YAML is
read as a run's config, and its photos and network are made. A block without a language shows what is printed or
written, and is not run.
"""

import configparser
import contextlib
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

import vision_attn
from vision_attn import LAYERS, METHODS, UsageError
from vision_attn.cli import main
from vision_attn.cli.main import TRAINING, _parser
from vision_attn.cli.predict import is_of_a_run
from vision_attn.data.reading import read_image
from vision_attn.data.shapes import SHAPES, write_image_folder
from vision_attn.data.transforms import Preprocessing, eval_transforms
from vision_attn.export import save_model
from vision_attn.layers.attach import attach_all
from vision_attn.models.factory import create_model
from vision_attn.training.run import TrainingCLI, training_words

ROOT = Path(__file__).parents[1]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "data/README.md", *DOCS]
KINDS = ("python", "console", "yaml", "bash", "")  # "" is what is printed, and file trees

# Commands, by how they begin, that are read by their parser and not carried out, and why.
PARSED = {
    "make": "sets up an environment; its target has to be in the Makefile",
    "pip": "the tests install nothing; the extra has to be in setup.cfg",
    "jupyter": "a server, which does not end; its folder has to be there: tests/test_examples.py",
    "torchrun": "several processes: tests/test_distributed.py",
    "vision-attn fit": "minutes to days: tests/test_configs.py trains every recipe for a step",
    "vision-attn export runs/mine --push": "writes to the hub: tests/test_hub.py",
}
# Commands that are carried out by `pytest -m slow` alone, and else are read by their parser, too.
SLOW = (
    "vision-attn evaluate",
    "vision-attn explain runs/clothing_vits14",
    "vision-attn explain runs/gated/export photos --method gates --sheet",
    "vision-attn explain runs/mine/export photos --sheet",
    "vision-attn explain tf_efficientnet_lite0",
    "vision-attn export",
    "vision-attn report",
    "vision-attn test",
)
# Commands that show how an error is told: the exit code is 2, and this is said.
FAILS = {
    "vision-attn fit --config clothes.yaml": "expected labels of the training photos in .*clothes.csv, got 'shrit'"
}
# Pages whose blocks and commands run with `pytest -m slow` alone; else Python is compiled, and commands are parsed.
SLOW_PAGES = {
    "data/README.md": "draws 1,200 pictures",
    "docs/evaluate.md": "measures every method, twice",
    "docs/export.md": "traces and checks ONNX graphs",
}
# Pages that ask the hub for weights, and which. Here those networks keep random ones; all else is as it is written.
FROM_HUB = {
    "README.md": {"tf_efficientnet_lite0", "vit_small_patch16_224", "resnet50"},
    "docs/finetune.md": {"tf_efficientnet_lite0"},
    "docs/train.md": {"resnet50"},
}

CLASSES = ("cat", "dog", "dress", "hat", "pants", "shirt", "shoes", "skirt")
assert len(CLASSES) == len(SHAPES)


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    page: str
    line: int

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """Returns a page's code blocks from top to bottom."""
    tokens = MarkdownIt("commonmark").parse((ROOT / page).read_text(encoding="utf-8"))
    # An indented block has no language, so it is of no known kind.
    kinds = {"fence": lambda token: token.info.strip(), "code_block": lambda _: "indented: fence it"}
    found = [token for token in tokens if token.type in kinds]
    return [Block(kinds[token.type](token), token.content, page, token.map[0] + 1) for token in found]


def commands_of(block: Block) -> list[str]:
    """Returns what stands after each prompt, lines that end in a backslash joined."""
    return re.findall(r"^\$ (.*)$", block.text.replace("\\\n", " "), re.MULTILINE)


def begins(command: str, starts: Any) -> str | None:
    return next((start for start in starts if re.match(re.escape(start) + r"\b", command)), None)


# ------------------------------------------------------------------------------------------ the folder of a page


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with photos, masks, and runs on them under the names that pages have for them."""
    folder = tmp_path_factory.mktemp("docs")
    with contextlib.chdir(folder):
        write_image_folder("shapes", train=24, val=8, size=64)
        for place, target in (("train", "photos"), ("masks/train", "masks"), ("val", "new_photos")):
            Path(target).mkdir()
            for shape, name in zip(SHAPES, CLASSES, strict=True):
                shutil.move(f"shapes/{place}/{shape}", f"{target}/{name}")
        shutil.rmtree("shapes")
        shutil.copy(sorted(Path("photos/cat").iterdir())[0], "photo.jpg")
        data = "--data.path photos --data.test_share 0.15 --data.image_size 64 --data.crop_pct 1.0 --data.num_workers 0"
        trainer = "--trainer.max_epochs 1 --trainer.accelerator cpu --evaluation.mistakes 0"
        network = "--model.name va_vit_micro_stem8_64 --model.options '{depth: 4}' --data.batch_size 8"
        watch = "--watch.photos 2 --watch.animation false"
        assert main(shlex.split(f"fit {network} {data} {trainer} {watch} --run_dir runs/mine")) == 0
        written = Path("runs/mine/config.yaml").read_text(encoding="utf-8")
        for name in ("a", "b", "probe", "shapes", "shortcut", "clothing_vits14", "clothing_effnetlite0", "x"):
            shutil.copytree("runs/mine", f"runs/{name}")
            Path(f"runs/{name}/config.yaml").write_text(written.replace("runs/mine", f"runs/{name}"), encoding="utf-8")
        gated = create_model("resnet10t", num_classes=len(CLASSES))
        attach_all(gated, [{"name": "sse", "where": "layer3"}, {"name": "axial", "where": "layer3"}], image_size=128)
        save_model(
            "runs/gated/export",
            gated,
            architecture="resnet10t",
            classes=CLASSES,
            preprocessing=Preprocessing((128, 128), transforms=eval_transforms(128)),
        )
        for name in ("config.yaml", "photos.yaml"):
            shutil.copy("runs/mine/config.yaml", name)
    return folder


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    """A copy of it to work in, for one page."""
    shutil.copytree(prepared, tmp_path / "place")
    (tmp_path / "place" / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path / "place")


@pytest.fixture
def registers():
    """Takes out of the registers what a page enters."""
    kept = [(registry, dict(registry._things), dict(registry._info)) for registry in (LAYERS, METHODS)]
    yield
    for registry, things, info in kept:
        registry._things, registry._info = things, info


@pytest.fixture
def hub(monkeypatch) -> list[str]:
    """Stands in for timm's hub: networks keep their random weights, and their names are noted."""
    load, asked = timm.models._builder.load_pretrained, []

    def no_network(model, pretrained_cfg, *given, **options):
        if pretrained_cfg.get("file") or pretrained_cfg.get("source") == "local-dir":
            return load(model, pretrained_cfg, *given, **options)
        asked.append(pretrained_cfg["architecture"])
        return None

    monkeypatch.setattr(timm.models._builder, "load_pretrained", no_network)
    return asked


# -------------------------------------------------------------------------- what pages assume besides, page by page


def readme() -> dict[str, Any]:
    """A photo as another model sees it: the first block has no room for it."""
    network = timm.create_model("vit_small_patch14_reg4_dinov2")
    save_file(network.state_dict(), "weights.safetensors")
    preprocessing = Preprocessing((224, 224))
    photo = read_image("photo.jpg")
    pixels, geometry = preprocessing(photo)
    return {"photo": photo, "geometry": geometry, "images": preprocessing.normalize(pixels[None])}


def a_checkpoint() -> dict[str, Any]:
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), "tf_efficientnet_lite0.safetensors")
    return {}


def a_beagle() -> dict[str, Any]:
    shutil.copy("photo.jpg", "photos/beagle.jpg")
    return {}


def manifests() -> dict[str, Any]:
    """A table, and the config of another one, in which a label is mistyped."""
    photos = [(path.as_posix(), path.parent.name) for path in sorted(Path("photos").glob("*/*.png"))]
    table = [f"{photo},{label},train" for photo, label in photos]
    Path("clothes.csv").write_text("\n".join(["path,kind,split", *table]) + "\n", encoding="utf-8")
    Path("mistyped").mkdir()
    table[-1] = f"{photos[-1][0]},shrit,val"
    Path("mistyped/clothes.csv").write_text("\n".join(["path,kind,split", *table]) + "\n", encoding="utf-8")
    data = {"source": "manifest", "path": "mistyped/clothes.csv", "options": {"label_column": "kind", "root": "."}}
    config = {"model": {"name": "resnet18"}, "data": {**data, "image_size": 64}}
    Path("clothes.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return {}


PREPARE: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/train.md": a_checkpoint,
    "docs/explain.md": a_beagle,
    "docs/data.md": manifests,
}


# ------------------------------------------------------------------------------------------------ kinds of blocks


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Executes a block; a traceback has the page's own lines."""
    exec(compile("\n" * block.line + block.text, block.page, "exec"), namespace)


class ReadOnly(TrainingCLI):
    """Reads its arguments and makes nothing."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...


@cache
def training_parser() -> Any:
    """Returns the parser of `fit` and its like, which takes most of a second to make."""
    with training_words():
        return ReadOnly(["fit", "--model.name", "resnet18"]).parser


def read_arguments(words: list[str]) -> None:
    """Lets `vision-attn`'s own parsers read a command: a flag or key that it does not have is a UsageError."""
    command, *rest = words
    with training_words():
        if command in TRAINING or (command == "predict" and is_of_a_run(rest)):
            training_parser().parse_args(words)
            return
        options, config = _parser().parse_known_args(words)
        if config:
            if not getattr(options, "takes_config", False):
                raise UsageError(f"unrecognized arguments: {config}")
            training_parser().parse_args(["fit", "--model.name", "resnet18", *config])


def read_command(command: str) -> None:
    """Checks a command that is not carried out."""
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words) <= set(targets[1].split())
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        assert words[0] == "install"
        for extra in re.findall(r"\[(.*)\]", words[1]):
            assert set(extra.split(",")) <= set(setup["options.extras_require"])
    elif program == "jupyter":
        assert words[0] == "lab" and list((ROOT / words[1]).glob("*.ipynb"))
    elif program == "torchrun":
        given = get_args_parser().parse_args(words)
        assert given.module and given.training_script == "vision_attn.cli"
        read_arguments(given.training_script_args)
    else:
        assert program == "vision-attn"
        read_arguments(words)


def run_command(command: str, *, slow: bool, capsys: pytest.CaptureFixture) -> None:
    """Carries a command out, or reads it where the tables above say so."""
    if (start := begins(command, FAILS)) is not None:
        assert main(shlex.split(command, comments=True)[1:]) == 2
        assert re.search(FAILS[start], capsys.readouterr().err)
    elif begins(command, PARSED) or (begins(command, SLOW) and not slow):
        read_command(command)
    else:
        program, *words = shlex.split(command, comments=True)
        assert program == "vision-attn"
        assert main(words) == 0, capsys.readouterr().err


def run_yaml(block: Block) -> None:
    """Reads a block as the config of a run, and makes its photos and its network."""
    config = yaml.safe_load(block.text)
    shapes = {"source": "shapes", "options": {"size": 64, "train": 16, "validation": 8, "test": 0}, "image_size": 64}
    config.setdefault("data", shapes).setdefault("path", "photos")
    config.setdefault("model", {"name": "va_vit_micro_stem8_64"})
    Path("block.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with training_words():
        parser = training_parser()
        parser.instantiate_classes(parser.parse_args(["fit", "--config", "block.yaml"]))


def run_bash(block: Block) -> None:
    """Lets bash read a script, and our parser the `vision-attn` in it."""
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for command in re.findall(r"\bvision-attn .*", block.text.replace("\\\n", " ")):
        read_command(command)


def run_page(page: str, *, slow: bool, capsys: pytest.CaptureFixture) -> Counter[str]:
    """Runs a page's blocks in order and returns how many of each kind were run."""
    namespace: dict[str, Any] = {"__name__": "docs", **PREPARE.get(page, dict)()}
    only_read = page in SLOW_PAGES and not slow
    done: Counter[str] = Counter()
    for block in blocks_of(page):
        try:
            match block.kind:
                case "python" if only_read:
                    compile(block.text, str(block), "exec")
                case "python":
                    run_python(block, namespace)
                case "console":
                    commands = commands_of(block)
                    assert commands, "expected a line that begins with $"
                    for command in commands:
                        read_command(command) if only_read else run_command(command, slow=slow, capsys=capsys)
                case "yaml":
                    run_yaml(block)
                case "bash":
                    run_bash(block)
                case "":
                    pass
                case _:
                    pytest.fail(f"{block}: expected one of {KINDS}, got {block.kind!r}")
        except Exception as error:
            error.add_note(f"in the {block.kind} block at {block}")
            raise
        done[block.kind] += 1
    return done


def is_slow(page: str) -> bool:
    """Whether `pytest -m slow` runs more of a page than the quick tests do."""
    commands = [command for block in blocks_of(page) if block.kind == "console" for command in commands_of(block)]
    return page in SLOW_PAGES or any(begins(command, SLOW) and not begins(command, PARSED) for command in commands)


# ---------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_the_blocks_of_a_page_run(page, place, registers, hub, capsys):
    assert run_page(page, slow=False, capsys=capsys) == Counter(block.kind for block in blocks_of(page))
    assert set(hub) <= FROM_HUB.get(page, set())


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if is_slow(page)])
def test_the_blocks_of_a_page_run_with_those_that_take_long(page, place, registers, hub, capsys):
    assert run_page(page, slow=True, capsys=capsys) == Counter(block.kind for block in blocks_of(page))
    assert set(hub) == FROM_HUB.get(page, set())


def test_blocks_are_of_known_kinds_and_every_kind_is_there():
    kinds = Counter(block.kind for page in PAGES for block in blocks_of(page))
    assert set(kinds) == set(KINDS)


def test_what_is_not_carried_out_is_on_a_page():
    blocks = [block for page in PAGES for block in blocks_of(page) if block.kind == "console"]
    commands = [command for block in blocks for command in commands_of(block)]
    for start in (*PARSED, *SLOW, *FAILS):
        assert any(begins(command, [start]) for command in commands), f"no page has {start}"
    assert set(PREPARE) | set(SLOW_PAGES) | set(FROM_HUB) <= set(PAGES)


def test_a_block_that_is_wrong_fails(place, capsys):
    with pytest.raises(ZeroDivisionError):
        run_python(Block("python", "1 / 0", "page.md", 3), {})
    with pytest.raises(UsageError, match="metod"):
        read_command("vision-attn explain runs/mine/export photos --metod rollout")
    with pytest.raises(UsageError, match="optm"):
        read_command("vision-attn fit --config config.yaml --model.optm.lr 1")
    with pytest.raises(AssertionError):
        read_command("pip install .[no_such_extra]")
    with pytest.raises(UsageError, match="brightnes"):
        run_yaml(Block("yaml", "data: {source: shapes, brightnes: 1}", "page.md", 3))


def test_every_public_name_is_in_the_api():
    entries = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES if page.startswith("docs/api/"))
    for name, module in vision_attn._PUBLIC.items():
        thing = rf"vision_attn(\.\w+)*\.{name}"
        assert re.search(rf"^::: ({thing}|{re.escape(module)})$", entries, re.MULTILINE), name
        assert re.search(rf"va\.{name}`\]\[{thing}\]", entries), name
