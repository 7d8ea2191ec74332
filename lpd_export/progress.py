"""What long work calls to say how far it is.

Knows neither the work nor where it is shown.
"""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str], None]
"""Called with a line at the start of each stage, and with what was found on the way."""
Progress = Callable[[str, int, int], None]
"""Called with a stage of an engine's build in TensorRT's words, the steps done and in all."""
