"""`apply_plan`: file to file, with the bytes of the live surgery, and without torch."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, SPARSE_FAMILIES
from transformers import AutoConfig

from adapt_pruner import PruningPlan, apply_plan, shard_io
from adapt_pruner.checkpoint import config_hash, open_checkpoint
from adapt_pruner.families import by_expert, find_family, layer_widths, unit_counts
from adapt_pruner.modeling.conversion import keep_config_layers, pruned_config
from adapt_pruner.plan import pruned_members
from adapt_pruner.surgery import gather_members

ALL = (*FAMILIES, *SPARSE_FAMILIES)


def make_plan(
    directory, *, seed=0, granularity="kv_group", mlp="channel", removed=(), uniform=False, share=0.6
):
    """A plan with random kept units: as many per lane as the unit kind wants."""
    checkpoint = open_checkpoint(directory)
    family = find_family(checkpoint.config["model_type"]).with_granularity(granularity, mlp)
    base, draw = layer_widths(checkpoint.config), np.random.default_rng(seed)
    keep = []
    for widths in base:
        layer = {}
        for kind in family.kinds_in(widths):
            lanes = kind.lanes(widths)
            units = kind.count(widths) // lanes
            kept = max(1, int(units * (share if uniform else draw.uniform(0.3, 1))))
            layer[kind.name] = np.concatenate(
                [lane * units + np.sort(draw.choice(units, kept, replace=False)) for lane in range(lanes)]
            )
        keep.append(layer)
    return PruningPlan(
        "base", config_hash(checkpoint.config), checkpoint.fingerprint(), family.name, {},
        unit_counts(family, base), tuple(keep), tuple(removed),
    )  # fmt: skip


def live_surgery(plan, directory):
    """The tensors that the modules' surgery leaves, under the names and numbers of the pruned model."""
    checkpoint = open_checkpoint(directory)
    family = find_family(checkpoint.config["model_type"])
    family = family.with_granularity(plan.granularity, plan.mlp_granularity)
    base = layer_widths(checkpoint.config)
    tensors = {}
    for shard in {info.shard for info in checkpoint.tensors.values()}:
        tensors |= load_file(shard)
    tensors = {name: tensors[name] for name in checkpoint.tensors}
    for name, (members, keep) in pruned_members(plan.keep_indices, family, base, tensors).items():
        tensors[name] = gather_members(tensors, members, keep)[name]
    for layer, widths in enumerate(base):
        for kind in family.kinds_in(widths):
            if kind.name == "expert":
                parts = by_expert(family.unit_tensors(kind, layer, widths, tensors))
                parts.pop(None, None)
                old = {e: [tensors.pop(t.name) for t in part] for e, part in parts.items()}
                for number, expert in enumerate(plan.keep_indices[layer]["expert"].tolist() if parts else ()):
                    tensors |= {t.name: value for t, value in zip(parts[number], old[expert], strict=True)}
    result = {}
    for name, tensor in tensors.items():
        if name.startswith("model.layers."):
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            if int(layer) in plan.removed_layers:
                continue
            name = f"model.layers.{plan.kept_layers.index(int(layer))}.{rest}"
        result[name] = tensor
    return result


def check(plan, directory, output, *, config_bytes=True, **options):
    """The weights are the bytes that safetensors writes, the config is what transformers makes of it."""
    expected = live_surgery(plan, directory)
    apply_plan(plan, directory, output, **options)
    files = sorted(output.glob("*.safetensors"))
    assert sum(len(load_file(file)) for file in files) == len(expected)
    for file in files:
        part = {name: expected[name].contiguous() for name in load_file(file)}
        save_file(part, output.parent / "expected.safetensors", metadata={"format": "pt"})
        assert file.read_bytes() == (output.parent / "expected.safetensors").read_bytes()
    config = AutoConfig.from_pretrained(directory)
    checkpoint = open_checkpoint(directory)
    family = find_family(config.model_type).with_granularity(plan.granularity, plan.mlp_granularity)
    keep_config_layers(config, plan.kept_layers)
    config = pruned_config(config, plan.widths(family, layer_widths(checkpoint.config)))
    seen = AutoConfig.from_pretrained(output)
    assert type(seen) is type(config)
    assert seen.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    if config_bytes:
        saved = output.parent / f"{output.name}-config"
        config.save_pretrained(saved)
        for file in saved.iterdir():
            assert (output / file.name).read_text() == file.read_text()
    assert shard_io.verify_checksums(output) == len(expected)
    return files


@pytest.fixture(params=["native", "numpy"])
def engine(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(shard_io, "_engine", lambda: shard_io._copy_by_numpy)
    else:
        pytest.importorskip("adapt_pruner._io")


@pytest.mark.parametrize("family", ALL)
@pytest.mark.usefixtures("engine")
def test_every_family_has_the_bytes_of_the_live_surgery(family, tiny_models, tmp_path):
    model = tiny_models[family]
    check(make_plan(model), model, tmp_path / "a")
    check(make_plan(model, granularity="query_head", removed=(1,), seed=1), model, tmp_path / "b")
    check(make_plan(model, uniform=True, share=0.5, removed=(0, 3), seed=2), model, tmp_path / "c")
    if family in SPARSE_FAMILIES:
        check(make_plan(model, mlp="expert", seed=3), model, tmp_path / "d")
