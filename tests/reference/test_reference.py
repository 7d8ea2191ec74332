"""The reference: recorded vectors, who sees whom, guidance and sampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import golden
from lpd_reference import LPD, PUBLISHED_MODELS, LPDConfig, VQConfig, VQTokenizer, generate
from lpd_reference.generate import GuidanceSchedule, draw, filter_logits, guidance_scale
from lpd_reference.lpd import teacher_forcing_mask

LAST_UNIFORM = 1 - 2**-53
"""The greatest double below 1."""

VOCABULARY = 11
CLASSES = 5


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def lively_model(seed: int, grid: int = 3) -> LPD:
    """A small model; its weights are larger than at initialisation, so that attention matters."""
    config = LPDConfig(32, 2, 2, grid, num_classes=CLASSES, vocab_size=VOCABULARY)
    model = LPD(config).initialize(seed).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10)
    return model


def random_orders(count: int, cells: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(cells, generator=generator) for _ in range(count)])


def random_integers(high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def random_uniform(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def partitions(cells: int) -> st.SearchStrategy[list[int]]:
    """Group sizes that sum to `cells`."""
    return st.sets(st.integers(1, cells - 1)).map(
        lambda cuts: np.diff([0, *sorted(cuts), cells]).tolist()
    )


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small are not worth waking another core for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


seeds = st.integers(0, 2**31)
grids_and_sizes = st.integers(2, 4).flatmap(
    lambda grid: st.tuples(st.just(grid), partitions(grid * grid))
)
finite_logits = st.floats(-20, 20, width=32)


# ----------------------------------------------------------------------------- recorded vectors


@pytest.mark.parametrize("name", golden.LPD_NAMES)
@pytest.mark.parametrize("case", ["guided", "plain", "null"])
@pytest.mark.parametrize("uniform", [0.0, 0.37, LAST_UNIFORM])
def test_recorded_generation(name: str, case: str, uniform: float) -> None:
    recorded = golden.read(name)
    orders = recorded.expect["orders"]
    result = generate(
        golden.lpd(recorded),
        None if case == "null" else recorded.expect["labels"],
        orders,
        recorded.config["group_sizes"],
        torch.full(orders.shape, uniform, dtype=torch.float64),
        cfg=1.0 if case == "plain" else recorded.config["cfg_scale"],
        guidance=recorded.config["cfg_schedule"],
        top_k=1,
    )
    assert result.token_ids.equal(recorded.expect[f"{case}.tokens"])
    close(result.logits, recorded.expect[f"{case}.logits"])


@pytest.mark.parametrize("name", golden.LPD_NAMES)
def test_a_temperature_near_zero_is_greedy(name: str) -> None:
    recorded = golden.read(name)
    orders = recorded.expect["orders"]
    result = generate(
        golden.lpd(recorded),
        recorded.expect["labels"],
        orders,
        recorded.config["group_sizes"],
        random_uniform(tuple(orders.shape), seed=0),
        cfg=recorded.config["cfg_scale"],
        guidance=recorded.config["cfg_schedule"],
        temperature=1e-5,
    )
    assert result.token_ids.equal(recorded.expect["guided.tokens"])


@pytest.mark.parametrize("name", golden.LPD_NAMES)
def test_recorded_teacher_forcing(name: str) -> None:
    recorded = golden.read(name)
    tokens, orders = recorded.expect["teacher.tokens"], recorded.expect["orders"]
    logits = golden.lpd(recorded)(
        tokens, recorded.expect["labels"], orders, recorded.config["teacher_group_sizes"]
    )
    close(logits, recorded.expect["teacher.logits"])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.gather(1, orders).flatten())
    close(loss[None], recorded.expect["teacher.loss"])


@pytest.mark.parametrize("name", golden.VQ_NAMES)
def test_recorded_images(name: str) -> None:
    recorded = golden.read(name)
    tokenizer = golden.tokenizer(recorded)
    close(tokenizer.decode(recorded.expect["indices"]), recorded.expect["image"])
    image = recorded.expect["encode_image"]
    close(tokenizer.encode_latent(image), recorded.expect["encode_latent"])
    assert tokenizer.encode(image).equal(recorded.expect["encode_indices"])


# ------------------------------------------------------------------------------ the architecture


@pytest.mark.parametrize(("name", "millions"), [("lpd-l", 337), ("lpd-xl", 752), ("lpd-xxl", 1400)])
def test_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = LPD(LPDConfig(**PUBLISHED_MODELS[name], grid=16))
    assert model.config.head_dim == 64
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_published_tokenizer() -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer(VQConfig())
    assert tokenizer.config.stride == 16
    assert sum(p.numel() for p in tokenizer.parameters()) / 1e6 == pytest.approx(71.9, abs=0.05)


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValueError, match="dim 64 does not divide into 5 heads"):
        LPDConfig(64, 1, 5, 4)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = LPDConfig(32, 2, 2, 3, num_classes=CLASSES, vocab_size=VOCABULARY)
    one, same, other = (LPD(config).initialize(seed).state_dict() for seed in (1, 1, 2))
    assert all(one[key].equal(same[key]) for key in one)
    matrices = [key for key in one if one[key].dim() > 1]
    assert len(matrices) == 6 + 4 * config.depth
    assert not any(one[key].equal(other[key]) for key in matrices)
    drawn = torch.cat([one[key].flatten() for key in matrices])
    assert drawn.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(drawn.mean().item()) < 1e-3
    for key in set(one) - set(matrices):
        assert (one[key] == (1.0 if key.endswith("weight") else 0.0)).all()


def test_initial_tokenizer_weights_depend_on_the_seed_alone() -> None:
    config = VQConfig(32, (1, 2), 1, 32, 16, 4)
    one, same, other = (VQTokenizer(config).initialize(seed).state_dict() for seed in (1, 1, 2))
    assert all(one[key].equal(same[key]) for key in one)
    assert not any(one[key].equal(other[key]) for key in one if one[key].dim() > 1)
    image = VQTokenizer(config).initialize(1).decode(random_integers(16, (2, 9), seed=3))
    assert image.shape == (2, 3, 6, 6)
    assert 0.1 < image.std().item() < 10


def test_the_nearest_codebook_row_is_by_angle() -> None:
    tokenizer = VQTokenizer(VQConfig(32, (1, 2), 1, 32, 16, 4)).initialize(5)
    tokenizer.quantize.embedding.weight.data *= torch.arange(1, 17)[:, None]
    latent = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(6))
    rows = tokenizer.quantize.embedding.weight.detach().double().numpy()
    found = tokenizer.quantize(latent)
    for image, index in itertools.product(range(2), range(9)):
        vector = latent[image, :, index // 3, index % 3].double().numpy()
        angles = [np.dot(row, vector) / np.linalg.norm(row) for row in rows]
        assert found[image, index] == int(np.argmax(angles))


def test_indices_that_make_no_square() -> None:
    tokenizer = VQTokenizer(VQConfig(32, (1, 2), 1, 32, 16, 4)).initialize(0)
    with pytest.raises(ValueError, match="6 indices do not make a square grid"):
        tokenizer.decode(torch.zeros(1, 6, dtype=torch.int64))


# -------------------------------------------------------------------------------- who sees whom


@given(st.integers(1, 6).flatmap(lambda grid: partitions(grid * grid + 1)))
def test_the_teacher_forcing_mask_is_the_rule(sizes: list[int]) -> None:
    group_of_cell = [group for group, size in enumerate(sizes) for _ in range(size)]
    # The condition counts as the group before the first.
    sequence = [("context", -1)]
    sequence += [("context", group) for group in group_of_cell if group < len(sizes) - 1]
    sequence += [("query", group) for group in group_of_cell]

    def sees(row: tuple[str, int], column: tuple[str, int]) -> bool:
        match row[0], column[0]:
            case "context", "context":  # all up to the end of its own group
                return column[1] <= row[1]
            case "query", "context":  # what was sampled in the steps before its own
                return column[1] < row[1]
            case "query", "query":  # those of its own step
                return column[1] == row[1]
        return False

    expected = [[sees(row, column) for column in sequence] for row in sequence]
    assert teacher_forcing_mask(torch.tensor(sizes)).tolist() == expected
    alone = [
        [seen and (i == j or sequence[j][0] == "context") for j, seen in enumerate(row)]
        for i, row in enumerate(expected)
    ]
    assert teacher_forcing_mask(torch.tensor(sizes), mutual_visibility=False).tolist() == alone


@given(
    grids_and_sizes,
    seeds,
    st.sampled_from([1.0, 0.0, 2.5, 6.0]),
    st.sampled_from(["linear", "constant"]),
)
@settings(max_examples=40)
def test_decoding_step_by_step_is_the_teacher_forced_pass(
    grid_and_sizes: tuple[int, list[int]], seed: int, cfg: float, guidance: GuidanceSchedule
) -> None:
    grid, sizes = grid_and_sizes
    cells = grid * grid
    model = lively_model(seed, grid)
    orders, labels = random_orders(2, cells, seed), random_integers(CLASSES, (2,), seed)
    uniform = random_uniform((2, cells), seed)
    result = generate(model, labels, orders, sizes, uniform, cfg=cfg, guidance=guidance)
    conditional = model(result.token_ids, labels, orders, sizes)
    null = model(result.token_ids, None, orders, sizes)
    for n in range(cells):
        scale = cfg if guidance == "constant" else 1 + (cfg - 1) * n / cells
        expected = null[:, n] + scale * (conditional[:, n] - null[:, n])
        close(result.logits[:, n], expected, 1e-3 if cfg > 1 else 1e-4)


def test_a_cache_keeps_context_and_no_queries() -> None:
    model, cache = lively_model(0), lively_model(0).new_cache()
    model.decode_step(model.condition(None, 1), torch.tensor([[0, 4, 2]]), cache)
    assert [len(layer) for layer in cache] == [1, 1]
    context = model.token_emb(torch.tensor([[7, 3]]))
    logits = model.decode_step(context, torch.tensor([[4, 2, 9, 1, 5]]), cache)
    assert logits.shape == (1, 3, VOCABULARY)
    assert [len(layer) for layer in cache] == [3, 3]


@given(partitions(9).filter(lambda sizes: len(sizes) > 1), seeds, st.data())
@settings(max_examples=40)
def test_tokens_are_seen_by_later_groups_alone(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    model = lively_model(seed % 7)
    orders, tokens = random_orders(1, 9, seed), random_integers(VOCABULARY, (1, 9), seed)
    group = data.draw(st.integers(0, len(sizes) - 1), label="group")
    first, after = sum(sizes[:group]), sum(sizes[: group + 1])
    changed = tokens.clone()
    changed[0, orders[0, data.draw(st.integers(first, after - 1), label="cell")]] += 1
    labels = torch.tensor([2])
    before = model(tokens, labels, orders, sizes)
    # One entry above the vocabulary wraps around.
    now = model(changed % VOCABULARY, labels, orders, sizes)
    close(now[:, :after], before[:, :after], 1e-5)
    if after < 9:
        assert (now - before)[:, after:].abs().amax(dim=-1).min() > 1e-4


@given(partitions(9).filter(lambda sizes: max(sizes[:-1], default=0) > 1), seeds, st.data())
@settings(max_examples=40)
def test_queries_of_a_step_see_each_other(sizes: list[int], seed: int, data: st.DataObject) -> None:
    """Moves one query to a cell of a later group: its mates notice, earlier steps do not."""
    model = lively_model(seed % 7)
    orders, tokens = random_orders(1, 9, seed), random_integers(VOCABULARY, (1, 9), seed)
    groups = [group for group, size in enumerate(sizes[:-1]) if size > 1]
    group = data.draw(st.sampled_from(groups), label="group")
    first, after = sum(sizes[:group]), sum(sizes[: group + 1])
    moved, other = (data.draw(st.integers(*ends)) for ends in ((first, after - 1), (after, 8)))
    swapped = orders.clone()
    swapped[0, [moved, other]] = orders[0, [other, moved]]

    before = model(tokens, None, orders, sizes)
    now = model(tokens, None, swapped, sizes)
    close(now[:, :first], before[:, :first], 1e-5)
    difference = (now - before).abs().amax(dim=-1)[0]
    assert difference[first:after].min() > 1e-4


@given(partitions(9), seeds)
@settings(max_examples=25)
def test_the_order_within_a_group_does_not_matter(sizes: list[int], seed: int) -> None:
    model = lively_model(seed % 7)
    orders, tokens = random_orders(1, 9, seed), random_integers(VOCABULARY, (1, 9), seed)
    shuffle = torch.cat(
        [
            start + random_orders(1, size, seed + start)[0]
            for start, size in zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True)
        ]
    )
    labels = torch.tensor([1])
    before = model(tokens, labels, orders, sizes)
    close(model(tokens, labels, orders[:, shuffle], sizes), before[:, shuffle])


def test_the_class_is_seen_by_every_query() -> None:
    model, sizes = lively_model(0), [1, 3, 5]
    orders, tokens = random_orders(1, 9, 0), random_integers(VOCABULARY, (1, 9), 0)
    one, other, null = (
        model(tokens, labels, orders, sizes)
        for labels in (torch.tensor([0]), torch.tensor([1]), None)
    )
    assert (one - other).abs().amax(dim=-1).min() > 1e-4
    assert (one - null).abs().amax(dim=-1).min() > 1e-4


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model, sizes = lively_model(1), [1, 2, 6]
    orders, labels = random_orders(4, 9, 1), torch.tensor([0, 3, 3, 1])
    uniform = random_uniform((4, 9), seed=1)
    together = generate(model, labels, orders, sizes, uniform, cfg=3.0)
    for i in range(4):
        row = slice(i, i + 1)
        alone = generate(model, labels[row], orders[row], sizes, uniform[row], cfg=3.0)
        assert alone.token_ids.equal(together.token_ids[row])
        close(alone.logits, together.logits[row])


# ------------------------------------------------------------------------------------- guidance


def test_guidance_scales() -> None:
    assert guidance_scale(5.0, "linear", 4).tolist() == [1, 2, 3, 4]
    assert guidance_scale(5.0, "constant", 4).tolist() == [5, 5, 5, 5]
    assert guidance_scale(1.0, "linear", 3).tolist() == [1, 1, 1]
    assert guidance_scale(0.0, "linear", 2).tolist() == [1, 0.5]


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_an_unknown_guidance_schedule(cfg: float) -> None:
    arguments = (torch.tensor([0]), random_orders(1, 9, 0), [4, 5], torch.zeros(1, 9))
    with pytest.raises(ValueError, match="'cosine' is neither 'constant' nor 'linear'"):
        generate(lively_model(0), *arguments, cfg=cfg, guidance="cosine")  # type: ignore[arg-type]


@pytest.mark.parametrize("guidance", ["linear", "constant"])
def test_a_scale_of_one_is_no_guidance(guidance: GuidanceSchedule) -> None:
    model, sizes = lively_model(2), [1, 2, 6]
    orders, labels = random_orders(3, 9, 2), torch.tensor([0, 1, 4])
    uniform = random_uniform((3, 9), seed=2)

    def run(labels: Tensor | None, cfg: float) -> tuple[Tensor, Tensor]:
        return generate(model, labels, orders, sizes, uniform, cfg=cfg, guidance=guidance)

    tokens, logits = run(labels, 1.0)
    close(logits, model(tokens, labels, orders, sizes))
    nearly_tokens, nearly_logits = run(labels, 1.0 + 1e-6)
    assert nearly_tokens.equal(tokens)
    close(nearly_logits, logits)
    # Without a class there is nothing to guide towards.
    tokens, logits = run(None, 1.0)
    close(logits, model(tokens, None, orders, sizes))
    assert run(None, 7.0)[1].equal(logits)


@pytest.mark.parametrize(
    ("grid", "cells", "sizes"),
    [(3, 9, [4, 4]), (3, 9, [5, 5]), (3, 9, []), (3, 4, [4]), (2, 9, [9]), (3, 4, [9])],
)
def test_group_sizes_that_do_not_fill_the_grid(grid: int, cells: int, sizes: list[int]) -> None:
    orders, uniform = random_orders(1, cells, 0), torch.zeros(1, cells)
    with pytest.raises(ValueError, match=f"{sum(sizes)} cells in groups, {cells} in the orders"):
        generate(lively_model(0, grid), None, orders, sizes, uniform)


# ------------------------------------------------------------------------------------- sampling


@given(
    st.lists(st.one_of(finite_logits, st.just(-math.inf)), min_size=1, max_size=40),
    st.one_of(st.floats(0, LAST_UNIFORM), st.sampled_from([0.0, LAST_UNIFORM])),
)
def test_draw_inverts_the_cumulative_distribution(logits: list[float], uniform: float) -> None:
    """Laid out in bands of one nat below the best, by id within a band."""
    assume(max(logits) > -math.inf)
    weights = [math.exp(logit - max(logits)) for logit in logits]
    probabilities = [weight / math.fsum(weights) for weight in weights]
    drawn = int(draw(torch.tensor(logits), torch.tensor(uniform, dtype=torch.float64)))
    layout = sorted(range(len(logits)), key=lambda i: (band(max(logits), logits[i]), i))
    below = math.fsum(probabilities[i] for i in layout[: layout.index(drawn)])
    assert probabilities[drawn] > 0
    assert below - 1e-13 <= uniform < below + probabilities[drawn] + 1e-13


def band(best: float, logit: float) -> float:
    return min(np.floor(np.float32(best) - np.float32(logit)), 31)


def test_draw_by_hand() -> None:
    logits = torch.tensor([0, 0.25, 0.5, 0, 0.25, 0]).log()
    uniform = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, LAST_UNIFORM], dtype=torch.float64)
    assert draw(logits.expand(6, -1), uniform).tolist() == [1, 1, 2, 2, 4, 4]
    # The second is more than a nat, the first more than two below the third.
    logits = torch.tensor([0.05, 0.2, 0.75]).log()
    uniform = torch.tensor([0.0, 0.74, 0.76, 0.94, 0.96, LAST_UNIFORM], dtype=torch.float64)
    assert draw(logits.expand(6, -1), uniform).tolist() == [2, 2, 1, 1, 0, 0]
    # A border belongs to the token above it.
    borders = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    assert draw(torch.zeros(4, 4), borders).tolist() == [0, 1, 2, 3]


@given(
    st.lists(finite_logits, min_size=2, max_size=40),
    st.integers(1, 50),
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.5, LAST_UNIFORM]),
)
def test_a_filtered_token_is_never_drawn(
    logits: list[float], top_k: int, top_p: float, uniform: float
) -> None:
    filtered = filter_logits(torch.tensor(logits), top_k, top_p)
    drawn = int(draw(filtered, torch.tensor(uniform, dtype=torch.float64)))
    assert filtered[drawn] > -math.inf


@pytest.mark.parametrize("seed", range(20))
def test_the_ends_of_a_large_vocabulary(seed: int) -> None:
    """Sums of 16384 probabilities do not end in 1 exactly, and still give a possible token."""
    logits = torch.randn(4, 16384, generator=torch.Generator().manual_seed(seed))
    logits[:, :100] = logits[:, -100:] = -math.inf
    ends = [torch.full((4,), end, dtype=torch.float64) for end in (0.0, LAST_UNIFORM)]
    for row, first, last in zip(logits, draw(logits, ends[0]), draw(logits, ends[1]), strict=True):
        depth = (row.max() - row).floor()
        possible = row.isfinite()
        assert first == (depth == 0).nonzero().min()
        assert last == (possible & (depth == depth[possible].max())).nonzero().max()


def kept(filtered: Tensor, logits: list[float]) -> set[int]:
    """Which entries a filter kept, all of them unchanged."""
    entries = {i for i, logit in enumerate(filtered.tolist()) if logit != -math.inf}
    assert all(filtered[i].item() == logits[i] for i in entries)
    return entries


@given(st.lists(finite_logits, min_size=1, max_size=30), st.integers(1, 40))
def test_top_k_keeps_the_greatest(logits: list[float], top_k: int) -> None:
    entries = kept(filter_logits(torch.tensor(logits), top_k, None), logits)
    # Entries that tie with the last one kept are kept too.
    least = sorted(logits, reverse=True)[:top_k][-1]
    assert entries == {i for i, logit in enumerate(logits) if logit >= least}


@given(st.lists(finite_logits, min_size=1, max_size=30), st.floats(1e-3, 1, exclude_max=True))
def test_top_p_keeps_the_smallest_set_that_reaches_it(logits: list[float], top_p: float) -> None:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    reached = [0.0]
    for i in ranked:
        reached.append(reached[-1] + weights[i] / math.fsum(weights))
    assume(all(abs(share - top_p) > 1e-5 for share in reached))
    size = next((n for n, share in enumerate(reached) if share >= top_p), len(logits))
    entries = kept(filter_logits(torch.tensor(logits), None, top_p), logits)
    assert len(entries) == size
    assert sorted(logits[i] for i in entries) == sorted(logits[i] for i in ranked[:size])


def test_filters_at_their_limits() -> None:
    logits = [0.0, 3.0, -90.0, 1.0]
    assert kept(filter_logits(torch.tensor(logits), None, None), logits) == {0, 1, 2, 3}
    assert kept(filter_logits(torch.tensor(logits), 4, 1.0), logits) == {0, 1, 2, 3}
    assert kept(filter_logits(torch.tensor(logits), None, 1e-9), logits) == {1}
    assert kept(filter_logits(torch.tensor(logits), None, 0.0), logits) == {1}
    assert kept(filter_logits(torch.tensor(logits), 1, 0.9), logits) == {1}
    # In float32 the first alone reaches 1, but all that is asked for is all there is.
    logits = [0.0, -40.0, -30.0]
    assert kept(filter_logits(torch.tensor(logits), None, 1.0), logits) == {0, 1, 2}


def test_the_nucleus_is_of_what_top_k_left() -> None:
    # Of all, the first has 0.4 and three are needed for 0.75; of the top two it has 0.57.
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert filter_logits(logits, None, 0.75).isfinite().tolist() == [True, True, True, False]
    assert filter_logits(logits, 2, 0.75).isfinite().tolist() == [True, True, False, False]
    assert filter_logits(logits, 2, 0.55).isfinite().tolist() == [True, False, False, False]
    assert filter_logits(logits, None, 0.55).isfinite().tolist() == [True, True, False, False]


def test_filters_treat_rows_alone() -> None:
    logits = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0))
    together = filter_logits(logits, 7, 0.6)
    for i, j in itertools.product(range(3), range(4)):
        assert together[i, j].equal(filter_logits(logits[i, j], 7, 0.6))


def test_each_token_has_its_own_number_in_generation_order() -> None:
    orders, uniform = random_orders(4, 16, 5), random_uniform((4, 16), seed=5)
    labels = torch.tensor([0, 1, 2, 3])
    result = generate(lively_model(5, 4), labels, orders, [1, 2, 5, 8], uniform, cfg=2.0)
    assert draw(result.logits, uniform).equal(result.token_ids.gather(1, orders))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (2.0, 5, None), (1.0, None, 0.8), (0.7, 6, 0.9)],
)
def test_tokens_are_as_frequent_as_they_are_probable(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    count = 8000
    model = lively_model(3, grid=1)
    orders = torch.zeros(count, 1, dtype=torch.int64)
    uniform = random_uniform((count, 1), seed=4)
    result = generate(
        model,
        torch.full((count,), 2),
        orders,
        [1],
        uniform,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    weights = (result.logits[0, 0].double() / temperature).exp().numpy()
    ranked = np.argsort(-weights)[: top_k or VOCABULARY]
    if top_p is not None:
        share = weights[ranked].cumsum() / weights[ranked].sum()
        ranked = ranked[: 1 + int(np.searchsorted(share, top_p))]
        assert len(ranked) < (top_k or VOCABULARY)
    expected = np.zeros(VOCABULARY)
    expected[ranked] = count * weights[ranked] / weights[ranked].sum()
    counts = np.bincount(result.token_ids[:, 0].numpy(), minlength=VOCABULARY)
    assert (counts[expected == 0] == 0).all()
    # Chi-square of at most ten degrees of freedom exceeds 35 once in 10,000 draws.
    likely = expected > 0
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() < 35
