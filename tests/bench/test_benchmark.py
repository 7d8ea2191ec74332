"""`lpd-export bench`: what takes turns, how ratios are paired, what is told; never how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commandline import answer, mistake
from lpd_export.bench.benchmark import read_cpuinfo, take_turns
from lpd_export.bench.cold import ColdStart
from lpd_export.bench.profiling import ListeningExecutor, second_half, slowest
from lpd_export.bench.request import BenchRequest
from lpd_export.bench.results import collect
from lpd_export.bench.timing import BundleContender, Seconds, split
from lpd_export.runtime.arrays import arrays_of
from lpd_export.runtime.pipeline import Pipeline


class Runner:
    """Takes the times that it is given, and tells the order in which it was asked."""

    def __init__(self, name: str, times: list[float], asked: list[str]) -> None:
        self.name, self._times, self._asked = name, iter(times), asked

    def run(self, batch: int, seed: int) -> Seconds:
        self._asked.append(self.name)
        time = next(self._times)
        return {"detokenize": time / 4, "total": time}


def test_contenders_take_turns_and_ratios_are_of_pairs() -> None:
    """The machine becomes slower: pairs tell the ratio of 2, which medians of each do not."""
    asked: list[str] = []
    ours = Runner("ours", [9, 1, 10, 3], asked)
    other = Runner("other", [9, 2, 30, 6], asked)
    rounds = take_turns([ours, other], 1, BenchRequest(Path("x"), runs=3), lambda line: None)
    assert asked == ["other", "ours", "ours", "other", "other", "ours", "ours", "other"]
    times = collect(1, rounds, ["ours", "other"], {})
    assert times.seconds["total"].values == [1, 10, 3]
    (compared,) = times.compared
    assert compared.ratios.values == [2, 3, 2]
    assert (compared.ratios.p50, compared.ratios.p90) == (2, pytest.approx(2.8))
    assert compared.part_ratios["detokenize"].values == [2, 3, 2]
    assert times.images_a_second == pytest.approx(1 / 3)
    assert times.over_floor is None


def test_parts_of_a_generation_are_all_of_it() -> None:
    runs = [("decode", 1, 3), ("decode", 4, 9), ("detokenize", 9.5, 11), ("detokenize", 11, 12)]
    parts = split([(graph, float(start), float(end)) for graph, start, end in runs], 12.25)
    assert parts == {
        "prepare": [1],
        "steps": [2, 5],
        "sampling": [1, 0.5],
        "detokenize": [2.5],
        "pixels": [0.25],
    }
    assert sum(map(sum, parts.values())) == 12.25


def test_a_bundle_on_the_clock_makes_the_images_that_it_makes(small_bundle: Path) -> None:
    with Pipeline.open(small_bundle, threads=1) as pipeline:
        contender = BundleContender("small", pipeline)
        seconds = contender.run(2, seed=3)
        timed = contender._timed.generate([0, 1], seed=3, batch=2)
        plain = pipeline.generate([0, 1], seed=3, batch=2)
    assert [*seconds][:4] == ["prefill", "step 2", "step 3", "step 4"]
    total = seconds["total"]
    assert sum(seconds.values()) - total == pytest.approx(total)
    assert min(seconds.values()) >= 0
    assert all((a.pixels == b.pixels).all() for a, b in zip(timed, plain, strict=True))


def test_profiles_leave_out_the_warm_up() -> None:
    """As ONNX Runtime writes them: two runs, the first slow."""

    def node(ts: int, dur: int, kind: str = "kernel") -> dict[str, object]:
        name = f"a_{kind}_time"
        return {"cat": "Node", "name": name, "ts": ts, "dur": dur, "args": {"op_name": "MatMul"}}

    session = {"cat": "Session", "dur": 9}
    runs = [session | {"name": "model_run", "ts": ts} for ts in (0, 10)]
    events = [*runs, node(1, 999), node(11, 2), node(12, 5, "fence_before"), node(13, 3)]
    (found,) = slowest(second_half(events))
    assert (found.operator, found.calls) == ("MatMul", 2)
    assert found.seconds == pytest.approx(5e-6)


def test_layers_of_engines_are_summed_by_graph() -> None:
    class Layers:
        """A binding as TensorRT's: each run tells its layers, in milliseconds."""

        def profile(self, tell) -> None:
            self.tell = tell

        def __call__(self) -> None:
            self.tell("fc1", 2.0)
            self.tell("fc2", 1.0)

    class Engines:
        arrays, device, float_type = arrays_of("cpu"), "cpu", "float16"

        def bind(self, graph: str, tensors: object) -> Layers:
            return Layers()

    listener = ListeningExecutor(Engines())
    run = listener.bind("decode", {})
    run()
    run()
    first, second = slowest(listener.times["decode"])
    assert (first.operator, first.seconds, first.calls) == ("fc1", pytest.approx(4e-3), 2)
    assert (second.operator, second.seconds) == ("fc2", pytest.approx(2e-3))


def test_the_processor_is_told(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512_vnni\n")
    assert read_cpuinfo(path) == ("AMD EPYC", {"fpu", "avx2", "avx512_vnni"})
    assert read_cpuinfo(tmp_path / "none") == ("", set())


def test_everything_is_told(small_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "speed"
    options = ["--batch", "1,2", "--runs", "2", "--threads", "1", "--json"]
    others = ["--against", "reference", "--against", small_bundle]
    said = answer("bench", small_bundle, *options, *others, "--out", out)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert json.loads((out / "report.json").read_text("utf-8")) == found
    assert (found["steps"], found["runs"], found["precision"]) == (4, 2, "fp32")
    assert found["machine"]["onnxruntime"]
    assert found["device"]["rates"]["int8"] > 0
    cold = ColdStart(**found["cold"])
    stages = cold.imports + cold.verify + cold.load + cold.first_image
    assert stages == pytest.approx(cold.total)
    assert cold.peak_memory > 50e6
    assert any(entry["operator"] == "MatMul" for entry in found["operators"]["decode"])
    assert any(entry["operator"] == "Conv" for entry in found["operators"]["detokenize"])
    parts = ["prefill", "step 2", "step 3", "step 4", "sampling", "detokenize", "pixels", "prepare"]
    for batch, times in zip((1, 2), found["batches"], strict=True):
        assert times["batch"] == batch
        assert [*times["seconds"]] == [*parts, "total"]
        assert [*times["floors"]] == parts[:-1]
        ours = times["seconds"]["total"]["values"]
        assert len(ours) == 2
        assert times["over_floor"] == pytest.approx(
            times["seconds"]["total"]["p50"] / times["least"]
        )
        names = [other["name"] for other in times["compared"]]
        assert names == ["reference", str(small_bundle)]
        for other in times["compared"]:
            theirs = other["seconds"]["total"]["values"]
            assert other["ratios"]["values"] == pytest.approx(
                [b / a for a, b in zip(ours, theirs, strict=True)]
            )
            assert "detokenize" in other["part_ratios"]
    page = (out / "report.html").read_text("utf-8")
    for words in ("prefill", "step 4", "times its floor", "images a second", "Conv", "reference"):
        assert words.lower() in page.lower()
    assert "http://" not in page
    assert "<script" not in page
    assert 'src="' not in page


def test_the_table_is_for_people(small_bundle: Path) -> None:
    said = answer("bench", small_bundle, "--runs", "1", "--threads", "1", "--no-details")
    assert said.code == 0, said.err
    for words in ("small, fp32 on onnxruntime", "batch 1", "prefill", "x its floor", "█"):
        assert words in said.out
    assert "first image in a new process" not in said.out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--runs", "0"], "--runs must be a whole number from 1"),
        (["--threads", "0"], "--threads must be a whole number from 1"),
        (["--against", "nowhere"], "there is no bundle nowhere"),
        (["--checkpoint", "x"], "--checkpoint is the reference's: add --against reference"),
        (["--roofline", "h100", "--against", "reference"], "--roofline runs nothing"),
        (["--out", "."], "holds"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    small_bundle: Path, options: list[str], sentence: str
) -> None:
    assert sentence in mistake("bench", small_bundle, *options)


def test_another_model_is_not_compared(small_bundle: Path, emoji_bundle: Path) -> None:
    said = mistake("bench", small_bundle, "--against", emoji_bundle)
    assert "is another model than" in said
    assert str(emoji_bundle) in said
