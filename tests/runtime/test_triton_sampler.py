"""The Triton kernels, in Triton's interpreter on the CPU, against the plain sampler; and compiled.

That they compile is tested for a GPU that need not be here. What no test can say without one is how
fast they are; `choose_draw_step` compares their draws on the GPU before it uses them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import array_api_compat.torch
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpu_cost import WithTensors
from lpd_export import ImageRequest, Pipeline, Sampling
from lpd_export.runtime import generator, sampler
from lpd_export.runtime.arrays import Arrays, arrays_of
from lpd_export.runtime.sampler import SamplingRows, StepCells, choose_draw_step, first_difference

triton_sampler = pytest.importorskip("lpd_export.runtime.triton_sampler")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # of numbers too large

TORCH = Arrays(array_api_compat.torch, "cpu")
"""As on a GPU, whose arrays are torch's."""
SIDE = 3
"""Cells of other steps on both sides of those that are drawn."""


def drawn(
    draw: sampler.DrawStep,
    logits: Tensor,
    uniform: Tensor,
    samplings: Sequence[Sampling],
    guided: bool,
    given: Tensor | None = None,
    arrays: Arrays = TORCH,
) -> tuple[Tensor, Tensor]:
    """The whole buffers [B, S] of tokens and finite, the step's cells amid others'."""
    images, queries = uniform.shape
    cells = queries + 2 * SIDE
    rows = SamplingRows.of(samplings, cells, logits.shape[-1])
    numbers, all_given = torch.zeros(images, cells).double(), torch.full((images, cells), -1)
    tokens = torch.full((images, cells), -7)
    finite = torch.zeros(images, cells, dtype=torch.bool)
    step = slice(SIDE, SIDE + queries)
    numbers[:, step] = uniform
    if given is not None:
        all_given[:, step] = given
    whole = (numbers, torch.from_numpy(rows.scale), all_given, tokens, finite)
    views = [arrays.put(tensor.numpy()) for tensor in whole]
    cells_of_step = StepCells(*(view[:, step] for view in views))
    filtered = any(sampling.filtered for sampling in samplings)
    draw(arrays.put(logits.numpy()), cells_of_step, rows.on(arrays), guided, filtered)
    return tokens, finite  # which the arrays share their memory with


def even(chance: torch.Generator, *shape: int) -> Tensor:
    return torch.zeros(shape)


def normal(spread: float) -> Callable[..., Tensor]:
    return lambda chance, *shape: spread * torch.randn(shape, generator=chance)


overflowing = normal(1e36)
"""Beyond what a float holds, once guided or at a low temperature."""


def tied(chance: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=chance).float()


def signed_zeros(chance: torch.Generator, *shape: int) -> Tensor:
    return torch.where(torch.rand(shape, generator=chance) < 0.5, 0.0, -0.0)


def one_hot(chance: torch.Generator, *shape: int) -> Tensor:
    place = torch.randint(shape[-1], (*shape[:-1], 1), generator=chance)
    return torch.full(shape, -torch.inf).scatter(-1, place, 3.0)


def half_impossible(chance: torch.Generator, *shape: int) -> Tensor:
    logits = torch.randn(shape, generator=chance)
    logits[..., 1:][logits[..., 1:] < 0] = -torch.inf
    return logits


KINDS = [normal(0.01), normal(3), normal(200), overflowing, even, tied, signed_zeros]
IMPOSSIBLE = [one_hot, half_impossible]
SAMPLINGS = st.builds(
    Sampling,
    cfg=st.sampled_from([0.0, 1.0, 4.8, 1000.0]),
    guidance=st.sampled_from(sampler.GUIDANCE_SCHEDULES),
    temperature=st.sampled_from([0.001, 0.5, 1.0, 3.0, 1000.0]),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(1e-6, 1.0) | st.sampled_from([0.25, 0.5, 1 - 2**-24]),
)


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Iterator[None]:
    """So that few tokens fill several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_sampler, "BLOCK", 32)
        patch.setattr(triton_sampler, "LANES", 16)
        yield


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS + IMPOSSIBLE),
    vocab_size=st.integers(1, 50),
    queries=st.integers(1, 2),
    samplings=st.lists(SAMPLINGS, min_size=1, max_size=2),
    end=st.none() | st.sampled_from([0.0, 0.25, 0.5, 1 - 2**-53]),
    guided=st.booleans(),
)
@example(0, even, 48, 1, [Sampling(top_k=1), Sampling(top_p=0.5)], 0.5, False)
@example(0, tied, 50, 2, [Sampling(top_k=7, top_p=0.5, cfg=2), Sampling()], 1 - 2**-53, True)
def test_kernels_draw_what_the_plain_sampler_draws(
    seed: int,
    kind: Callable[..., Tensor],
    vocab_size: int,
    queries: int,
    samplings: list[Sampling],
    end: float | None,
    guided: bool,
) -> None:
    chance = torch.Generator().manual_seed(seed)
    images = len(samplings)
    guided = guided and kind not in IMPOSSIBLE  # -inf less -inf is no number
    logits = kind(chance, 2 * images if guided else images, queries, vocab_size)
    uniform = torch.rand(images, queries, dtype=torch.float64, generator=chance)
    if end is not None:
        uniform.fill_(end)
    kept = torch.randint(-2 * vocab_size, vocab_size, (images, queries), generator=chance)
    (tokens, finite), (expected, expected_finite), (on_host, finite_on_host) = (
        drawn(draw, logits, uniform, samplings, guided, kept, arrays)
        for draw, arrays in (
            (triton_sampler.draw_step, TORCH),
            (sampler.draw_step, TORCH),
            (sampler.draw_step, arrays_of("cpu")),
        )
    )
    assert finite.equal(expected_finite)
    assert finite_on_host.equal(expected_finite)
    assert on_host.equal(expected)
    overflown = ~finite if kind is overflowing else torch.zeros_like(finite)
    overflown[:, :SIDE] = overflown[:, -SIDE:] = False
    assert tokens[~overflown].equal(expected[~overflown])
    assert ((tokens >= 0) & (tokens < vocab_size))[overflown].all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_broken_logit_is_noticed_in_its_row_alone(value: float, filtered: bool) -> None:
    logits = normal(1)(torch.Generator().manual_seed(0), 2, 2, 40)
    uniform = torch.full((2, 2), 0.6, dtype=torch.float64)
    samplings = [Sampling(top_p=0.9 if filtered else None)] * 2
    expected, _ = drawn(sampler.draw_step, logits, uniform, samplings, guided=False)
    logits[1, 0, 39] = value
    for draw in (triton_sampler.draw_step, sampler.draw_step):
        tokens, finite = drawn(draw, logits, uniform, samplings, guided=False)
        step = slice(SIDE, SIDE + 2)
        assert finite[:, step].tolist() == [[True, True], [False, True]]
        assert tokens[0].equal(expected[0])
        assert tokens[1, SIDE + 1] == expected[1, SIDE + 1]
        assert 0 <= tokens[1, SIDE] < 40


@pytest.mark.parametrize("top_p", [None, 0.875])
def test_a_huge_vocabulary(top_p: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of whole weights is still exact."""
    monkeypatch.setattr(triton_sampler, "BLOCK", 2**16)
    monkeypatch.setattr(triton_sampler, "LANES", 2**14)
    logits, uniform = torch.zeros(1, 1, 2**18), torch.full((1, 1), 0.7, dtype=torch.float64)
    for draw in (triton_sampler.draw_step, sampler.draw_step):
        tokens, _ = drawn(draw, logits, uniform, [Sampling(top_p=top_p)], guided=False)
        assert tokens[0, SIDE] == int(0.7 * (top_p or 1) * 2**18)


@pytest.mark.model
def test_a_whole_generation_is_the_same(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NumPy, whose tokens are the reference's, as on a GPU, and there with the kernels."""
    samplings = [Sampling(cfg=2.0), Sampling(cfg=1.0), Sampling(cfg=4.0, top_k=5, temperature=2)]
    requests = [ImageRequest(i, seed=i, sampling=each) for i, each in enumerate(samplings)]
    with Pipeline.open(small_bundle) as pipeline:
        expected = list(pipeline.stream(requests, batch=3))
        executor = WithTensors(pipeline.executor)
        with Pipeline(pipeline.manifest, pipeline.choose_schedule(None), executor) as other:
            for draw in (sampler.draw_step, triton_sampler.draw_step):
                monkeypatch.setattr(generator, "choose_draw_step", lambda *_, draw=draw: draw)
                found = list(other.stream(requests, batch=3))
                for one, two in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(one.token_ids, two.token_ids)
                    np.testing.assert_array_equal(one.pixels, two.pixels)
            logits = other.teacher_forced_logits(expected)
        np.testing.assert_array_equal(logits, pipeline.teacher_forced_logits(expected))


def test_a_cpu_draws_without_kernels() -> None:
    assert choose_draw_step("cpu") is sampler.draw_step


def test_kernels_that_draw_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def mirrored(logits: Tensor, cells: StepCells, *others: Any) -> None:
        sampler.draw_step(logits, cells._replace(uniform=1 - cells.uniform), *others)

    for arrays in (TORCH, arrays_of("cpu")):
        assert first_difference(sampler.draw_step, arrays) is None
        assert "other tokens" in str(first_difference(mirrored, arrays))
    if torch.cuda.is_available():
        monkeypatch.setattr(triton_sampler, "draw_step", mirrored)
    with pytest.warns(RuntimeWarning, match="some 60 launches a step"):
        assert choose_draw_step.__wrapped__("cuda") is sampler.draw_step


COMPILE = """
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lpd_export.runtime import triton_sampler as sampler

types = dict.fromkeys(("logits", "scales", "temperatures", "top_ps"), "*fp32")
types |= {"uniforms": "*fp64", "finites": "*i1"}
types |= dict.fromkeys(("top_ks", "weights", "givens", "tokens"), "*i64")
types |= dict.fromkeys(("queries", "stride", "vocab_size", "count"), "i32")
for kernel, filtered in ((sampler._filter, True), (sampler._draw, True), (sampler._draw, False)):
    given = {"GUIDED": True, "FILTERED": filtered, "BLOCK": sampler.BLOCK, "LANES": sampler.LANES}
    constants = {name: given[name] for name in kernel.arg_names if name in given}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    built = compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options=sampler.OPTIONS,
    )
    text = built.asm["ptx"]
    assert built.asm["cubin"]
    assert "fma.rn.f32" not in text, "a product and a sum are rounded as one"
    assert set(re.findall(r"div[.\\w]*f32", text)) == {"div.rn.f32"}, "division is approximate"
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_and_round_as_the_plain_sampler(tmp_path: Path) -> None:
    """In a process of its own: in this one Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_is_drawn_does_not_depend_on_how_many_cells_are_drawn_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = normal(3)(torch.Generator().manual_seed(0), 4, 9, 60)
    uniform = torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    samplings = [Sampling(cfg=3, top_k=7), Sampling(temperature=2)]
    host = arrays_of("cpu")
    expected, _ = drawn(sampler.draw_step, logits, uniform, samplings, True, arrays=host)
    monkeypatch.setattr(sampler, "IN_CACHE", 4 * 60)
    tokens, _ = drawn(sampler.draw_step, logits, uniform, samplings, True, arrays=host)
    assert tokens.equal(expected)
