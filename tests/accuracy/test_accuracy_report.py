"""The report of a verification: what it says, of made-up results, and that it can be relied on."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lpd_export.accuracy import plots
from lpd_export.accuracy.report import (
    AMPLIFICATION,
    difference,
    grown_layers,
    print_table,
    write_report,
)
from lpd_export.accuracy.results import (
    Figure,
    ImagePair,
    LayerError,
    Measurement,
    Step,
    Verification,
)
from lpd_export.accuracy.thresholds import JUDGED, REPORTED, Limits
from lpd_export.errors import UserError

GOOD = {
    "rows_left_alone": 0.0,
    "cache_error": 2e-6,
    "logits_error": 3e-6,
    "logits_largest_error": 4e-6,
    "kl": 5e-12,
    "image_psnr": 120.0,
    "index_agreement": 1.0,
    "sequence_kl": 6e-12,
    "sequence_top_1": 1.0,
    "unexplained_draws": 0.0,
    "generation_psnr": math.inf,
}
"""Values that pass in every precision."""
DECODE = {
    "rows_left_alone": ["rows_left_alone"],
    "cache_error": ["present_key_0", "present_value_0", "present_key_1", "present_value_1"],
    "logits_error": ["logits"],
    "logits_largest_error": ["logits"],
    "kl": ["guided_logits"],
}
"""Tensors by metric."""
AFTER = [
    ("detokenize", "image", "image_psnr"),
    ("tokenize", "indices", "index_agreement"),
    ("sequence", "guided_logits", "sequence_kl"),
    ("sequence", "guided_logits", "sequence_top_1"),
    ("generation", "token_ids", "unexplained_draws"),
    ("generation", "pixels", "generation_psnr"),
]
Values = dict[tuple[str, str, str], float]


def made_up(
    values: Values | None = None, precision: str = "fp32", phases: int = 4, **others: Any
) -> Verification:
    """A verification that passes but for these values by phase, tensor and metric."""
    limits = others.get("limits") or Limits.of([precision, "fp32"])
    places = [
        (f"phase_{number:02d}", tensor, metric)
        for number in range(phases)
        for metric, tensors in DECODE.items()
        for tensor in tensors
    ]
    measurements = []
    for phase, tensor, metric in [*places, *AFTER]:
        value = (values or {}).get((phase, tensor, metric), GOOD[metric])
        passed = limits.met(metric, value)
        measurements.append(Measurement(phase, tensor, metric, value, limits.limit(metric), passed))
    return Verification(
        versions={"lpd-export": "0.1.0", "torch": "2.13.0"},
        time="2026-11-23T12:00:00+00:00",
        **{
            "bundle": "engines/demo",
            "name": "lpd-emoji32",
            "precision": precision,
            "backend": "onnxruntime",
            "quantized": "",
            "against": "reference",
            "ran": "ONNX Runtime 1.31.1, cpu",
            "images": 8,
            "seed": 3,
            "cfg": 4.5,
            "guidance": "linear",
            "remarks": [],
            "measurements": measurements,
            "reported": [Figure("generation", "token_ids", "token_agreement", 0.875)],
            "limits": limits,
            "steps": [Step(number + 1, 1, 6e-12, 1.0, 1.0) for number in range(phases)],
            "pairs": [],
            **others,
        },
    )


def layer(name: str, error: float, growth: float, graph: str = "decode") -> LayerError:
    return LayerError(graph, name, error, error, growth)


def pair(label: str = "heart", side: int = 16, change: int = 3) -> ImagePair:
    expected = np.random.default_rng(0).integers(0, 200, (side, side, 3)).astype(np.uint8)
    actual = expected.copy()
    actual[0, 0, 0] += change
    return ImagePair(label, expected, actual, 0.875)


def table(verification: Verification, width: int = 100, **console: Any) -> str:
    output = io.StringIO()
    print_table(verification, Console(file=output, width=width, **console))
    return output.getvalue()


class Page(HTMLParser):
    """A page as it was parsed: balanced or the test fails."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.bad: list[str] = []
        self._in_bad: list[str] | None = None
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td" and "bad" in (dict(attrs).get("class") or "").split():
            self._in_bad = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "td" and self._in_bad is not None:
            self.bad.append(" ".join(self._in_bad))
            self._in_bad = None

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)
        if self._in_bad is not None and data.strip():
            self._in_bad.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def report(
    folder: Path, verification: Verification, commands: dict[str, str] | None = None
) -> Page:
    return Page(write_report(verification, folder, commands or {}).read_text("utf-8"))


FAILURES: Values = {
    ("phase_02", "present_key_1", "cache_error"): 0.12,
    ("phase_02", "present_value_1", "cache_error"): 0.34,
    ("detokenize", "image", "image_psnr"): 104.0,
    ("sequence", "guided_logits", "sequence_kl"): 2e-7,
}


# ------------------------------------------------------------------------------ the terminal


def test_a_pass_shows_the_worst_of_each_phase() -> None:
    worse = made_up({("phase_01", "present_value_1", "cache_error"): 7e-6})
    lines = table(worse).splitlines()
    assert "passed: every threshold of fp32 holds for 8 images" in lines
    (row,) = (line.split() for line in lines if " phase_01" in line)
    assert row == ["2", "phase_01", "0", "7e-06", "3e-06", "4e-06", "5e-12"]
    assert "passed: every threshold of fp32 holds for 1 image" in table(made_up(images=1))


def test_what_is_reported_alone_has_a_list_of_its_own(tmp_path: Path) -> None:
    found = made_up({("generation", "token_ids", "unexplained_draws"): 1.0})
    text, page = table(found), report(tmp_path, found).text
    judged, reported = text.split("reported, without a limit")
    assert "token agreement" not in judged
    assert re.search(r"^generation +token agreement +0\.875 *$", reported, re.M)
    assert "token agreement" not in reported[reported.index("FAILED") :]
    judged, reported = page.split("Reported, without a limit")
    assert "token agreement" not in judged
    assert f"generation token agreement 0.875 {REPORTED[0].description}" in reported
    record = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert "token_agreement" not in {entry["metric"] for entry in record["measurements"]}
    assert record["reported"] == [
        {
            "phase": "generation",
            "tensor": "token_ids",
            "metric": "token_agreement",
            "value": 0.875,
        }
    ]


def test_steps_count_from_1_and_phases_as_their_files(tmp_path: Path) -> None:
    steps = [Step(number, 1, 6e-12, 1.0, float(number < 3)) for number in range(1, 5)]
    found = made_up(FAILURES, steps=steps, layers=[layer("blocks.0", 1e-3, 9)])
    text, page = table(found), report(tmp_path, found)
    rows = re.findall(r"^ *(\w+) +(phase_\d\d)\b", text, re.M)
    assert rows == [(f"{n + 1}", f"phase_0{n}") for n in range(4)]
    assert "FAILED: step 3 (phase_02), present_key_1: " in text
    assert "cache error of present_key_1 in step 3 (phase_02) ." in page.text
    assert "All tokens are equal before step 3, where the first differ." in page.text
    assert "first difference: step 3" in page.text
    record = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert record["first_failure"]["step"] == 3
    numbered = {(entry["phase"], entry["step"]) for entry in record["measurements"]}
    assert numbered >= {("phase_00", 1), ("phase_03", 4), ("sequence", None)}
    assert [entry["step"] for entry in record["steps"]] == [1, 2, 3, 4]


def test_remarks_come_last() -> None:
    lines = table(made_up(remarks=["a.pth is another file", "it is [b]old[/b]"])).splitlines()
    assert lines[-2:] == ["remark: a.pth is another file", "remark: it is [b]old[/b]"]


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("phases", [4, 48])
def test_without_a_terminal_it_is_plain_and_fits(width: int, phases: int) -> None:
    values = FAILURES | {("phase_03", *place): math.nan for place in _decode_places()}
    limits = Limits.of(["fp32"], ["kl=1e-9", "image_psnr=1e9"])
    layers = [layer(f"blocks.{i}.a_rather_long_name.{'x' * 40}", 1e-6, 2.0) for i in range(20)]
    text = table(made_up(values, phases=phases, limits=limits, layers=layers), width)
    assert "\x1b" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for whole in ("phase_02", "0.34", "> 1e-05", "< 1000000000", "NaN", "present_key_1"):
        assert whole in text


def _decode_places() -> list[tuple[str, str]]:
    return [(tensor, metric) for metric, tensors in DECODE.items() for tensor in tensors]


def test_an_ascii_terminal_can_show_it() -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_table(made_up(FAILURES, layers=[layer("blocks.0", 1e-3, 9)]), Console(file=output))
    output.flush()


def test_the_first_failure_comes_first_and_four_more_are_listed() -> None:
    text = table(made_up(FAILURES))
    lines = text[text.index("FAILED") :].splitlines()
    assert lines == [
        "FAILED: step 3 (phase_02), present_key_1: cache_error 0.12, at most 1e-05",
        "and 3 more:",
        "  step 3 (phase_02), present_value_1: cache_error 0.34, at most 1e-05",
        "  detokenize, image: image_psnr 104, at least 105",
        "  sequence, guided_logits: sequence_kl 2e-07, at most 1e-08",
    ]
    values = {(f"phase_{n:02d}", "logits", "logits_error"): 1.0 for n in range(9)}
    lines = table(made_up(values, phases=9)).splitlines()
    assert [line.split(",")[0].split()[-1] for line in lines if "logits_error" in line] == [
        f"(phase_{n:02d})" for n in range(5)
    ]
    assert lines[-1] == "  ... 4 are not listed here"


def test_only_failing_values_are_red_and_their_limit_follows() -> None:
    coloured = table(made_up(FAILURES), force_terminal=True, color_system="standard")
    red = re.findall(r"\x1b\[1;31m([^\x1b]*)\x1b", coloured)
    assert [part.strip() for part in red] == [
        # The worse of two caches, and the limits on the line below.
        *("0.34", "> 1e-05"),
        "104 < 105",
        "2e-07 > 1e-08",
        "FAILED",
    ]


def test_a_value_is_as_exact_as_its_side_of_the_limit_needs() -> None:
    values = {
        ("phase_00", "logits", "logits_error"): 1.0000004e-5,
        ("detokenize", "image", "image_psnr"): 104.99999,
    }
    text = table(made_up(values))
    assert "logits_error 1.0000004e-05, at most 1e-05" in text
    assert "image_psnr 104.99999, at least 105" in text


def test_many_phases_that_pass_share_rows() -> None:
    values = {
        ("phase_20", "logits", "kl"): 0.0,
        ("phase_03", "present_key_0", "cache_error"): 9e-6,
        ("phase_09", "guided_logits", "kl"): 1.0,
    }
    lines = [line.strip() for line in table(made_up(values, phases=48)).splitlines()]
    found = (re.match(r"(to )?(\d+) +(?:to )?phase_(\d\d)( |$)", line) for line in lines)
    ends = [(each[1] or "", int(each[2]), int(each[3])) for each in found if each]
    assert all(step == phase + 1 for _, step, phase in ends)
    rows = " ".join(f"{to}{phase:02d}" for to, _, phase in ends).replace(" to ", "-").split()
    assert rows == ["00-07", "08", "09", "10-17", "18-25", "26-33", "34-41", "42-47"]
    assert "9e-06" in next(line for line in lines if " phase_00" in line)
    few = table(made_up(phases=24))
    assert all(f" phase_{number:02d} " in few for number in range(24))


def test_limits_of_the_user_are_named() -> None:
    limits = Limits.of(["fp32"], ["kl=0.5", "sequence_top_1=0"])
    text = table(made_up(limits=limits))
    assert text.splitlines()[-4:] == [
        "passed: every threshold holds for 8 images",
        "judged by other limits than those of fp32:",
        "  kl 0.5 instead of 1e-08",
        "  sequence_top_1 0 instead of 0.999",
    ]


def test_the_looser_precision_of_two_bundles_is_named() -> None:
    limits = Limits.of(["fp32", "int8"])
    text = table(made_up(precision="fp32", limits=limits, against="engines/demo-int8"))
    assert "passed: every threshold of int8 holds for 8 images" in text
    assert "judged by" not in text


def test_layers_where_the_error_grows_are_listed() -> None:
    layers = [layer("embedding", 1e-3, math.inf), layer("blocks.0", 6e-2, 60.0)]
    text = table(made_up(layers=layers, layers_phase="phase_01"))
    assert "where the error grows most (decode: step 2 (phase_01)):" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("decode ")]
    assert rows == [
        ["decode", "embedding", "0.001", "from", "0"],
        ["decode", "blocks.0", "0.06", "x", "60"],
    ]
    assert "grow" not in table(made_up())
    falling = table(made_up(layers=[layer("embedding", 1e-3, 0.5)]))
    assert "no layer's error is larger than that of the layers that feed it" in falling


def test_growth_of_noise_and_after_nan_is_left_out() -> None:
    layers = [
        layer("noise", 1e-9, 100.0),
        layer("small", 0.02, 3.0),
        layer("large", 1.0, 50.0),
        layer("broken", math.nan, math.nan),
        layer("after", math.nan, math.nan),
        layer("image", 1e-6, 2.0, "detokenize"),
    ]
    names = [each.layer for each in grown_layers(layers)]
    assert names == ["broken", "large", "small", "image"]
    assert [each.layer for each in grown_layers(layers, count=2)] == ["broken", "large"]


# ---------------------------------------------------------------------------------- the files


def test_the_sentence_to_sign(tmp_path: Path) -> None:
    text = report(tmp_path, made_up()).text
    assert "Passed The bundle engines/demo (lpd-emoji32, fp32, onnxruntime) was compared" in text
    assert "with the PyTorch reference on 8 images with seed 3 and guidance 4.5 linear" in text
    assert "by lpd-export 0.1.0, torch 2.13.0." in text
    assert "Each of 38 measurements keeps the threshold of fp32." in text
    assert "What failed" not in text


def test_failures_come_first_and_alone_are_marked(tmp_path: Path) -> None:
    page = report(tmp_path, made_up(FAILURES))
    assert "4 of 38 measurements break the thresholds of fp32; the first in the order of" in (
        page.text
    )
    assert "computation is cache error of present_key_1 in step 3 (phase_02) ." in page.text
    listed = ["0.12", "0.34", "104", "2e-07"]
    assert page.bad == [*listed, "0.34 > 1e-05", "104 < 105", "2e-07 > 1e-08"]
    assert page.text.index("What failed") < page.text.index("What was compared")


def test_many_failures_are_shortened_and_say_so(tmp_path: Path) -> None:
    values = {
        (f"phase_{n:02d}", tensor, metric): math.nan
        for n in range(48)
        for tensor, metric in _decode_places()
    }
    page = report(tmp_path, made_up(values, phases=48))
    assert "372 more" in page.text
    assert "184 more are in report.json." in page.text


def test_the_record_is_strict_json(tmp_path: Path) -> None:
    values = FAILURES | {("phase_03", "logits", "kl"): math.nan}
    write_report(
        made_up(values, layers=[layer("blocks.0", math.nan, math.inf)]),
        tmp_path,
        {},
    )

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "report.json").read_text("utf-8")
    record = json.loads(text, parse_constant=refuse)
    assert record["passed"] is False
    assert record["first_failure"]["tensor"] == "present_key_1"
    assert record["layers"][0]["relative_error"] is None
    assert len(record["measurements"]) == 38


@pytest.mark.parametrize("phases", [1, 48])
@pytest.mark.parametrize("layers", [0, 1, 300])
def test_the_page_is_whole_in_itself(tmp_path: Path, phases: int, layers: int) -> None:
    errors = [layer(f"blocks.{i}.mlp.fc1", 1e-6 * (i + 1), 1.1) for i in range(layers)]
    page = report(
        tmp_path,
        made_up(phases=phases, layers=errors, pairs=[pair(), pair()]),
        commands={"phase_00": "polygraphy run phase_00.onnx"},
    )
    sources = [page.values(name) for name in ("src", "href", "xlink:href", "srcset")]
    assert all(
        value.startswith(("data:image/png;base64,", "#")) for values in sources for value in values
    )
    assert not {tag for tag, _, _ in page.attributes} & {"script", "link", "iframe"}
    html = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'(?:href="#|url\(#)([^")]+)', html):
        assert reference in ids


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_plots_stand_any_value(tmp_path: Path, bad: float) -> None:
    values = {("phase_01", tensor, metric): bad for tensor, metric in _decode_places()}
    steps = [
        Step(number + 1, number + 1, *values)
        for number, values in enumerate(
            [(bad, 1.0, 1.0), (1e-9, bad, bad), (bad, 0.5, 1.0), (1e-8, 1.0, 0.0)]
        )
    ]
    layers = [layer("blocks.0", bad, bad), layer("blocks.1", 1e-7, bad)]
    page = report(tmp_path, made_up(values, steps=steps, layers=layers))
    assert ("exactly 0" if bad == 0 else "NaN or infinite") in page.text
    nothing = [Step(number, 1, bad, bad, bad) for number in range(1, 5)]
    report(tmp_path, made_up(steps=nothing, layers=[layer("blocks.0", bad, bad)]))


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    page = report(tmp_path, made_up(phases=0, steps=[]))
    assert "svg" not in {tag for tag, _, _ in page.attributes}
    for heading in ("Every decode phase", "Layer by layer", "The same images"):
        assert heading not in page.text


@pytest.mark.parametrize(
    ("agreement", "said"),
    [
        ([1.0, 1.0, 1.0, 1.0], "All tokens of all steps are equal."),
        ([1.0, 1.0, 0.9, 1.0], "All tokens are equal before step 3, where the first differ."),
        ([0.5, 0.2, 0.1, 0.0], "Tokens differ from the first step on."),
    ],
)
def test_where_images_part_is_said(tmp_path: Path, agreement: list[float], said: str) -> None:
    steps = [Step(number + 1, 1, 1e-9, 1.0, share) for number, share in enumerate(agreement)]
    page = report(tmp_path, made_up(steps=steps))
    assert said in page.text
    assert ("first difference: step" in page.text) == (agreement[-1] < 1 or agreement[2] < 1)


def test_names_cannot_be_markup(tmp_path: Path) -> None:
    label, remark = '<b onclick="x">heart</b>', "<script>alert(1)</script> & more"
    page = report(
        tmp_path,
        made_up(
            pairs=[pair(label)],
            remarks=[remark],
            name="<i>model",
            layers=[layer("blocks.<0>.$x$", 1e-3, 5.0)],
        ),
        commands={"<phase>": "polygraphy run 'a<b'"},
    )
    for text in (label, remark, "<i>model", "blocks.<0>.$x$", "<phase>", "run 'a<b'"):
        assert text in page.text
    assert not {tag for tag, _, _ in page.attributes} & {"script", "b", "i"}
    assert "[bold]heart" in table(made_up(layers=[layer("[bold]heart", 1e-3, 5.0)]))


def test_limits_and_commands_are_on_the_page(tmp_path: Path) -> None:
    limits = Limits.of(["fp32"], ["kl=0.5"])
    commands = {f"phase_{n:02d}": f"polygraphy run phase_{n:02d}.onnx" for n in range(4)}
    page = report(tmp_path, made_up(FAILURES, limits=limits, saved_phases=[*commands]), commands)
    assert "It was judged by other limits than those of fp32: kl 0.5 instead of 1e-08." in page.text
    assert "kl ≤ 0.5 not that of fp32" in page.text
    for metric in (*JUDGED, REPORTED[0]):
        assert metric.reason in page.text
    places = [page.text.index(f"polygraphy run phase_{n:02d}.onnx") for n in range(4)]
    assert min(places) == places[2]  # the phase that failed first


def test_what_more_layers_in_higher_precision_gave_is_on_the_page(tmp_path: Path) -> None:
    decided = {"layers": 49, "measure": "KL", "limit": 0.0075}
    kept = {"head/MatMul": 0.1, "blocks.0.fc1/MatMul": 0.2}
    found = made_up(
        decisions={
            "decode": {
                **decided,
                "kept": kept,
                "value": 0.007,
                "trials": [[0, 0.0112], [2, 0.007]],
            },
            "tokenize": {**decided, "kept": {}, "value": 0.005},
        }
    )
    page = report(tmp_path, found)
    rows = "decode 0 49 KL 0.0112 0.0075 decode 2 49 KL 0.007 0.0075 tokenize 0 49 KL 0.005 0.0075"
    assert rows in page.text
    record = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert record["decisions"]["decode"]["trials"] == [[0, 0.0112], [2, 0.007]]
    assert "Layers in higher precision" not in report(tmp_path, made_up()).text


# ---------------------------------------------------------------------------------- the images


def test_a_difference_is_amplified_and_clipped() -> None:
    expected = np.array([[[0, 255, 100], [10, 10, 10]]], np.uint8)
    actual = np.array([[[1, 254, 200], [10, 10, 10]]], np.uint8)
    result = difference(expected, actual)
    assert result.dtype == np.uint8
    assert result.tolist() == [[[AMPLIFICATION, AMPLIFICATION, 255], [0, 0, 0]]]
    assert (difference(actual, expected) == result).all()
    with pytest.raises(ValueError, match="shape"):
        difference(expected, actual[:, :1])


@pytest.mark.parametrize(("side", "shown", "enlarged"), [(16, 128, True), (512, 320, False)])
def test_pairs_are_shown_and_kept(tmp_path: Path, side: int, shown: int, enlarged: bool) -> None:
    some = pair("heart", side)
    page = report(tmp_path, made_up(pairs=[some, pair(side=side)]))
    kept = sorted(path.name for path in (tmp_path / "images").iterdir())
    names = ("actual", "difference", "expected")
    assert kept == [f"pair_{n:02d}_{name}.png" for n in range(2) for name in names]
    pixels = {
        "expected": some.expected,
        "actual": some.actual,
        "difference": difference(some.expected, some.actual),
    }
    for uri, (name, expected) in zip(page.values("src")[:3], pixels.items(), strict=True):
        embedded = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        for image in (embedded, Image.open(tmp_path / "images" / f"pair_00_{name}.png")):
            assert (np.asarray(image) == expected).all()
    assert "heart · 87.5 % of the tokens equal · largest difference 3 of 255" in page.text
    assert page.values("width").count(str(shown)) == 6
    assert ("Small images are enlarged" in page.text) == enlarged
    assert ("enlarged" in page.values("class")) == enlarged


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="not a folder"):
        write_report(made_up(), file / "report", {})


# ----------------------------------------------------------------------------------- the plots


def labels(svg: str) -> list[str]:
    """What is written in a plot."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_layer_names_are_thinned_out_but_for_those_that_matter() -> None:
    layers = [layer(f"layer_{i}", 1e-6, 1.0) for i in range(300)]
    named = _named(plots.errors_by_layer(layers, [layers[151], layers[152], layers[7]]))
    assert {"layer_151", "layer_7"} <= set(named)
    assert "layer_152" not in named  # would stand on the name before it
    assert plots.LAYER_LABELS / 2 < len(named) <= plots.LAYER_LABELS
    assert _named(plots.errors_by_layer(layers[:40], [])) == [f"layer_{i}" for i in range(40)]


def _named(svg: str) -> Sequence[str]:
    return [text for text in labels(svg) if text.startswith("layer_")]


def test_equal_limits_are_one_line() -> None:
    errors = {"cache error": [1e-3, 2e-3], "logits error": [1e-3, 1e-2]}
    same = labels(plots.errors_by_step(errors, dict.fromkeys(errors, 5e-3)))
    assert _limits(same) == ["limit 0.005"]
    two = labels(plots.errors_by_step(errors, {"cache error": 5e-3, "logits error": 0.1}))
    assert _limits(two) == ["limit of cache error 0.005", "limit of logits error 0.1"]


def _limits(texts: Iterable[str]) -> list[str]:
    return [text for text in texts if text.startswith("limit")]


def test_plots_take_the_colours_of_the_page() -> None:
    svg = plots.errors_by_step({"cache error": [1e-3, math.nan]}, {"cache error": 1e-2})
    assert not re.search(r"#[0-9a-f]{6}", svg)
    style = set(re.findall(r"var\((--[a-z]+)\)", svg))
    template = (Path(plots.__file__).with_name("style.css.jinja")).read_text("utf-8")
    assert style <= set(re.findall(r"(--[a-z]+):", template))
    assert {"--ink", "--first", "--bad"} <= style


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.errors_by_step({"cache error": [1e-3]}, {"cache error": 1e-2})
    assert dict(mpl.rcParams) == before
