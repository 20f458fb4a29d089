"""Long work of the backward pass is shared: how it is split, and that the sums are the gradients."""

from __future__ import annotations

import pytest
import torch

from modelopt_sparse.kernels import NMSparsity, Plan, SkipSoftmax, SkipSoftmaxDecode, backward
from tests.cpu.test_triton_gradients import check_gradients, small
from tests.cpu.test_triton_tiles import random_map
from tests.inputs import features, needs_interpreter
from tests.thinned import thinned

pytestmark = needs_interpreter

NM = NMSparsity(2, 4, 1, 3)
PLANS = {
    "dense": Plan(),
    "2:4": Plan(NM),
    "skip": Plan(skip=SkipSoftmax(0.3, 16, 16), skip_decode=SkipSoftmaxDecode(0.3, 16, 64)),
}


def split(visits: list[int], n_programs: int, least: int):
    """Slots [column, share, shares], and the shares of each column, of columns with so many visits."""
    from modelopt_sparse.kernels.programs.shares import shares_kernel

    lengths = torch.tensor([[n // 3, n - n // 3] for n in visits], dtype=torch.int32)
    slots = torch.full((2 * n_programs, 3), -7, dtype=torch.int32)
    shares_of = torch.full((len(visits),), -7, dtype=torch.int32)
    shares_kernel[(1,)](lengths, len(visits), n_programs, least, slots, len(slots), shares_of)
    return slots.tolist(), shares_of.tolist()


def test_columns_longer_than_their_part_are_split():
    slots, shares_of = split([4, 100, 0, 9, 31], n_programs=16, least=1)  # 144 / 16 = 9 visits
    assert shares_of == [0, 12, 0, 0, 4]
    assert slots[:16] == [[1, i, 12] for i in range(12)] + [[4, i, 4] for i in range(4)]
    assert all(column == -1 for column, _, _ in slots[16:])


def test_columns_of_the_least_length_are_not_split():
    slots, shares_of = split([4, 100, 0, 9, 31], n_programs=16, least=50)
    assert shares_of == [0, 2, 0, 0, 0] and slots[2][0] == -1


@pytest.mark.parametrize("n_programs", [1, 7, 264])
def test_there_are_always_slots_enough(n_programs):
    generator = torch.Generator().manual_seed(n_programs)
    for high in (2, 30, 5000):
        visits = torch.randint(0, high, (2100,), generator=generator).tolist()
        slots, shares_of = split(visits, n_programs, least=1)
        used = [slot for slot in slots if slot[0] != -1]
        assert slots[: len(used)] == used and len(used) == sum(shares_of)
        assert used == [[c, i, n] for c, n in enumerate(shares_of) for i in range(n)]


@pytest.fixture
def sums(monkeypatch):
    """Of a GPU with many processors, the shares of the columns that are added up in each launch."""
    seen, kernel = [], backward.add_shares_kernel
    monkeypatch.setattr(backward, "processors", lambda device: 40)
    monkeypatch.setattr(backward, "LEAST_VISITS", 1)

    class Spy:
        def __getitem__(self, grid):
            def launch(k_sums, v_sums, shares, slots, *rest, **options):
                seen.append(shares if slots is None else int(slots[:, 2].max()))
                kernel[grid](k_sums, v_sums, shares, slots, *rest, **options)

            return launch

    monkeypatch.setattr(backward, "add_shares_kernel", Spy())
    return seen


@thinned(4, plan=PLANS, names=["", "bounds"])
def test_gradients_of_shared_columns_are_those_of_the_reference(sums, plan, names):
    inputs = small(q_lens=(150, 1, 20, 0), k_lens=(150, 90, 25, 3), heads=4, kv_heads=2)
    check_gradients(inputs, plan, **features(names, inputs))
    assert max(sums) > 1


@thinned(2, nm={"2:4": NM, "": None})
def test_gradients_of_given_tiles_in_shared_columns(sums, nm):
    inputs = small(q_lens=(300, 20), k_lens=(300, 25), heads=4, kv_heads=2)
    check_gradients(inputs, Plan(nm, tiles=random_map(inputs, 64, 32)))
    assert max(sums) > 1
