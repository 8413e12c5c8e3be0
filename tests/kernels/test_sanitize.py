"""The CPU kernels do not touch a byte that is not theirs, and the driver that says so would notice."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import sanitized

PROBLEM = sanitized.problem()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name of the source."""
    folder = tmp_path_factory.mktemp("sanitized")
    built = sanitized.compile_sources(folder, [sanitized.DRIVER, *sanitized.kernel_sources()])
    return {path.stem: path for path in built}


def test_all_kernels_are_clean(objects: dict[str, Path], tmp_path: Path) -> None:
    driver = sanitized.build_driver(tmp_path / "driver", list(objects.values()))
    done = subprocess.run([driver], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^baseline: \d{4,} cases$", done.stdout, re.MULTILINE), done.stdout


ONE_BYTE_TOO_FAR = """static_cast<const char*>(h_in.data) +
  ((tokens - 1) * h_in.row_stride + hidden) * (h_in.dtype == kFloat32 ? 4 : 2)"""


@pytest.mark.parametrize(
    ("planted", "noticed"),
    [
        (f"*static_cast<const volatile char*>({ONE_BYTE_TOO_FAR});", "heap-buffer-overflow"),
        # as of an instruction that the sanitizer does not know: stopped by the page behind
        (f"static_cast<void>(unseen({ONE_BYTE_TOO_FAR}));", "AddressSanitizer: SEGV"),
        ("volatile int32_t most = INT32_MAX; most = most + int32_t(tokens);", "signed integer overflow"),
        ("if (tokens > 1) --tokens;", "WRONG RESULT"),
        ('asm volatile("" : : "r"(new char[3]));', "LeakSanitizer: detected memory leaks"),
    ],
    ids=["read", "unseen read", "undefined", "wrong", "leak"],
)
def test_what_is_planted_is_noticed(
    objects: dict[str, Path], tmp_path: Path, planted: str, noticed: str
) -> None:
    (source,) = [s for s in sanitized.kernel_sources() if "void ap_cpu_residual_similarity(" in s.read_text()]
    copied = shutil.copytree(sanitized.ROOT / "csrc", tmp_path / "csrc") / "cpu" / source.name
    text = copied.read_text()
    begin = text.index("void ap_cpu_residual_similarity(")
    unseen = (
        '__attribute__((noinline, no_sanitize("address", "undefined")))\n'
        "static char unseen(const volatile char* p) { return *p; }\n"
    )
    body = text.index("{", begin) + 1
    head = f"#include <cstdint>\n{unseen if 'unseen' in planted else ''}"
    copied.write_text(
        f"{text[:begin]}{head}{text[begin:body]} using namespace adapt_pruner; {planted}{text[body:]}"
    )
    (broken,) = sanitized.compile_sources(tmp_path, [copied])
    driver = sanitized.build_driver(tmp_path / "driver", [*(objects | {source.stem: broken}).values()])
    done = subprocess.run([driver, "similarity"], capture_output=True, text=True, timeout=500)
    assert done.returncode != 0
    assert noticed in done.stderr, done.stderr
