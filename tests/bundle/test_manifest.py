"""Manifests: whatever is written in one, a command answers with a result or a sentence."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from commandline import answer, sentence
from lpd_export.bundle.manifest import CHECKSUM, FORMAT_VERSION, MANIFEST, Bundle, checksum
from lpd_export.errors import UserError

WRONG: tuple[Any, ...] = (
    None,
    -1,
    3,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    "x",
    "../x",
    "\0",
    "\ud800",
    [1],
    {},
    {"x": {}},
)
Keys = tuple[str | int, ...]


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


def entries_of(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The keys that lead to every entry of a manifest; of a list to the first one alone."""
    if isinstance(value, dict):
        children = list(value.items())
    else:
        children = list(enumerate(value[:1])) if isinstance(value, list) else []
    for key, child in children:
        yield (*keys, key)
        yield from entries_of(child, (*keys, key))


def sign(bundle: Path, values: dict[str, Any]) -> None:
    """Writes a manifest whose checksum is right."""
    (bundle / MANIFEST).write_text(json.dumps({CHECKSUM: checksum(values)} | values))


def changed(values: dict[str, Any], keys: Keys, change: Callable[[Any, Any], None]) -> Any:
    """A copy in which `change(parent, key)` was called on an entry."""
    values = copy.deepcopy(values)
    parent: Any = values
    for key in keys[:-1]:
        parent = parent[key]
    change(parent, keys[-1])
    return values


def mutations(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every entry replaced by every wrong value, taken out, and one added beside it."""

    def put(value: Any) -> Callable[[Any, Any], None]:
        return lambda parent, key: parent.__setitem__(key, value)

    def rename(parent: Any, key: Any) -> None:
        if isinstance(parent, dict):
            parent[f"../{key}"] = parent.pop(key)
        else:
            parent.append(parent[key])

    for keys in entries_of(values):
        for value in WRONG:
            yield changed(values, keys, put(value))
        yield changed(values, keys, lambda parent, key: parent.pop(key))
        yield changed(values, keys, rename)


def read(bundle: Path) -> dict[str, Any]:
    values = json.loads((bundle / MANIFEST).read_text())
    del values[CHECKSUM]
    return values


def test_every_mutated_manifest_gives_a_result_or_a_sentence(bundle: Path, tmp_path: Path) -> None:
    refused = 0
    for number, values in enumerate(mutations(read(bundle))):
        sign(bundle, values)
        said = answer("inspect", bundle)
        if said.code != 0:
            sentence(said)
            refused += 1
            continue
        for images in tmp_path.glob("images*"):
            shutil.rmtree(images)
        said = answer("run", bundle, "--class", "0", "--out", tmp_path / f"images{number}")
        if said.code != 0:
            sentence(said)
    assert refused > 700


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("model", "depth"), "two", "'model.depth': Input should be a valid integer"),
        (("cfg",), -1, "'cfg': Input should be greater than or equal to 0"),
        (("phases", 1, "queries"), None, "'phases.1.queries': Input should be a valid integer"),
        (("resolution",), 17, "it is not so that resolution is model.grid times tokenizer.stride"),
        (("made", "checkpoint", "sha256"), "x", "'made.checkpoint.sha256': String should match"),
        (("class_names", 2), [], "'class_names.2': List should have at least 1 item"),
        (("more",), 1, "'more': Unexpected keyword argument"),
    ],
)
def test_the_sentence_names_the_entry(bundle: Path, keys: Keys, value: Any, told: str) -> None:
    sign(bundle, changed(read(bundle), keys, lambda parent, key: parent.__setitem__(key, value)))
    said = sentence(answer("inspect", bundle))
    assert said.startswith(f"{bundle / MANIFEST} is no manifest of bundle format {FORMAT_VERSION}")
    assert told in said
    assert said.endswith("build the bundle again")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "onnx/../../x", "onnx//x", "C:x"])
def test_a_file_outside_the_bundle(bundle: Path, name: str) -> None:
    values = read(bundle)
    values["files"][name] = values["files"]["schedule.npz"]
    sign(bundle, values)
    with pytest.raises(UserError, match="must be a path inside the bundle"):
        Bundle.open(bundle)
