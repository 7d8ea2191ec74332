"""The command line: help, JSON, exit codes, and the one line that answers a mistake."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lpd_export.cli.main
from commandline import COMMAND, answer, end, entries, mistake, sentence, start
from lpd_export.bundle.manifest import Bundle
from lpd_export.cli.exit_codes import EXIT_FAULT, EXIT_MISTAKE, EXIT_READER_GONE
from lpd_export.schedule.schedule_file import Schedule

COMMANDS = (["build"], ["run"], ["verify"], ["schedule", "make"], ["schedule", "check"])
COMMANDS += (["schedule", "show"], ["inspect"], ["doctor"], ["bench"], ["edit"])
COMMANDS += (["merge"], ["evaluate"], ["serve"], ["triton"])


def printed(*arguments: object) -> Any:
    """What `--json` prints, in a process of its own: nothing else may be on standard output."""
    said = end(start(*arguments, "--json"))
    assert said.code == 0, said
    assert "Traceback" not in said.err
    return json.loads(said.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


# ------------------------------------------------------------------------------------- the shape


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_has_an_example(command: list[str], option: str) -> None:
    said = answer(*command, option)
    assert said.code == 0
    assert said.err == ""
    assert f"\n    lpd-export {' '.join(command)}" in said.out
    assert "Example" in said.out
    assert "--json" in said.out


def test_every_command_is_tested() -> None:
    assert {command[0] for command in COMMANDS} == set(lpd_export.cli.main.COMMANDS)


@pytest.mark.parametrize("group", [[], ["schedule"]])
def test_a_group_alone_gives_its_help(group: list[str]) -> None:
    said = answer(*group)
    assert said.code == 2
    assert said.out == ""
    assert said.err.strip() == answer(*group, "--help").out.strip()
    assert "Example" in said.err


def test_help_in_its_own_process_is_quick_and_loads_no_torch() -> None:
    program = "import sys; from lpd_export.cli.main import main\ntry: main(['build', '--help'])\n"
    program += "except SystemExit: pass\nassert not {'torch', 'onnx', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


SLIPS = {
    "run gone --class 0 --out a": "there is no bundle gone",
    "run SMALL --class xqzzy --out a": "there is no class 'xqzzy'",
    "run SMALL --class 0 --out .": "exists and is not empty",
    "run SMALL --class 0 --out a --seed -1": "--seed must be",
    "build gone.toml": "there is no recipe gone.toml",
    "verify gone": "there is no bundle gone",
    "verify SMALL --against gone": "there is no bundle gone",
    "verify SMALL --bisect": "build one with --precision int8",
    "verify SMALL --threshold psnr=a": "--threshold psnr=a",
}
TOLD_EARLY = """
import sys; from lpd_export.cli.main import main
for line in sys.stdin:
    try: main(line.split())
    except SystemExit as end: print(end.code)
    print('torch' in sys.modules)
"""


def test_mistakes_are_told_before_torch_is_loaded(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    lines = "\n".join(SLIPS).replace("SMALL", str(small_bundle))
    said = subprocess.run(
        [sys.executable, "-c", TOLD_EARLY],
        cwd=tmp_path,
        input=lines,
        capture_output=True,
        text=True,
    )
    assert said.stdout.split() == ["2", "False"] * len(SLIPS), said
    for told, message in zip(said.stderr.splitlines(), SLIPS.values(), strict=True):
        assert message in told


def test_version() -> None:
    assert answer("--version").out == f"lpd-export, version {lpd_export.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bild", "No such command 'bild'. Did you mean 'build'? (see `lpd-export --help`)"),
        ("xqzzy", "No such command 'xqzzy' (see `lpd-export --help`)"),
        ("--jsn", "No such option '--jsn'"),
        ("schedule mak", "(see `lpd-export schedule --help`)"),
        ("build --resolution 256", "No such option '--resolution'"),
        ("build a.toml b.toml", "Got unexpected extra argument (b.toml) (see `lpd-export build"),
        ("run", "Missing argument 'BUNDLE' (see `lpd-export run --help`)"),
        ("run a --out", "Option '--out' requires an argument"),
        ("inspect", "Missing argument 'BUNDLE'"),
        ("inspect a b", "Got unexpected extra argument (b)"),
        ("schedule make --res 256 --steps 20", "Missing option '--out'"),
        ("schedule check", "Missing argument 'FILE'"),
        ("doctor a", "Got unexpected extra argument (a) (see `lpd-export doctor --help`)"),
        (
            "run a --device tpu --out b",
            "'tpu' is not cpu, cuda, or a GPU by its number such as",
        ),
        ("inspect a --batch 0", "--batch must be a whole number from 1 to 2147483647, but it is 0"),
        ("inspect a --batch many", "'many' is not a valid integer"),
    ],
)
def test_words_that_mean_nothing(arguments: str, message: str) -> None:
    assert message in mistake(*arguments.split())


@pytest.mark.parametrize(
    "arguments",
    ["bild", "inspect gone --json", "run gone --class 0 --out a --json", "build --steps 3"],
)
def test_a_mistake_in_a_process_of_its_own(arguments: str, tmp_path: Path) -> None:
    sentence(end(start(*arguments.split(), cwd=tmp_path)))
    assert entries(tmp_path) == []


# ------------------------------------------------------------------------------------------ JSON


def test_json_of_run_and_inspect(small_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    result = printed("run", small_bundle, "--class", "bird", "none", "-n", 2, "--out", out)
    seconds = result.pop("seconds")
    assert seconds > 0
    images = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [len(image.pop("token_ids")) for image in images] == [16] * 4  # in the file alone
    assert result == {
        "out": str(out),
        "made": 4,
        "failed": 0,
        "contact_sheet": str(out / "contact_sheet.png"),
        "tokens": None,
        "traces": None,
        "images": images,
        "notes": [],
    }
    inspected = printed("inspect", small_bundle)
    assert inspected["bundle"] == str(small_bundle)
    # The manifest as it is on disk, but for its checksum.
    on_disk = json.loads((small_bundle / "manifest.json").read_text())
    on_disk.pop("manifest_sha256")
    assert inspected["manifest"] == on_disk


def test_json_of_schedules(tmp_path: Path) -> None:
    file, picture = tmp_path / "a.npz", tmp_path / "a.png"
    made = printed(
        *("schedule", "make", "--res", 64, "--steps", 5, "--kind", "random", "--count", 2),
        *("--seed", 3, "--out", file),
    )
    loaded = Schedule.load(file)
    assert (loaded.grid, loaded.steps, loaded.count, loaded.seed) == (4, 5, 2, 3)
    assert made == printed("schedule", "check", file)
    assert made["file"] == str(file)
    assert (made["kind"], made["grid"], made["steps"], made["orders"]) == ("random", 4, 5, 2)
    assert made["group_sizes"] == loaded.group_sizes.tolist()
    assert printed("schedule", "show", file, "--order", 1, "--out", picture) == {
        "file": str(file),
        "order": 1,
        "out": str(picture),
    }


def test_json_has_no_nan(tmp_path: Path) -> None:
    # A single cell has no neighbours to have statistics of.
    options = ["--res", 16, "--steps", 1, "--count", 1]
    said = answer("schedule", "make", *options, "--out", tmp_path / "a.npz", "--json")
    assert json.loads(said.out)["group_distance"] is None


# ----------------------------------------------------------------------- schedule make/check/show


def test_making_checking_and_showing_a_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = answer("schedule", "make", "--res", 256, "--steps", 20, "--count", 4, "--out", "a.npz")
    assert made.code == 0, made
    assert made.out.startswith("a.npz: 4 locality orders of a 16x16 grid in 20 steps\n")
    assert "group sizes: 1 2 4 5 7 8 10" in made.out
    assert answer("schedule", "check", "a.npz").out == made.out
    assert answer("schedule", "show", "a.npz", "--order", 3, "--out", "a.png").out == "a.png\n"
    with Image.open("a.png") as picture:
        assert picture.format == "PNG"
    orders = Schedule.load("a.npz").orders.tolist()
    Path("theirs.json").write_text(json.dumps(orders))
    foreign = answer("schedule", "check", "theirs.json", "--steps", 20)
    assert foreign.out.startswith("theirs.json: 4 foreign orders of a 16x16 grid in 20 steps\n")
    assert foreign.out.splitlines()[1:] == made.out.splitlines()[1:]


def test_a_schedule_of_another_stride(tmp_path: Path) -> None:
    options = ["--res", 32, "--stride", 2, "--steps", 20, "--count", 1]
    assert answer("schedule", "make", *options, "--out", tmp_path / "a.npz").code == 0
    assert Schedule.load(tmp_path / "a.npz").grid == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("make --res 250 --steps 20 --out b.npz", "--res 250 is not a multiple of the tokenizer's"),
        ("make --res 0 --steps 20 --out b.npz", "--res 0 is not a multiple"),
        ("make --res 256 --stride 0 --steps 20 --out b.npz", "the tokenizer's stride of 0"),
        ("make --res 64 --steps 17 --out b.npz", "17 steps are too many for 16 cells"),
        (
            "make --res 64 --steps 0 --out b.npz",
            "number of steps must be a whole number from 1",
        ),
        (
            "make --res 64 --steps 4 --count 0 --out b.npz",
            "number of orders must be a",
        ),
        ("make --res 64 --steps 4 --repulsion -1 --out b.npz", "the repulsion threshold must be"),
        (
            "make --res 64 --steps 4 --proximity nan --out b.npz",
            "proximity threshold must be a",
        ),
        ("make --res 64 --steps 4 --seed -1 --out b.npz", "the seed must be a whole number from 0"),
        ("make --res 64 --steps 4 --kind spiral --out b.npz", "'spiral' is not one of 'locality'"),
        ("make --res 64 --steps 4 --out a.npz", "a.npz exists: choose another --out, or replace"),
        ("make --res 64 --steps 4 --out gone/b.npz", "cannot write gone/b.npz: No such file"),
        ("make --res 64 --steps 4 --out a.npz/b.npz", "cannot write a.npz/b.npz: Not a directory"),
        ("check gone.npz", "cannot read the schedule gone.npz: No such file"),
        ("check .", "cannot read the schedule .: Is a directory"),
        ("check a.npz --steps 5", "a.npz: this schedule has 4 steps, but --steps 5 was asked for"),
        ("check a.txt", "a.txt: this is neither an .npz schedule nor a complete JSON list"),
        ("show a.npz --out a.txt", "a.txt exists: choose another --out"),
        ("show a.npz --order 2 --out b.png", "order 2"),
        ("show a.npz --order -1 --out b.png", "order -1"),
        ("show gone.npz --out b.png", "cannot read the schedule gone.npz"),
        ("show a.npz --out gone/b.png", "cannot write gone/b.png"),
    ],
)
def test_schedules_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Schedule.make(4, 4, count=2).save("a.npz")
    Path("a.txt").touch()
    assert message in mistake("schedule", *arguments.split())
    assert entries(tmp_path) == ["a.npz", "a.txt"]


def test_force_replaces_a_schedule(tmp_path: Path) -> None:
    file, picture = tmp_path / "a.npz", tmp_path / "a.png"
    file.touch()
    picture.touch()
    options = ["--res", 64, "--steps", 4, "--count", 1]
    assert answer("schedule", "make", *options, "--out", file, "--force").code == 0
    assert answer("schedule", "show", file, "--out", picture, "--force").code == 0
    assert file.stat().st_size > 0
    assert picture.stat().st_size > 0


# --------------------------------------------------------------------------------------- inspect


def test_inspect(small_bundle: Path) -> None:
    said = answer("inspect", small_bundle)
    assert said.code == 0
    lines = [line.split() for line in said.out.splitlines()]
    assert said.out.startswith("small: 16 px in 4 steps\n")
    for line in (
        "model width 64, 2 blocks, 1 heads of 64, grid 4x4, vocabulary 64, 5 classes",
        "backend onnxruntime",
        "guidance 3 linear (recommended)",
        "batch any",
        "files, all whole:",
    ):
        assert any(words[: len(line.split())] == line.split() for words in lines), line
    phases = Schedule.load(small_bundle / "schedule.npz").group_sizes
    assert ["3", "phase_02", str(phases[1]), str(phases[2])] in [words[:4] for words in lines]


def memory(bundle: Path, *options: object) -> tuple[int, int, int]:
    """What `inspect` says that a batch needs in MB: in all, weights, caches and logits."""
    said = answer("inspect", bundle, *options)
    parts = r"memory +(\d+) MB for a batch of \d+ with guidance: (\d+) weights, (\d+) caches and"
    found = re.search(parts, said.out)
    assert found, said
    return int(found[1]), int(found[2]), int(found[3])


def test_memory_of_a_batch(emoji_bundle: Path) -> None:
    manifest = Bundle.open(emoji_bundle).manifest
    model, queries = manifest.model, max(phase.queries for phase in manifest.phases)
    # Of the two rows of an image, in float32: a key and a value a block, and the logits.
    cache = 2 * 4 * 2 * model.depth * (model.grid**2 + 1) * model.dim
    image = cache + 2 * 4 * queries * model.vocab_size
    weights = manifest.files["onnx/weights.data"].size
    for batch in (1, 4, 100):
        expected = [weights + batch * image, weights, batch * image]
        said = memory(emoji_bundle, "--batch", batch)
        assert list(said) == [round(size / 1e6) for size in expected]
    assert memory(emoji_bundle) == memory(emoji_bundle, "--batch", 1)


def test_the_classes_of_a_bundle(small_bundle: Path) -> None:
    said = answer("inspect", small_bundle, "--classes")
    assert said.out.splitlines()[0].split() == ["0", "red", "panda,", "firefox"]
    assert [line.split()[0] for line in said.out.splitlines() if line] == ["0", "1", "2", "3", "4"]
    names = json.loads(answer("inspect", small_bundle, "--classes", "--json").out)
    assert names[3] == ["Crane", "bird"]


def test_the_pager_is_for_what_does_not_fit(small_bundle: Path, tmp_path: Path) -> None:
    """On a terminal of a real size, with a pager that leaves a note that it was called."""
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\ncat\n")
    pager.chmod(0o755)
    # What tells of a terminal or its lack comes from the terminal that is made here alone.
    hints = ("CI", "LINES", "COLUMNS")
    environment = {name: value for name, value in os.environ.items() if name not in hints}
    environment |= {"PAGER": str(pager), "TERM": "xterm"}
    for lines, called in ((40, False), (3, True)):
        terminal, other = pty.openpty()
        termios.tcsetwinsize(other, (lines, 80))
        subprocess.run(
            [COMMAND, "inspect", small_bundle, "--classes"],
            **dict.fromkeys(("stdin", "stdout", "stderr"), other),  # type: ignore[arg-type]
            env=environment,
            check=True,
        )
        os.close(other)
        assert b"ice-cream" in os.read(terminal, 10000)
        os.close(terminal)
        assert (tmp_path / "called").exists() == called


# ---------------------------------------------------------------------------------------- doctor


@pytest.mark.slow
def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    found = printed("doctor")
    assert found["facts"]["packages"]["torch"]["version"] == torch.__version__
    assert found["folder"] == str(tmp_path / "engines")
    assert found["hub"]["endpoint"] == "http://localhost:9"
    able = {(a["precision"], a["backend"], a["device"]): a for a in found["abilities"]}
    assert able["fp32", "onnxruntime", "cpu"]["run"] == {"possible": True, "missing": []}
    assert able["bf16", "onnxruntime", "cpu"]["build"]["possible"] is False
    said = end(start("doctor"))
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0] == f"lpd-export {lpd_export.__version__} on this machine"
    assert any(line.startswith("  fp32          yes    yes ") for line in lines)
    assert entries(tmp_path) == []


# ------------------------------------------------------------------------------- standard output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_standard_output(small_bundle: Path) -> None:
    with open("/dev/full", "w") as full:
        said = subprocess.run(
            [COMMAND, "inspect", small_bundle], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert said.returncode == 2
    assert said.stderr == "lpd-export: error: cannot write the result: No space left on device\n"


def test_a_reader_that_goes_away(emoji_bundle: Path) -> None:
    process = start("inspect", emoji_bundle, "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) == EXIT_READER_GONE


# -------------------------------------------------------------------------------- standard error


def images_of(folder: Path) -> list[str]:
    return [path.name for path in sorted(folder.glob("000*.png"))]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_standard_error(small_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    command = [COMMAND, "run", small_bundle, "--class", "0", "-n", "6", "--out", out]
    with open("/dev/full", "w") as full:
        said = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True)
    assert said.returncode == 0
    assert said.stdout.startswith("6 images in ")
    assert len(images_of(out)) == 6
    with open("/dev/full", "w") as full:  # a mistake keeps its code, though nobody hears of it
        assert subprocess.run([*command, "--cfg=-1"], stderr=full).returncode == EXIT_MISTAKE


def test_a_reader_of_progress_that_goes_away(small_bundle: Path, tmp_path: Path) -> None:
    process = start("run", small_bundle, "--class", "0", "-n", 6, "--out", tmp_path / "a")
    assert process.stderr is not None
    process.stderr.close()
    assert process.stdout is not None
    assert process.stdout.read().startswith("6 images in ")
    assert process.wait(60) == 0
    assert len(images_of(tmp_path / "a")) == 6


def test_one_reader_of_both_that_goes_away(small_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    process = start("run", small_bundle, "--class", "0", "-n", 6, "--out", out, both=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"loading {small_bundle}\n"
    process.stdout.close()
    assert process.wait(60) == EXIT_READER_GONE
    assert len(images_of(out)) == 6
    assert (out / "contact_sheet.png").is_file()


# ----------------------------------------------------------------------------------------- faults


def test_a_fault_of_our_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of two\nlines")

    monkeypatch.setattr(Schedule, "load", faulty)
    said = answer("schedule", "check", tmp_path / "a.npz")
    assert (said.code, said.out) == (EXIT_FAULT, "")
    first, *_, last = said.err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.startswith("lpd-export: ZeroDivisionError: of two lines: this is a fault of lpd-")
    assert "please report it" in last


def test_progress_on_a_log_is_lines(small_bundle: Path, tmp_path: Path) -> None:
    said = end(start("run", small_bundle, "--class", "0", "-n", 20, "--out", tmp_path / "a"))
    images = ("1 to 4", "5 to 8", "9 to 12", "13 to 16", "17 to 20")
    assert said.err.splitlines() == [
        f"loading {small_bundle}",
        "generating",
        *(f"images {made} of 20, step 4 of 4" for made in images),
    ]
    assert said.out.startswith("20 images in ")


def test_a_line_a_tenth_however_many_images(small_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    said = answer("run", small_bundle, "--class", "0", "-n", 30, "--batch", 1, "--out", out)
    told = said.err.splitlines()[2:]
    assert told == [f"image {made} of 30, step 4 of 4" for made in range(3, 31, 3)]


def test_quiet_and_verbose(small_bundle: Path, tmp_path: Path) -> None:
    command = ["run", small_bundle, "--class", "0", "-n", 2, "--out"]
    quiet = answer(*command, tmp_path / "a", "-q")
    assert (quiet.code, quiet.err) == (0, "")
    assert quiet.out.startswith("2 images in ")
    verbose = answer(*command, tmp_path / "b", "-v").err.splitlines()
    assert verbose[2:] == [f"images 1 to 2 of 2, step {step} of 4" for step in (1, 2, 3, 4)]
    assert mistake("run", small_bundle, "-q", "--out", tmp_path / "c").startswith("say what to")


# ------------------------------------------------------------------------------------- interrupts


def test_an_impatient_second_interrupt_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0, 100.1, 100.6, 100.9, 101.5]
    monkeypatch.setattr("time.monotonic", lambda: clock.pop(0))
    interrupt = lpd_export.cli.main.interrupter()
    with pytest.raises(KeyboardInterrupt):
        interrupt(2, None)
    for _ in range(3):
        interrupt(2, None)
    with pytest.raises(KeyboardInterrupt):  # nothing came of the first
        interrupt(2, None)
