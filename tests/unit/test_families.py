"""Families: which tensors belong to a unit, how many units a layer has, and what one costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FAMILIES as TINY_FAMILIES
from tiny import SHAPE, make_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from adapt_pruner.families import (
    FAMILIES,
    LayerWidths,
    find_family,
    is_uniform,
    layer_widths,
    unit_costs,
    unit_counts,
)
from adapt_pruner.surgery import gather_members

WIDTHS = LayerWidths(num_attention_heads=8, num_key_value_heads=4, intermediate_size=88, head_dim=10)


def kind_of(model_type: str, name: str):
    return next(kind for kind in find_family(model_type).unit_kinds if kind.name == name)


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# Finding a family


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "llama"),
        ("mistral", "llama"),
        ("adapt_llama", "llama"),
        ("adapt_mistral", "llama"),
        ("qwen2", "qwen2"),
        ("adapt_qwen2", "qwen2"),
    ],
)
def test_a_family_is_found_by_its_model_type(model_type, name):
    assert find_family(model_type).name == name


@pytest.mark.parametrize("model_type", ["gpt2", "Llama", "", None])
def test_an_unknown_model_type_lists_the_known_ones(model_type):
    with pytest.raises(ValueError, match="unknown architecture") as caught:
        find_family(model_type)
    assert repr(model_type) in str(caught.value)
    for family in FAMILIES:
        for known in family.model_types:
            assert repr(known) in str(caught.value)


def test_no_model_type_belongs_to_two_families():
    known = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(known) == len(set(known))


# Widths from a config


def test_a_stock_config_has_equal_layers():
    assert layer_widths(SHAPE) == (WIDTHS,) * 4
    assert is_uniform(layer_widths(SHAPE))


def test_the_config_of_a_live_model_gives_its_widths():
    assert layer_widths(make_model("qwen2").config.to_dict()) == (WIDTHS,) * 4


def test_head_dim_follows_from_the_hidden_size_if_it_is_not_given():
    for config in ({k: v for k, v in SHAPE.items() if k != "head_dim"}, SHAPE | {"head_dim": None}):
        assert {layer.head_dim for layer in layer_widths(config)} == {6}


@pytest.mark.parametrize("missing", [{}, {"num_key_value_heads": None}])
def test_without_kv_heads_every_query_head_has_its_own(missing):
    config = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"} | missing
    assert {layer.num_key_value_heads for layer in layer_widths(config)} == {8}


@pytest.mark.parametrize("key", [str, int])
def test_per_layer_config_overrides_single_layers_and_values(key):
    changes = {
        key(1): {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 20},
        key(3): {"intermediate_size": 1},
    }
    widths = layer_widths(SHAPE | {"per_layer_config": changes})
    assert widths == (WIDTHS, LayerWidths(6, 3, 20, 10), WIDTHS, LayerWidths(8, 4, 1, 10))
    assert not is_uniform(widths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": None}, "intermediate_size is None, expected a positive integer"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"intermediate_size": 88.0}, r"intermediate_size is 88\.0"),
        ({"num_attention_heads": -8}, "num_attention_heads is -8"),
        ({"num_attention_heads": "8"}, "num_attention_heads is '8'"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": "10"}, "head_dim is '10'"),
        ({"head_dim": None, "hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "layer 0: 8 attention heads are not a multiple of 3 KV heads"),
        ({"per_layer_config": {"2": {"num_key_value_heads": 5}}}, "layer 2: 8 attention .* 5 KV heads"),
        ({"per_layer_config": {"2": {"intermediate_size": 0}}}, "intermediate_size is 0"),
        ({"per_layer_config": {"4": {"intermediate_size": 9}}}, r"layers \[4\], expected 0 to 3"),
    ],
)
def test_widths_that_make_no_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        layer_widths(SHAPE | change)


# Unit tensors


def test_a_channel_is_a_row_of_gate_and_up_and_a_column_of_down():
    family, shapes = find_family("mistral"), shapes_of(make_model("mistral"))
    tensors = family.unit_tensors(kind_of("mistral", "channel"), 2, WIDTHS, shapes)
    assert {(t.name, t.dim, t.group_size) for t in tensors} == {
        ("model.layers.2.mlp.gate_proj.weight", 0, 1),
        ("model.layers.2.mlp.up_proj.weight", 0, 1),
        ("model.layers.2.mlp.down_proj.weight", 1, 1),
    }


def test_a_kv_group_owns_the_rows_of_all_its_query_heads():
    # Two query heads of 10 rows per KV head: 20 rows of q, although hidden_size / heads is 6.
    family, shapes = find_family("mistral"), shapes_of(make_model("mistral"))
    tensors = family.unit_tensors(kind_of("mistral", "kv_group"), 0, WIDTHS, shapes)
    assert {(t.name, t.dim, t.group_size) for t in tensors} == {
        ("model.layers.0.self_attn.q_proj.weight", 0, 20),
        ("model.layers.0.self_attn.k_proj.weight", 0, 10),
        ("model.layers.0.self_attn.v_proj.weight", 0, 10),
        ("model.layers.0.self_attn.o_proj.weight", 1, 20),
    }


@pytest.mark.parametrize(
    ("model_type", "kind", "biases"),
    [
        ("llama", "channel", {"mlp.gate_proj.bias": 1, "mlp.up_proj.bias": 1}),
        (
            "llama",
            "kv_group",
            {"self_attn.q_proj.bias": 20, "self_attn.k_proj.bias": 10, "self_attn.v_proj.bias": 10},
        ),
        ("qwen2", "channel", {}),
        (
            "qwen2",
            "kv_group",
            {"self_attn.q_proj.bias": 20, "self_attn.k_proj.bias": 10, "self_attn.v_proj.bias": 10},
        ),
    ],
)
def test_biases_belong_to_a_unit_where_the_model_has_them(model_type, kind, biases):
    # The biases of down and o are as long as the residual stream: no unit owns any of it.
    shapes = shapes_of(make_model(model_type))
    tensors = find_family(model_type).unit_tensors(kind_of(model_type, kind), 1, WIDTHS, shapes)
    seen = {t.name: (t.dim, t.group_size) for t in tensors if t.name.endswith("bias")}
    assert seen == {f"model.layers.1.{name}": (0, size) for name, size in biases.items()}


@pytest.mark.parametrize("model_type", TINY_FAMILIES)
def test_units_cover_every_layer_tensor_that_has_a_prunable_axis(model_type):
    shapes = shapes_of(make_model(model_type))
    family = find_family(model_type)
    covered = {
        t.name
        for layer in range(4)
        for kind in family.unit_kinds
        for t in family.unit_tensors(kind, layer, WIDTHS, shapes)
    }
    # No two sizes in SHAPE are equal: 88 channels, 80 query rows, 40 key and value rows, 48 hidden. Phi-3 has
    # 160 rows of queries, keys and values in one tensor, and 176 of gate and up.
    prunable = {n for n, s in shapes.items() if ".layers." in n and set(s) & {88, 80, 40, 160, 176}}
    assert covered == prunable


def test_a_missing_weight_is_named():
    shapes = shapes_of(make_model("qwen2"))
    del shapes["model.layers.3.mlp.up_proj.weight"]
    family = find_family("qwen2")
    with pytest.raises(
        ValueError, match=r"family qwen2: tensor model\.layers\.3\.mlp\.up_proj\.weight is mis"
    ):
        family.unit_tensors(kind_of("qwen2", "channel"), 3, WIDTHS, shapes)


# Counts and costs


def test_counts_per_layer():
    widths = (WIDTHS, LayerWidths(6, 3, 20, 10))
    assert unit_counts(find_family("llama"), widths) == (
        {"kv_group": 4, "channel": 88},
        {"kv_group": 3, "channel": 20},
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_costs_are_the_parameters_a_smaller_real_model_does_not_have(model_type):
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[model_type]
    biases = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}

    def build(**changes):
        with torch.device("meta"):
            return model_class(config_class(**SHAPE | biases | changes))

    def parameters(model) -> int:
        return sum(p.numel() for p in model.parameters())

    whole = build()
    without_channel = build(intermediate_size=87)
    without_group = build(num_attention_heads=6, num_key_value_heads=3)
    costs = unit_costs(find_family(model_type), layer_widths(SHAPE), shapes_of(whole))
    assert len(costs) == 4
    assert sum(cost["channel"] for cost in costs) == parameters(whole) - parameters(without_channel)
    assert sum(cost["kv_group"] for cost in costs) == parameters(whole) - parameters(without_group)


def test_costs_do_not_depend_on_how_many_units_are_left():
    model = make_model("llama")
    smaller = make_model("llama").config.to_dict() | {"intermediate_size": 30}
    with torch.device("meta"):
        pruned = LlamaForCausalLM(LlamaConfig(**smaller))
    family = find_family("llama")
    assert unit_costs(family, layer_widths(smaller), shapes_of(pruned)) == unit_costs(
        family, layer_widths(SHAPE), shapes_of(model)
    )


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.1.mlp.gate_proj.weight", (87, 48), 88),
        ("model.layers.1.mlp.down_proj.weight", (48, 89), 88),
        ("model.layers.1.self_attn.q_proj.weight", (48, 48), 80),
        ("model.layers.1.self_attn.o_proj.weight", (48, 40), 80),
        ("model.layers.1.self_attn.k_proj.bias", (80,), 40),
    ],
)
def test_shapes_that_do_not_fit_the_config_are_refused(name, shape, expected):
    shapes = shapes_of(make_model("llama")) | {name: shape}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  all parts of the message are checked
        unit_costs(find_family("llama"), layer_widths(SHAPE), shapes)
    for part in (name, str(shape), str(expected)):
        assert part in str(caught.value)


# Resizing


def test_resizing_channels_leaves_attention_alone():
    assert kind_of("llama", "channel").resized(WIDTHS, 5) == LayerWidths(8, 4, 5, 10)


def test_resizing_kv_groups_keeps_heads_per_group():
    assert kind_of("llama", "kv_group").resized(WIDTHS, 1) == LayerWidths(2, 1, 88, 10)
    assert kind_of("llama", "kv_group").resized(LayerWidths(9, 3, 88, 64), 2) == LayerWidths(6, 2, 88, 64)


def test_spans():
    assert [WIDTHS.span(span) for span in ("one", "head", "group")] == [1, 10, 20]


# Fused tensors


def test_a_fused_tensor_is_several_members():
    shapes = shapes_of(make_model("phi3"))
    prefix = "model.layers.0."
    seen = {
        (t.name.removeprefix(prefix), t.dim, t.group_size, t.segment and (t.segment.start, t.segment.length))
        for kind in find_family("phi3").unit_kinds
        for t in find_family("phi3").unit_tensors(kind, 0, WIDTHS, shapes)
    }
    assert seen == {
        ("self_attn.qkv_proj.weight", 0, 20, (0, 80)),
        ("self_attn.qkv_proj.weight", 0, 10, (80, 40)),
        ("self_attn.qkv_proj.weight", 0, 10, (120, 40)),
        ("self_attn.o_proj.weight", 1, 20, None),
        ("mlp.gate_up_proj.weight", 0, 1, (0, 88)),
        ("mlp.gate_up_proj.weight", 0, 1, (88, 88)),
        ("mlp.down_proj.weight", 1, 1, None),
    }


def test_a_fused_tensor_of_the_wrong_size_is_refused():
    shapes = shapes_of(make_model("phi3")) | {"model.layers.1.self_attn.qkv_proj.weight": (170, 48)}
    with pytest.raises(ValueError, match=r"\(170, 48\), the config asks for 160 in dimension 0"):
        unit_costs(find_family("phi3"), layer_widths(SHAPE), shapes)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gathering_leaves_the_rest_of_a_fused_tensor(backend):
    shapes = shapes_of(make_model("phi3"))
    family = find_family("phi3").with_granularity("query_head")
    members = family.unit_tensors(family.unit_kinds[0], 0, WIDTHS, shapes)
    tensors = {m.name: torch.randn(shapes[m.name]) for m in members}
    after = gather_members(tensors, members, np.array([1, 2, 5, 6]), backend=backend)
    qkv = tensors["model.layers.0.self_attn.qkv_proj.weight"]
    expected = torch.cat([qkv[10:30], qkv[50:70], qkv[80:]])
    assert torch.equal(after["model.layers.0.self_attn.qkv_proj.weight"], expected)


# A family of one's own


def test_the_family_of_the_documentation_works(tmp_path, tokenizer, calibration_file):
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) < 60
    (tmp_path / "starcoder2_family.py").write_text(code)
    config = Starcoder2Config(**SHAPE, embedding_dropout=0.0, residual_dropout=0.0)
    torch.manual_seed(0)
    Starcoder2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    script = f"""
import starcoder2_family, torch
from transformers import AutoModelForCausalLM
from adapt_pruner import PruneConfig, apply_plan, prune
result = prune(PruneConfig("model", 0.7, "run", iterations=5, num_sequences=4, sequence_length=16,
                           calibration={str(calibration_file)!r}, device="cpu", amplitude=0.1))
assert 0 <= result.metrics["parameters_below_target"] < 100, result.metrics
assert {{len(k["channel"]) for k in result.plan.keep_indices}} != {{88}}
models = [result.model_directory, apply_plan(result.plan, "model", "applied")]
a, b = (AutoModelForCausalLM.from_pretrained(d) for d in models)
assert type(a).__name__ == "AdaptStarcoder2ForCausalLM"
ids = torch.arange(3, 20)[None]
assert torch.equal(a(ids).logits, b(ids).logits)
assert a.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 21)
try:
    starcoder2_family.register_family(starcoder2_family.STARCODER2, None, None, None)
except ValueError as error:
    assert "['adapt_starcoder2', 'starcoder2'] are known already" in str(error)
else:
    raise SystemExit("a family was added twice")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
