"""`vision-attn fit|validate|test|predict`: LightningCLI over our classifier and our data, a folder for each run."""

import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
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

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.errors import UsageError
from vision_attn.files import free_path, is_taken
from vision_attn.training.arguments import OneLineParser
from vision_attn.training.callbacks import EpochLines, RunPlots
from vision_attn.training.checkpoints import BEST, LAST, check_checkpoint
from vision_attn.training.module import Classifier
from vision_attn.training.optim import create_optimizer
from vision_attn.training.results import report_evaluation, write_predictions
from vision_attn.training.run_checks import check_epochs, check_same_split

COMMANDS = ("fit", "validate", "test", "predict")


@dataclass(frozen=True)
class Run:
    """A command that has ended.

    Attributes:
        run_dir: The run's folder.
        classifier: After `fit` with the best weights of the run, in evaluation mode.
        data: The photos.
        metrics: The best epoch's metrics after `fit`, else those of the command.
        temperature: What logits are divided by for probabilities that hold (Guo et al. 2017).
    """

    run_dir: Path
    classifier: Classifier
    data: ImageDataModule
    metrics: dict[str, float]
    temperature: float = 1.0


def run(command: str, arguments: Sequence[str]) -> Run:
    """Carries out one of `COMMANDS` with the arguments of the command line, and returns what came of it.

    Raises:
        UsageError: an argument, the config, the data or the run's folder cannot be used; nothing was written then.
    """
    assert command in COMMANDS
    with training_words():
        return TrainingCLI([command, *arguments]).carry_out(command)


@contextmanager
def training_words() -> Iterator[None]:
    """Keeps Lightning's advice off the terminal and tells its refusals, and a config's, in one line."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _say_what_is_loaded()
    with warnings.catch_warnings():
        # Advice on speed and on parts of Lightning that are none of the user's business.
        for category, text in _LIGHTNING_ADVICE:
            warnings.filterwarnings("ignore", text, category)
        try:
            yield
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
        parser.link_arguments("data.multi_label", "model.multi_label", apply_on="instantiate")
        parser.link_arguments("data.class_counts", "model.class_counts", apply_on="instantiate")

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
            check_same_split(config, Path(config.run_dir))
        elif config.model.freeze and not (config.model.checkpoint or config.model.pretrained):
            raise UsageError(
                f"expected weights to start from where modules are frozen, got model.freeze {config.model.freeze} with "
                "neither model.checkpoint nor model.pretrained: give one"
            )
        if fit:
            check_epochs(config.trainer)
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
            callbacks += self._fit_callbacks(interactive)
        else:
            config["logger"] = False
            # The run has its config already.
            self.save_config_callback = None
        try:
            return self._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, TypeError, ValueError) as error:
            reason = re.sub(r"\s+", " ", str(error)).strip()
            raise UsageError(f"expected trainer options that Lightning can use here, got: {reason}") from error

    def _fit_callbacks(self, interactive: bool) -> list[pl.Callback]:
        """Returns what goes on beside training; each reads its own part of the config."""
        callbacks = [
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
        return callbacks

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
        named = {"best": BEST, "last": LAST}
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
