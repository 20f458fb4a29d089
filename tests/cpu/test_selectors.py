"""Other ways to choose tiles: as many as skip-softmax keeps, and by what they are said to look at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from examples.quality import selectors
from examples.quality.choosing import chosen_like
from examples.quality.orders import ORDERS
from examples.quality.selectors import SELECTORS, Prompt, top_mass
from modelopt_sparse.calls import AttentionCall
from modelopt_sparse.errors import UnsupportedCall
from modelopt_sparse.kernels import DENSE, NMSparsity, Plan, SkipSoftmax, attention_reference
from tests.inputs import topical

PLAN = Plan(skip=SkipSoftmax(0.5, 16, 16))
LENGTHS = [150, 1, 90]


@pytest.fixture(scope="module")
def call() -> AttentionCall:
    inputs = topical(LENGTHS, LENGTHS, dim=16, strength=5.0, span=16, dtype=torch.float32)
    return AttentionCall(attention_reference, *inputs.qkv, {})


def dropped(call: AttentionCall, plan: Plan) -> float:
    """The mean over rows and heads of the weight that is left out."""
    return float((1 - (call(plan).lse - call(DENSE).lse).nan_to_num(0.0).exp2()).mean())


@pytest.mark.parametrize("name", SELECTORS)
def test_each_keeps_as_many_tiles_of_each_head_as_skip_softmax(call, name):
    wanted = call(PLAN, details=True).kept
    chosen = chosen_like(call, PLAN, SELECTORS[name]).unpacked()
    for own, theirs, n in zip(chosen, wanted, LENGTHS, strict=True):
        if n == 1:
            assert own is None
            continue
        assert torch.equal(own.sum((1, 2)), theirs.sum((1, 2)))
        assert 0 < int(own.sum()) < own.numel()
        rows = torch.arange(own.shape[1])
        assert own[:, rows, (torch.clamp((rows + 1) * 16, max=n) - 1) // 16].all()


def test_the_oracle_drops_least(call):
    masses = {
        name: dropped(call, Plan(tiles=chosen_like(call, PLAN, selector)))
        for name, selector in SELECTORS.items()
    }
    assert min(masses, key=masses.get) == "oracle", masses
    assert 0 < masses["oracle"] <= dropped(call, PLAN)
    assert masses["oracle"] < 0.1 * masses["random"]


def scores_of(name: str, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return SELECTORS[name](Prompt(q[None], k[None], 16, 16))[0]


def test_the_oracle_is_the_weight_of_each_tile():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 50, 8, generator=generator)
    weights = (q @ k.T).masked_fill(torch.ones(50, 50).triu(1).bool(), -torch.inf).softmax(-1)
    found = top_mass(Prompt(q[None], k[None], 16, 16))[0]
    assert found.shape == (4, 4)
    for row in range(4):
        for key in range(4):
            tile = weights[16 * row : 16 * row + 16, 16 * key : 16 * key + 16]
            assert float(found[row, key]) == pytest.approx(float(tile.sum()), abs=1e-5)


def test_a_key_that_all_look_at_is_found_by_what_looks_at_keys():
    """Tile 1 holds a key that every row wants; all else is alike."""
    q, k = torch.zeros(96, 4), torch.zeros(96, 4)
    q[:, 0], k[20, 0] = 1.0, 9.0
    for name in ("oracle", "vertical-slash", "mean similarity"):
        last_row = scores_of(name, q, k)[-1]
        assert int(last_row[:5].argmax()) == 1, name


def test_antidiagonals_cross_every_row_and_column():
    """A tile of larger scores is found wherever in it they lie: one of eight antidiagonals meets them."""
    for column in range(16, 32):
        q, k = torch.zeros(96, 4), torch.zeros(96, 4)
        q[:, 0], k[column, 0] = 1.0, 9.0
        assert int(scores_of("antidiagonal", q, k)[-1][:5].argmax()) == 1


def test_the_window_is_nearest_first_beside_the_sink():
    found = scores_of("window and sink", torch.zeros(96, 4), torch.zeros(96, 4))
    assert found[5].argsort(descending=True).tolist() == [0, 5, 4, 3, 2, 1]


def test_other_plans_are_refused(call):
    for plan in (DENSE, replace(PLAN, nm=NMSparsity(2, 4))):
        with pytest.raises(UnsupportedCall, match="skip alone"):
            chosen_like(call, plan, top_mass)


@pytest.mark.parametrize("option", ["window", "sinks", "softcap"])
def test_other_options_are_refused(call, option):
    value = torch.zeros(call.q.shape[1]) if option == "sinks" else 9
    with pytest.raises(UnsupportedCall, match=option):
        chosen_like(replace(call, options={option: value}), PLAN, top_mass)
    options = {option: None, "scale": 0.25, "causal": True}
    assert chosen_like(replace(call, options=options), PLAN, top_mass)


def test_calls_that_are_not_causal_or_of_whole_prompts_are_refused(call):
    inputs = topical([20], [90], dim=16, strength=5.0, span=16, dtype=torch.float32)
    later = AttentionCall(attention_reference, *inputs.qkv, {})
    for other in (replace(call, options={"causal": False}), later):
        with pytest.raises(UnsupportedCall, match="whole prompts"):
            chosen_like(other, PLAN, top_mass)


def test_in_its_own_order_the_margin_is_what_skip_softmax_decides_by(call):
    """With one lambda for each head. In other orders other tiles stay."""
    wanted = call(PLAN, details=True).kept
    own = chosen_like(call, PLAN, ORDERS["last, first, downward"]).unpacked()
    for name, selector in ORDERS.items():
        found = chosen_like(call, PLAN, selector).unpacked()
        same = [torch.equal(a, b) for a, b in zip(found, own, strict=True) if a is not None]
        assert all(same) == (name == "last, first, downward")
    assert all(torch.equal(a, b) for a, b in zip(own, wanted, strict=True) if a is not None)


@pytest.mark.parametrize("name", {**SELECTORS, **ORDERS})
def test_scores_do_not_depend_on_how_many_row_tiles_are_taken_at_once(name, monkeypatch):
    q, k = torch.randn(2, 3, 150, 16, generator=torch.Generator().manual_seed(1))
    prompt = Prompt(q, k, 16, 32)
    selector = {**SELECTORS, **ORDERS}[name]
    at_once = selector(prompt)
    monkeypatch.setattr(selectors, "_ROWS_AT_ONCE", 16)
    torch.testing.assert_close(selector(prompt), at_once)
