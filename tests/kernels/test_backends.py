import importlib
import subprocess
import sys
import types
import warnings
from typing import Any

import pytest
import torch

from adapt_pruner.kernels import (
    BACKENDS,
    BackendUnavailable,
    backend_status,
    backends,
    build_info,
    linear_importance,
    ops,
    unit_importance,
)

W = torch.ones(4, 6)


def run(backend: str = "auto", device: str = "cpu") -> torch.Tensor:
    w = W.to(device)
    return unit_importance([w], [w], [0], [1], backend=backend)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_extension", None)
    monkeypatch.setattr(backends, "_extension_problem", "extension not built: no such module")
    monkeypatch.setattr(backends, "_warned_about_fallback", False)


def fake_extension(cuda: str | None, archs: str | None, driver: int) -> Any:
    info = {"version": "1", "torch_target": "2.10", "compiler": "?", "cpu_isa": "baseline"}
    return types.SimpleNamespace(
        build_info=lambda: {**info, "cuda": cuda, "cuda_archs": archs}, cuda_driver_version=lambda: driver
    )


def test_status_names_every_backend_but_auto() -> None:
    status = backend_status()
    assert set(status) == set(BACKENDS) - {"auto"}
    assert status["reference"] is None
    if not torch.cuda.is_available():
        assert status["triton"] == "no CUDA or ROCm device"


def test_build_info_reports_what_was_compiled(native_cpu: str) -> None:
    info = build_info()
    assert set(info) == {"version", "torch_target", "compiler", "cpu_isa", "cuda", "cuda_archs"}
    assert info["torch_target"] == "2.10"
    assert info["cpu_isa"] in ("avx512", "avx2", "baseline")
    assert (info["cuda"] is None) == (info["cuda_archs"] is None)
    if info["cuda"] is None:
        assert backend_status()["cuda"] == "built without CUDA"


def test_auto_runs_native_without_warning(native_cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned_about_fallback", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run().tolist() == [6.0] * 4
    assert backends.choose_backend("auto", torch.device("cpu")) == "cpu"


def test_auto_falls_back_with_one_warning(without_extension: None) -> None:
    with pytest.warns(RuntimeWarning, match="slow reference ops: extension not built: no such module"):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run().tolist() == [6.0] * 4


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_named_backend_without_extension(without_extension: None, backend: str) -> None:
    assert backend_status()[backend] == "extension not built: no such module"
    with pytest.raises(BackendUnavailable, match="extension not built: no such module"):
        run(backend)
    with pytest.raises(BackendUnavailable, match="extension not built"):
        build_info()


def test_a_broken_extension_is_a_reason_not_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("undefined symbol: torch_something")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert backends._load_extension() == (None, "extension not built: undefined symbol: torch_something")


def test_unknown_and_missing_backends() -> None:
    with pytest.raises(
        ValueError, match="backend 'fast': expected one of auto, reference, cpu, cuda, triton"
    ):
        run("fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_triton_without_a_device() -> None:
    with pytest.raises(BackendUnavailable, match="'triton' cannot be used: no CUDA or ROCm device"):
        run("triton")


def test_broken_triton_is_a_reason_not_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends._triton_problem() is None

    def fail(name: str) -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert backends._triton_problem() == "triton cannot be imported: No module named 'triton'"


def test_an_op_of_triton_alone_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "_warned_about_fallback", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)
    assert backends.triton_for_cuda("some_op", "cuda", device) == "triton"
    monkeypatch.setattr(backends, "_triton_problem", lambda: "triton cannot be imported: none")
    with pytest.raises(
        BackendUnavailable, match="some_op on CUDA devices needs triton: triton cannot be imp"
    ):
        backends.triton_for_cuda("some_op", "cuda", device)
    with pytest.warns(RuntimeWarning, match="slow reference ops: some_op on CUDA devices needs triton"):
        assert backends.triton_for_cuda("some_op", "auto", device) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.triton_for_cuda("some_op", "auto", device) == "reference"


def test_linear_importance_falls_back_only_from_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device where triton is missing: the choice of "cuda" is what such a device would give."""
    monkeypatch.setattr(ops, "choose_backend", lambda backend, device: {"auto": "cuda"}.get(backend, backend))
    monkeypatch.setattr(backends, "_triton_problem", lambda: "triton cannot be imported: none")
    monkeypatch.setattr(backends, "_warned_about_fallback", False)
    x, dy = torch.randn(5, 6), torch.randn(5, 4)
    with pytest.warns(RuntimeWarning, match="linear_importance on CUDA devices needs triton"):
        scores = linear_importance(x, dy, W, 0)
    assert torch.equal(scores, linear_importance(x, dy, W, 0, backend="reference"))
    with pytest.raises(BackendUnavailable, match="linear_importance on CUDA devices needs triton"):
        linear_importance(x, dy, W, 0, backend="cuda")


@pytest.mark.parametrize(
    ("cuda_problem", "capability", "chosen"),
    [
        (None, (9, 0), "cuda"),
        (None, (8, 0), "triton"),  # the native kernels are built for 9.0 alone
        ("built without CUDA", (9, 0), "triton"),
        ("built without CUDA", (7, 0), "reference"),
    ],
)
def test_automatic_choice_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, cuda_problem: str | None, capability: tuple[int, int], chosen: str
) -> None:
    monkeypatch.setattr(backends, "_extension", fake_extension("13.0", "9.0", 13000))
    monkeypatch.setattr(backends, "_cuda_problem", lambda: cuda_problem)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends, "_warned_about_fallback", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert backends.choose_backend("auto", torch.device("cuda", 0)) == chosen
    messages = [str(warning.message) for warning in caught]
    expected = (
        "adapt_pruner runs the slow reference ops: built without CUDA; triton: cuda:0 has architecture 7.0"
    )
    assert len(messages) == (chosen == "reference")
    assert all(message.startswith(expected) for message in messages)


def test_reasons_why_cuda_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def status(extension: Any, available: bool) -> str | None:
        monkeypatch.setattr(backends, "_extension", extension)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        return backend_status()["cuda"]

    assert status(fake_extension(None, None, 0), True) == "built without CUDA"
    assert status(fake_extension("13.0", "8.0", 13000), False) == "no CUDA device"
    problem = "built with CUDA 13.0, the driver supports only 12.8"
    assert status(fake_extension("13.0", "8.0", 12080), True) == problem
    assert status(fake_extension("13.0", "8.0", 13010), True) is None


@pytest.mark.parametrize(
    ("archs", "capability", "usable"),
    [
        ("8.0:9.0", (8, 0), True),
        ("8.0:9.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0:9.0", (10, 0), False),
        ("8.0:9.0+PTX", (12, 0), True),
        ("8.0+PTX", (7, 5), False),
        ("9.0a", (9, 0), True),
    ],
)
def test_architectures(
    monkeypatch: pytest.MonkeyPatch, archs: str, capability: tuple[int, int], usable: bool
) -> None:
    monkeypatch.setattr(backends, "_extension", fake_extension("13.0", archs, 13000))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    problem = backends._architecture_problem(torch.device("cuda", 0))
    assert (problem is None) == usable
    assert usable or f"cuda:0 is {capability[0]}.{capability[1]}" in str(problem)


def test_named_backend_on_the_wrong_device(native_cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend 'cpu' needs tensors on a cpu device, got meta"):
        run("cpu", "meta")
    monkeypatch.setattr(backends, "_cuda_problem", lambda: None)
    with pytest.raises(ValueError, match="backend 'cuda' needs tensors on a cuda device, got cpu"):
        run("cuda")


def test_import_touches_no_gpu() -> None:
    code = (
        "import adapt_pruner.kernels as kernels, torch, sys\n"
        "assert 'triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
        "kernels.backend_status()\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
