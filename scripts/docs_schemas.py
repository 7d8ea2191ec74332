"""A hook of mkdocs: writes the JSON schema of a class where a page asks for it.

A page asks by a line `<!-- schema: module.Class -->`, of a class that pydantic checks. So what the
pages say of a file's format is what the code checks.
"""

from __future__ import annotations

import importlib
import json
import re
from typing import Any

from pydantic import TypeAdapter


def schema(model: str) -> str:
    """The JSON schema of the class of this dotted name, as a fenced block."""
    module, _, name = model.rpartition(".")
    found = TypeAdapter(getattr(importlib.import_module(module), name)).json_schema()
    return f"```json\n{json.dumps(found, indent=2)}\n```"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page."""
    return re.sub(r"^<!-- schema: ([\w.]+) -->$", lambda m: schema(m[1]), markdown, flags=re.M)
