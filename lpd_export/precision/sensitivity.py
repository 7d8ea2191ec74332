"""Decides which layers INT8 and FP8 leave in higher precision, by what quantizing them does.

Layers of the transformer are ranked by what quantizing each alone changes of its logits, those of
the tokenizer by what each alone does to pixels or indices. Then graphs are quantized and run: more
layers are kept back each time, until the whole graph is as close to FP32 as it should be. How a
layer is quantized is in `quantization` and `convolutions`, how noise is measured in `calibration`,
and what a layer of the transformer alone changes in `worth`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lpd_export.bundle.manifest import GRAPH_NAMES, Manifest
from lpd_export.errors import UserError
from lpd_export.formats import FLOAT32, PRECISIONS, FloatType, Quantization
from lpd_export.graphs import export
from lpd_export.precision.calibration import (
    SEED,
    LayerMeasurement,
    calibration_images,
    spread_labels,
)
from lpd_export.precision.casting import lower
from lpd_export.precision.convolutions import Spans, shares_of_work
from lpd_export.precision.quantization import Layer, simulate_layer
from lpd_export.precision.quantized_graph import quantize_graph
from lpd_export.precision.worth import Simulation, log_probabilities_of, worth_of_layers
from lpd_export.progress import Report
from lpd_export.runtime.onnxruntime_executor import OnnxRuntimeExecutor
from lpd_export.runtime.pipeline import Pipeline
from lpd_export.runtime.requests import GeneratedImage
from lpd_export.schedule.schedule_file import Schedule

KEPT_SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 3 / 32, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the layers of a graph of the tokenizer that are kept back, in the order of trial.

The last convolution first, which gives pixels or latents and costs next to nothing, then those that
alone do most harm; in the decoder LARGE ones last.
"""
LARGE = 1 / 20
"""Of a graph's multiplications: INT8 is there to make a convolution fast that has more."""
RANKING_SHARE = 1 / 4
"""Of the images that trials use: those by which layers of the tokenizer are put in order."""
MOST_KEPT = 0.5
"""Share of the transformer's layers from which on a quantization is not worth its name."""


@dataclass(frozen=True)
class Target:
    """How close a quantized graph must be to FP32."""

    measure: str
    limit: float
    at_most: bool
    """Whether the measure must be at most or at least the limit."""

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


TARGETS = {
    # About what a photograph keeps when it is saved as JPEG at high quality.
    "detokenize": Target("PSNR of the image in dB", 35.0, at_most=False),
    # Half of the wrong indices that are promised not to be exceeded.
    "tokenize": Target("share of equal indices", 0.95, at_most=False),
}
"""Of the tokenizer's graphs; that of the transformer is in the precision's row of `formats`."""


@dataclass(frozen=True)
class GraphDecision:
    """What was decided of one graph, and why; goes into the manifest."""

    layers: int
    kept: dict[str, float]
    """Layers in higher precision, with the noise (squared error over squared signal) they had."""
    measure: str
    value: float
    limit: float
    trials: list[tuple[int, float]] = field(default_factory=list)
    """How many layers were kept and what the measure was, in the order of trial."""
    kept_as: str = ""
    """What the weights of layers that are kept are stored as, if not as they are."""


class Chooser:
    """Tries quantized graphs against the FP32 ones.

    Args:
        graphs: a folder with the FP32 ONNX files.
        scratch: an empty folder for trials.
        manifest, schedule: of the bundle in the making; trials compute in its float type, as what
            is shipped does.
        spans: for each graph, of what convolutions read and give, where that is rounded too.
    """

    def __init__(
        self,
        graphs: Path,
        scratch: Path,
        manifest: Manifest,
        schedule: Schedule,
        spans: Mapping[str, Spans] | None = None,
    ) -> None:
        self._spans = spans or {}
        self._precision = precision = PRECISIONS[manifest.precision]
        self._float_type = precision.float_type(manifest.backend)
        divergence = "mean KL divergence of guided logits"
        self.targets = TARGETS | {"decode": Target(divergence, precision.divergence, at_most=True)}
        self._graphs = graphs
        self._scratch = scratch
        self._worth: dict[str, float] = {}
        # These graphs take any batch, whatever engines are to take.
        self._manifest = dataclasses.replace(manifest, max_batch=None)
        self._schedule = schedule
        exact = self._pipeline(graphs, FLOAT32)
        count = calibration_images(manifest.resolution)
        labels: list[int | str | None] = [*spread_labels(manifest.model.num_classes, count)]
        # Not the images of the calibration, which the ranges fit best.
        self._images = exact.generate(labels, seed=SEED + 1, batch=count)
        self._log_probabilities = log_probabilities_of(exact, self._images)
        self._pixels = self._decode_images(exact, count)
        self._indices = exact.tokenize(self._pixels)

    def _pipeline(self, folder: Path, float_type: FloatType) -> Pipeline:
        files = {name: folder / f"{name}.onnx" for name in GRAPH_NAMES}
        executor = OnnxRuntimeExecutor(files, float_type.torch)
        return Pipeline(self._manifest, self._schedule, executor)

    def _decode_images(self, pipeline: Pipeline, images: int) -> np.ndarray:
        return np.clip(pipeline.detokenize(token_ids(self._images[:images])), -1, 1)

    def choose(
        self,
        graph: str,
        layers: Mapping[str, LayerMeasurement],
        report: Report = lambda line: None,
    ) -> tuple[dict[str, float], GraphDecision]:
        """The activation ranges of the layers to quantize, by node, and the decision.

        Raises:
            UserError: if the transformer does not stand the precision at all.
        """
        for kept_as in self._kinds_of_kept(graph):
            found = self._search(graph, layers, kept_as, report)
            if not isinstance(found, float):
                return found
        target = self.targets[graph]
        raise UserError(
            f"{self._precision.name} changes this model too much: with half of its layers kept in "
            f"higher precision the {target.measure} is {found:.3g}, above {target.limit}; use "
            "--precision fp16"
        )

    def _kinds_of_kept(self, graph: str) -> Sequence[Quantization | None]:
        """What layers that are kept may be stored as, in the order of trial."""
        kind = self._precision.quantization_of(graph)
        if graph == "decode" and kind and kind.kept:
            # Where values of few channels are far larger than others, a CPU rounds too much so.
            return kind.kept, None
        return (None,)

    def _search(
        self,
        graph: str,
        layers: Mapping[str, LayerMeasurement],
        kept_as: Quantization | None,
        report: Report,
    ) -> tuple[dict[str, float], GraphDecision] | float:
        """As `choose`; the measure, if half of the layers of the transformer are not enough."""
        target, trials = self.targets[graph], []
        ranking = [*layers][-1:]
        kept = 0
        while True:
            left_out = set(ranking[:kept])
            ranges = {n: m.activation_range for n, m in layers.items() if n not in left_out}
            value = self._try(graph, ranges, kept_as)
            trials.append((kept, value))
            report(f"{graph}: {len(ranges)} of {len(layers)} layers, {target.measure} {value:.4g}")
            if target.met(value):
                noise = {node: layers[node].noise for node in ranking[:kept]}
                decision = GraphDecision(
                    len(layers),
                    noise,
                    target.measure,
                    value,
                    target.limit,
                    trials,
                    kept_as.title if kept_as else "",
                )
                return ranges, decision
            if graph != "decode":
                counts = [math.ceil(share * len(layers)) for share in KEPT_SHARES]
                kept = min(count for count in counts if count > kept)
                if kept > len(ranking):
                    report(f"{graph}: measuring what each layer does to the whole graph")
                    ranking += self._most_harmful_first(graph, layers, ranking)
                continue
            if kept >= MOST_KEPT * len(layers):
                return value
            self._worth = self._worth or self.worth(layers, self._simulation(layers))
            ranking = [*self._worth]
            kept = next_trial([*self._worth.values()], kept, value, target.limit)

    def _simulation(self, layers: Mapping[str, LayerMeasurement]) -> Simulation:
        """Of layers whose activations are rounded as well."""
        kind = self._precision.quantization
        assert kind is not None

        def simulate(model: ir.Model, layer: Layer) -> ir.Value:
            activation_range = layers[layer.node].activation_range
            return simulate_layer(model, layer, activation_range, weight=True, kind=kind)[0]

        return simulate

    def worth(self, nodes: Collection[str], simulate: Simulation) -> dict[str, float]:
        """What quantizing each layer of the decode graph alone changes of it, the most first."""
        worth = worth_of_layers(
            self._graphs,
            self._scratch,
            self._manifest,
            self._schedule,
            nodes,
            simulate,
            self._images,
            self._log_probabilities,
        )
        return dict(sorted(worth.items(), key=lambda entry: entry[1], reverse=True))

    def _most_harmful_first(
        self, graph: str, layers: Mapping[str, LayerMeasurement], known: Sequence[str]
    ) -> list[str]:
        """The other layers of a graph of the tokenizer, by what one alone does to some images.

        Of the decoder, those that would cost much in float come last.
        """
        work = shares_of_work(ir.load(self._graphs / f"{graph}.onnx"))
        values = {
            node: self._try(graph, {node: layer.activation_range}, share=RANKING_SHARE)
            for node, layer in layers.items()
            if node not in known
        }
        large = {n for n in values if graph == "detokenize" and work[n] > LARGE}
        return sorted(values, key=lambda n: (n in large, values[n], -layers[n].noise))

    def keep(
        self,
        graph: str,
        layers: Mapping[str, LayerMeasurement],
        kept: Sequence[str],
        exact: bool = False,
        report: Report = lambda line: None,
    ) -> tuple[dict[str, float], GraphDecision]:
        """As `choose`, with the layers to keep decided elsewhere; what they give is measured.

        exact: whether their weights stay as they are, even if fewer bits would do.
        """
        target = self.targets[graph]
        ranges = {n: m.activation_range for n, m in layers.items() if n not in kept}
        for kept_as in (None,) if exact else self._kinds_of_kept(graph):
            value = self._try(graph, ranges, kept_as)
            report(f"{graph}: {len(ranges)} of {len(layers)} layers, {target.measure} {value:.4g}")
            if target.met(value):
                break
        noise = {node: layers[node].noise for node in kept}
        title = kept_as.title if kept_as else ""
        return ranges, GraphDecision(
            len(layers), noise, target.measure, value, target.limit, kept_as=title
        )

    def _try(
        self,
        graph: str,
        ranges: Mapping[str, float],
        kept_as: Quantization | None = None,
        share: float = 1,
    ) -> float:
        """The target's measure with these layers quantized, over a share of the images."""
        model = self.model(graph)
        quantize_graph(
            model, graph, self._precision, ranges, self._spans, unsigned=True, kept_as=kept_as
        )
        return self.measure(graph, model, share)

    def model(self, graph: str) -> ir.Model:
        """A graph in the float type of the bundle, to be quantized on trial."""
        model = ir.load(self._graphs / f"{graph}.onnx")
        lower(model, self._float_type)
        return model

    def measure(self, graph: str, model: ir.Model, share: float = 1) -> float:
        """The target's measure of a graph on trial, over a share of the images."""
        export.write_models({graph: model}, self._scratch)
        trial = self._pipeline(self._scratch, self._float_type)
        measure = {"decode": self._kl, "detokenize": self._psnr, "tokenize": self._agreement}
        value = measure[graph](trial, math.ceil(share * len(self._images)))
        for file in self._scratch.iterdir():
            file.unlink()
        return value

    def _kl(self, trial: Pipeline, images: int) -> float:
        of_trial = log_probabilities_of(trial, self._images[:images])
        return mean_kl(self._log_probabilities[:images], of_trial)

    def _psnr(self, trial: Pipeline, images: int) -> float:
        difference = self._decode_images(trial, images) - self._pixels[:images]
        error = float(np.mean(difference**2))
        return math.inf if error == 0 else 10 * math.log10(4 / error)

    def _agreement(self, trial: Pipeline, images: int) -> float:
        indices = trial.tokenize(self._pixels[:images])
        return float(np.mean(indices == self._indices[:images]))


def token_ids(images: list[GeneratedImage]) -> np.ndarray:
    """[B, S] int64, raster order."""
    return np.stack([image.token_ids for image in images])


def mean_kl(exact: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats of log-probabilities [..., V]."""
    return float(torch.sum(exact.exp() * (exact - other), dim=-1).mean())


def next_trial(worth: Sequence[float], kept: int, value: float, limit: float) -> int:
    """How many layers to keep next, of layers that change a graph by `worth`, in falling order.

    What each alone changes adds up to what all change, nearly: with some of them kept, a graph
    changes by so much less.

    Args:
        worth: of each layer.
        kept: how many were kept.
        value: how much the graph changed with them, above the limit.
        limit: how much it may change.
    """
    left = sum(worth[kept:])
    wanted = left * limit / value
    most = math.ceil(MOST_KEPT * len(worth))
    count = kept + 1
    while count < most and not sum(worth[count:]) <= wanted:  # nor of NaN
        count += 1
    return count
