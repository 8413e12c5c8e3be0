"""The CPU kernels under the address and undefined-behaviour sanitizers, driven without torch.

`python tests/kernels/sanitized.py` builds and runs the driver, which is what `make sanitize` does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).resolve().parent / "sanitize" / "driver.cpp"
# The address sanitizer sees what these two look for; they and checks in line cost half of the compile time.
QUICKER = ["-fno-sanitize=null,object-size", "--param=asan-instrumentation-with-call-threshold=0"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-ffp-contract=off", "-D_GLIBCXX_ASSERTIONS"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", *SANITIZERS, *QUICKER]


def problem() -> str | None:
    """Why nothing can be built here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    with tempfile.TemporaryDirectory() as folder:
        command = ["g++", *SANITIZERS, "-x", "c++", "-", "-o", f"{folder}/empty"]
        done = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    return f"g++ has no sanitizers: {done.stderr}" if done.returncode else None


def compile_sources(folder: Path, sources: Sequence[Path]) -> list[Path]:
    """An object in `folder` for each source, `csrc` of this tree being where they find kernels.h."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        # the driver's own loops would take most of the time
        trusted = ["-fno-sanitize=all", "-O2"] if source == DRIVER else []
        command = ["g++", *FLAGS, *trusted, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, timeout=500)
        return target

    largest_first = sorted(sources, key=lambda source: -source.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, largest_first))


def build_driver(binary: Path, objects: Sequence[Path]) -> Path:
    subprocess.run(["g++", *SANITIZERS, *map(str, objects), "-o", str(binary)], check=True, timeout=100)
    return binary


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        objects = compile_sources(Path(folder), [DRIVER, *kernel_sources()])
        return subprocess.run([build_driver(Path(folder) / "driver", objects)]).returncode


if __name__ == "__main__":
    sys.exit(main())
