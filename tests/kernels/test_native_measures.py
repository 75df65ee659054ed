"""The experts' outputs measured in their own pass, against the outputs of each expert by itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.errors import UsageError  # noqa: E402
from tests.kernels.brute_force import make_case  # noqa: E402
from tests.kernels.native_cases import every_variant, native, needs_native  # noqa: E402

pytestmark = needs_native


@every_variant
@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.sampled_from([1, 5, 33, 70]),
    top_k=st.integers(1, 4),
    groups=st.integers(1, 3),
    long=st.booleans(),
    packed=st.booleans(),
    threads=st.sampled_from([1, 3]),
)
def test_measures_are_those_of_each_output(
    isa: str, seed: int, tokens: int, top_k: int, groups: int, long: bool, packed: bool, threads: int
) -> None:
    case = make_case(
        seed, tokens=tokens, experts=5, top_k=top_k, hidden=32 * 17, intermediate=64, packed=packed
    )
    backend = native(isa, threads).for_tokens(100 if long else 1)
    x, ids, weights = (torch.from_numpy(a) for a in (case.x, case.ids, case.weights))
    x, weights = x.float(), weights.float()
    owner = torch.randint(0, groups, (tokens,), generator=torch.Generator().manual_seed(seed))
    before = torch.rand(groups, 5, x.shape[1], dtype=torch.float64)
    sums = before.clone()
    measured = backend.measured_experts(x, ids, weights, case.experts, owner, sums)
    assert measured is not None
    assert torch.equal(measured.y, backend.experts(x, ids, weights, case.experts))
    expected = torch.zeros_like(sums)
    for slot in range(top_k):
        alone = ids[:, slot : slot + 1]
        outputs = backend.experts(x, alone, torch.ones(tokens, 1), case.experts)
        assert torch.equal(measured.least[:, slot], outputs.amin(dim=1))
        assert torch.equal(measured.largest[:, slot], outputs.amax(dim=1))
        torch.testing.assert_close(measured.norms[:, slot], outputs.double().norm(dim=1), rtol=1e-12, atol=0)
        expected.index_put_((owner, ids[:, slot]), outputs.double(), accumulate=True)
    torch.testing.assert_close(sums - before, expected, rtol=1e-12, atol=1e-9)


def test_groups_and_sums_that_do_not_fit_are_refused() -> None:
    case = make_case(0, tokens=3, experts=4)
    x, ids, weights = (torch.from_numpy(a) for a in (case.x, case.ids, case.weights))
    sums = torch.zeros(2, 4, x.shape[1], dtype=torch.float64)
    for owner, wrong in (
        (torch.tensor([0, 1, 2]), sums),
        (torch.tensor([0, -1, 1]), sums),
        (torch.zeros(2, dtype=torch.int64), sums),
        (torch.zeros(3, dtype=torch.int64), sums.float()),
        (torch.zeros(3, dtype=torch.int64), sums[:, :3]),
    ):
        with pytest.raises(UsageError):
            native().measured_experts(x.float(), ids, weights.float(), case.experts, owner, wrong)
    mapped = make_case(0, tokens=3, experts=4, stored=6).experts
    with pytest.raises(UsageError, match="expert_map"):
        native().measured_experts(x.float(), ids, weights.float(), mapped, torch.zeros(3).long(), sums)
