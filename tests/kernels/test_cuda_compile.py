"""What ptxas makes of the CUDA kernels: needs nvcc, but no GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("source", ["saliency.cu", "gather.cu", "similarity.cu"])
def test_no_kernel_spills_registers(tmp_path: Path, source: str) -> None:
    command = [str(NVCC), "-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", "-cubin", "--ptxas-options=-v"]
    command += [str(ROOT / "csrc" / "cuda" / source), "-o", str(tmp_path / "kernels.cubin")]
    report = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills, report
    assert set(spills) == {("0", "0", "0")}, report
