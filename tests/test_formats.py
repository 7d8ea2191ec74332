"""Nobody but `formats.py` compares the name of a precision or a backend: all else asks its row.

Read from the sources. A name may be handed on, printed and be a default; it may not decide. A table
with a row for every precision is no comparison, and of packages `onnxruntime` is but one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lpd_export.formats import BACKENDS, PRECISIONS

ROOT = Path(__file__).parents[1]
NAMES = {*PRECISIONS, *BACKENDS}
ROWS = {"FLOAT32", "FLOAT16", "BFLOAT16", "ONNXRUNTIME", "TENSORRT", "TENSORRT_RTX"}
TESTS_OF_TEXT = {"startswith", "endswith", "removeprefix", "removesuffix", "count", "find", "index"}
MODULES = sorted(
    path
    for folder in ("lpd_export", "scripts")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "lpd_export" / "formats.py"
)


def names_in(node: ast.AST) -> Iterator[str]:
    """The names that an expression holds: as a text, in a collection, or as a row's `.name`."""
    match node:
        case ast.Constant(value=str(text)) if text in NAMES:
            yield text
        case ast.Attribute(value=ast.Name(id=row), attr="name") if row in ROWS:
            yield f"{row}.name"
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            for element in elements:
                yield from names_in(element)


def decisions(source: str) -> list[tuple[int, str]]:
    """The line and name of each place where a name decides."""
    found = []
    for node in ast.walk(ast.parse(source)):
        held: list[ast.AST | None] = []
        match node:
            case ast.Compare():
                held = [node.left, *node.comparators]
            case ast.Dict():
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                if keys != set(PRECISIONS) and "torch" not in keys:
                    held = list(node.keys)
            case ast.MatchValue():
                held = [node.value]
            case ast.Subscript():
                held = [node.slice]
            case ast.Call(func=ast.Attribute(attr=method)) if method in {*TESTS_OF_TEXT, "get"}:
                held = list(node.args[:1])
            case ast.Call(func=ast.Name(id="dict")):
                found += [(node.lineno, k.arg) for k in node.keywords if k.arg in NAMES]
        found += [(node.lineno, name) for part in held if part for name in names_in(part)]
    return found


OTHERS = {
    "lpd_export/bench/devices.py": ["int8"],  # the type of a product, beside float32
    "lpd_export/bench/terminal.py": ["onnxruntime"],  # the version of the package
}
"""Names that are a format's by chance."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_name_of_a_format_decides(path: Path) -> None:
    found = decisions(path.read_text())
    others = OTHERS.get(path.relative_to(ROOT).as_posix(), [])
    assert [name for _, name in found] == others, found


@pytest.mark.parametrize(
    "source",
    [
        'precision == "int8"',
        '"fp16" != precision',
        'backend in ("tensorrt", "tensorrt-rtx")',
        "backend == TENSORRT_RTX.name",
        '{"fp16": 1}[precision]',
        "dict(int8=1)",
        'precision.startswith("int8")',
        'rows["bf16"]',
        'rows.get("bf16")',
        'match precision:\n    case "fp32": pass',
        'match precision:\n    case "fp32" | "fp16": pass',
    ],
)
def test_a_name_that_decides_is_found(source: str) -> None:
    assert decisions(source)


@pytest.mark.parametrize("source", ['precision = "fp32"', 'build(precision="int8")', "row == INT8"])
def test_a_name_that_is_handed_on_is_not(source: str) -> None:
    assert not decisions(source)
