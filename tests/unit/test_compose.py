"""Sums of thin matrices against full ones, TIES and DARE against their papers written out, and what is never added up."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.adapter.compose import MIN_DENSITY, ComposePlan, combined, compose_adapters
from lora_tune.adapter.door import MAX_RANK, open_adapter
from lora_tune.adapter.lowrank import (
    concatenated,
    dare_sum,
    padded,
    scaled,
    ties_sum,
    total,
    trimmed,
    truncated,
    truncated_delta,
)
from lora_tune.adapter.parents import MAX_FACTOR, check_parts, name_of, read_layers
from lora_tune.adapter.resize import fold_adapter, resize_adapter
from lora_tune.errors import AdapterMismatchError, RefusedError, UsageError
from tests.unit.test_door import MODULES, tensors, write
from tests.unit.test_hostile_passport import with_passport

SIZES = st.integers(1, 12)


def _ignore(*_):
    """Take no note."""


def thin(d_out, d_in, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@settings(max_examples=60, deadline=None)
@given(
    SIZES,
    SIZES,
    st.lists(st.tuples(st.integers(1, 6), st.floats(-4, 4).filter(lambda w: abs(w) > 0.01)), min_size=1, max_size=4),
)
def test_a_concatenation_is_the_sum_of_the_full_changes(d_out, d_in, parts):
    terms, expected = [], torch.zeros(d_out, d_in, dtype=torch.float64)
    for seed, (rank, factor) in enumerate(parts):
        a, b = thin(d_out, d_in, rank, seed)
        terms.append(scaled(a, b, factor=factor))
        expected += factor * (b.double() @ a.double())
    whole = concatenated(terms)
    assert whole.rank == sum(rank for rank, _ in parts)
    size = sum(
        abs(factor) * float(b.norm() * a.norm())
        for seed, (rank, factor) in enumerate(parts)
        for a, b in [thin(d_out, d_in, rank, seed)]
    )
    for found in (whole, padded(whole, whole.rank + 3)):
        error = (found.b.double() @ found.a.double() - expected).norm()
        assert float(error) <= 1e-6 * size


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
def test_a_truncation_is_the_best_of_its_rank_and_says_what_it_keeps(d_out, d_in, rank, to, seed):
    a, b = thin(d_out, d_in, rank, seed)
    u, values, v_t = np.linalg.svd((b.double() @ a.double()).numpy(), full_matrices=False)
    best = torch.from_numpy((u[:, :to] * values[:to]) @ v_t[:to])
    share = math.sqrt(float((values[:to] ** 2).sum() / (values**2).sum()))
    for cut, kept in (truncated(scaled(a, b, factor=1.0), to), truncated_delta(b.double() @ a.double(), to)):
        assert cut.a.shape == (to, d_in)
        assert cut.b.shape == (d_out, to)
        # Two singular values that are alike could be swapped: what is lost is compared, not what is kept.
        lost = (cut.b.double() @ cut.a.double() - b.double() @ a.double()).norm()
        assert float(lost) == pytest.approx(
            math.sqrt(float((values[to:] ** 2).sum())), abs=1e-5 * float(a.norm() * b.norm())
        )
        assert kept.share == pytest.approx(share, abs=1e-6)
        if to >= min(d_out, d_in, rank):
            assert float((cut.delta() - best).norm()) <= 1e-5 * float(a.norm() * b.norm())
            assert kept.share == pytest.approx(1.0, abs=1e-6)


def test_a_truncation_splits_its_size_evenly_between_a_and_b():
    a, b = thin(20, 30, 8, 1)
    for cut in (truncated(scaled(a, 100 * b, factor=1.0), 4)[0], truncated_delta(100 * (b @ a), 4)[0]):
        assert torch.allclose(cut.a.norm(dim=1), cut.b.norm(dim=0), rtol=1e-4)
        values = torch.linalg.svdvals(100 * (b @ a))[:4]
        assert torch.allclose(cut.a.norm(dim=1) ** 2, values, rtol=1e-4)


def test_the_norm_kept_of_several_layers_is_that_of_their_squares():
    pairs = [truncated(scaled(*thin(9, 7, 5, seed), factor=1.0), 2) for seed in range(3)]
    spectra = [torch.linalg.svdvals(b.double() @ a.double()) for a, b in (thin(9, 7, 5, seed) for seed in range(3))]
    expected = math.sqrt(sum(float((s[:2] ** 2).sum()) for s in spectra) / sum(float((s**2).sum()) for s in spectra))
    assert total(kept for _, kept in pairs).share == pytest.approx(expected, abs=1e-9)


def test_nothing_is_lost_of_an_adapter_that_changes_nothing():
    for cut, kept in (
        truncated(scaled(torch.ones(4, 6), torch.zeros(5, 4), factor=2.0), 2),
        truncated_delta(torch.zeros(5, 6), 2),
    ):
        assert kept.share == 1.0
        assert not cut.delta().any()
        assert torch.isfinite(cut.a).all()


def naive_ties(deltas, density):
    """Algorithm 1 of the paper, entry by entry."""
    d_out, d_in = deltas[0].shape
    count = max(1, round(density * d_out * d_in))
    trim = []
    for delta in deltas:
        largest = sorted(((abs(delta[i][j]), i, j) for i in range(d_out) for j in range(d_in)), reverse=True)[:count]
        trim.append({(i, j): delta[i][j] for _, i, j in largest})
    merged = np.zeros((d_out, d_in))
    for i in range(d_out):
        for j in range(d_in):
            values = [kept[i, j] for kept in trim if kept.get((i, j), 0.0) != 0.0]
            sign = np.sign(sum(values))
            agreeing = [value for value in values if np.sign(value) == sign]
            merged[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(1, 4), st.floats(MIN_DENSITY, 1.0), st.integers(0, 1000))
def test_ties_is_the_papers_algorithm(d_out, d_in, parts, density, seed):
    deltas = np.random.default_rng(seed).normal(size=(parts, d_out, d_in)).astype(np.float32)
    found = ties_sum([torch.from_numpy(delta) for delta in deltas], density=density)
    assert np.allclose(found.numpy(), naive_ties(deltas.astype(float), density), atol=1e-6)


def test_ties_of_opposite_changes_is_nothing_and_of_equal_ones_the_same():
    delta = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    assert not ties_sum([delta, -delta], density=1.0).any()
    assert torch.allclose(ties_sum([delta, delta, delta], density=1.0), delta)


def test_trimming_keeps_the_largest_entries():
    delta = torch.tensor([[0.1, -5.0, 0.2], [3.0, -0.3, 0.4]])
    assert trimmed(delta, 0.34).tolist() == [[0.0, -5.0, 0.0], [3.0, 0.0, 0.0]]
    assert torch.equal(trimmed(delta, 1.0), delta)
    assert trimmed(delta, 0.01).count_nonzero() == 1


def test_dare_drops_entries_at_random_and_rescales_the_others():
    generator = torch.Generator().manual_seed(5)
    deltas = [torch.randn(40, 50, generator=generator) for _ in range(3)]
    draws = torch.Generator().manual_seed(11)
    expected = np.zeros((40, 50))
    for delta in deltas:
        drawn = torch.rand(40, 50, generator=draws).numpy()
        expected += np.where(drawn < 0.3, delta.numpy().astype(float) / 0.3, 0.0)
    found = dare_sum(deltas, density=0.3, generator=torch.Generator().manual_seed(11))
    assert np.allclose(found.numpy(), expected, atol=1e-5)
    again = dare_sum(deltas, density=0.3, generator=torch.Generator().manual_seed(12))
    assert not torch.equal(found, again)
    assert torch.allclose(dare_sum(deltas, density=1.0, generator=generator), sum(deltas))


def test_dare_is_right_on_average():
    delta = torch.ones(200, 200)
    one = dare_sum([delta], density=0.25, generator=torch.Generator().manual_seed(0))
    assert set(one.unique().tolist()) == {0.0, 4.0}
    # 40,000 draws of variance 3 (0.25 · 16 - 1): four standard errors are 4 · sqrt(3 / 40000).
    assert float(one.mean()) == pytest.approx(1.0, abs=4 * math.sqrt(3 / 40_000))


@pytest.mark.parametrize("method", ["concat", "svd", "ties", "dare"])
def test_a_layer_that_one_adapter_lacks_is_made_of_the_other_alone(method):
    both, alone = scaled(*thin(8, 6, 2, 0), factor=1.0), scaled(*thin(8, 6, 3, 1), factor=1.0)
    plan = ComposePlan(method, "sum", density=1.0)
    layers, kept = combined([{"x": both}, {"x": both, "y": alone}], plan, _ignore, rank=5)
    assert {layer.rank for layer in layers.values()} == {5}
    assert relative(layers["y"].delta(), alone.delta().double()) <= 1e-5
    expected = both.delta() if method == "ties" else 2 * both.delta()
    assert relative(layers["x"].delta(), expected.double()) <= 1e-5
    assert kept["x"].share == pytest.approx(1.0, abs=1e-6)


def test_the_same_seed_drops_the_same_entries():
    parts = [{"x": scaled(*thin(8, 6, 2, 0), factor=1.0), "y": scaled(*thin(8, 6, 2, 1), factor=1.0)}]
    runs = [combined(parts, ComposePlan("dare", "sum", seed=seed), _ignore, rank=6)[0] for seed in (3, 3, 4)]
    assert torch.equal(runs[0]["y"].delta(), runs[1]["y"].delta())
    assert not torch.equal(runs[0]["y"].delta(), runs[2]["y"].delta())


@pytest.mark.parametrize(("config", "factor"), [({}, 4 / 2), ({"use_rslora": True}, 4 / math.sqrt(2))])
def test_layers_are_read_with_their_scaling_and_weight_inside(tmp_path, config, factor):
    layers = read_layers(open_adapter(write(tmp_path / "a", config)), -0.5)
    assert sorted(layers) == MODULES
    b, a = np.arange(16.0).reshape(8, 2), np.arange(16.0).reshape(2, 8)
    assert np.allclose(layers[MODULES[0]].delta().numpy(), -0.5 * factor * (b @ a), rtol=1e-6)


def two(tmp_path, change=None, other=None):
    return [
        (open_adapter(with_passport(tmp_path / "a", change)), 1.0),
        (open_adapter(with_passport(tmp_path / "b", other)), 1.0),
    ]


@pytest.mark.parametrize(
    "field",
    [
        "base.config",
        "base.tensors",
        "base.weights",
        "tokenizer.tokenizer",
        "tokenizer.chat_template",
        "base.quantization",
    ],
)
def test_adapters_of_another_base_tokenizer_or_template_are_refused_naming_the_field(tmp_path, field):
    check_parts(two(tmp_path), allow_unverified=False)
    other = {field: "nf4" if field == "base.quantization" else "1" * 64}
    with pytest.raises(AdapterMismatchError) as caught:
        check_parts(two(tmp_path, None, other), allow_unverified=True)
    assert caught.value.where == field
    assert caught.value.exit_code == 77


def test_an_adapter_without_a_passport_is_taken_only_when_that_is_said(tmp_path):
    parts = [(open_adapter(with_passport(tmp_path / "a")), 1.0), (open_adapter(write(tmp_path / "b")), 1.0)]
    with pytest.raises(RefusedError, match="no passport"):
        compose_adapters(parts, tmp_path / "out", _ignore, plan=ComposePlan("concat", "sum"))
    check_parts(parts, allow_unverified=True)
    assert [name_of(files) for files, _ in parts] == ["home", "b"]


def test_layers_of_other_widths_are_refused(tmp_path):
    content = {name: value for name, value in tensors().items() if "q_proj" in name}
    content = {name: (dtype, [2, 4] if "lora_A" in name else shape, data[: 32 if "lora_A" in name else 64])
               for name, (dtype, shape, data) in content.items()}  # fmt: skip
    parts = [(open_adapter(write(tmp_path / "a")), 1.0), (open_adapter(write(tmp_path / "b", content=content)), 1.0)]
    with pytest.raises(AdapterMismatchError, match=r"8 → 8 in .*, but 4 → 8"):
        check_parts(parts, allow_unverified=True)


@pytest.mark.parametrize("weight", [0.0, math.nan, math.inf, -math.inf, 2 * MAX_FACTOR, -2 * MAX_FACTOR])
def test_a_weight_that_is_no_factor_is_a_usage_error(tmp_path, weight):
    parts = [(open_adapter(write(tmp_path / "a")), weight)]
    with pytest.raises(UsageError, match="weight"):
        check_parts(parts, allow_unverified=True)


def test_dora_is_refused_with_the_way_out(tmp_path):
    content = tensors() | {
        f"base_model.model.{module}.lora_magnitude_vector": ("F32", [8], bytes(32)) for module in MODULES
    }
    files = open_adapter(write(tmp_path / "a", {"use_dora": True}, content))
    for make in (
        lambda: compose_adapters(
            [(files, 1.0)], tmp_path / "out", _ignore, plan=ComposePlan("svd", "x", allow_unverified=True)
        ),
        lambda: resize_adapter(files, tmp_path / "out", _ignore, rank=1),
        lambda: fold_adapter(files, tmp_path / "out", _ignore),
    ):
        with pytest.raises(RefusedError, match="DoRA") as caught:
            make()
        assert "merge" in caught.value.hint
    assert not (tmp_path / "out").exists()


PLANS = {
    "a method that there is not": ComposePlan("average", "sum"),
    "a rank for concat": ComposePlan("concat", "sum", rank=4),
    "rank zero": ComposePlan("svd", "sum", rank=0),
    "a rank that no door lets in": ComposePlan("svd", "sum", rank=MAX_RANK + 1),
    "no density": ComposePlan("ties", "sum", density=0.0),
    "more than all": ComposePlan("dare", "sum", density=1.5),
    "a density that is no number": ComposePlan("dare", "sum", density=math.nan),
    "a negative seed": ComposePlan("dare", "sum", seed=-1),
    "a path as a name": ComposePlan("concat", "../sum"),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_plan_that_cannot_be_meant_is_a_usage_error(tmp_path, plan):
    with pytest.raises(UsageError):
        compose_adapters([(open_adapter(with_passport(tmp_path / "a")), 1.0)], tmp_path / "out", _ignore, plan=plan)


def test_ranks_that_add_up_to_more_than_the_door_lets_in_are_refused(tmp_path):
    rank = MAX_RANK // 2 + 1
    content = {
        f"base_model.model.{MODULES[0]}.{part}.weight": ("F32", shape, bytes(4 * rank * 8))
        for part, shape in (("lora_A", [rank, 8]), ("lora_B", [8, rank]))
    }
    files = open_adapter(write(tmp_path / "a", {"r": rank}, content))
    with pytest.raises(RefusedError, match=f"add up to {2 * rank}") as caught:
        compose_adapters([(files, 1.0)] * 2, tmp_path / "out", _ignore, plan=ComposePlan("concat", "sum"))
    assert "svd" in caught.value.hint


def test_no_adapters_and_too_many_are_usage_errors(tmp_path):
    files = open_adapter(with_passport(tmp_path / "a"))
    for parts in ([], [(files, 1.0)] * 17):
        with pytest.raises(UsageError, match="adapters to compose"):
            compose_adapters(parts, tmp_path / "out", _ignore, plan=ComposePlan("concat", "sum"))


def test_plain_lora_is_not_folded(tmp_path):
    with pytest.raises(UsageError, match="plain LoRA already"):
        fold_adapter(open_adapter(write(tmp_path / "a")), tmp_path / "out", _ignore)
