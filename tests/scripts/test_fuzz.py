"""scripts/fuzz.py: every parser answers with a result or a sentence, what was found included."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import DATA, Answers, Target, run_hypothesis, targets

NAMES = (
    "checkpoint legacy",
    "checkpoint pickle",
    "checkpoint pth",
    "checkpoint safetensors",
    "class names",
    "graph",
    "image",
    "images arr_0.npy",
    "images arr_1.npy",
    "images npz",
    "kept layers",
    "manifest",
    "mask",
    "recipe",
    "record",
    "requests csv",
    "requests jsonl",
    "schedule json",
    "schedule meta.npy",
    "schedule npz",
    "schedule orders.npy",
    "statistics count.npy",
    "statistics features_sha256.npy",
    "statistics mu.npy",
    "statistics npz",
    "statistics sigma.npy",
    "token ids",
)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("whole"))


def test_every_parser_is_there(known: dict[str, Target]) -> None:
    assert sorted(known) == sorted(NAMES)
    assert {folder.name for folder in DATA.iterdir()} - {"whole"} <= {
        name.replace(" ", "-") for name in NAMES
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_results_or_sentences(
    known: dict[str, Target], name: str, tmp_path: Path
) -> None:
    target, found = known[name], tmp_path / "found"
    for content in target.seeds:  # whole files are read: what is damaged is beyond the first check
        path = tmp_path / target.file
        path.write_bytes(target.wrap(content))
        target.parse(path)
    answers = Answers(target, tmp_path, found)
    for path in sorted((DATA / name.replace(" ", "-")).glob("*")):
        assert answers.ask(path.read_bytes()) == "", path
    run_hypothesis(answers, inputs=40, seed=0)
    assert not answers.known
    assert not found.exists()


def test_what_is_found_is_told_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def parse(path: Path) -> None:
        if path.read_bytes().startswith(b"x"):
            raise KeyError("x")

    answers = Answers(Target("a", parse, [b"seed"]), tmp_path, tmp_path / "found", inputs=3)
    assert answers.ask(b"seed") == ""
    assert answers.ask(b"x1") == answers.ask(b"x2") == "KeyError in parse of test_fuzz.py"
    assert [path.read_bytes() for path in (tmp_path / "found").iterdir()] == [b"x1"]
    said = capfd.readouterr().err
    assert re.fullmatch(r"FOUND: KeyError in parse of test_fuzz.py\nSECONDS: 0.\d\d\n", said)


@pytest.mark.slow
def test_a_run_of_the_script(tmp_path: Path) -> None:
    script = Path(sys.modules["fuzz"].__file__ or "")
    done = subprocess.run(
        [
            *(sys.executable, script, "--inputs", "400", "--target", "recipe"),
            *("--found", tmp_path / "found"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    row = [cell.strip() for cell in done.stdout.splitlines()[2].strip("|").split("|")]
    assert row[0] == "recipe"
    assert int(row[4]) > int(row[3]) > 50  # it finds branches that the whole file does not reach
    assert row[-1] == "-"
    assert not (tmp_path / "found").exists()
