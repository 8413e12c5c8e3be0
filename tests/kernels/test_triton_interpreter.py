"""Runs tests/kernels/interpreted in a process where Triton's kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "interpreted"


def test_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", str(TESTS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert " passed" in report, report
    assert " skipped" not in report, report
