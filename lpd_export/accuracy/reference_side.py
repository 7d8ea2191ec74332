"""The side that is right: the PyTorch model and tokenizer, in FP32.

It follows its own rules, from the group sizes alone: it ignores the mask and the write index that
a graph is fed, so that a wrong one is seen. Knows where its weights come from.
Shapes as in `sides`.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpd_export.accuracy.request import VerifyRequest
from lpd_export.accuracy.sides import BATCH, Drawn, Feed, Outputs, Task, in_shape
from lpd_export.bundle.manifest import Manifest, Origin
from lpd_export.errors import UserError
from lpd_export.files import sha256
from lpd_export.graphs.contract import cache_shape
from lpd_export.images import to_uint8
from lpd_export.progress import Report
from lpd_export.schedule.phases import Phase
from lpd_reference.checkpoint import CheckpointError, load_lpd, load_tokenizer, locate
from lpd_reference.generate import generate, guidance_scale
from lpd_reference.lpd import LPD, LayerCache, LPDConfig
from lpd_reference.vq import VQConfig, VQTokenizer


class WholeCache(LayerCache):
    """A layer's cache that also keeps the queries' keys and values of its last step."""

    written: tuple[Tensor, Tensor]
    """Keys and values [B, H, T, d] of the last step's context tokens and queries."""

    def extend(self, key: Tensor, value: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        self.written = key, value
        return super().extend(key, value, keep)


class Reference:
    """The PyTorch model and tokenizer."""

    name = "reference"
    feed_type = np.float32

    def __init__(self, model: LPD, tokenizer: VQTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.faults: dict[str, list[str]] = {}  # it has no graph that could fail

    def cast(self, feed: Feed) -> dict[str, NDArray[Any]]:
        return dict(feed)

    @torch.inference_mode()
    def draw(self, task: Task, report: Report) -> Drawn:
        token_ids, pixels = [], []
        for start in range(0, task.images, BATCH):
            chunk = slice(start, start + BATCH)
            report(f"drawing images with the reference: {start} of {task.images}")
            drawn = self._generate(task, chunk)
            token_ids.append(drawn.numpy())
            pixels.append(to_uint8(self.tokenizer.decode(drawn).numpy()))
        return Drawn(np.concatenate(token_ids), np.concatenate(pixels))

    def _generate(self, task: Task, chunk: slice) -> Tensor:
        sampling = task.sampling
        return generate(
            self.model,
            torch.tensor(task.labels[chunk]),
            torch.from_numpy(task.orders[chunk]),
            task.schedule.group_sizes.tolist(),
            torch.from_numpy(task.uniform[chunk]),
            cfg=sampling.cfg,
            guidance=sampling.guidance,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        ).token_ids

    @torch.inference_mode()
    def sequence_logits(self, task: Task, token_ids: NDArray[np.int64]) -> Tensor:
        sizes, logits = task.schedule.group_sizes.tolist(), []
        for i, label in enumerate(task.labels):
            tokens = torch.from_numpy(token_ids[[i]])
            order = torch.from_numpy(task.orders[[i]])
            guided = self.model(tokens, torch.tensor([label]), order, sizes)
            if task.sampling.guided:
                null = self.model(tokens, None, order, sizes)
                guided = null + self._scale(task)[:, None] * (guided - null)
            logits.append(guided)
        return torch.cat(logits)

    def _scale(self, task: Task) -> Tensor:
        sampling = task.sampling
        return guidance_scale(sampling.cfg, sampling.guidance, self.model.config.cells)

    @torch.inference_mode()
    def decode(self, task: Task, phase: Phase, feed: Feed) -> Outputs:
        past, caches, config = past_rows(task, phase), [], self.model.config
        by_heads = cache_shape(config.heads, config.cells, config.head_dim, fused_attention=True)
        for i in range(config.depth):
            key, value = (
                torch.from_numpy(in_shape(feed[f"past_{kind}_{i}"], by_heads))
                for kind in ("key", "value")
            )
            rows = (key[:, :, :past], value[:, :, :past]) if past else (None, None)
            caches.append(WholeCache(*rows))
        positions = torch.from_numpy(feed["positions"])
        context = self.content(torch.from_numpy(feed["token_ids"]))
        logits = self.model.decode_step(context, positions, [*caches])
        outputs: Outputs = OrderedDict(logits=logits.numpy())
        guided = logits
        if task.sampling.guided:
            scale = self._scale(task)[phase.first_cell : phase.first_cell + phase.queries]
            conditional, null = logits.chunk(2)
            guided = null + scale[:, None] * (conditional - null)
        outputs["guided_logits"] = guided.numpy()
        for number, kind in enumerate(("key", "value")):
            for i, cache in enumerate(caches):
                before = feed[f"past_{kind}_{i}"]
                present = in_shape(before, by_heads).copy()
                written = cache.written[number].numpy()
                present[:, :, past : past + written.shape[2]] = written
                outputs[f"present_{kind}_{i}"] = in_shape(present, before.shape[1:])
        return outputs

    def content(self, token_ids: Tensor) -> Tensor:
        """Content [R, C, D] of context tokens: ids from V on are classes, the last no class."""
        config = self.model.config
        table = torch.cat(
            [self.model.token_emb.weight, self.model.class_emb.weight, self.model.fake_latent]
        )
        assert len(table) == config.vocab_size + config.num_classes + 1
        return table[token_ids]

    @torch.inference_mode()
    def detokenize(self, feed: Feed) -> Outputs:
        return OrderedDict(image=self.tokenizer.decode(torch.from_numpy(feed["indices"])).numpy())

    @torch.inference_mode()
    def tokenize(self, feed: Feed) -> Outputs:
        indices = self.tokenizer.encode(torch.from_numpy(feed["image"]))
        return OrderedDict(indices=indices.flatten(1).numpy())


def past_rows(task: Task, phase: Phase) -> int:
    """How many cache rows hold context tokens of the steps before a phase.

    From the group sizes alone, whatever the phase says of itself.
    """
    return int(1 + task.schedule.group_sizes[: phase.index - 1].sum()) if phase.index else 0


# ----------------------------------------------------------------------------------- its weights


def open_reference(
    request: VerifyRequest, manifest: Manifest, remarks: list[str], report: Report
) -> Reference:
    """The reference with the weights that a bundle was made from, or with those of the request.

    Raises:
        UserError: if the files are not there, damaged, or of another architecture.
    """
    report("loading the reference")
    seed = manifest.made["random_weights_seed"]
    config, vq_config = architecture(manifest)
    if seed is not None and not (request.checkpoint or request.tokenizer):
        model, vq = LPD(config).initialize(seed), VQTokenizer(vq_config).initialize(seed)
        return Reference(model.requires_grad_(False).eval(), vq.requires_grad_(False).eval())
    checkpoint = find_weights(
        "--checkpoint", request.checkpoint, manifest.made["checkpoint"], remarks
    )
    tokenizer = find_weights("--tokenizer", request.tokenizer, manifest.made["tokenizer"], remarks)
    try:
        model = load_lpd(checkpoint, grid=config.grid, heads=config.heads)
        vq = load_tokenizer(tokenizer)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    for file, ours, theirs in (
        (checkpoint, config, model.config),
        (tokenizer, vq_config, vq.config),
    ):
        check_architecture(file, dataclasses.asdict(ours), dataclasses.asdict(theirs))
    return Reference(model, vq)


def architecture(manifest: Manifest) -> tuple[LPDConfig, VQConfig]:
    """The architectures that a bundle was made from."""
    model, tokenizer = dataclasses.asdict(manifest.model), dataclasses.asdict(manifest.tokenizer)
    fields = {field.name for field in dataclasses.fields(LPDConfig)}
    config = LPDConfig(**{key: value for key, value in model.items() if key in fields})
    fields = {field.name for field in dataclasses.fields(VQConfig)}
    tokenizer["channel_multipliers"] = tuple(tokenizer["channel_multipliers"])
    return config, VQConfig(**{key: value for key, value in tokenizer.items() if key in fields})


def check_architecture(file: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raises UserError unless a file's architecture is the bundle's."""
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(
                f"{file} is another model than the bundle's: its {key} is {theirs[key]}, the "
                f"bundle's {value}"
            )


def find_weights(option: str, given: str | None, made: Origin | None, remarks: list[str]) -> Path:
    """The file of weights that the user names, or else that the bundle was made from.

    Raises:
        UserError: if there is none.
    """
    source = given or (made["source"] if made else None)
    if source is None:
        raise UserError(f"the bundle has random weights of a seed: {option} must be given as well")
    try:
        file = locate(source)
    except CheckpointError as error:
        hint = "" if given else f"; it is what the bundle was made from: say with {option} where"
        raise UserError(f"{error}{hint}") from error
    if made is None or sha256(file) != made["sha256"]:
        remarks.append(f"{file} is not the file that the bundle was made from: its content differs")
    return file
