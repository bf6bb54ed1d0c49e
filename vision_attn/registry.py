"""Names for things: layers, methods, metrics, data sources.

Each kind of thing has one `Registry`. A name that is not there is answered with the closest names that are.
"""

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from vision_attn.errors import UsageError

T = TypeVar("T")


def close_names(name: str, choices: Iterable[str], *, limit: int = 3) -> list[str]:
    """Returns up to `limit` of the `choices` that look like `name`, best first; capitals make no difference."""
    choices = list(choices)
    found = get_close_matches(name.casefold(), {choice.casefold() for choice in choices}, n=limit, cutoff=0.5)
    return [choice for folded in found for choice in choices if choice.casefold() == folded][:limit]


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """Returns the error for a `name` that is none of the `choices`; it offers close names, or a short list whole."""
    choices = sorted(choices)
    close = close_names(str(name), choices)
    if close:
        advice = f"did you mean {' or '.join(map(repr, close))}?"
    elif len(choices) <= 40:
        advice = f"choose one of {', '.join(choices)}"
    else:
        advice = f"there are {len(choices)} to choose from"
    return UsageError(f"expected a known {kind}, got {name!r}: {advice}")


class Registry(Generic[T]):
    """A table from name to thing.

    Args:
        kind: What the things are, in the singular, for error messages ("method", "layer").

    Example:
        >>> methods = Registry("method")
        >>> @methods.register("center", class_specific=False)
        ... def center(model, images): ...
        >>> methods.names()
        ['center']
        >>> methods.info("center")
        {'class_specific': False}
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}
        self._info: dict[str, dict[str, Any]] = {}

    def register(self, name: str, *, replace: bool = False, **info: Any) -> Callable[[T], T]:
        """Returns a decorator that enters a thing under `name`, with free `info` about it.

        Raises:
            UsageError: the name is taken and `replace` is false.
        """

        def enter(thing: T) -> T:
            if name in self._things and not replace:
                raise UsageError(
                    f"expected a new name for a {self.kind}, got {name!r}: choose another or pass replace=True"
                )
            self._things[name] = thing
            self._info[name] = info
            return thing

        return enter

    def get(self, name: str) -> T:
        """Returns the thing under `name`.

        Raises:
            UsageError: there is none; the message offers close names.
        """
        if not isinstance(name, str) or name not in self._things:
            raise unknown(self.kind, name, self._things)
        return self._things[name]

    def info(self, name: str) -> dict[str, Any]:
        """Returns what was said about the thing under `name` when it was registered."""
        self.get(name)
        return dict(self._info[name])

    def names(self) -> list[str]:
        """Returns all names, sorted."""
        return sorted(self._things)

    def __contains__(self, name: str) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._things)
