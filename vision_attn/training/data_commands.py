"""`vision-attn data report|preview|pack`: a run's photos without the run, from the same config."""

from collections.abc import Sequence

from pytorch_lightning.cli import instantiate_module

from vision_attn.data.datamodule import ImageDataModule
from vision_attn.training.run import TrainingCLI, training_words


class _DataCLI(TrainingCLI):
    """The parser of `fit`, which makes the data module alone: no model is built and no folder is looked at."""

    def before_instantiate_classes(self) -> None:
        """Leaves out the checks of a run's folder and model."""

    def instantiate_classes(self) -> None:
        """Makes the data module."""
        self.datamodule = instantiate_module(ImageDataModule, self.config["fit"].data.as_dict())


def open_data(arguments: Sequence[str]) -> ImageDataModule:
    """Returns the photos that a run with these arguments of `vision-attn fit` would have.

    Args:
        arguments: `--config FILE` and `--data.<key> <value>`; the rest of a run's config is checked and not used.

    Raises:
        UsageError: an argument, the config or the photos cannot be used.
    """
    with training_words():
        # A network is not asked for: the name stands in where neither config nor arguments have one.
        return _DataCLI(["fit", "--model.name", "resnet18", *arguments]).datamodule
