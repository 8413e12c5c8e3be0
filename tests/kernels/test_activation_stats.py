import pytest
import torch
from torch import Tensor

from adapt_pruner.kernels import ActivationStats, activation_stats

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def activations(rows: int, columns: int, dtype: torch.dtype = torch.float32, mean: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, columns, generator=generator) + mean).to(dtype)


def assert_statistics_of(stats: ActivationStats, x: Tensor) -> None:
    """At most twice the error of plain fp32 PyTorch, and 1e-6 of the spread."""
    exact, plain = x.double(), x.float()
    mean, plain_mean = exact.mean(0), plain.mean(0)
    m2, plain_m2 = (exact - mean).square().sum(0), (plain - plain_mean).square().sum(0)
    scale = exact.abs().max(0).values.clamp_min(1e-30)
    error, plain_error = (((m - mean).abs() / scale).max() for m in (stats.mean, plain_mean))
    assert error <= 2 * plain_error + 2**-23
    scale = m2.clamp_min(1e-30)
    if len(x) > 1:
        error, plain_error = (((m - m2).abs() / scale).max() for m in (stats.m2, plain_m2))
        assert error <= 2 * plain_error + 2**-21
    else:
        assert (stats.m2 == 0).all()
    assert stats.count.item() == len(x)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 70), (2, 33), (16, 31), (17, 64), (129, 7), (700, 300), (4500, 5), (3, 16421)]
)
def test_matches_oracle(native_cpu: str, backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = activations(*shape, dtype)
    stats = ActivationStats.zeros(shape[1])
    stats.update(x, backend=backend)
    assert_statistics_of(stats, x)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_batches_merge_into_those_of_all_rows(native_cpu: str, backend: str) -> None:
    x = torch.cat([activations(n, 40, mean=m) for n, m in ((1, 0.0), (300, 5.0), (17, -3.0), (129, 100.0))])
    stats = ActivationStats.zeros(40)
    for part in x.split([1, 1, 300, 100, 45]):
        stats.update(part, backend=backend)
    assert_statistics_of(stats, x)


def test_ranks_merge_in_any_order(native_cpu: str) -> None:
    x = activations(1000, 33)
    ranks = []
    for part in x.split([400, 599, 1]):
        ranks.append(ActivationStats.zeros(33))
        ranks[-1].update(part)
    for order in ([0, 1, 2], [2, 1, 0]):
        total = ActivationStats.zeros(33)
        for rank in order:
            total.merge(ranks[rank])
        assert_statistics_of(total, x)
    before = total.mean.clone()
    total.merge(ActivationStats.zeros(33))
    assert torch.equal(total.mean, before)


def test_far_from_zero_and_beside_an_outlier(native_cpu: str) -> None:
    """Where the square of the mean dwarfs the variance, and where first tokens are unlike the rest."""
    far = activations(2000, 64, mean=1000.0)
    beside = activations(2000, 64)
    beside[::500] = 3000.0
    for x in (far, beside):
        stats = ActivationStats.zeros(64)
        stats.update(x, backend=native_cpu)
        assert_statistics_of(stats, x)


def test_equal_values_have_no_variance(native_cpu: str) -> None:
    stats = ActivationStats.zeros(50)
    stats.update(torch.full((777, 50), 0.1), backend=native_cpu)
    assert (stats.variance >= 0).all()
    assert (stats.variance < 1e-12).all()


def test_derived_quantities() -> None:
    x = activations(500, 20)
    stats = ActivationStats.zeros(20)
    stats.update(x.view(5, 100, 20))
    torch.testing.assert_close(stats.variance, x.double().var(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.norm, x.double().norm(dim=0), rtol=1e-6, atol=0)


def test_strided_rows(native_cpu: str) -> None:
    x = activations(100, 80)[:, 3:71]
    stats = ActivationStats.zeros(68)
    stats.update(x, backend=native_cpu)
    assert_statistics_of(stats, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(native_cpu: str, threads: None, dtype: torch.dtype) -> None:
    x, results = activations(5000, 300, dtype), []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        stats = ActivationStats.zeros(300)
        stats.update(x, backend=native_cpu)
        results.append(stats)
    for other in results[1:]:
        assert torch.equal(results[0].mean, other.mean)
        assert torch.equal(results[0].m2, other.m2)


def test_nan_and_infinity_show(native_cpu: str) -> None:
    x = activations(300, 40)
    x[130, 3], x[7, 38] = torch.nan, torch.inf
    stats = ActivationStats.zeros(40)
    stats.update(x, backend=native_cpu)
    wrong = [not bool(value.isfinite()) for value in stats.m2]
    assert [i for i, is_wrong in enumerate(wrong) if is_wrong] == [3, 38]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(0, 6)}, "at least one row, got shape"),
        ({"x": torch.ones(3, 6).int()}, "x: expected float32, float16 or bfloat16, got torch.int32"),
        ({"mean": torch.zeros(6)}, "mean: expected torch.float64 of shape"),
        ({"m2": torch.zeros(5).double()}, r"m2: expected torch.float64 of shape \(6,\) on cpu, got"),
        ({"count": torch.zeros(1, dtype=torch.int64)}, "count: expected torch.int64 of shape"),
    ],
)
def test_bad_arguments(changes: dict[str, Tensor], message: str) -> None:
    state = {"mean": torch.zeros(6).double(), "m2": torch.zeros(6).double(), "count": torch.tensor(0)}
    with pytest.raises(ValueError, match=message):
        activation_stats(**{"x": torch.ones(3, 6), **state, **changes})


@pytest.mark.parametrize("name", ["mean", "m2", "count"])
def test_native_op_checks_its_state(native_cpu: str, name: str) -> None:
    state = {"mean": torch.zeros(6).double(), "m2": torch.zeros(6).double(), "count": torch.tensor(0)}
    for wrong in (state[name].float(), torch.zeros(7, dtype=state[name].dtype)):
        with pytest.raises(RuntimeError, match=f"{name}: expected"):
            torch.ops.adapt_pruner.activation_stats(torch.ones(3, 6), **{**state, name: wrong})


def test_merge_needs_as_many_columns() -> None:
    with pytest.raises(ValueError, match="expected 4 columns, got 1"):
        ActivationStats.zeros(4).merge(ActivationStats.zeros(1))
