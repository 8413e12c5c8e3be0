"""What nvcc makes of the CUDA kernels: needs the compiler, but no GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
)
TARGETS = ("sm_80", "sm_90", "sm_100")
# source -> the kernels that read whole tensors
SOURCES = {
    "saliency.cu": ["tile_sums"],
    "gather.cu": ["gather"],
    "similarity.cu": ["token_values"],
    "activations.cu": ["block_moments"],
}

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@dataclass(frozen=True)
class Compiled:
    cubin: Path
    report: str  # of ptxas


@pytest.fixture(
    scope="module", params=[(source, target) for source in SOURCES for target in TARGETS], ids="-".join
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """With the options of setup.py."""
    source, target = request.param
    cubin = tmp_path_factory.mktemp(target) / f"{source}.cubin"
    command = [str(NVCC), "-std=c++17", "-O3", "-fmad=false", f"-arch={target}", "-cubin"]
    command += ["--ptxas-options=-v", str(ROOT / "csrc" / "cuda" / source), "-o", str(cubin)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return Compiled(cubin, result.stderr)


def cuobjdump() -> str | None:
    """The toolkit's, else the one that Triton brings along."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(Path(str(NVCC)).resolve().parent))
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        found = shutil.which("cuobjdump", path=str(path))
    return found


def test_no_kernel_uses_local_memory(compiled: Compiled) -> None:
    kernels = compiled.report.count("Compiling entry function")
    usage = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.report
    )
    assert len(usage) == kernels > 0, compiled.report
    assert set(usage) == {("0", "0", "0")}, compiled.report


@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
def test_tensors_are_loaded_in_words_of_16_bytes(compiled: Compiled) -> None:
    dump = subprocess.run(
        [str(cuobjdump()), "-sass", str(compiled.cubin)], check=True, capture_output=True, text=True
    ).stdout
    # a demangled name ends before its template or function arguments; a mangled one carries its length
    hot = SOURCES[compiled.cubin.stem]
    functions = {
        name: code
        for name, code in re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", dump, re.DOTALL)
        if any(f"{len(kernel)}{kernel}" in name for kernel in hot)
    }
    assert functions, dump[:1000]
    for name, code in functions.items():
        assert re.search(r"\bLDG\.E\.128\b", code), name
        # an address of unknown kind, which every access would have to look up
        assert not re.findall(r"\b(?:LD|ST)\.E\b\S*", code), name
