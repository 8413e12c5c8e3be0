"""Importance of units and layers against an independent re-computation in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import FAMILIES, SHAPE, VOCABULARY, make_model
from torch.nn import functional

from adapt_pruner import kernels
from adapt_pruner.families import find_family, layer_widths
from adapt_pruner.scoring import score
from adapt_pruner.scoring.estimators import OBS_FISHER

HEAD_DIM, KV, HEADS = SHAPE["head_dim"], SHAPE["num_key_value_heads"], SHAPE["num_attention_heads"]
BATCH = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(1))


def fp64_importance(model, batch):
    """|w * dL/dw| summed by unit; the owner of query head q is KV head q // heads_per_group."""
    model = model.double()
    model.requires_grad_(True)
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))
    loss.backward()

    def by_row(module, *names):
        """Of each of the named layers, or of the parts of the one layer that is all of them (Phi-3)."""
        fused = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}[names[0]]
        linears = [getattr(module, name) for name in ([fused] if hasattr(module, fused) else names)]
        rows = []
        for linear in linears:
            saliency = (linear.weight * linear.weight.grad).abs().sum(1)
            if linear.bias is not None:
                saliency = saliency + (linear.bias * linear.bias.grad).abs()
            rows.append(saliency)
        if len(rows) < len(names):
            sizes = {3: [HEADS * HEAD_DIM, KV * HEAD_DIM, KV * HEAD_DIM], 2: [88, 88]}[len(names)]
            rows = rows[0].split(sizes)
        return rows

    def by_column(linear):
        return (linear.weight * linear.weight.grad).abs().sum(0)

    units = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        q_rows, k_rows, v_rows = by_row(attention, "q_proj", "k_proj", "v_proj")
        group = k_rows.view(KV, HEAD_DIM).sum(1) + v_rows.view(KV, HEAD_DIM).sum(1)
        for per_query_row in (q_rows, by_column(attention.o_proj)):
            heads = per_query_row.view(HEADS, HEAD_DIM).sum(1)
            for q in range(HEADS):
                group[q // (HEADS // KV)] += heads[q]
        channel = sum(by_row(mlp, "gate_proj", "up_proj")) + by_column(mlp.down_proj)
        units.append({"kv_group": group.detach().numpy(), "channel": channel.detach().numpy()})
    return loss.item(), units


def score_model(model, batch=BATCH, **options):
    family = find_family(model.config.model_type)
    return score(model, family, layer_widths(model.config.to_dict()), batch, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_end_to_end_importance_equals_fp64(family):
    scores = score_model(make_model(family), micro_batch_size=4)
    loss, expected = fp64_importance(make_model(family), BATCH)
    assert scores.loss == pytest.approx(loss, rel=1e-6)
    for layer, reference in zip(scores.unit_importance, expected, strict=True):
        for kind in ("kv_group", "channel"):
            np.testing.assert_allclose(layer[kind], reference[kind], rtol=1e-5)


def test_op_equals_fp64_given_the_same_weight_and_gradient():
    model = make_model("qwen2")
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    family = find_family("qwen2")
    parameters = dict(model.named_parameters())
    for i, widths in enumerate(layer_widths(model.config.to_dict())):
        for kind in family.unit_kinds:
            tensors = family.unit_tensors(kind, i, widths, parameters)
            expected = 0
            for t in tensors:
                p = parameters[t.name]
                saliency = (p.detach().double() * p.grad.double()).abs().movedim(t.dim, 0)
                expected = expected + saliency.reshape(kind.count(widths), -1).sum(1)
            members = [parameters[t.name] for t in tensors]
            result = kernels.unit_importance(
                [p.detach() for p in members],
                [p.grad for p in members],
                [t.dim for t in tensors],
                [t.group_size for t in tensors],
            )
            torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=0)


def test_micro_batches_do_not_change_the_result():
    whole = score_model(make_model("llama"), micro_batch_size=6)
    parts = score_model(make_model("llama"), micro_batch_size=1)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    np.testing.assert_allclose(parts.layer_importance, whole.layer_importance, rtol=1e-5)
    for a, b in zip(parts.unit_importance, whole.unit_importance, strict=True):
        for kind in a:
            np.testing.assert_allclose(a[kind], b[kind], rtol=1e-4)


def test_bf16_gradients_of_micro_batches_add_up_in_fp32(monkeypatch):
    seen = []
    original = kernels.unit_importances

    def spy(sets, **more):
        seen.append({g.dtype for s in sets for g in s.grads})
        return original(sets, **more)

    monkeypatch.setattr(kernels, "unit_importances", spy)
    model = make_model("llama", dtype=torch.bfloat16)
    accumulated = score_model(model, micro_batch_size=1)
    assert set().union(*seen) == {torch.float32}
    seen.clear()
    score_model(model, micro_batch_size=6)
    assert set().union(*seen) == {torch.bfloat16}
    exact = score_model(make_model("llama", dtype=torch.bfloat16).float(), micro_batch_size=6)
    for a, b in zip(accumulated.unit_importance, exact.unit_importance, strict=True):
        np.testing.assert_allclose(a["channel"].sum(), b["channel"].sum(), rtol=0.02)


def test_only_prunable_weights_get_a_gradient_and_the_model_is_left_as_it_was():
    model = make_model("qwen2").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    touched = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: touched.append(name))
    score_model(model, micro_batch_size=6)
    assert touched
    assert all(".self_attn." in name or ".mlp." in name for name in touched)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not any(layer._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "manhattan"])
def test_layer_importance_equals_fp64(metric):
    scores = score_model(make_model("llama"), micro_batch_size=4, metric=metric)
    with torch.no_grad():
        # The last of transformers' hidden states is behind the final norm: the layers' own outputs instead.
        model, outputs = make_model("llama").double(), []
        hooks = [m.register_forward_hook(lambda m, a, o: outputs.append(o)) for m in model.model.layers]
        embedded = model.model.embed_tokens(BATCH)
        model(input_ids=BATCH)
        for hook in hooks:
            hook.remove()
    expected = []
    for h_in, h_out in zip([embedded, *outputs[:-1]], outputs, strict=True):
        if metric == "cosine":
            expected.append(-functional.cosine_similarity(h_in, h_out, dim=-1).mean().item())
        else:
            order = 2 if metric == "euclidean" else 1
            expected.append((h_out - h_in).norm(p=order, dim=-1).mean().item())
    np.testing.assert_allclose(scores.layer_importance, expected, rtol=1e-5)


def test_a_loss_that_is_not_finite_is_an_error():
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="calibration loss is nan"):
        score_model(model, micro_batch_size=6)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_and_materialised_gradients_give_the_same_scores(family):
    model = make_model(family)
    fused, again, materialised = (
        score_model(model, micro_batch_size=6, gradients=gradients)
        for gradients in ("fused", "fused", "materialised")
    )
    assert fused.loss == materialised.loss
    np.testing.assert_array_equal(fused.layer_importance, materialised.layer_importance)
    for a, same, b in zip(
        fused.unit_importance, again.unit_importance, materialised.unit_importance, strict=True
    ):
        assert a.keys() == b.keys() == {"kv_group", "channel"}
        for kind in a:
            np.testing.assert_array_equal(a[kind], same[kind])
            np.testing.assert_allclose(a[kind], b[kind], rtol=1e-5)


def test_fused_gradients_never_exist_and_the_model_is_left_as_it_was():
    model = make_model("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    touched = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: touched.add(name))
    score_model(model, micro_batch_size=6, gradients="fused")
    prunable_biases = {
        f"model.layers.{i}.{name}.bias"
        for i in range(SHAPE["num_hidden_layers"])
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj",
        )
    }  # fmt: skip
    assert touched == prunable_biases
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_fused_gradients_need_the_whole_batch_in_one_pass():
    with pytest.raises(ValueError, match=r"micro_batch_size of at least 6 \(num_sequences\), got 5"):
        score_model(make_model("llama"), micro_batch_size=5, gradients="fused")


class Transposed(torch.nn.Module):
    """A linear layer of other making, as GPT-2 has it."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.nn.Parameter(linear.weight.detach())

    def forward(self, x):
        return x @ self.weight.T


def test_fused_gradients_need_linear_layers():
    model = make_model("mistral")
    materialised = score_model(model, micro_batch_size=6)
    model.model.layers[1].mlp.up_proj = Transposed(model.model.layers[1].mlp.up_proj)
    named = r"model\.layers\.1\.mlp\.up_proj\.weight is the weight of a Transposed"
    with pytest.raises(ValueError, match=named):
        score_model(model, micro_batch_size=6, gradients="fused")
    auto = score_model(model, micro_batch_size=6)
    for a, b in zip(auto.unit_importance, materialised.unit_importance, strict=True):
        np.testing.assert_allclose(a["channel"], b["channel"], rtol=1e-5)


def test_a_layer_that_runs_twice_cannot_be_fused():
    model = make_model("llama")
    mlp = model.model.layers[2].mlp
    once = mlp.forward
    mlp.forward = lambda x: once(x) + once(2 * x)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.gate_proj\.weight is used twice in a pass"):
        score_model(model, micro_batch_size=6, gradients="fused")


@pytest.mark.parametrize("gradients", ["fused", "materialised"])
def test_automatic_gradients_are_materialised_on_the_cpu(gradients, monkeypatch):
    calls = []
    original = kernels.linear_importance
    monkeypatch.setattr(
        kernels, "linear_importance", lambda *a, **k: calls.append(k["name"]) or original(*a, **k)
    )
    score_model(make_model("mistral"), micro_batch_size=6)
    assert calls == []
    score_model(make_model("mistral"), micro_batch_size=6, gradients=gradients)
    assert len(calls) == (7 * SHAPE["num_hidden_layers"] if gradients == "fused" else 0)


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_a_gradient_of_a_weight_that_is_not_finite_is_named(value):
    model = make_model("llama")
    weight = model.model.layers[3].mlp.down_proj.weight

    def spoil(grad):
        grad = grad.clone()
        grad[3, 4] = float(value)
        return grad

    weight.register_hook(spoil)
    with pytest.raises(kernels.NonFiniteError) as error:
        score_model(model, micro_batch_size=2)
    assert str(error.value) == (
        f"gradient of model.layers.3.mlp.down_proj.weight[3, 4] is {value}: "
        "expected finite values, got 1 of 4224 NaN or infinite"
    )


@pytest.mark.parametrize(
    ("gradients", "named"),
    [
        ("fused", r"output gradient of model\.layers\.2\.mlp\.down_proj\.weight\[2, 5, 7\] is nan"),
        ("materialised", r"gradient of model\.layers\.2\.mlp\.\w+\.weight\[0, 0\] is nan"),
    ],
)
def test_a_gradient_that_is_not_finite_is_named_where_the_backward_pass_meets_it(gradients, named):
    """Planted in the output gradient of an MLP, at one feature of a token; all layers in front get it too."""
    model = make_model("llama")

    def spoil(grad):
        grad = grad.clone()
        grad[2, 5, 7] = torch.nan
        return grad

    model.model.layers[2].mlp.down_proj.register_forward_hook(
        lambda module, args, output: output.register_hook(spoil) and None
    )
    with pytest.raises(kernels.NonFiniteError, match=f"^{named}: "):
        score_model(model, micro_batch_size=6, gradients=gradients)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("gradients", ["fused", "materialised"])
def test_an_activation_that_is_not_finite_is_named_by_its_layer(gradients):
    model = make_model("llama")

    def plant(module, args, output):
        output = output.clone()
        output[1, 3, 4] = float("inf")
        return output

    model.model.layers[2].mlp.register_forward_hook(plant)
    message = r"^layer 2: the cosine between its input and output is"
    with pytest.raises(kernels.NonFiniteError, match=message):
        score_model(model, micro_batch_size=6, gradients=gradients)
    with pytest.raises(kernels.NonFiniteError, match=message):  # before labels are drawn
        score_model(model, micro_batch_size=6, estimator=OBS_FISHER)


def test_activations_too_large_for_their_norm_are_named_though_the_loss_is_finite():
    """The norm in front of a layer brings back to zero what overflows in it."""
    model = make_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1e30)
    with pytest.raises(kernels.NonFiniteError, match=r"^layer 1: the euclidean .* is inf"):
        score_model(model, micro_batch_size=6, metric="euclidean")


@pytest.mark.parametrize("gradients", ["fused", "materialised"])
def test_gradients_that_are_there_already_stay_and_do_not_count(gradients):
    model = make_model("qwen2")
    fresh = score_model(model, micro_batch_size=6, gradients=gradients)
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    again = score_model(model, micro_batch_size=6, gradients=gradients)
    for first, second in zip(fresh.unit_importance, again.unit_importance, strict=True):
        for kind in first:
            assert np.array_equal(first[kind], second[kind])
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())


def test_fused_gradients_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, written = (
            score_model(make_model("llama"), micro_batch_size=6, gradients=g)
            for g in ("fused", "materialised")
        )
    for first, second in zip(fused.unit_importance, written.unit_importance, strict=True):
        for kind in first:
            np.testing.assert_allclose(first[kind], second[kind], rtol=2e-2)
