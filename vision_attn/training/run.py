"""`vision-attn fit|validate|test|predict`: LightningCLI over our classifier and our data, a folder for each run."""

import copy
import errno
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
import yaml
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import nn

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.data.report import report_lines
from vision_attn.errors import StoppedError, UsageError
from vision_attn.files import free_path, is_taken, remove_parts
from vision_attn.training.arguments import OneLineParser
from vision_attn.training.callbacks import EpochLines, FitReport, RunPlots
from vision_attn.training.checkpoints import BEST, LAST, WholeCheckpointIO, check_checkpoint
from vision_attn.training.distributed import SyncBatchNorms, end_together, launched_rank, others_reported
from vision_attn.training.evaluation import EvaluationConfig, KeptOutputs, evaluate_fit, evaluate_run, predict_views
from vision_attn.training.module import Classifier
from vision_attn.training.optim import create_optimizer, create_schedule
from vision_attn.training.run_checks import (
    check_epochs,
    check_has_weights,
    check_resumed,
    check_same_photos,
    check_same_split,
)
from vision_attn.training.run_log import RunLog
from vision_attn.training.safety import (
    BatchSeed,
    EpochAgain,
    FiniteLoss,
    LastCheckpoint,
    NotFiniteError,
    StopSignals,
    describe_photos,
    resume_command,
    versions,
)
from vision_attn.training.tuning import FinderConfig, tune
from vision_attn.training.watching import WatchAttention, WatchConfig
from vision_attn.training.writer import PredictionWriter

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
        rank: This process's among those of the run. What a run leaves behind is written by rank 0 alone, and only
            there is the classifier whole.
    """

    run_dir: Path
    classifier: Classifier
    data: ImageDataModule
    metrics: dict[str, float]
    temperature: float = 1.0
    rank: int = 0


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
        except ValueError as error:
            # What a part that can be left out (data.mixing, model.lora) refuses, among all that jsonargparse has tried.
            refused = re.search(r"Union subtypes.*?\n\s*- (expected .*?, got .*?)\n", str(error), re.DOTALL)
            if isinstance(error, UsageError) or not refused:
                raise
            raise UsageError(re.sub(r"\s+", " ", refused.group(1))) from error


class _Printer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        Console(soft_wrap=True, highlight=False, markup=False).print(record.getMessage())


def _say_what_is_loaded() -> None:
    """Sends what loading a checkpoint has to say (what was left out, resampled, cast) to the terminal."""
    for name in ("vision_attn.models", "vision_attn.training"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(_Printer())
            logger.setLevel(logging.INFO)


_LIGHTNING_ADVICE: tuple[tuple[type[Warning], str], ...] = (
    (UserWarning, r".*does not have many workers which may be a bottleneck.*"),
    (UserWarning, r".*The number of training batches .* is smaller than the logging interval.*"),
    (UserWarning, r".*Checkpoint directory .* exists and is not empty.*"),
    (UserWarning, r".*Consider setting `persistent_workers=True`.*"),
    (UserWarning, r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint.*"),
    # The data module starts at the batch after the checkpoint's: `ImageDataModule.start_at`.
    (UserWarning, r"You're resuming from a checkpoint that ended before the epoch ended.*"),
    # What is frozen stays in evaluation mode, as `Classifier.train` says.
    (UserWarning, r"Found \d+ module\(s\) in eval mode at the start of training.*"),
    # Metrics are the same on all processes: torchmetrics has counted over all of them.
    (UserWarning, r"It is recommended to use `self.log\(.*, sync_dist=True\)`.*"),
    (UserWarning, r".*LightningCLI's args parameter is intended to run from within Python.*"),
    # LightningCLI calls what jsonargparse will drop in its version 5.
    (DeprecationWarning, r"(?s).*JsonargparseDeprecationWarning"),
    (DeprecationWarning, r"(?s).*deprecated\s+in\s+v4\.\d+\.\d+\s+and\s+will\s+be\s+removed\s+in\s+v5"),
    (FutureWarning, r".*LeafSpec.*"),
    (DeprecationWarning, r".*LeafSpec.*"),
)


class TrainingCLI(LightningCLI):
    """Our model, our data, and the run's folder; nothing runs until `carry_out`."""

    whole_network: nn.Module | None = None
    resumed = False
    watcher: WatchAttention | None = None

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(
            Classifier,
            ImageDataModule,
            args=arguments,
            run=True,
            seed_everything_default=0,
            save_config_kwargs={"config_filename": "config.yaml"},
            trainer_defaults={
                "max_epochs": 10,
                "accelerator": "auto",
                "log_every_n_steps": 10,
                "use_distributed_sampler": False,
            },
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
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int | None,
            default=None,
            help="Write last.ckpt every so many steps within an epoch, too; before each epoch alone where left out.",
        )
        parser.add_class_arguments(EvaluationConfig, "evaluation")
        parser.add_class_arguments(FinderConfig, "tune")
        parser.add_argument(
            "--watch",
            type=WatchConfig | None,
            default=None,
            help="Draw where the network looks in fixed validation photos as it learns, such as {photos: 8}; not drawn "
            "where left out.",
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
        elif fit and config.ckpt_path is not None:
            parser = self._parser("fit")
            # As it is saved: without what follows from other keys.
            now, defaults = (
                yaml.safe_load(parser.dump(values, skip_none=False, skip_validation=True))
                for values in (config, parser.get_defaults())
            )
            check_resumed(now, defaults)
            self.resumed = True
        elif fit and launched_rank() == 0 and is_taken(Path(config.run_dir)):
            raise UsageError(
                f"expected a new folder for the run, got {config.run_dir}, which exists: choose another with --run_dir"
            )
        if not fit or self.resumed:
            # The weights come from the run's checkpoint: those that it started from need not be there any more.
            config.model.checkpoint, config.model.pretrained = None, False
            config.tune.lr = config.tune.batch_size = False
        if not fit:
            check_same_split(config, Path(config.run_dir))
            config.model.teacher = None
        elif not self.resumed:
            check_has_weights(config.model)
        if fit:
            check_epochs(config.trainer)
        if config.ema is not None and not 0 < config.ema < 1:
            raise UsageError(f"expected ema within (0, 1), got {config.ema}: 0.999 is usual")
        every = config.checkpoint_every_n_steps
        if every is not None and every < 1:
            raise UsageError(f"expected checkpoint_every_n_steps of at least 1, got {every}: 1000 is usual")
        self.run_dir = Path(config.run_dir)
        self.ema = config.ema
        self.outputs = KeptOutputs()
        seed = config.seed_everything
        self.signals = StopSignals()
        self.last_checkpoint = LastCheckpoint(
            self.run_dir,
            seed=torch.initial_seed() if isinstance(seed, bool) else seed,
            every_n_steps=every,
            signals=self.signals,
        )

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
        if config.get("use_distributed_sampler"):
            raise UsageError(
                "expected trainer.use_distributed_sampler false, got true: the data module shares out the photos itself"
            )
        if config.pop("sync_batchnorm", False):
            config["plugins"] = [*_listed(config.get("plugins")), SyncBatchNorms()]
        if fit:
            # First, for the trainer's log_dir is that of the first: config, metrics and curves stay with the run.
            others = config.get("logger")
            others = others if isinstance(others, list) else [others]
            config["logger"] = [RunLog(self.run_dir), *(other for other in others if isinstance(other, Logger))]
            config["plugins"] = [*_listed(config.get("plugins")), WholeCheckpointIO()]
            callbacks += self._fit_callbacks(interactive)
        else:
            config["logger"] = False
            callbacks.append(self.outputs)
        if not fit or self.resumed:
            # The run has its config already.
            self.save_config_callback = None
        try:
            trainer = self._instantiate_trainer(config, callbacks)
            # Before those of the config, too, and after them: see these classes.
            places = {LastCheckpoint: 0, BatchSeed: 1, EpochAgain: 3}
            trainer.callbacks.sort(key=lambda callback: places.get(type(callback), 2))  # type: ignore[attr-defined]
            return trainer
        except (MisconfigurationException, TypeError, ValueError) as error:
            reason = re.sub(r"\s+", " ", str(error)).strip()
            raise UsageError(f"expected trainer options that Lightning can use here, got: {reason}") from error

    def _fit_callbacks(self, interactive: bool) -> list[pl.Callback]:
        """Returns what goes on beside training; each reads its own part of the config."""
        callbacks: list[pl.Callback] = [
            self.last_checkpoint,
            EpochAgain(self.last_checkpoint),
            BatchSeed(self.last_checkpoint.seed),
            FiniteLoss(self.run_dir),
            ModelCheckpoint(
                dirpath=self.run_dir / BEST.parent,
                filename=BEST.stem,
                monitor=self.model.monitor,
                mode="max",
                enable_version_counter=False,
            ),
            LearningRateMonitor("step"),
            RunPlots(self.run_dir),
            FitReport(self.run_dir),
        ]
        if not interactive:
            callbacks.append(EpochLines())
        if self.ema is not None:
            callbacks.append(EMAWeightAveraging(decay=self.ema))
        if (watch := self.config_init[self.config_init.subcommand].watch) is not None:
            # Last: what it takes is none of the epoch's time.
            self.watcher = WatchAttention(watch, self.run_dir)
            callbacks.append(self.watcher)
        return callbacks

    def _run_subcommand(self, subcommand: str) -> None:
        """Puts off what LightningCLI would do now to `carry_out`."""

    def carry_out(self, command: str) -> Run:
        """Looks at the photos, runs the command, and returns what came of it."""
        self.datamodule.check()
        first = self.trainer.is_global_zero
        for line in self.datamodule.skipped_lines() if first else ():
            Console(soft_wrap=True, highlight=False).print(line)
        for line in report_lines(self.datamodule) if first and command == "fit" and not self.resumed else ():
            Console(soft_wrap=True, highlight=False, markup=False).print(f"photos: {line}")
        self._try_data(command)
        if self.watcher is not None:
            self.watcher.check(self.trainer, self.model, self.datamodule)
        kwargs = self._prepare_subcommand_kwargs(command)
        if command == "fit":
            if self.resumed and self._has_ended(kwargs):
                return self._finished_fit()
            try:
                if first and isinstance(self.trainer.strategy, FSDPStrategy):
                    # Lightning shards the network in place; what is exported is whole.
                    self.whole_network = copy.deepcopy(self.model.network)
                if not self.resumed:
                    self._tune()
                with others_reported(f"go on with: {resume_command(self.run_dir)}"), self._ended_in_order():
                    self.trainer.fit(**kwargs)
            except UsageError:
                # A run that never got to a checkpoint is no run: its folder would only stand in the way.
                if first and not any((self.run_dir / name).is_file() for name in (BEST, LAST)):
                    shutil.rmtree(self.run_dir, ignore_errors=True)
                raise
            return self._finished_fit()
        given = str(kwargs.get("ckpt_path") or "best")
        named = {"best": BEST, "last": LAST}
        path = self.run_dir / named[given] if given in named else Path(given)
        check_checkpoint(path, self.datamodule.classes)
        kwargs["ckpt_path"] = str(path)
        if command == "predict":
            predict_views(self.model, self.datamodule, self._evaluation().tta)
            writer = PredictionWriter(free_path(self.run_dir / "predictions.csv"))
            self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
            with others_reported("give the command again"):
                self.trainer.predict(**{**kwargs, "return_predictions": False})
            if first:
                Console(soft_wrap=True).print(f"predictions: {writer.path}")
            return Run(self.run_dir, self.model, self.datamodule, {}, rank=self.trainer.global_rank)
        with others_reported("give the command again"):
            found = getattr(self.trainer, command)(**{**kwargs, "verbose": False})
        end_together()
        metrics = {key: float(value) for key, value in found[0].items()}
        temperature = 1.0
        if first:
            step = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("global_step")
            temperature = evaluate_run(
                self.trainer,
                self.model,
                self.datamodule,
                self.run_dir,
                self._evaluation(),
                command=command,
                outputs=self.outputs.outputs(),
                metrics=metrics,
                step=step,
            )
        rank = self.trainer.global_rank
        return Run(self.run_dir, self.model, self.datamodule, metrics, temperature=temperature, rank=rank)

    def _tune(self) -> None:
        """Looks for the batch size and the learning rate, and writes what was found into the config that is saved."""
        config = self.config[self.config.subcommand]
        wanted = self.config_init[self.config_init.subcommand].tune
        if not (wanted.lr or wanted.batch_size):
            return
        if self.trainer.world_size > 1:
            raise UsageError(
                f"expected one device for tune, got {self.trainer.world_size}: look for the values on one, then give "
                "them as model.optim.lr and data.batch_size"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        found = tune(self.model, self.datamodule, wanted, trainer=config.trainer.as_dict(), run_dir=self.run_dir)
        config.model.optim.lr = found.get("lr", config.model.optim.lr)
        config.data.batch_size = found.get("batch_size", config.data.batch_size)
        # The saved config is that of this run: it says what was found, and looks for nothing.
        config.tune.lr = config.tune.batch_size = False

    def _evaluation(self) -> EvaluationConfig:
        return self.config_init[self.config_init.subcommand].evaluation

    def _has_ended(self, kwargs: dict[str, Any]) -> bool:
        """Looks at the checkpoint to go on from, and returns whether there is nothing left to train."""
        kwargs["ckpt_path"] = path = self.run_dir / LAST
        content = check_checkpoint(path, self.datamodule.classes, self.model.state_dict())
        if "run" not in content:
            raise UsageError(
                f"expected a checkpoint that can be gone on from at {path}, got one of an earlier version: start a new "
                f"run from its weights with --model.checkpoint {path}"
            )
        saved, say = content["run"], Console(soft_wrap=True, highlight=False)
        check_same_photos(
            saved, describe_photos(self.datamodule), seed=self.last_checkpoint.seed, world_size=self.trainer.world_size
        )
        ended = saved["place"] == "end"
        if self.trainer.is_global_zero:
            remove_parts(self.run_dir)
            for name, version in versions().items():
                if saved["versions"][name] != version:
                    say.print(f"the run was started with {name} {saved['versions'][name]}, and goes on with {version}")
            done = f"epoch {content['epoch'] + (not ended)}, step {content['global_step']}"
            if not ended:
                say.print(f"{self.run_dir} goes on from {done}")
            elif is_taken(self.run_dir / "export"):
                say.print(f"{self.run_dir} ended after {done}: nothing is left to do")
            else:
                say.print(f"{self.run_dir} ended after {done}: its export is made now")
        return ended

    @contextmanager
    def _ended_in_order(self) -> Iterator[None]:
        """Tells in one line what ended training before its time, and how the run goes on."""
        with self.signals:
            try:
                yield
            except (StoppedError, KeyboardInterrupt, SystemExit) as stop:
                number = self.signals.received
                if number is None:
                    raise
                kept = f"go on with: {resume_command(self.run_dir)}" if self._has_last() else "nothing was trained yet"
                where = f"after step {self.trainer.global_step}" if isinstance(stop, StoppedError) else "at once"
                raise StoppedError(f"stopped {where}; {kept}", signal=number) from None
            except UsageError as error:
                if not self._has_last() or isinstance(error, NotFiniteError):
                    raise
                raise UsageError(f"{error}; then go on with: {resume_command(self.run_dir)}") from error
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
                    raise
                kept = f", then go on with: {resume_command(self.run_dir)}" if self._has_last() else ""
                raise UsageError(
                    f"expected to write {error.filename or self.run_dir}, got an error ({error.strerror}): free the "
                    f"place{kept}"
                ) from error

    def _has_last(self) -> bool:
        return (self.run_dir / LAST).is_file()

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
                name = self.config[self.config.subcommand].model.name
                raise UsageError(
                    f"expected a network that takes {image.shape[2]} x {image.shape[3]} pixels, got {name}, which "
                    f"fails: {reason}"
                ) from error
        if command == "fit":
            create_schedule(
                create_optimizer(network, self.model.optim), self.model.optim, total_steps=1000, steps_per_epoch=10
            )
            self.model.check_teacher(self.datamodule.classes, image)
        self.model.train()

    def _finished_fit(self) -> Run:
        rank = self.trainer.global_rank
        end_together()
        if rank:
            return Run(self.run_dir, self.model, self.datamodule, {}, rank=rank)
        if self.whole_network is not None:
            self.model.network = self.whole_network
        # From the file, for the best weights may be of a part of the run that another process trained.
        metrics, step = {}, None
        if (self.run_dir / BEST).is_file():
            best = torch.load(self.run_dir / BEST, map_location="cpu", weights_only=True)
            self.model.load_state_dict(best["state_dict"])
            self.model.merge_lora()
            score = best["callbacks"][self.trainer.checkpoint_callback.state_key]["best_model_score"]  # type: ignore[union-attr]
            metrics, step = {self.model.monitor: float(score)}, best["global_step"]
        model, data = self.model.eval(), self.datamodule
        if is_taken(self.run_dir / "export"):
            # It had ended before.
            return Run(self.run_dir, model, data, metrics)
        temperature = evaluate_fit(self.trainer, model, data, self.run_dir, self._evaluation(), step=step)
        return Run(self.run_dir, model, data, metrics, temperature=temperature)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
