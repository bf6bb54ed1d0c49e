"""For the site: our docstrings head what is to be tried with `Example:`; griffe takes `Examples:` alone as code."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Reads `Example:` as griffe's section of examples, so that doctests are set as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Changes the heading where griffe has read a docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
