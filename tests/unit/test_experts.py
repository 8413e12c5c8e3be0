"""Mixtures of experts: channels inside experts, whole experts, and dense layers among them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import SPARSE_FAMILIES, VOCABULARY, make_model
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM

from adapt_pruner import EvaluateConfig, PruneConfig, apply_plan, evaluate, prune, summarize
from adapt_pruner.checkpoint import config_hash, open_checkpoint
from adapt_pruner.engines.in_memory import load_model
from adapt_pruner.families import find_family, layer_widths, removal_counts, unit_costs, unit_counts
from adapt_pruner.modeling.conversion import convert_pruned_model
from adapt_pruner.modeling.modeling_adapt import experts_of_any_width
from adapt_pruner.plan import PruningPlan
from adapt_pruner.scoring import find_estimator, score
from adapt_pruner.surgery import prune_layer

IDS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
CASES = [(family, mlp) for family in SPARSE_FAMILIES for mlp in ("channel", "expert")]
# What is left of each layer: experts, and channels of each expert; layer 2 of qwen3_moe has an MLP instead.
EXPERTS = [[0, 2, 3], [1], [0, 1, 2, 3, 4], [2, 4]]
CHANNELS = [5, 8, 16, 11]
GROUPS = [[0, 2, 3], [1], [0, 1, 2, 3], [0, 3]]


def widths_of(model):
    return layer_widths(model.config.to_dict())


def keep_of(widths, mlp):
    """Kept units of every layer: of the experts of a layer equally many channels, but not the same ones."""
    draw = np.random.default_rng(0)
    keep = []
    for layer, groups, experts, channels in zip(widths, GROUPS, EXPERTS, CHANNELS, strict=True):
        kept = {"kv_group": np.array(groups)}
        if not layer.num_experts:
            kept["channel"] = np.arange(40, 88)
        elif mlp == "expert":
            kept["expert"] = np.array(experts)
        else:
            size = layer.intermediate_size
            chosen = [np.sort(draw.permutation(size)[:channels]) + e * size for e in range(layer.num_experts)]
            kept["channel"] = np.concatenate(chosen)
        keep.append(kept)
    return keep


def cut(model, mlp):
    """Prunes in place; the widths afterwards."""
    family, widths = find_family(model.config.model_type).with_granularity("kv_group", mlp), widths_of(model)
    keep = keep_of(widths, mlp)
    return [prune_layer(model, family, i, layer, keep[i]) for i, layer in enumerate(widths)]


def without(model, mlp):
    """The same by zeros and by routers that never choose the removed experts."""
    with torch.no_grad():
        for layer, widths, keep in zip(
            model.model.layers, widths_of(model), keep_of(widths_of(model), mlp), strict=True
        ):
            for group in set(range(4)) - set(keep["kv_group"].tolist()):
                layer.self_attn.o_proj.weight[:, group * 20 : (group + 1) * 20] = 0
            if "expert" in keep:
                gone = torch.ones(widths.num_experts, dtype=torch.bool)
                gone[keep["expert"]] = False
                gate, top_k = layer.mlp.gate, min(widths.experts_per_token, len(keep["expert"]))

                def route(module, args, output, gone=gone, top_k=top_k, normalise=True):
                    logits = output[0].masked_fill(gone, -torch.inf)
                    chosen = logits.float().softmax(-1).topk(top_k, -1)
                    return logits, chosen.values / chosen.values.sum(-1, keepdim=True), chosen.indices

                gate.register_forward_hook(route)
            elif widths.num_experts:
                gone = torch.ones(widths.num_experts * widths.intermediate_size, dtype=torch.bool)
                gone[keep["channel"]] = False
                down = layer.mlp.experts.down_proj
                down[gone.view(widths.num_experts, 1, -1).expand_as(down)] = 0
            else:
                layer.mlp.down_proj.weight[:, :40] = 0
    return model


# Units


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_widths(family):
    widths = widths_of(make_model(family))
    experts, channels, top_k = (5, 24, 3) if family == "mixtral" else (6, 16, 2)
    dense = [2] if family == "qwen3_moe" else []
    for i, layer in enumerate(widths):
        seen = (layer.num_experts, layer.intermediate_size, layer.experts_per_token)
        assert seen == ((0, 88, 0) if i in dense else (experts, channels, top_k))
    by_channel = find_family(family)
    by_expert = by_channel.with_granularity("kv_group", "expert")
    mlp = "channel" if dense else "expert"
    assert unit_counts(by_channel, widths)[0] == {"kv_group": 4, "channel": experts * channels}
    assert removal_counts(by_channel, widths)[0] == {"kv_group": 4, "channel": channels}
    assert unit_counts(by_expert, widths)[0] == {"kv_group": 4, "expert": experts}
    assert list(unit_counts(by_expert, widths)[2]) == ["kv_group", mlp]


def test_the_hub_calls_the_number_of_experts_otherwise(tiny_models):
    config = dict(open_checkpoint(tiny_models["qwen3_moe"]).config)
    widths = layer_widths(config)
    config["num_experts"] = config.pop("num_local_experts")
    assert layer_widths(config) == widths
    for key, value in (("num_experts", -1), ("moe_intermediate_size", 0), ("num_experts_per_tok", None)):
        with pytest.raises(ValueError, match=f"{key} is {value}, expected a positive integer"):
            layer_widths(config | {key: value})


def test_every_second_layer_may_have_experts():
    model = make_model("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[])
    assert [layer.num_experts for layer in widths_of(model)] == [0, 6, 0, 6]
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, True, False, True]


@pytest.mark.parametrize(("family", "mlp"), CASES)
def test_costs_are_the_parameters_a_smaller_model_does_not_have(family, mlp, tiny_models):
    whole = make_model(family)
    size = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}[family]
    smaller = (
        make_model(family, **{size: getattr(whole.config, size) - 1})
        if mlp == "channel"
        else make_model(family, num_local_experts=whole.config.num_local_experts - 1)
    )
    description = find_family(family).with_granularity("kv_group", mlp)
    shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    costs = unit_costs(description, widths_of(whole), shapes)
    sparse = [cost[mlp] for cost, layer in zip(costs, widths_of(whole), strict=True) if layer.num_experts]
    assert sum(sparse) == whole.num_parameters() - smaller.num_parameters()
    # The checkpoint has a tensor for each expert, and says the same.
    stored = {name: info.shape for name, info in open_checkpoint(tiny_models[family]).tensors.items()}
    assert sum(".experts." in name for name in stored) == 3 * sum(
        layer.num_experts for layer in widths_of(whole)
    )
    assert unit_costs(description, widths_of(whole), stored) == costs


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_a_missing_or_misshapen_expert_is_named(family, tiny_models):
    checkpoint = open_checkpoint(tiny_models[family])
    stored = {name: info.shape for name, info in checkpoint.tensors.items()}
    name = next(name for name in stored if "layers.1." in name and ".experts.3." in name)
    widths = layer_widths(checkpoint.config)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        unit_costs(find_family(family), widths, stored | {name: (7, 7)})
    del stored[name]
    with pytest.raises(ValueError, match=f"tensor {name} is missing"):
        unit_costs(find_family(family), widths, stored)
    shapes = {name: tuple(p.shape) for name, p in make_model(family).named_parameters()}
    shapes["model.layers.1.mlp.experts.down_proj"] = (9, *shapes["model.layers.1.mlp.experts.down_proj"][1:])
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.experts\.down_proj has shape .* asks for . experts"
    ):
        unit_costs(find_family(family), widths, shapes)


# Importance


@pytest.mark.parametrize(("family", "mlp"), CASES)
def test_importance_is_that_of_the_units_own_weights(family, mlp):
    model = make_model(family)
    description = find_family(family).with_granularity("kv_group", mlp)
    seen = score(model, description, widths_of(model), IDS, micro_batch_size=1).unit_importance
    exact = make_model(family).double().requires_grad_(True)
    exact.set_experts_implementation("eager")
    logits = exact(input_ids=IDS).logits[:, :-1]
    functional.cross_entropy(logits.reshape(-1, VOCABULARY), IDS[:, 1:].reshape(-1)).backward()

    def saliency(parameter):
        return (parameter * parameter.grad).abs().detach()

    for layer, widths, importance in zip(exact.model.layers, widths_of(model), seen, strict=True):
        if not widths.num_experts:
            rows = saliency(layer.mlp.gate_proj.weight).sum(1) + saliency(layer.mlp.up_proj.weight).sum(1)
            expected, kind = rows + saliency(layer.mlp.down_proj.weight).sum(0), "channel"
        elif mlp == "channel":
            halves = saliency(layer.mlp.experts.gate_up_proj).sum(2).unflatten(1, (2, -1)).sum(1)
            expected = (halves + saliency(layer.mlp.experts.down_proj).sum(1)).flatten()
            kind = "channel"
        else:
            tensors = (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
            expected = sum(saliency(t).sum((1, 2)) for t in tensors) + saliency(layer.mlp.gate.weight).sum(1)
            kind = "expert"
        np.testing.assert_allclose(importance[kind], expected.numpy(), rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize(("family", "mlp"), CASES)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_an_expert_that_no_token_goes_to_has_importance_zero(family, mlp, implementation):
    model = make_model(family)
    model.set_experts_implementation(implementation)
    router = model.model.layers[1].mlp.gate

    def avoid_expert_3(module, args, output):
        chosen = output[0].index_fill(-1, torch.tensor([3]), -torch.inf).softmax(-1).topk(2, -1)
        return output[0], chosen.values, chosen.indices

    router.register_forward_hook(avoid_expert_3)
    description = find_family(family).with_granularity("kv_group", mlp)
    scores = score(model, description, widths_of(model), IDS, micro_batch_size=2).unit_importance[1][mlp]
    assert np.isfinite(scores).all()
    of_experts = scores.reshape(router.num_experts, -1).sum(1)
    assert of_experts[3] == 0
    assert np.all(np.delete(of_experts, 3) > 0)


@pytest.mark.parametrize(
    "estimator", ["taylor_vectorize", "taylor_second", "taylor_mixed", "magnitude_l2", "random"]
)
def test_other_estimators_score_every_unit(estimator):

    model = make_model("qwen3_moe")
    for mlp in ("channel", "expert"):
        family = find_family("qwen3_moe").with_granularity("kv_group", mlp)
        scores = score(
            model, family, widths_of(model), IDS, micro_batch_size=2, estimator=find_estimator(estimator)
        ).unit_importance
        assert [{k: len(v) for k, v in layer.items()} for layer in scores] == list(
            unit_counts(family, widths_of(model))
        )
        if estimator == "magnitude_l2":
            experts, gate = model.model.layers[0].mlp.experts, model.model.layers[0].mlp.gate
            squares = experts.gate_up_proj.square().sum(2).unflatten(1, (2, -1)).sum(1)
            squares = (squares + experts.down_proj.square().sum(1)).detach()
            expected = (
                squares.flatten()
                if mlp == "channel"
                else squares.sum(1) + gate.weight.detach().square().sum(1)
            )
            np.testing.assert_allclose(scores[0][mlp], expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("estimator", ["wanda", "fluctuation"])
def test_inputs_of_an_expert_are_those_of_its_tokens(estimator):
    model, seen = make_model("qwen3_moe"), []
    how = {"micro_batch_size": 1, "estimator": find_estimator(estimator)}

    def score_channels():
        scores = score(model, find_family("qwen3_moe"), widths_of(model), IDS, **how)
        return scores.unit_importance[1]["channel"]

    scores = score_channels()
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(IDS)
    (hidden, chosen, _), expected = seen[0], []
    for expert in range(6):
        rows = hidden[[expert in choice for choice in chosen.tolist()]].double()
        gate, up = (rows @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
        inputs, down = functional.silu(gate) * up, experts.down_proj[expert].double()
        if estimator == "wanda":
            expected.append(down.abs().sum(0) * inputs.norm(dim=0))
        elif len(rows) > 1:
            values = down.square().sum(0) * inputs.var(0)
            expected.append((values - values.mean()) / values.std())
        else:
            expected.append(torch.zeros(16))
    np.testing.assert_allclose(scores, torch.cat(expected).detach().numpy(), rtol=1e-3, atol=1e-4)
    model.model.layers[1].mlp.gate.register_forward_hook(
        lambda module, args, output: (output[0], output[1], torch.zeros_like(output[2]))
    )  # all tokens to one expert
    alone = score_channels()
    assert not alone[16:].any()
    assert np.isfinite(alone).all()
    assert alone[:16].any()


def test_the_load_of_experts_is_not_part_of_the_loss():
    model = make_model("mixtral")
    plain = score(model, find_family("mixtral"), widths_of(model), IDS, micro_batch_size=2)
    model.config.output_router_logits = True
    balanced = score(model, find_family("mixtral"), widths_of(model), IDS, micro_batch_size=2)
    assert balanced.loss == plain.loss


# Surgery


@pytest.mark.parametrize(("family", "mlp"), CASES)
def test_pruning_equals_leaving_the_units_out_and_survives_saving(family, mlp, tmp_path):
    model = make_model(family)
    widths = cut(model, mlp)
    logits = model(IDS).logits  # the live model works as it is, before it is converted
    torch.testing.assert_close(logits, without(make_model(family), mlp)(IDS).logits, rtol=1e-4, atol=1e-5)
    converted = convert_pruned_model(model, widths)
    converted.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded).__name__.startswith("Adapt")
    assert torch.equal(loaded(IDS).logits, logits)
    assert layer_widths(open_checkpoint(tmp_path / "model").config) == tuple(widths)
    assert type(AutoModel.from_pretrained(tmp_path / "model")) is type(loaded.model)
    loaded.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (
        loaded.generate(IDS, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        loaded.set_experts_implementation(implementation)
        torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_router_logits_of_kept_experts_are_the_same(family):
    model = make_model(family)
    hidden = torch.randn(34, 48, generator=torch.Generator().manual_seed(0))
    before = [
        layer.mlp.gate(hidden)[0] if hasattr(layer.mlp, "gate") else None for layer in model.model.layers
    ]
    top_k = model.config.num_experts_per_tok
    cut(model, "expert")
    for layer, kept, logits in zip(model.model.layers, EXPERTS, before, strict=True):
        if logits is None:
            continue
        after, weights, chosen = layer.mlp.gate(hidden)
        # BLAS may add up a product with fewer rows in another order.
        torch.testing.assert_close(after, logits[:, kept], rtol=1e-4, atol=1e-5)
        if len(kept) == 1:
            assert torch.equal(weights, torch.ones(34, 1))
        assert weights.shape == chosen.shape == (34, min(top_k, len(kept)))
        assert int(chosen.max()) < len(kept)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_a_training_step_with_the_loss_that_balances_the_load(family, tmp_path):
    model = make_model(family)
    convert_pruned_model(model, cut(model, "expert")).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    plain = loaded(input_ids=IDS, labels=IDS)
    output = loaded(input_ids=IDS, labels=IDS, output_router_logits=True)
    assert torch.equal(output.logits, plain.logits)
    torch.testing.assert_close(
        output.loss, plain.loss + loaded.config.router_aux_loss_coef * output.aux_loss, rtol=1e-6, atol=0
    )
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in loaded.parameters() if p.grad is not None)
    torch.optim.SGD(loaded.parameters(), lr=0.05).step()
    assert loaded(input_ids=IDS, labels=IDS).loss < plain.loss


def test_experts_of_any_width_are_those_of_the_stock_model():
    model = make_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(30, 48)
    chosen = torch.randint(0, 4, (30, 3))  # none goes to expert 4
    weights = torch.rand(30, 3)
    model.set_experts_implementation("eager")
    expected = experts(hidden, chosen, weights)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in experts.parameters()]
    model.zero_grad()
    seen = experts_of_any_width(experts, hidden, chosen, weights)
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)
    seen.sum().backward()
    for parameter, gradient in zip(experts.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
        assert not parameter.grad[4].any()


# The whole way


@pytest.fixture
def settings(tiny_models, calibration_file, tmp_path):
    def make(family, mlp="channel", **changes):
        options = {
            "model": str(tiny_models[family]), "target": 0.7, "output": str(tmp_path / "run"),
            "device": "cpu", "calibration": str(calibration_file), "mlp_granularity": mlp, "iterations": 5,
            "amplitude": 0.08, "num_sequences": 8, "sequence_length": 16, "micro_batch_size": 8, **changes,
        }  # fmt: skip
        return PruneConfig(**options)

    return make


@pytest.mark.parametrize(("family", "mlp"), CASES)
def test_prune_apply_load_generate_evaluate_and_inspect(family, mlp, settings, calibration_file, tmp_path):
    config = settings(family, mlp)
    result = prune(config)
    units = result.plan.keep_indices
    assert [set(layer) for layer in units] == [
        {"kv_group", "channel" if mlp == "channel" or (family, i) == ("qwen3_moe", 2) else "expert"}
        for i in range(4)
    ]
    # A unit of the costliest kind at most, one channel where every layer has some.
    most = 144 * 6 if (family, mlp) != ("mixtral", "expert") else 3504
    assert 0 <= result.metrics["parameters_below_target"] < most
    model = AutoModelForCausalLM.from_pretrained(result.model_directory).eval()
    assert model.num_parameters() == result.metrics["parameters_after"]
    for layer, kept in zip(model.model.layers, units, strict=True):
        if hasattr(layer.mlp, "experts"):
            experts, channels, _ = layer.mlp.experts.gate_up_proj.shape
            assert len(kept[mlp]) == (experts if mlp == "expert" else experts * channels // 2)
    applied = apply_plan(result.plan, config.model, tmp_path / "applied")
    for name in ("model.safetensors", "config.json"):
        assert (applied / name).read_bytes() == (result.model_directory / name).read_bytes()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert model.generate(IDS, attention_mask=torch.ones_like(IDS), **options).shape == (2, 21)
    evaluated = evaluate(
        EvaluateConfig(
            str(result.run_directory), str(calibration_file), context=16, max_tokens=256, device="cpu"
        )
    )
    assert 1 < evaluated.perplexity.perplexity < 10 * VOCABULARY
    assert summarize(result.model_directory).parameters == model.num_parameters()


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_a_plan_that_keeps_all_experts_changes_no_bit(family, settings, tiny_models, tmp_path):
    result = prune(settings(family, "expert", target=1.0))
    assert result.plan.removes_nothing()
    assert result.plan.mlp_granularity == "expert"
    applied = apply_plan(result.plan, tiny_models[family], tmp_path / "applied")
    for directory in (result.model_directory, applied):
        for name in ("model.safetensors", "config.json"):
            assert (directory / name).read_bytes() == (tiny_models[family] / name).read_bytes()


def test_a_result_can_be_pruned_again_and_loads_without_the_package(settings, tmp_path):
    first = prune(settings("qwen3_moe", "expert", target=0.8))
    again = {"model": str(first.model_directory), "output": str(tmp_path / "second")}
    second = prune(settings("qwen3_moe", "channel", **again))
    applied = apply_plan(second.plan, first.model_directory, tmp_path / "applied")
    names = ("model.safetensors", "config.json")
    assert all((applied / n).read_bytes() == (second.model_directory / n).read_bytes() for n in names)
    expected = AutoModelForCausalLM.from_pretrained(second.model_directory).eval()(IDS).logits
    torch.save({"ids": IDS, "logits": expected}, tmp_path / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
expected = torch.load("expected.pt", weights_only=True)
model = AutoModelForCausalLM.from_pretrained({str(second.model_directory)!r}, trust_remote_code=True).eval()
assert "adapt_pruner" not in sys.modules
torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
model.save_pretrained("again")
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL,
        cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (second.model_directory / weights).read_bytes()


@pytest.mark.parametrize(("channels", "name"), [(16, "MixtralForCausalLM"), (18, "AdaptMixtralForCausalLM")])
def test_equal_layers_are_saved_as_the_stock_model_if_it_can_run_them(channels, name, tmp_path):
    model, family, widths = make_model("mixtral"), find_family("mixtral"), []
    for i, layer in enumerate(widths_of(model)):
        keep = np.concatenate([np.arange(channels) + e * 24 for e in range(5)])
        widths.append(prune_layer(model, family, i, layer, {"kv_group": np.arange(4), "channel": keep}))
    convert_pruned_model(model, widths).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == name
    assert loaded.config.intermediate_size == channels
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_methods_that_look_at_inputs(settings, tmp_path):
    for method in ("wanda-sp", "flap"):
        result = prune(
            settings("qwen3_moe", method=method, compensation="none", output=str(tmp_path / method))
        )
        assert AutoModelForCausalLM.from_pretrained(result.model_directory)(IDS).logits.isfinite().all()


def test_query_heads_and_experts_together(settings):
    result = prune(settings("mixtral", "expert", granularity="query_head"))
    assert set(result.plan.keep_indices[0]) == {"query_head", "expert"}
    assert AutoModelForCausalLM.from_pretrained(result.model_directory)(IDS).logits.isfinite().all()


@pytest.mark.parametrize("mlp", ["channel", "expert"])
def test_a_plan_fits_a_checkpoint_with_fused_experts_too(mlp, tiny_models, tmp_path):
    model = load_model(tiny_models["mixtral"], device="cpu")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    checkpoint = open_checkpoint(tmp_path / "fused")
    assert "model.layers.0.mlp.experts.gate_up_proj" in checkpoint.tensors
    widths = layer_widths(checkpoint.config)
    keep = tuple(keep_of(widths, mlp))
    plan = PruningPlan(
        "fused", config_hash(checkpoint.config), checkpoint.fingerprint(), "mixtral", {},
        unit_counts(find_family("mixtral").with_granularity("kv_group", mlp), widths), keep,
    )  # fmt: skip
    applied = AutoModelForCausalLM.from_pretrained(
        apply_plan(plan, checkpoint.directory, tmp_path / "applied")
    )
    pruned = cut(model, mlp)
    assert layer_widths(applied.config.to_dict()) == tuple(pruned)
    assert torch.equal(applied(IDS).logits, model(IDS).logits)


# What cannot be done is said before anything is loaded.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "obs"}, "estimator obs needs the second moments .* 'wanda', 'fluctuation', 'random'"),
        (
            {"estimator": "wanda", "mlp_granularity": "expert"},
            r"estimator wanda needs the columns .* 'magnitude_l2', 'random'\]",
        ),
        (
            {"estimator": "fluctuation", "mlp_granularity": "expert"},
            "estimator fluctuation needs the columns",
        ),
        ({"compensation": "least_squares"}, "compensation 'least_squares' needs .* expected 'none'"),
        ({"gradients": "fused"}, "gradients 'fused' needs linear layers"),
        ({"allocation": "search"}, "allocation 'search' measures losses"),
        ({"mlp_granularity": "expert", "allocation": "reference"}, "allocation 'reference' counts rows"),
        ({"mlp_granularity": "expert", "gqa_credit": "modulo"}, "gqa_credit 'modulo' is for"),
    ],
)
def test_what_experts_do_not_have_is_refused(changes, message, settings, tmp_path):
    with pytest.raises(ValueError, match=f"the model is a mixture of experts: .*{message}"):
        prune(settings("mixtral", **changes))
    assert not (tmp_path / "run").exists()


def test_a_dense_family_has_no_experts_to_remove(settings, tmp_path):
    with pytest.raises(ValueError, match="mlp_granularity is 'expert', and models of family llama"):
        prune(settings("llama", "expert"))
    assert not (tmp_path / "run").exists()


def test_a_plan_with_different_numbers_of_channels_is_refused(settings, tmp_path):
    config = settings("mixtral", target=0.9)
    plan = prune(config).plan
    layers = [dict(layer) for layer in plan.keep_indices]
    layers[1]["channel"] = np.setdiff1d(np.arange(120), [30])
    uneven = dataclasses.replace(plan, keep_indices=tuple(layers))
    with pytest.raises(ValueError, match=r"layer 1: the plan keeps \[24, 23, 24, 24, 24\] .* per expert"):
        apply_plan(uneven, config.model, tmp_path / "applied")


# Inspecting


def test_flops_are_those_of_the_experts_a_token_goes_through(tiny_models):
    summary = summarize(tiny_models["qwen3_moe"], context=64)
    sparse, dense = summary.layers[0], summary.layers[2]
    attention = 2 * (2 * 80 * 48 + 2 * 40 * 48) + 4 * 80 * 64
    assert sparse.flops_per_token == attention + 2 * (6 * 48 + 2 * 3 * 16 * 48)
    assert dense.flops_per_token == attention + 2 * 3 * 88 * 48
    layers = json.loads(json.dumps(summary.to_dict()))["layers"]
    assert layers[0]["widths"]["num_experts"] == 6
    assert "num_experts" not in layers[2]["widths"]
    with safe_open(tiny_models["qwen3_moe"] / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert sparse.parameters == sum(size for name, size in sizes.items() if "layers.0." in name)
