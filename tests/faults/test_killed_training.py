"""`accel`, and `recover` in it, killed at random moments, again and again: the same bytes in the end."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml

from adapt_pruner.recovery.config import AccelConfig

pytestmark = pytest.mark.timeout(600)

KILLED = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import yaml
from adapt_pruner.adapt_accel import accel
from adapt_pruner.modeling import register
from adapt_pruner.recovery.config import AccelConfig

register()  # imports the model classes once, for all children
import matplotlib.backends.backend_agg, matplotlib.figure

moments = random.Random(0)

def logged(config):
    return sum(path.read_bytes().count(b"\\n") for path in Path(config.output).rglob("log.jsonl"))

# Children are forked from a process that has only imported: no thread pool exists yet.
def child(config, lines=None):
    process = os.fork()
    if not process:
        accel(config)
        os._exit(0)
    while lines is not None:  # killed a little behind the moment when it has logged so many
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        if logged(config) >= lines:
            time.sleep(moments.uniform(0, 0.1))
            os.kill(process, signal.SIGKILL)
            break
        time.sleep(0.002)
    return os.waitpid(process, 0)[1]

config = AccelConfig(**yaml.safe_load(sys.stdin))
whole = replace(config, output=f"{config.output}-whole")
assert child(whole) == 0
killed = 0
for run in range(3):
    resumed = replace(config, output=f"{config.output}-{run}", resume=True)
    for _ in range(2):
        status = child(resumed, moments.randrange(logged(resumed), logged(whole) - 1))
        assert status in (0, signal.SIGKILL), status
        killed += status == signal.SIGKILL
    assert child(resumed) == 0
print(killed)
"""


def test_killed_at_random_moments(tiny_models, calibration_file, tmp_path):
    config = AccelConfig(
        model=str(tiny_models["llama"]),
        target=0.85,
        output=str(tmp_path / "run"),
        stages=2,
        prune={"calibration": str(calibration_file), "num_sequences": 4, "sequence_length": 32},
        recover={
            "data": str(calibration_file), "tokens": 6 * 8 * 32, "sequence_length": 32, "batch_size": 8,
            "micro_batch_size": 8, "learning_rate": 1e-3, "save_steps": 1, "eval_tokens": 256,
            "loggers": "none",
        },
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        input=yaml.safe_dump(asdict(config)),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert int(done.stdout.splitlines()[-1]) >= 4
    runs = [tmp_path / f"run-{name}" for name in ("whole", *range(3))]
    expected, *others = ({file.name: file.read_bytes() for file in (run / "model").iterdir()} for run in runs)
    for run, model in zip(runs[1:], others, strict=True):
        assert model == expected, run.name
        assert not list(run.glob("**/*.partial*"))
        assert not list(run.glob("stages/*/recover/checkpoints"))
