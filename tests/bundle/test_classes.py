"""Class names: the ids and names that a user may give, and the answer to those that are wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpd_export.bundle.classes import (
    display_name,
    imagenet_names,
    read_names,
    resolve_class,
    resolve_classes,
)
from lpd_export.errors import UserError

NAMES = [["red panda", "firefox"], ["ice-cream"], ["crane"], ["Crane", "bird"], ["monkey_face"]]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (0, 0),
        (np.int64(4), 4),
        ("3", 3),
        (" 3 ", 3),
        ("+3", 3),
        ("red panda", 0),
        ("Red-Panda", 0),
        ("  RED__panda ", 0),
        ("firefox", 0),
        ("ice cream", 1),
        ("monkey-face", 4),
        ("bird", 3),
        (None, None),
        ("none", None),
        ("None", None),
    ],
)
def test_ways_to_name_a_class(text: Any, label: int | None) -> None:
    assert resolve_class(text, NAMES, 5) == label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (5, "there is no class 5: the classes are 0 to 4"),
        ("5", "there is no class 5: the classes are 0 to 4"),
        (-1, "there is no class -1: the classes are 0 to 4"),
        ("-1", "there is no class -1: the classes are 0 to 4"),
        ("9" * 5000, "there is no class '999"),
        ("1.5", "there is no class '1.5'"),
        ("read panda", "no class 'read panda'; did you mean 'red panda' (0)"),
        ("monkey face mask", "did you mean 'monkey_face' (4)"),
        ("big old tame bird", "did you mean 'bird' (3)"),
        ("xqzzy", "no class 'xqzzy': it has 5, listed by `lpd-export inspect BUNDLE --classes`"),
        ("", "there is no class ''"),
        ("CRANE", "'CRANE' is the name of several classes: give the number, 2 (crane) or 3 (Crane"),
    ],
)
def test_names_of_no_class(text: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        resolve_class(text, NAMES, 5)
    assert message in str(raised.value)


def test_a_main_name_goes_before_another_class_synonym() -> None:
    assert resolve_class("jay", [["bird", "jay"], ["Jay"]], 2) == 1


def test_a_class_that_is_called_none_or_all() -> None:
    names = [["all"], ["none"]]
    assert resolve_classes(["none", "all"], names, 2) == [1, 0]


def test_a_name_typed_where_the_locale_is_not_utf8() -> None:
    typed = "café".encode().decode("ascii", errors="surrogateescape")
    assert resolve_class(typed, [["tea"], ["café"]], 2) == 1
    with pytest.raises(UserError, match="there is no class"):
        resolve_class("\ud800", [["tea"]], 1)


def test_a_model_without_names() -> None:
    assert resolve_classes(["1", "none", 0], [], 2) == [1, None, 0]
    with pytest.raises(UserError, match="classes have no names, give a number from 0 to 1"):
        resolve_class("cat", [], 2)
    assert display_name([], 1) == "class 1"


def test_all_is_every_class_wherever_it_stands() -> None:
    assert resolve_classes(["ALL"], NAMES, 5) == [0, 1, 2, 3, 4]
    assert resolve_classes(["none", "all", "bird"], NAMES, 5) == [None, 0, 1, 2, 3, 4, 3]
    assert resolve_classes([], NAMES, 5) == []


def test_what_is_written_under_an_image() -> None:
    assert display_name(NAMES, 0) == "red panda"
    assert display_name(NAMES, None) == display_name([], None) == "none"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("tench", 0),
        ("Tinca tinca", 0),
        ("golden retriever", 207),
        ("red panda", 387),
        ("giant-panda", 388),
        ("construction crane", 517),
        ("crane bird", 134),
        ("999", 999),
    ],
)
def test_imagenet_names(text: str, label: int) -> None:
    assert resolve_class(text, imagenet_names(), 1000) == label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crane", r"give the number, 134 \(.*\) or 517 \(construction crane, crane\)$"),
        ("panda", r"give the number, 387 \(red panda, .*\) or 388 \(giant panda, panda\)$"),
        ("missile", r"give the number, 657 \(missile\) or 744"),
        ("golden retreiver", r"did you mean 'Golden Retriever' \(207\)"),
        ("1000", r"there is no class 1000: the classes are 0 to 999"),
    ],
)
def test_what_imagenet_names_leave_open(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_class(text, imagenet_names(), 1000)


def test_every_imagenet_class_can_be_named() -> None:
    names = imagenet_names()
    assert len(names) == 1000
    assert all(entry and all(entry) for entry in names)
    unnamed = []
    for label, entry in enumerate(names):
        for name in entry:
            try:
                if resolve_class(name, names, 1000) == label:
                    break
            except UserError:
                continue
        else:
            unnamed.append(label)
    assert unnamed == [657]  # "missile" alone, and 744 is called that too


def test_names_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps([["a", "b"], "ç"]), encoding="utf-8")
    assert read_names(path, 2) == [["a", "b"], ["ç"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'["a", "b"', "are not JSON"),
        (b"\xff\xfe", "are not JSON"),
        (b"[" * 100_000, "are not JSON"),
        (b'{"a": 0, "b": 1}', "are not a JSON list of names"),
        (b'["a", 7]', "are not a JSON list of names"),
        (b'["a", ""]', "have no name for class 1"),
        (b'["a", []]', "have no name for class 1"),
        (b'["a", ["b", null]]', "have no name for class 1"),
        (b'["a", "b", "c"]', "are for 3 classes, the model has 2"),
    ],
)
def test_files_that_are_no_names(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "classes.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^the class names {path} {message}"):
        read_names(path, 2)


def test_a_file_of_names_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the class names .*: No such file"):
        read_names(tmp_path / "gone.json", 2)
