"""Random numbers of what goes on beside training, which must not change what training draws."""

from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning.utilities.seed import isolate_rng


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts the random state of torch, CUDA, NumPy and Python back, whatever was drawn or raised in between."""
    failed: BaseException | None = None
    with isolate_rng():
        # Lightning's puts nothing back where an exception comes through it.
        try:
            yield
        except BaseException as error:
            failed = error
    if failed is not None:
        raise failed
