"""JSON that every reader takes: what is not a finite number is null."""

from __future__ import annotations

import json
import math
from typing import Any


def strict_json(result: Any) -> str:
    """Indented text of plain values; what JSON has no word for is told as text, NaN as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(result), indent=1, allow_nan=False, default=str)
