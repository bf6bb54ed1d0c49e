"""What a person asks for: methods and their options, classes, photos. Checked before anything runs."""

import glob
import inspect
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vision_attn.attribution import METHODS
from vision_attn.attribution.base import default_method, unknown_option
from vision_attn.data.reading import find_images
from vision_attn.errors import UsageError
from vision_attn.registry import unknown

PREDICTED = "predicted"
"""The target that stands for each photo's predicted class."""

Target = str | int | None


def several(names: str | Sequence[str]) -> tuple[str, ...]:
    """Returns names, each once, from a sequence or from a text with commas."""
    listed = names.split(",") if isinstance(names, str) else list(names)
    return tuple(dict.fromkeys(name.strip() for name in listed))


def chosen_methods(method: str | Sequence[str] | None, model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the methods that are asked for; where none is, of the model's default."""
    return (default_method(model),) if method is None else several(method)


def find_targets(target: Target | Sequence[Target], classes: Sequence[str]) -> tuple[int | None, ...]:
    """Returns the indices of the classes that are asked for, each once; None stands for the predicted class.

    Raises:
        UsageError: there is no such class; close names are offered.
    """
    if target is None:
        return (None,)
    if isinstance(target, (str, int)):
        # The name of a class may have commas of its own.
        target = [target] if isinstance(target, int) or target in classes else _listed(target, classes)
    if not target:
        raise UsageError("expected at least one target, got none: leave it out for the predicted class")
    found = [
        None if one is None or (one == PREDICTED and PREDICTED not in classes) else find_class(one, classes)
        for one in target
    ]
    return tuple(dict.fromkeys(found))


def _listed(text: str, classes: Sequence[str]) -> list[str]:
    """Returns what a text with commas names; parts that together are one class stay together, as many as can be."""
    parts, names = text.split(","), []
    while parts:
        taken = next((n for n in range(len(parts), 1, -1) if ",".join(parts[:n]).strip() in classes), 1)
        names.append(",".join(parts[:taken]).strip())
        parts = parts[taken:]
    return names


def find_class(target: str | int, classes: Sequence[str]) -> int:
    """Returns the index of a class given by name or by index.

    Raises:
        UsageError: there is no such class; close names are offered.
    """
    if not classes:
        raise UsageError(f"expected a model with classes for the target {target!r}, got one without: leave it out")
    if str(target) in classes:
        return list(classes).index(str(target))
    if str(target).removeprefix("-").isdecimal():
        if 0 <= int(target) < len(classes):
            return int(target)
        raise UsageError(f"expected a class index from 0 to {len(classes) - 1}, got {target}: or give the class's name")
    raise unknown("class", str(target), classes)


def check_classes(methods: Iterable[str], classes: Sequence[str]) -> None:
    """Raises a `UsageError` where a method asks for a class and the model has none."""
    specific = [name for name in methods if METHODS.info(name)["class_specific"]]
    if specific and not classes:
        others = ", ".join(name for name in METHODS.names() if not METHODS.info(name)["class_specific"])
        raise UsageError(
            f"expected a model with a classifier for {', '.join(specific)}, got one without: these methods ask for no "
            f"class: {others}"
        )


def find_photos(photos: Sequence[str | Path]) -> dict[Path, Path]:
    """Returns the photos that files, folders and patterns (`*.jpg`, `**/*.png`) name, each with the folder it is under.

    Raises:
        UsageError: a path does not exist, or a pattern or everything together names no photo.
    """
    roots: dict[Path, Path] = {}
    if not photos:
        raise UsageError("expected at least one photo, folder or pattern, got none")
    for given in photos:
        path = Path(given)
        if not os.path.lexists(path) and any(letter in str(given) for letter in "*?["):
            found = _matches(str(given))
            start = _fixed_part(path)
        else:
            found, start = [path], path if path.is_dir() else path.parent
        for photo in find_images(found):
            roots.setdefault(photo, start)
    return roots


def _matches(pattern: str) -> list[Path]:
    found = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    photos = [path for path in found if path.is_dir() or path.is_file()]
    if not photos:
        raise UsageError(f"expected photos that match {pattern!r}, got none: check the pattern")
    return photos


def _fixed_part(pattern: Path) -> Path:
    """Returns the folder of a pattern: all before the first part that is a pattern."""
    return Path(*_until_pattern(pattern.parts))


def _until_pattern(parts: Sequence[str]) -> Iterator[str]:
    for part in parts[:-1]:
        if any(letter in part for letter in "*?["):
            return
        yield part


def method_options(methods: Sequence[str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the options of each method.

    Args:
        methods: Registered names.
        given: Options by name: "head_fusion" goes to every method that has it, "raw.layer" to one, before the other.

    Raises:
        UsageError: a method or an option is unknown, or an option is one that none of the methods has.
    """
    if not methods:
        raise UsageError("expected at least one method, got none: rollout is usual")
    takes = {method: _options_of(METHODS.get(method)) for method in methods}
    chosen: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for name in sorted(given, key=lambda name: "." in name):
        method, dot, option = name.rpartition(".")
        if dot and method not in takes:
            raise unknown(f"method before the option {option!r}", method, takes)
        asked = [method] if dot else [method for method in methods if option in takes[method]]
        if not asked or any(option not in takes[method] and not _takes_any(METHODS.get(method)) for method in asked):
            known = sorted({option for method in asked or methods for option in takes[method]})
            raise unknown_option(" and ".join(asked or methods), option, known)
        for method in asked:
            chosen[method][option] = given[name]
    return chosen


def takes_option(method: str, option: str) -> bool:
    """Returns whether a method has an option of this name."""
    return option in _options_of(METHODS.get(method))


def _options_of(function: Any) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("layout", "geometry")}


def _takes_any(function: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def describe_methods() -> str:
    """Returns every method with what it needs, its first line, and its options with types, defaults and meanings."""
    lines = []
    for name in METHODS.names():
        function, info = METHODS.get(name), METHODS.info(name)
        text = inspect.getdoc(function) or ""
        about = "for a class" if info.get("class_specific") else "the same for every class"
        needs = info.get("needs", "nothing")
        needs = "any model" if needs == "nothing" else f"needs {needs}"
        lines += [f"{name} ({about}; {needs})", *_indented(_first_paragraph(text), 4)]
        explained = _argument_lines(text)
        for option, parameter in _options_of(function).items():
            default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
            lines.append(f"    --option {name}.{option}{default}  ({_type_name(parameter)})")
            if option in explained:
                lines += _indented(explained[option], 8)
        lines.append("")
    return "\n".join(lines).rstrip()


def _indented(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=" " * width, subsequent_indent=" " * width)


def _type_name(parameter: inspect.Parameter) -> str:
    kind = parameter.annotation
    if kind is parameter.empty:
        return "any"
    text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    return re.sub(r"\b(typing|collections\.abc|torch|pathlib)\.", "", text)


def _first_paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _argument_lines(text: str) -> dict[str, str]:
    """Returns what stands about each argument under `Args:` of a docstring in Google's style, each in one line."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
    if not section:
        return {}
    found = re.findall(r"^ {4}\*{0,2}(\w+)(?: \([^)]*\))?: (.*(?:\n {5,}.*)*)", section.group(1), re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in found}
