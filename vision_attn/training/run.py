"""`vision-attn fit|validate|test|predict`: LightningCLI over our classifier and our data, a folder for each run."""

import csv
import io
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.errors import UsageError
from vision_attn.files import free_path, is_taken, write_whole
from vision_attn.metrics.intervals import wilson_interval
from vision_attn.registry import close_names, unknown
from vision_attn.training.callbacks import EpochLines, RunPlots
from vision_attn.training.module import Classifier
from vision_attn.training.optim import create_optimizer
from vision_attn.viz.plots import confusion_matrix

COMMANDS = ("fit", "validate", "test", "predict")
BEST = Path("checkpoints", "best.ckpt")


@dataclass(frozen=True)
class Run:
    """A command that has ended.

    Attributes:
        run_dir: The run's folder.
        classifier: After `fit` with the best weights of the run, in evaluation mode.
        data: The photos.
        metrics: The best epoch's metrics after `fit`, else those of the command.
    """

    run_dir: Path
    classifier: Classifier
    data: ImageDataModule
    metrics: dict[str, float]


def run(command: str, arguments: Sequence[str]) -> Run:
    """Carries out one of `COMMANDS` with the arguments of the command line, and returns what came of it.

    Raises:
        UsageError: an argument, the config, the data or the run's folder cannot be used; nothing was written then.
    """
    assert command in COMMANDS
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _say_what_is_loaded()
    with warnings.catch_warnings():
        # Advice on speed and on parts of Lightning that are none of the user's business.
        for category, text in _LIGHTNING_ADVICE:
            warnings.filterwarnings("ignore", text, category)
        try:
            return TrainingCLI([command, *arguments]).carry_out(command)
        except MisconfigurationException as error:
            reason = re.sub(r"\s+", " ", str(error)).strip()
            raise UsageError(f"expected options that go together, got: {reason}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"expected a config in UTF-8, got {error}: save it as UTF-8") from error


class _Printer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        Console(soft_wrap=True, highlight=False, markup=False).print(record.getMessage())


def _say_what_is_loaded() -> None:
    """Sends what loading a checkpoint has to say (what was left out, resampled, cast) to the terminal."""
    logger = logging.getLogger("vision_attn.models")
    if not logger.handlers:
        logger.addHandler(_Printer())
        logger.setLevel(logging.INFO)


_LIGHTNING_ADVICE: tuple[tuple[type[Warning], str], ...] = (
    (UserWarning, r".*does not have many workers which may be a bottleneck.*"),
    (UserWarning, r".*The number of training batches .* is smaller than the logging interval.*"),
    (UserWarning, r".*Checkpoint directory .* exists and is not empty.*"),
    (UserWarning, r".*Consider setting `persistent_workers=True`.*"),
    (UserWarning, r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint.*"),
    # What is frozen stays in evaluation mode, as `Classifier.train` says.
    (UserWarning, r"Found \d+ module\(s\) in eval mode at the start of training.*"),
    (UserWarning, r".*LightningCLI's args parameter is intended to run from within Python.*"),
    # LightningCLI calls what jsonargparse will drop in its version 5.
    (DeprecationWarning, r"(?s).*JsonargparseDeprecationWarning"),
    (DeprecationWarning, r"(?s).*deprecated\s+in\s+v4\.\d+\.\d+\s+and\s+will\s+be\s+removed\s+in\s+v5"),
    (FutureWarning, r".*LeafSpec.*"),
    (DeprecationWarning, r".*LeafSpec.*"),
)


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line that offers close names."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raises what is wrong with the arguments or the config as a `UsageError`."""
        raise UsageError(one_line(message, self._known_keys())) from ex

    def _known_keys(self) -> list[str]:
        keys = [action.dest for action in self._actions if action.dest not in ("help", "subcommand")]
        for action in self._actions:
            # The commands' parsers, on the parser above them.
            for parser in (getattr(action, "_name_parser_map", None) or {}).values():
                keys += parser._known_keys()
        return keys


def one_line(message: str, known: Iterable[str]) -> str:
    """Returns jsonargparse's explanation as one line: what is wrong, and close names for a key that is unknown."""
    text = re.sub(r"\s+", " ", message).strip()
    for pattern in _UNKNOWN_KEY:
        if found := re.search(pattern, text):
            key = found.group(1)
            close = close_names(key, set(known)) or close_names(key.rsplit(".", 1)[-1], set(known))
            advice = f"did you mean {' or '.join(map(repr, close))}?" if close else "see vision-attn fit --help"
            return f"expected a known config key, got {key!r}: {advice}"
    if found := re.search(r"File does not exist: '(.+?)'", text):
        return f"expected a config file at {found.group(1)}, got nothing: correct --config"
    if found := re.search(r"arguments are required: (?:\w+\.)?([\w.]+)", text):
        return f"expected a value for {found.group(1)}, got none: give --{found.group(1)} or set it in the config"
    if found := re.search(r'Parser key "([\w.]+)"', text):
        key, types = found.group(1), dict.fromkeys(re.findall(r"<class '([\w.]+)'>", text.split("Given value")[0]))
        value = re.search(r"(?:Given value|Got value): (.*)$", text)
        if choices := re.findall(r"typing\.Literal\[(.*?)\]", text):
            names = [name.strip(" '") for group in choices for name in group.split(",")]
            return str(unknown(key, value.group(1) if value else "", names))
        if types and value:
            wanted = " or ".join("nothing" if name == "NoneType" else name for name in types)
            return f"expected {wanted} for {key}, got {value.group(1)}: correct it"
        return f"{key}: {text.split(':', 1)[1].strip()}"
    return text


# The ways in which jsonargparse and argparse say that a key is unknown.
_UNKNOWN_KEY = (
    r"""(?:[Kk]ey|[Oo]ption|[Aa]rgument) ['"]([\w.\-]+)['"] is not expected""",
    r"""does not accept (?:nested key|option|key) ['"]([\w.\-]+)['"]""",
    r"""[Uu]nrecognized arguments: (?:--)?([\w.\-]+)""",
)


class TrainingCLI(LightningCLI):
    """Our model, our data, and the run's folder; nothing runs until `carry_out`."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(
            Classifier,
            ImageDataModule,
            args=arguments,
            run=True,
            seed_everything_default=0,
            save_config_kwargs={"config_filename": "config.yaml"},
            trainer_defaults={"max_epochs": 10, "accelerator": "auto", "log_every_n_steps": 10},
        )

    # LightningCLI parses, instantiates and runs in its constructor. The run's folder and the photos are looked at
    # between these, so that a run which cannot work ends before it has written anything.

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Returns the parser with errors of one line."""
        parser = OneLineParser(
            allow_abbrev=False, **{**kwargs, "description": "Train, validate, test and predict with image classifiers."}
        )
        parser.add_argument("-c", "--config", action="config", help="YAML file; later ones override earlier ones.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run's folder and the weight average, and takes the model's size and classes from the data."""
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="The run's folder; a new runs/<model> where left out."
        )
        parser.add_argument(
            "--ema",
            type=float | None,
            default=None,
            help="Decay of the weight average, such as 0.999; none where left out.",
        )
        parser.link_arguments("data.image_size", "model.image_size")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Leaves the checkpoint to `carry_out`: all of a run's config is in its YAML, none in its checkpoints."""

    def before_instantiate_classes(self) -> None:
        """Chooses the run's folder, and refuses one that is taken."""
        config = self.config[self.config.subcommand]
        fit = self.config.subcommand == "fit"
        if config.run_dir is None:
            if not fit:
                raise UsageError(
                    "expected the folder of the run, got none: give --run_dir or --config runs/<name>/config.yaml"
                )
            config.run_dir = str(free_path(Path("runs") / config.model.name.replace("/", "_")))
        elif fit and is_taken(Path(config.run_dir)):
            raise UsageError(
                f"expected a new folder for the run, got {config.run_dir}, which exists: choose another with --run_dir"
            )
        if not fit:
            # The weights come from the run's checkpoint: those that it started from need not be there any more.
            config.model.checkpoint, config.model.pretrained = None, False
            _check_same_split(config, Path(config.run_dir))
        elif config.model.freeze and not (config.model.checkpoint or config.model.pretrained):
            raise UsageError(
                f"expected weights to start from where modules are frozen, got model.freeze {config.model.freeze} with "
                "neither model.checkpoint nor model.pretrained: give one"
            )
        if fit:
            _check_epochs(config.trainer)
        if config.ema is not None and not 0 < config.ema < 1:
            raise UsageError(f"expected ema within (0, 1), got {config.ema}: 0.999 is usual")
        self.run_dir = Path(config.run_dir)
        self.ema = config.ema

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Returns the trainer with the run's logger and callbacks."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        fit = self.config.subcommand == "fit"
        interactive = Console().is_terminal
        callbacks: list[pl.Callback] = [RichProgressBar()] if interactive else []
        config["enable_progress_bar"] = interactive and config.get("enable_progress_bar") is not False
        if not config["enable_progress_bar"]:
            callbacks = []
        config["enable_model_summary"] = False
        if fit:
            # First, for the trainer's log_dir is that of the first: config, metrics and curves stay with the run.
            others = config.get("logger")
            others = others if isinstance(others, list) else [others]
            csv_logger = CSVLogger(self.run_dir, name="", version="")
            config["logger"] = [csv_logger, *(other for other in others if isinstance(other, Logger))]
            callbacks += [
                ModelCheckpoint(
                    dirpath=self.run_dir / BEST.parent,
                    filename=BEST.stem,
                    monitor="val/top1",
                    mode="max",
                    save_last=True,
                    enable_version_counter=False,
                ),
                LearningRateMonitor("step"),
                RunPlots(self.run_dir),
            ]
            if not interactive:
                callbacks.append(EpochLines())
            if self.ema is not None:
                callbacks.append(EMAWeightAveraging(decay=self.ema))
        else:
            config["logger"] = False
            # The run has its config already.
            self.save_config_callback = None
        try:
            return self._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, TypeError, ValueError) as error:
            reason = re.sub(r"\s+", " ", str(error)).strip()
            raise UsageError(f"expected trainer options that Lightning can use here, got: {reason}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Puts off what LightningCLI would do now to `carry_out`."""

    def carry_out(self, command: str) -> Run:
        """Looks at the photos, runs the command, and returns what came of it."""
        self.datamodule.check()
        for line in self.datamodule.skipped_lines():
            Console(soft_wrap=True, highlight=False).print(line)
        self._try_data(command)
        kwargs = self._prepare_subcommand_kwargs(command)
        if command == "fit":
            if kwargs.get("ckpt_path"):
                check_checkpoint(Path(kwargs["ckpt_path"]), self.datamodule.classes)
            try:
                self.trainer.fit(**kwargs)
            except UsageError:
                # A run that never got to a checkpoint is no run: its folder would only stand in the way.
                if not (self.run_dir / BEST.parent).is_dir():
                    shutil.rmtree(self.run_dir, ignore_errors=True)
                raise
            return self._finished_fit()
        given = str(kwargs.get("ckpt_path") or "best")
        named = {"best": BEST, "last": BEST.with_stem("last")}
        path = self.run_dir / named[given] if given in named else Path(given)
        check_checkpoint(path, self.datamodule.classes)
        kwargs["ckpt_path"] = str(path)
        if command == "predict":
            predictions = self.trainer.predict(**kwargs)
            path = write_predictions(self.run_dir, self.datamodule, predictions or [])
            Console(soft_wrap=True).print(f"predictions: {path}")
            return Run(self.run_dir, self.model, self.datamodule, {})
        found = getattr(self.trainer, command)(**{**kwargs, "verbose": False})
        metrics = {key: float(value) for key, value in found[0].items()}
        report_evaluation(self.run_dir, self.model, self.datamodule, metrics)
        return Run(self.run_dir, self.model, self.datamodule, metrics)

    def _try_data(self, command: str) -> None:
        """Sends a photo of each split through the network: what cannot work ends before anything is written."""
        loaders = {
            "fit": (self.datamodule.train_dataloader, self.datamodule.val_dataloader),
            "validate": (self.datamodule.val_dataloader,),
            "test": (self.datamodule.test_dataloader,),
            "predict": (self.datamodule.predict_dataloader,),
        }
        network = self.model.network.eval()
        for loader in loaders[command]:
            image = loader().dataset[0][0].permute(2, 0, 1)[None]
            try:
                with torch.no_grad():
                    network(self.model.normalize(image))
            except (RuntimeError, ValueError, AssertionError) as error:
                if isinstance(error, UsageError):
                    raise
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise UsageError(
                    f"expected a network that takes {image.shape[2]} x {image.shape[3]} pixels, got {self.model.name}, "
                    f"which fails: {reason}"
                ) from error
        if command == "fit":
            create_optimizer(network, self.model.optim)
        self.model.train()

    def _finished_fit(self) -> Run:
        best = self.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        if best:
            checkpoint = torch.load(best, map_location="cpu", weights_only=True)
            self.model.load_state_dict(checkpoint["state_dict"])
        score = self.trainer.checkpoint_callback.best_model_score  # type: ignore[union-attr]
        metrics = {} if score is None else {"val/top1": float(score)}
        return Run(self.run_dir, self.model.eval(), self.datamodule, metrics)


def _check_epochs(trainer: Any) -> None:
    """Refuses a trainer that would never train, or never validate: without validation there are no best weights."""
    epochs = trainer.max_epochs
    if epochs is not None and epochs < 1:
        raise UsageError(f"expected trainer.max_epochs of at least 1, got {epochs}")
    if trainer.limit_val_batches == 0 or (epochs and (trainer.check_val_every_n_epoch or 1) > epochs):
        raise UsageError(
            "expected validation in the run, which decides on the best weights, got trainer options without: leave "
            "trainer.limit_val_batches and trainer.check_val_every_n_epoch out"
        )


def _check_same_split(config: Any, run_dir: Path) -> None:
    """Refuses to set photos aside in another way than the run did: they would be among those that it was trained on."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return
    then, now = yaml.safe_load(path.read_text(encoding="utf-8")).get("data", {}), config.data
    if (then.get("source"), then.get("path")) != (now.source, now.path):
        return
    for key in ("seed", "validation_share", "test_share"):
        if key in then and then[key] != now[key]:
            raise UsageError(
                f"expected data.{key} {then[key]}, as in the run, got {now[key]}: photos that it was trained on would "
                "be counted; give other photos with --data.path, or fit again"
            )


def check_checkpoint(path: Path, classes: Sequence[str]) -> None:
    """Raises a `UsageError` where a checkpoint is not there, is not ours with plain tensors, or is of other classes."""
    if not path.is_file():
        raise UsageError(f"expected a checkpoint at {path}, got nothing: give --ckpt_path, or fit the run first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a different one for each kind of damage
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"expected a checkpoint of plain tensors (no code to unpickle) at {path}, got: {reason}"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UsageError(f"expected a checkpoint of a run at {path}, got another file: give runs/<name>/{BEST}")
    trained_on = tuple(content.get("classes", classes))
    if trained_on != tuple(classes):
        raise UsageError(
            f"expected photos of the run's classes ({', '.join(trained_on)}), got {', '.join(classes)}: make the class "
            "folders the same"
        )


def report_evaluation(run_dir: Path, classifier: Classifier, data: ImageDataModule, metrics: dict[str, float]) -> Path:
    """Prints the metrics with the accuracy's 95 % interval; writes them as JSON with the confusion matrix beside it."""
    stage = next(iter(metrics)).split("/")[0]
    confusion = classifier.val_confusion if stage == "val" else classifier.test_confusion
    matrix = confusion.compute().cpu()
    total, correct = int(matrix.sum()), int(matrix.diagonal().sum())
    low, high = wilson_interval(correct, total)
    table = Table(title=f"{'validation' if stage == 'val' else stage}, {total} photos")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key, value in metrics.items():
        text = f"{value:.4f}" if key.endswith("loss") else f"{value:.2%}"
        table.add_row(
            key, f"{text} ({correct} of {total}, 95 % {low:.1%} to {high:.1%})" if key.endswith("top1") else text
        )
    Console().print(table)
    path = free_path(run_dir / f"{stage}.json")
    content = {
        **metrics,
        "correct": correct,
        "total": total,
        "top1_interval_95": [low, high],
        "classes": list(data.classes),
        "confusion": matrix.tolist(),
    }
    write_whole(path, json.dumps(content, indent=2) + "\n")
    picture = confusion_matrix(path.with_name(f"{path.stem}_confusion.png"), matrix.numpy(), data.classes)
    Console(soft_wrap=True).print(f"results: {path}, {picture}")
    return path


def write_predictions(run_dir: Path, data: ImageDataModule, predictions: Sequence[Any]) -> Path:
    """Writes a CSV with a row for each photo: its name, the label, the prediction, its probability, and all others'."""
    images = data.predict_dataloader().dataset.images  # type: ignore[attr-defined]
    path = free_path(run_dir / "predictions.csv")
    rows: list[list[str]] = [["photo", "label", "prediction", "probability", *data.classes]]
    for probabilities, indices in predictions:
        for row, index in zip(probabilities.tolist(), indices.tolist(), strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            rows.append(
                [images.name(index), data.classes[images.labels[index]], data.classes[best], f"{row[best]:.6f}"]
                + [f"{value:.6f}" for value in row]
            )
    table = io.StringIO(newline="")
    csv.writer(table).writerows(rows)
    return write_whole(path, table.getvalue())
