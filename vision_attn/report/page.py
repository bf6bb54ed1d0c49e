"""The page: data and blobs put into the HTML, CSS and JavaScript files of `template/`."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from vision_attn.report.packing import Blobs

SCRIPTS = ("data", "draw", "gallery", "explorer", "blocks", "trust", "run", "main")
"""Files of `template/js`, in the order in which they run."""


def write_page(data: Mapping[str, Any], blobs: Blobs) -> str:
    """Returns the whole page.

    Nothing in it asks for another file: the page's own policy forbids it, and forbids every script but its own. Names
    come in as JSON, in which no `<` stands, and are shown as text.
    """
    template = files("vision_attn.report") / "template"
    style = (template / "report.css").read_text(encoding="utf-8")
    script = "\n".join((template / "js" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n{script}'
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": html.escape(policy),
        "title": html.escape(str(data["title"])),
        "style": style,
        "data": json_for_script(data),
        "blobs": "\n".join(
            f'<script type="text/plain" id="blob-{number}"{" data-deflated" if deflated else ""}>{text}</script>'
            for number, (text, deflated) in enumerate(zip(blobs.texts, blobs.deflated, strict=True))
        ),
        "script": script,
    }
    page = (template / "report.html").read_text(encoding="utf-8")
    pieces = []
    for piece in page.split("{{"):
        name, closed, rest = piece.partition("}}")
        pieces.append(parts[name.strip()] + rest if closed else piece)
    return "".join(pieces)


def json_for_script(data: Any) -> str:
    """Returns JSON that can stand in a script element: nothing in it ends the element or begins another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
