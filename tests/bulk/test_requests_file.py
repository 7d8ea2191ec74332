"""Files of requests: what they may say, and which line is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpd_export.bulk.requests_file import read_requests
from lpd_export.errors import UserError


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    return path


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    lines = (
        '{"class": "red panda", "seed": 7, "index": 3, "count": 2, "cfg": 1.5, "top_p": 0.5}\n\n'
        '{"class": "1", "guidance": "constant", "temperature": 2, "top_k": 5}'
    )
    rows = (
        "\ufeffclass,seed,index,count,cfg,top_p,guidance,temperature,top_k\r\n"
        '"red panda",7,3,2,1.5,0.5,,,\r\n'
        "1,,,,,, constant ,2,5\r\n"
    )
    expected = [
        {"class_": "red panda", "seed": 7, "index": 3, "count": 2, "cfg": 1.5, "top_p": 0.5},
        {"class_": "1", "guidance": "constant", "temperature": 2.0, "top_k": 5},
    ]
    for path in (write(tmp_path, "a.jsonl", lines), write(tmp_path, "a.csv", rows)):
        first, second = read_requests(path)
        assert [first.line, second.line] == expected
        assert (first.where, first.edit) == (f"{path}, line {1 + (path.suffix == '.csv')}", None)
    (asked,) = read_requests(write(tmp_path, "b.jsonl", '{"class": null}'))
    assert asked.line == {"class_": None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "a.txt must be named .jsonl or .csv: that says how it is read"),
        ("a.jsonl", "\n \n", "a.jsonl has no requests: a line for each, such as"),
        ("a.csv", "class,seed\n", "a.csv has no requests"),
        ("a.jsonl", '{"class": 0}\n{"cgf": 1}', "a.jsonl, line 2: there is no key 'cgf': did you"),
        ("a.jsonl", '{"zork": 1}', "line 1: there is no key 'zork': the keys are class, count, se"),
        ("a.jsonl", '\n\n{"seed": 1}', "a.jsonl, line 3: it names no class: give one, or none"),
        ("a.jsonl", '{"class": true}', "line 1: class must be a name or a number, but it is True"),
        ("a.jsonl", '{"class": 0, "seed": "1"}', "line 1: seed must be a whole number from 0 to"),
        ("a.jsonl", '{"class": 0, "cfg": NaN}', "cfg must be a number from 0 to 1000, but it is n"),
        ("a.jsonl", '{"class": 0, "count": 0}', "count must be a whole number from 1 to 2147483"),
        ("a.jsonl", '{"class": 0, "top_p": 2}', "top_p must be a number above 0 and at most 1, bu"),
        ("a.jsonl", '{"class": 0, "mask": "a.png"}', "line 1: mask is of an edit: say of which im"),
        ("a.jsonl", '{"image": "a.png", "box": [0, 0, 4]}', "box must be 4 whole numbers, but"),
        ("a.jsonl", '{"image": "a.png", "fit": "cut"}', "fit must be crop or pad or stretch, but"),
        ("a.jsonl", '{"image": "a.jsonl"}', "a.jsonl has many images: say which, as in"),
        ("a.csv", 'image,box\na.png,"0,0,4,x"\n', "box must be 4 whole numbers, but it is 'x'"),
        ("a.jsonl", '{"class": 0,', 'line 1: not a JSON object such as {"class": 207}: Invalid'),
        ("a.jsonl", "[" * 100_000, "line 1: not a JSON object such as"),
        ("a.jsonl", "[]", 'line 1: not a JSON object such as {"class": 207}: Input should be an'),
        ("a.jsonl", "\udcff", "a.jsonl is not UTF-8 text: see its byte 0"),
        ("a.csv", "class,cgf\n0,1\n", "a.csv, line 1: there is no key 'cgf': did you mean cfg?"),
        ("a.csv", "class\n0\n0,1\n", "a.csv, line 3: it has more cells than the first line names"),
        ("a.csv", "class,cfg\n0,\n,2\n", "a.csv, line 3: it names no class"),
        ("a.csv", "class,count\n0,1.5\n", "a.csv, line 2: count must be a whole number from 1 to"),
        ("a.csv", "class\n" + "a" * 200_000, "not CSV: field larger than field limit"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(UserError) as told:
        read_requests(write(tmp_path, name, content))
    assert message in str(told.value)
    assert len(str(told.value)) < 400


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the requests .*gone.csv: No such file"):
        read_requests(tmp_path / "gone.csv")
