"""NaN and infinity are reported with the tensor's name and the index, by every backend and mode."""

import pytest
import torch

from adapt_pruner.kernels import (
    MODES,
    NonFiniteError,
    UnitSet,
    linear_importance,
    unit_importance,
    unit_importances,
)
from adapt_pruner.kernels.checks import MODES_WITH_FISHERS, MODES_WITH_GRADS

VALUES = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_it_is(
    native_cpu: str, backend: str, mode: str, dim: int, value: float, dtype: torch.dtype
) -> None:
    tensors = {name: torch.ones(40, 70, dtype=dtype) for name in ("weight", "grad", "fisher")}
    read = ["weight", *["grad"] * (mode in MODES_WITH_GRADS), *["fisher"] * (mode in MODES_WITH_FISHERS)]
    called = {"weight": "q", "grad": "gradient of q", "fisher": "Fisher diagonal of q"}
    for name in read:
        for index in ((0, 0), (39, 69), (17, 33)):
            tensor = tensors[name].clone()
            tensor[index] = value
            given = {**tensors, name: tensor}
            with pytest.raises(NonFiniteError) as raised:
                unit_importance(
                    [given["weight"]],
                    [given["grad"]] if "grad" in read else [],
                    [dim],
                    [1],
                    fishers=[given["fisher"]] if "fisher" in read else [],
                    names=["q"],
                    mode=mode,
                    backend=backend,
                )
            expected = f"{called[name]}[{index[0]}, {index[1]}] is {value}: expected finite values"
            assert str(raised.value).startswith(expected)


def test_which_set_and_member_it_is_in() -> None:
    ones, bias = torch.ones(4, 6), torch.ones(4)
    bad = bias.clone()
    bad[2] = torch.nan
    sets = [
        UnitSet([ones, bias], [ones, bias], [0, 0], [1, 1], names=[f"{i}.weight", f"{i}.bias"]) for i in "ab"
    ]
    assert len(unit_importances(sets)) == 2
    sets.append(UnitSet([ones, bias], [ones, bad], [0, 0], [1, 1], names=["c.weight", "c.bias"]))
    with pytest.raises(
        NonFiniteError, match=r"gradient of c.bias\[2\] is nan: .* got 1 of 4 NaN or infinite"
    ):
        unit_importances(sets)
    with pytest.raises(NonFiniteError, match=r"gradient of weights\[1\]\[2\] is nan"):
        unit_importance([ones, bias], [ones, bad], [0, 0], [1, 1])
    assert unit_importances(sets, check_finite=False)[2].isnan().tolist() == [False, False, True, False]


def test_a_sum_that_overflows_is_not_a_bad_input() -> None:
    huge = torch.full((2, 4), 3e38)
    huge[0] = 1.0
    with pytest.raises(NonFiniteError, match=r"the score of unit 1 is inf: the sum over w overflows float32"):
        unit_importance([huge], [], [0], [1], mode="magnitude_l2", names=["w"])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", VALUES)
def test_linear_importance(native_cpu: str, backend: str, value: float) -> None:
    tensors = {"x": torch.ones(5, 6), "dy": torch.ones(5, 4), "weight": torch.ones(4, 6)}
    called = {"x": "input of up_proj", "dy": "output gradient of up_proj", "weight": "up_proj"}
    for name in tensors:
        bad = tensors[name].clone()
        bad[3, 2] = value
        with pytest.raises(NonFiniteError) as raised:
            linear_importance(**{**tensors, name: bad}, dim=0, name="up_proj", backend=backend)
        assert str(raised.value).startswith(f"{called[name]}[3, 2] is {value}")


def test_a_gradient_that_overflows_in_its_dtype_is_named() -> None:
    x, dy, weight = torch.full((40, 6), 200.0), torch.full((40, 4), 200.0), torch.ones(4, 6)
    assert linear_importance(x, dy, weight, 0).isfinite().all()
    with pytest.raises(NonFiniteError, match="the gradient of up_proj overflows float16, or the sum"):
        linear_importance(x.half(), dy.half(), weight.half(), 0, name="up_proj")


def test_names_are_as_many_as_weights() -> None:
    w = torch.ones(4, 6)
    with pytest.raises(ValueError, match="names: expected one for each of 2 weights or none, got 1"):
        unit_importance([w, w], [w, w], [0, 0], [1, 1], names=["a"])
