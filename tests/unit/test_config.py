"""Settings: what is refused and with which message."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from adapt_pruner.config import (
    ApplyConfig,
    BenchConfig,
    EvaluateConfig,
    InspectConfig,
    MissingSetting,
    PruneConfig,
    parse_bytes,
    parse_target,
)
from adapt_pruner.methods import resolve


def prune_config(**changes) -> PruneConfig:
    return PruneConfig(**({"model": "m", "target": 0.8, "output": "o"} | changes))


@pytest.mark.parametrize(
    ("target", "value"),
    [
        ("0.8", 0.8),
        (0.8, 0.8),
        (" 0.25 ", 0.25),
        (1, 1.0),
        ("1", 1.0),
        ("1.0", 1.0),
        ("108M", 108_000_000),
        ("108m", 108_000_000),
        ("0.5K", 500),
        ("1.2B", 1_200_000_000),
        ("1.2 B", 1_200_000_000),
        ("500_000", 500_000),
        ("500,000", 500_000),
        (500_000, 500_000),
        ("1e6", 1_000_000),
        (2, 2),
    ],
)
def test_targets(target, value):
    parsed = parse_target(target)
    assert parsed == value
    # A float is a fraction, an int is a count: 1 is the whole model, not one parameter.
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "amount"),
    [
        ("target_flops", "1.2G", 1_200_000_000),
        ("target_flops", "0.5t", 500_000_000_000),
        ("target_flops", 0.7, 0.7),
        ("target_kv_cache", "64MB", 64_000_000),
        ("target_kv_cache", "64 MiB", 64 * 2**20),
        ("target_kv_cache", 4096, 4096),
        ("target_latency", "50ms", 50 * 10**9),  # picoseconds
        ("target_latency", "0.05s", 50 * 10**9),
        ("target_latency", "750us", 750 * 10**6),
        ("target_latency", "0.8", 0.8),
    ],
)
def test_other_targets_have_units_of_their_own(name, value, amount):
    config = PruneConfig("m", output="o", **{name: value})
    assert config.targets() == {name: amount}
    assert type(config.targets()[name]) is type(amount)


@pytest.mark.parametrize(
    ("name", "value", "example"),
    [
        ("target_flops", "1.2GB", "a count of FLOPs such as 500M or 1.2G"),
        ("target_kv_cache", "64M", "a size such as 64MB or 64MiB"),
        ("target_latency", "50", "a time such as 50ms or 0.05s"),
        ("target_latency", "50 minutes", "a time such as 50ms or 0.05s"),
        ("target_latency", "-5ms", "a time such as 50ms or 0.05s"),
    ],
)
def test_an_amount_of_something_else_is_refused(name, value, example):
    with pytest.raises(
        ValueError, match=re.escape(f"{name} is {value!r}, expected a fraction in (0, 1] or {example}")
    ):
        PruneConfig("m", output="o", **{name: value})


def test_one_target_and_the_output_are_needed():
    with pytest.raises(
        MissingSetting, match="target is missing: expected at least one of target, target_flops"
    ):
        PruneConfig("m", output="o")
    with pytest.raises(MissingSetting, match="output is missing"):
        PruneConfig("m", 0.8)


@pytest.mark.parametrize(
    "target",
    ["abc", "", "M", 0, "0", -1, "-0.5", math.nan, "nan", math.inf, "0M", "-3M", "80%", "1.2.3", "1.5"],
)
def test_what_is_no_target_is_refused(target):
    expected = re.escape(repr(target)) + r", expected a fraction in \(0, 1\] or a count of parameters"
    with pytest.raises(ValueError, match=f"target is {expected}"):
        parse_target(target)
    with pytest.raises(ValueError, match=f"target is {expected}"):
        prune_config(target=target)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("iterations", 0, "at least 1"),
        ("iterations", -5, "at least 1"),
        ("num_sequences", 0, "at least 1"),
        ("micro_batch_size", 0, "at least 1"),
        ("sequence_length", 1, "at least 2"),
        ("seed", -1, "at least 0"),
        ("amplitude", -0.01, "finite, at least 0"),
        ("amplitude", math.inf, "finite, at least 0"),
        ("amplitude", math.nan, "finite, at least 0"),
        ("round_to", 0, "at least 1"),
        ("attention_rate", -0.5, "finite, at least 0, or not given"),
        ("mlp_rate", math.inf, "finite, at least 0, or not given"),
        ("target_of", "embedding", "one of .*'non-embedding'"),
        ("layer_metric", "dot", "one of .*'euclidean'"),
        ("normalize", "mean", "one of .*'zscore_clip'"),
        ("dtype", "int8", "one of .*'bf16'"),
        ("backend", "metal", "one of .*'triton'"),
        ("gradients", "none", "one of .*'materialised'"),
    ],
)
def test_prune_settings_out_of_range_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, expected {expected}"):
        prune_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", 0, "at least 1"),
        ("context", 1, "at least 2"),
        ("stride", 0, "at least 1, or not given"),
        ("max_tokens", 1, "at least 2, or not given"),
        ("limit", 0, "at least 1, or not given"),
        ("dtype", "fp8", "one of .*'fp16'"),
    ],
)
def test_evaluate_settings_out_of_range_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, expected {expected}"):
        EvaluateConfig("m", **{name: value})


def test_inspect_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"^context is 0, expected at least 1"):
        InspectConfig("m", context=0)


def test_fused_gradients_need_one_micro_batch():
    expected = r"^micro_batch_size is 16, expected at least 512 \(num_sequences\), or gradients other than"
    with pytest.raises(ValueError, match=expected):
        resolve(prune_config(method="llm-pruner", gradients="fused"), 4)
    assert prune_config(gradients="fused", num_sequences=16).gradients == "fused"
    assert prune_config(gradients="fused", micro_batch_size=1000).gradients == "fused"
    assert prune_config().gradients == "auto"


def test_the_smallest_settings_are_accepted():
    prune_config(
        iterations=1, num_sequences=1, micro_batch_size=1, sequence_length=2, seed=0, amplitude=0.0, target=1
    )
    EvaluateConfig("m", batch_size=1, context=2, stride=1, max_tokens=2, limit=1)
    InspectConfig("m", context=1)


@pytest.mark.parametrize("config", [PruneConfig, ApplyConfig, EvaluateConfig, InspectConfig, BenchConfig])
def test_settings_cannot_be_changed_afterwards(config):
    required = [f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING]
    values = {"suite": "kernels"}
    given = {"target": 0.5, "output": "x"} if config is PruneConfig else {}
    made = config(**{name: values.get(name, "x") for name in required}, **given)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.model = "other"


def test_defaults_of_prune_are_those_of_the_paper_but_for_averages_over_rounds():
    config, _ = resolve(prune_config(), 4)
    assert (config.iterations, config.amplitude, config.layer_metric) == (50, 0.02, "cosine")
    assert (config.num_sequences, config.sequence_length, config.carry_over) == (32, 64, 1.0)
    assert resolve(prune_config(method="reference"), 4)[0].num_sequences == 512


@pytest.mark.parametrize(
    ("value", "amount"),
    [("8GB", 8 * 10**9), ("512MiB", 512 * 2**20), (" 1.5 kb", 1500), ("4096", 4096), (4096, 4096), ("1b", 1)],
)
def test_sizes(value, amount):
    assert parse_bytes("memory", value) == amount


@pytest.mark.parametrize("value", ["", "GB", "-1GB", "0", "8 pounds", "1.2.3MB", "nan", "0.1b"])
def test_what_is_no_size(value):
    with pytest.raises(ValueError, match="expected a size such as 8GB or 512MiB"):
        prune_config(memory=value)
