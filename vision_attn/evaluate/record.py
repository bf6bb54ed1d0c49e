"""What was measured, photo by photo, in a folder: a line each as soon as it is done, so that a stopped run goes on."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vision_attn.errors import UsageError
from vision_attn.evaluate.judged import Judged, Sanity
from vision_attn.files import is_taken, remove_parts, write_whole
from vision_attn.look.folder import check_settings

SETTINGS_FILE, PHOTOS_FILE, SANITY_FILE = "settings.json", "photos.jsonl", "sanity.json"


class Record:
    """A folder of an evaluation, begun or gone on with.

    Args:
        out: A new folder, or one that an evaluation with the same settings began.
        settings: All that the numbers depend on, as JSON gives it back.

    Raises:
        UsageError: the folder is something else's, or was begun with other settings.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out = out
        self.photos: dict[str, Judged] = {}
        self.fractions: list[float] = []
        if is_taken(out):
            check_settings(out, settings, what="the evaluation")
            remove_parts(out)
            self._read()
        else:
            write_whole(out / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")

    def _read(self) -> None:
        path = self.out / PHOTOS_FILE
        content = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = content[: content.rfind("\n") + 1]  # the last line may have been cut by the end of the process
        try:
            for line in whole.splitlines():
                values = json.loads(line)
                self.fractions = values.pop("fractions")
                judged = judged_from_dict(values)
                self.photos[judged.name] = judged
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"expected a line for each photo in {path}, got one that is damaged ({error}): choose another --out"
            ) from error
        if whole != content:
            write_whole(path, whole)

    def enter(self, judged: Sequence[Judged], fractions: Sequence[float]) -> None:
        """Enters photos that are done."""
        self.fractions = list(fractions)
        lines = [json.dumps({**judged_to_dict(one), "fractions": self.fractions}, allow_nan=False) for one in judged]
        with (self.out / PHOTOS_FILE).open("a", encoding="utf-8", newline="") as file:
            file.write("".join(f"{line}\n" for line in lines))
        self.photos.update({one.name: one for one in judged})

    def sanity(self) -> Sanity | None:
        """Returns what `keep_sanity` wrote; None where it did not."""
        path = self.out / SANITY_FILE
        return Sanity(**_nan_for_null(json.loads(path.read_text(encoding="utf-8")))) if path.is_file() else None

    def keep_sanity(self, sanity: Sanity) -> None:
        """Writes what randomised weights and noise did."""
        write_whole(self.out / SANITY_FILE, json.dumps(_null_for_nan(vars(sanity)), indent=2) + "\n")


def judged_to_dict(one: Judged) -> dict[str, Any]:
    """Returns what JSON can hold; `judged_from_dict` reads it back."""
    values = dict(vars(one))
    values["classes"] = [[key, scores] for key, scores in one.classes.items()]
    values["agreement"] = [[*pair, value] for pair, value in one.agreement.items()]
    return _null_for_nan(values)


def judged_from_dict(values: Mapping[str, Any]) -> Judged:
    """Returns what `judged_to_dict` was given."""
    values = {**_nan_for_null({key: value for key, value in values.items() if key not in _NULLABLE}), **_taken(values)}
    return Judged(
        **{
            **values,
            "classes": {key: _nan_for_null(scores) for key, scores in values["classes"]},
            "agreement": {(first, second): value for first, second, value in values["agreement"]},
        }
    )


# Here null is none, not a number that there is not; a class key may be null, too.
_NULLABLE = ("object_in_place", "object_effect", "classes")


def _taken(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in _NULLABLE}


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _null_for_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nan_for_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nan_for_null(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_nan_for_null(part) for part in value]
    return math.nan if value is None else value
