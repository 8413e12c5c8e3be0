import pytest
import torch
from members import DTYPES, Members, assert_importance_within_budget, make_members
from torch import Tensor

from adapt_pruner.kernels import MODES, UnitSet, reference, unit_importance, unit_importances

# the last ones: more than one tile of rows, and of columns
SIZES = [(1, 1), (7, 33), (33, 7), (257, 40), (40, 257), (130, 2080), (2051, 5), (5, 16421)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("units", "width"), SIZES)
def test_matches_oracle(native_cpu: str, mode: str, dtypes: str, units: int, width: int) -> None:
    members = make_members(units, width, dtypes)
    result = unit_importance(**members.arguments(mode), backend=native_cpu)
    assert_importance_within_budget(result, members, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group_size", [2, 7, 64])
@pytest.mark.parametrize("row_padding", [0, 3])
def test_groups_and_strided_rows(native_cpu: str, mode: str, group_size: int, row_padding: int) -> None:
    members = make_members(5, 37, "bf16_fp32", group_size, row_padding)
    members.weights[2] = members.weights[2].contiguous()
    assert (members.weights[0].is_contiguous()) == (row_padding == 0)
    result = unit_importance(**members.arguments(mode), backend=native_cpu)
    assert_importance_within_budget(result, members, mode)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_accuracy_of_long_sums(native_cpu: str, dim: int, dtypes: str) -> None:
    dtype, companion_dtype = DTYPES[dtypes]
    shape = (24, 14336) if dim == 0 else (14336, 24)
    generator = torch.Generator().manual_seed(1)
    members = Members(
        weights=[torch.randn(shape, generator=generator).to(dtype)],
        grads=[torch.randn(shape, generator=generator).to(companion_dtype)],
        dims=[dim],
        group_sizes=[1],
    )
    for mode in ("first", "vectorize", "magnitude_l2"):
        result = unit_importance(**members.arguments(mode), backend=native_cpu)
        assert_importance_within_budget(result, members, mode)


def test_members_of_different_dtypes(native_cpu: str) -> None:
    fp32, bf16 = make_members(9, 20, "fp32", seed=1), make_members(9, 20, "bf16", seed=2)
    both = Members(
        weights=fp32.weights + bf16.weights,
        grads=fp32.grads + bf16.grads,
        dims=fp32.dims + bf16.dims,
        group_sizes=fp32.group_sizes + bf16.group_sizes,
    )
    assert_importance_within_budget(
        unit_importance(**both.arguments("first"), backend=native_cpu), both, "first"
    )


def test_values_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    grad = torch.tensor([[1.0, 1.0], [-1.0, 2.0]])
    fisher = torch.tensor([[1.0, 0.0], [2.0, 1.0]])

    def score(
        mode: str, dim: int, group_size: int, grads: list[Tensor], fishers: list[Tensor]
    ) -> list[float]:
        return unit_importance([weight], grads, [dim], [group_size], fishers=fishers, mode=mode).tolist()

    assert score("first", 0, 1, [grad], []) == [3.0, 11.0]
    assert score("first", 1, 1, [grad], []) == [4.0, 10.0]
    assert score("first", 0, 2, [grad], []) == [14.0]
    assert score("vectorize", 0, 1, [grad], []) == [1.0, 5.0]
    assert score("vectorize", 1, 2, [grad], []) == [2.0 + 6.0]
    assert score("second", 0, 1, [], [fisher]) == [1.0, 34.0]
    assert score("mixed", 0, 1, [grad], [fisher]) == [0.5 + 2.0, 12.0 + 0.0]
    assert score("magnitude_l1", 0, 1, [], []) == [3.0, 7.0]
    assert score("magnitude_l2", 1, 1, [], []) == [10.0, 20.0]


@pytest.mark.parametrize("shape", [(6, 0), (0, 6)])
def test_empty_sums(native_cpu: str, shape: tuple[int, int]) -> None:
    weight = torch.empty(shape)
    for dim in (0, 1):
        result = unit_importance([weight], [weight], [dim], [1], backend=native_cpu)
        assert torch.equal(result, torch.zeros(shape[dim]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_value(native_cpu: str, dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    arguments = {"mode": "magnitude_l1", "check_finite": False, "backend": native_cpu}
    result = unit_importance([values], [], [0], [1], **arguments)
    # row sums of width 40 pass through the vectors, widths of 1 through the scalars
    padded = torch.zeros(len(values), 40, dtype=dtype)
    padded[:, 4] = values
    as_rows = unit_importance([padded], [], [0], [1], **arguments)
    for got in (result, as_rows):
        torch.testing.assert_close(got, values.float().abs(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_number_of_threads(native_cpu: str, threads: None, mode: str) -> None:
    members = make_members(300, 1100, "fp32", group_size=2)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        results.append(unit_importance(**members.arguments(mode), backend=native_cpu))
    assert all(torch.equal(results[0], other) for other in results[1:])


def as_set(members: Members, mode: str) -> UnitSet:
    arguments = members.arguments(mode)
    del arguments["mode"]
    return UnitSet(**arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_several_sets_are_scored_as_one_by_one(native_cpu: str, backend: str, mode: str) -> None:
    several = [
        make_members(7, 33, "fp32", 2),
        make_members(40, 5, "bf16"),
        make_members(3, 70, "fp16_fp32", 4),
    ]
    sets = [as_set(members, mode) for members in several]
    together = unit_importances(sets, mode=mode, backend=backend)
    for scores, members, unit_set in zip(together, several, sets, strict=True):
        assert scores.shape == (unit_set.units,)
        assert torch.equal(scores, unit_importance(**members.arguments(mode), backend=backend))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 70), (133, 2085), (2050, 40), (4, 16421)])
def test_rows_and_columns_from_one_read(
    native_cpu: str, mode: str, dtypes: str, shape: tuple[int, int]
) -> None:
    members = make_members(*shape, dtypes)
    both = []
    for dim in (0, 1):
        one = Members(members.weights[:1], [dim], [1], members.grads[:1], members.fishers[:1])
        both.append(as_set(one, mode))
    together = unit_importances(both, mode=mode, backend=native_cpu)
    for scores, alone in zip(together, both, strict=True):
        assert torch.equal(scores, unit_importances([alone], mode=mode, backend=native_cpu)[0])


def test_sets_by_hand() -> None:
    weight, grad = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [-1.0, 2.0]])
    sets = [UnitSet([weight, weight], [grad, grad], [0, 1], [1, 1]), UnitSet([weight], [grad], [0], [2])]
    assert [scores.tolist() for scores in unit_importances(sets)] == [[3.0 + 4.0, 11.0 + 10.0], [14.0]]
    with pytest.raises(ValueError, match="sets: expected at least one set of units, got none"):
        unit_importances([])


def test_parameters_that_require_gradients() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    score = unit_importance([weight], [torch.ones(4, 3)], [0], [1])
    assert not score.requires_grad


def test_float64_runs_the_reference_in_float64() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    result = unit_importance([weight], [weight], [0], [1])
    assert torch.equal(result, reference.unit_importance([weight], [weight], [], [0], [1], "first"))
    assert result.dtype == torch.float64
