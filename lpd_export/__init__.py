"""lpd-export: LPD image generators as ONNX graphs and engines, and a runtime that drives them.

from lpd_export import Pipeline

images = Pipeline.open("engines/demo").generate(["heart", "clock"], seed=0)
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lpd_export.errors import UserError

if TYPE_CHECKING:
    from lpd_export.runtime.pipeline import Pipeline

__all__ = ["Pipeline", "UserError"]
__version__ = version("lpd-export")


def __getattr__(name: str) -> Any:
    # Loaded when asked for: it brings torch, which `lpd-export --help` should not wait for.
    if name == "Pipeline":
        from lpd_export.runtime.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
