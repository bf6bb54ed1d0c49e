"""The parser of `fit` and its like: errors in one line, with close names."""

import re
from collections.abc import Iterable
from typing import Any

from pytorch_lightning.cli import LightningArgumentParser

from vision_attn.errors import UsageError
from vision_attn.registry import close_names, unknown


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
