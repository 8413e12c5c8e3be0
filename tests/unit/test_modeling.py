"""Models with per-layer widths: saving, loading, generating, training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import FAMILIES, VOCABULARY, make_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import adapt_pruner  # noqa: F401  registers the classes
from adapt_pruner.families import LayerWidths, find_family, layer_widths
from adapt_pruner.modeling.conversion import convert_pruned_model, pruned_config
from adapt_pruner.surgery import prune_layer

IDS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
# What stays of 4 KV groups and 88 channels, per layer.
KEEP = [([0, 2, 3], 60), ([1], 7), ([0, 1, 2, 3], 88), ([0, 3], 33)]


def make_pruned(family: str, keep=KEEP, **options):
    """A tiny model pruned to different widths in every layer, in the class that can be saved."""
    model = make_model(family, **options)
    description, widths = find_family(family), layer_widths(model.config.to_dict())
    pruned = [
        prune_layer(
            model,
            description,
            i,
            widths[i],
            {"kv_group": np.array(groups), "channel": np.arange(88 - channels, 88)},
        )
        for i, (groups, channels) in enumerate(keep)
    ]
    with torch.no_grad():
        logits = model(IDS).logits
    return convert_pruned_model(model, pruned), logits


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path):
    model, logits = make_pruned(request.param)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", logits


def test_pruning_equals_zeroing_the_removed_units():
    zeroed = make_model("llama")
    for layer, (groups, channels) in zip(zeroed.model.layers, KEEP, strict=True):
        removed = [g for g in range(4) if g not in groups]
        with torch.no_grad():
            for g in removed:
                layer.self_attn.o_proj.weight[:, g * 20 : (g + 1) * 20] = 0
            layer.mlp.down_proj.weight[:, : 88 - channels] = 0
    _, logits = make_pruned("llama")
    torch.testing.assert_close(logits, zeroed(IDS).logits, rtol=1e-4, atol=1e-5)


def test_round_trip(saved):
    directory, logits = saved
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert type(model).__name__.startswith("Adapt")
    assert torch.equal(model(IDS).logits, logits)
    config = json.loads((directory / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["head_dim"] == 10
    rope = config["rope_parameters"]
    if "sliding_attention" in rope:
        assert config["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"] == 10_000
    assert config["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]
    assert type(AutoModel.from_pretrained(directory)) is type(model.model)


def test_saving_again_writes_the_same_files(saved, tmp_path):
    directory, _ = saved
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / "again")
    for file in directory.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_attention_implementations_agree_and_can_be_switched(saved):
    directory, logits = saved
    soft_capped = json.loads((directory / "config.json").read_text()).get("attn_logit_softcapping")
    for implementation in ("eager",) if soft_capped else ("eager", "sdpa"):  # Gemma 2 has no sdpa
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation=implementation)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    model.set_attn_implementation("eager")
    assert all(m.self_attn.config._attn_implementation == "eager" for m in model.model.layers)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_cached_generation_equals_uncached(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0]).eval()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    options = {
        "attention_mask": mask, "max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip
    uncached = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(model.generate(IDS, use_cache=True, **options), uncached)
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, uncached)
    assert model.generate(IDS, num_beams=3, **options).shape == uncached.shape


def test_tied_embeddings_stay_tied_and_are_stored_once(saved):
    directory, _ = saved
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_untied_head_survives(tmp_path):
    model, logits = make_pruned("qwen2", tied=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert torch.equal(loaded(IDS).logits, logits)


def test_training_step_with_gradient_checkpointing(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0]).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    before = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    before.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6)
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert model(input_ids=IDS, labels=IDS).loss < before


def run_python(code: str, directory: Path) -> subprocess.CompletedProcess:
    # Without a terminal, or transformers would wait at its prompt for trust.
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=directory, timeout=300,
    )  # fmt: skip


def test_loads_with_remote_code_where_the_package_is_not_imported(saved):
    directory, logits = saved
    torch.save({"ids": IDS, "logits": logits}, directory.parent / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
expected = torch.load("expected.pt", weights_only=True)
try:
    AutoModelForCausalLM.from_pretrained({str(directory)!r})
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise SystemExit("loaded code from the checkpoint without being asked to")
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True)
assert "adapt_pruner" not in sys.modules
torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
"""
    done = run_python(code, directory.parent)
    assert done.returncode == 0, done.stderr


def test_import_alone_is_light_and_enough(tmp_path):
    directory = tmp_path / "model"
    make_pruned("llama")[0].save_pretrained(directory)
    code = f"""
import sys, adapt_pruner
assert not {{"torch", "transformers"}} & set(sys.modules), "import adapt_pruner is heavy"
from transformers import AutoModelForCausalLM
from transformers import LlamaForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(directory)!r})).__module__)
import torch
assert not torch.cuda.is_initialized()
"""
    done = run_python(code, directory.parent)
    assert done.stdout.strip() == "adapt_pruner.modeling.modeling_adapt", done.stderr


@pytest.mark.parametrize(("family", "stock"), [("llama", False), ("qwen2", True), ("mistral", True)])
def test_uniform_widths_need_no_custom_code_where_the_stock_config_takes_them(family, stock):
    # 6 heads divide hidden size 48, 3 groups of 2 do not break any check; 5 groups of 2 would.
    model = make_model(family)
    three = pruned_config(model.config, [LayerWidths(6, 3, 40, 10)] * 4)
    assert three.model_type == family
    assert three.head_dim == 10
    five = pruned_config(model.config, [LayerWidths(10, 5, 40, 10)] * 4)  # 48 is no multiple of 10
    assert (five.model_type == family) is stock
    assert [(w.num_attention_heads, w.intermediate_size) for w in layer_widths(five.to_dict())] == [
        (10, 40)
    ] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_model_saves_as_stock_architecture(family, tmp_path):
    model, logits = make_pruned(family, keep=[([0, 1, 3], 40)] * 4)
    model.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.py")] == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(make_model(family))
    assert torch.equal(loaded(IDS).logits, logits)


FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0]}
ROPES = {
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.6},
    "long": {"rope_type": "longrope", "original_max_position_embeddings": 8, **FACTORS},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("keep", [KEEP, [([0, 1, 3], 40)] * 4])
@pytest.mark.parametrize(("family", "rope"), [("phi3", "partial"), ("phi3", "long"), ("llama", "dynamic")])
def test_rotary_settings_survive(family, rope, keep, tmp_path):
    # Texts are longer than the model was made for, so that "long" and "dynamic" are not as "default".
    shape = {"hidden_size": 80, "max_position_embeddings": 8}
    parameters = {"rope_theta": 5000.0, **ROPES[rope]}
    model, logits = make_pruned(family, keep=keep, rope_parameters=parameters, **shape)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, logits)
    plain, _ = make_pruned(family, keep=keep, **shape)
    assert not torch.allclose(plain(IDS).logits, logits)
    config = json.loads((tmp_path / "config.json").read_text())
    if config["model_type"].startswith("adapt_"):  # what readers look at that predate rope_parameters
        assert config["rope_theta"] == 5000.0
        assert config.get("partial_rotary_factor", 1.0) == parameters.get("partial_rotary_factor", 1.0)
        for key in ("factor", "long_factor"):
            assert (config["rope_scaling"] or {}).get(key) == parameters.get(key)
    again = pruned_config(loaded.config, layer_widths(loaded.config.to_dict()))
    assert again.rope_parameters == loaded.config.rope_parameters


def test_heads_that_do_not_divide_are_refused(saved):
    config = json.loads((saved[0] / "config.json").read_text())
    config["per_layer_config"]["0"]["num_attention_heads"] = 5
    (saved[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="layer 0: 5 attention heads are not a multiple of 3 KV heads"):
        AutoConfig.from_pretrained(saved[0])
