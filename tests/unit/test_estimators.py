"""Every estimator against an independent computation in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import SHAPE, VOCABULARY, make_model
from torch.nn import functional

from adapt_pruner import kernels
from adapt_pruner.config import RIDGE
from adapt_pruner.families import find_family, layer_widths
from adapt_pruner.scoring import ESTIMATORS, find_estimator, score
from adapt_pruner.scoring.losses import generator_of
from adapt_pruner.scoring.obs import DAMPING

HEAD_DIM, KV, HEADS = SHAPE["head_dim"], SHAPE["num_key_value_heads"], SHAPE["num_attention_heads"]
BATCH = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(1))
ROWS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
COLUMNS = ("self_attn.o_proj", "mlp.down_proj")
WITHOUT_BACKWARD = [e.name for e in ESTIMATORS if e.loss is None]


def score_model(model, name, batch=BATCH, **options):
    family, options = find_family(model.config.model_type), {"micro_batch_size": 4, **options}
    return score(
        model, family, layer_widths(model.config.to_dict()), batch, estimator=find_estimator(name), **options
    )


def owner(head):
    return head // (HEADS // KV)


def modulo(head):
    return head % KV


def by_unit(model, element, *, after=lambda sums: sums, credit=owner, biases=True):
    """Sums of element(parameter) by row, for o and down by column, each `after`, then by unit."""
    units = []
    for layer in model.model.layers:
        group, channel = torch.zeros(KV, dtype=torch.float64), 0
        for name in (*ROWS, *COLUMNS):
            linear = layer.get_submodule(name)
            index = after(element(linear.weight).sum(0 if name in COLUMNS else 1))
            if biases and name in ROWS and linear.bias is not None:
                index = index + after(element(linear.bias))
            if name.startswith("mlp"):
                channel = channel + index
            else:
                heads = index.view(-1, HEAD_DIM).sum(1)
                for head, value in enumerate(heads):
                    group[credit(head) if len(heads) == HEADS else head] += value
        units.append({"kv_group": group.detach().numpy(), "channel": channel.detach().numpy()})
    return units


def gradients(model, batch=BATCH):
    """For each parameter, the gradient of the mean loss."""
    model.zero_grad()
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1)).backward()
    return {p: p.grad.clone() for p in model.parameters()}


def fisher(model):
    parts = [gradients(model, BATCH[i : i + 1]) for i in range(len(BATCH))]
    return {p: sum(part[p] ** 2 for part in parts) / len(BATCH) for p in model.parameters()}


def output_columns(model, of_columns):
    """Scores of the columns of o and down from their weight and input [tokens, columns], in order."""
    inputs = {}
    handles = [
        layer.get_submodule(name).register_forward_hook(
            lambda module, args, output: inputs.update({module: args[0].reshape(-1, args[0].shape[-1])})
        )
        for layer in model.model.layers
        for name in COLUMNS
    ]
    with torch.no_grad():
        model(input_ids=BATCH)
    for handle in handles:
        handle.remove()
    linears = [[layer.get_submodule(name) for name in COLUMNS] for layer in model.model.layers]
    return [[of_columns(linear.weight, inputs[linear]) for linear in pair] for pair in linears]


def wanda(model):
    columns = output_columns(model, lambda w, x: (w.abs() * x.norm(dim=0)).sum(0))
    return [
        {"kv_group": o.view(KV, -1).sum(1).detach().numpy(), "channel": down.detach().numpy()}
        for o, down in columns
    ]


def fluctuation(model):
    def standardised(values):
        return (values - values.mean()) / values.std()

    return [
        {
            "kv_group": standardised(o.square()).view(KV, -1).mean(1).detach().numpy(),
            "channel": standardised(down).detach().numpy(),
        }
        for o, down in output_columns(model, lambda w, x: (w.square() * x.var(dim=0)).sum(0))
    ]


def obs(model, attention=HEADS // KV * HEAD_DIM, metric=lambda w: torch.eye(w.shape[0], dtype=w.dtype)):
    """Per layer, of each unit of attention, which owns so many columns of o, and of each channel."""

    def errors(w, x, size):
        """trace(M W_G ((C^-1)_GG)^-1 W_G^T) of each group of columns, C with the ridge on its diagonal."""
        moments = x.T @ x
        inverse = torch.linalg.inv(moments + RIDGE * moments.diagonal().diag())
        groups = torch.arange(w.shape[1]).split(size)
        return torch.stack(
            [
                (metric(w) @ w[:, g]).T.mul(torch.linalg.solve(inverse[g][:, g], w[:, g].T)).sum()
                for g in groups
            ]
        )

    by_size = [output_columns(model, lambda w, x, n=n: errors(w, x, n)) for n in (attention, 1)]
    return [
        {"kv_group": o.detach().numpy(), "channel": down.detach().numpy()}
        for (o, _), (_, down) in zip(*by_size, strict=True)
    ]


def obs_fisher(model):
    """obs in the metric of half the sum over tokens of g g^T, g the gradient of the mean loss by outputs.

    That loss is of labels drawn from the predictions of the model in fp32.
    """
    outputs = {}
    for layer in model.model.layers:
        for linear in (layer.get_submodule(name) for name in COLUMNS):
            linear.register_forward_hook(lambda module, args, output: outputs.update({module.weight: output}))
    logits = model(input_ids=BATCH, use_cache=False).logits[:, :-1]
    generator = generator_of((0,), BATCH.device)
    labels = []
    for each in logits.float().softmax(-1):
        at = torch.rand(len(each), generator=generator)
        ends = each.double().cumsum(-1)
        labels += [int((row <= x * row[-1]).sum()) for row, x in zip(ends, at, strict=True)]
    loss = functional.cross_entropy(logits.reshape(-1, VOCABULARY), torch.tensor(labels))
    by_outputs = torch.autograd.grad(loss, list(outputs.values()))
    metrics = {}
    for weight, g in zip(list(outputs), by_outputs, strict=True):
        products = g.reshape(-1, g.shape[-1]).T @ g.reshape(-1, g.shape[-1])
        metrics[weight] = (products + DAMPING * products.diagonal().mean() * torch.eye(len(products))) / 2
    return obs(model, metric=lambda w: metrics[w])


def expected(name, model):
    model = model.double().requires_grad_(True)
    if name == "wanda":
        return wanda(model)
    if name == "fluctuation":
        return fluctuation(model)
    if name == "obs":
        return obs(model)
    if name == "obs_fisher":
        return obs_fisher(model)
    if name.startswith("magnitude"):
        return by_unit(model, torch.abs if name == "magnitude_l1" else torch.square)
    g = gradients(model)
    if name == "taylor_first":
        return by_unit(model, lambda w: (w * g[w]).abs())
    if name == "taylor_vectorize":
        return by_unit(model, lambda w: w * g[w], after=torch.abs)
    if name == "taylor_reference":
        micro_batches = [gradients(model, part) for part in BATCH.split(4)]
        return by_unit(model, lambda w: (w * sum(g[w] for g in micro_batches)).abs(), biases=False)
    h = fisher(model)
    if name == "taylor_second":
        return by_unit(model, lambda w: (w * h[w] * w).abs())
    assert name == "taylor_mixed"
    return by_unit(model, lambda w: (w * g[w] - 0.5 * w * h[w] * w).abs())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", [e.name for e in ESTIMATORS if e.name != "random"])
def test_importance_equals_fp64(family, name):
    ours = score_model(make_model(family), name).unit_importance
    theirs = expected(name, make_model(family))
    for a, b in zip(ours, theirs, strict=True):
        for kind in ("kv_group", "channel"):
            np.testing.assert_allclose(a[kind], b[kind], rtol=2e-5, atol=2e-5 * np.abs(b[kind]).max())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_obs_of_query_heads_equals_fp64(family):
    model = make_model(family)
    by_heads = find_family(family).with_granularity("query_head")
    widths = layer_widths(model.config.to_dict())
    ours = score(model, by_heads, widths, BATCH, micro_batch_size=4, estimator=find_estimator("obs"))
    theirs = obs(make_model(family).double(), attention=HEAD_DIM)
    for a, b in zip(ours.unit_importance, theirs, strict=True):
        assert a["query_head"].shape == (HEADS,)
        np.testing.assert_allclose(a["query_head"], b["kv_group"], rtol=2e-5)
        np.testing.assert_allclose(a["channel"], b["channel"], rtol=2e-5, atol=2e-5 * b["channel"].max())


@pytest.mark.parametrize("how", ["fused", "materialised"])
def test_modulo_credits_query_heads_as_a_fold_of_rows_does(how):
    """view(heads_per_group, kv_channels).sum(0) of the importance of q's rows and o's columns."""
    model = make_model("llama")
    ours = score_model(model, "taylor_first", gqa_credit="modulo", gradients=how, micro_batch_size=6)
    model = make_model("llama").double().requires_grad_(True)
    g = gradients(model)
    theirs = by_unit(model, lambda w: (w * g[w]).abs(), credit=modulo)
    for layer, (a, b) in enumerate(zip(ours.unit_importance, theirs, strict=True)):
        for kind in ("kv_group", "channel"):
            np.testing.assert_allclose(a[kind], b[kind], rtol=2e-5)
        attention = model.model.layers[layer].self_attn
        rows = (attention.q_proj.weight * g[attention.q_proj.weight]).abs().sum(1)
        rows = rows + (attention.q_proj.bias * g[attention.q_proj.bias]).abs()
        rows = rows + (attention.o_proj.weight * g[attention.o_proj.weight]).abs().sum(0)
        folded = rows.view(HEADS // KV, KV * HEAD_DIM).sum(0)
        for p in (attention.k_proj, attention.v_proj):
            folded = folded + (p.weight * g[p.weight]).abs().sum(1) + (p.bias * g[p.bias]).abs()
        folded = folded.view(KV, HEAD_DIM).sum(1)
        np.testing.assert_allclose(a["kv_group"], folded.detach().numpy(), rtol=2e-5)


@pytest.mark.parametrize("name", [e.name for e in ESTIMATORS if e.name not in ("random", "taylor_reference")])
def test_micro_batches_do_not_change_importance_or_loss(name):
    whole = score_model(make_model("llama"), name, micro_batch_size=6)
    parts = score_model(make_model("llama"), name, micro_batch_size=1)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    np.testing.assert_allclose(parts.layer_importance, whole.layer_importance, rtol=1e-5)
    for a, b in zip(parts.unit_importance, whole.unit_importance, strict=True):
        for kind in a:
            np.testing.assert_allclose(a[kind], b[kind], rtol=1e-4, atol=1e-5 * np.abs(b[kind]).max())


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.name)
def test_only_estimators_that_need_it_run_a_backward_pass(monkeypatch, estimator):
    backward, recording = [], []
    original = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: backward.append(1) or original(*a, **k))
    model = make_model("llama")
    model.model.register_forward_hook(lambda *a: recording.append(torch.is_grad_enabled()))
    scores = score_model(model, estimator.name)
    assert len(backward) == {None: 0, "batch": 2, "micro_batch": 2, "sequence": 6}[estimator.loss]
    assert set(recording) == {estimator.loss is not None}
    assert scores.loss == pytest.approx(score_model(make_model("llama"), "taylor_first").loss, rel=1e-6)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_the_estimators_without_a_backward_pass():
    assert WITHOUT_BACKWARD == ["magnitude_l1", "magnitude_l2", "wanda", "fluctuation", "obs", "random"]


def test_random_is_of_its_seed_alone():
    def draw(model, seed):
        return [
            {k: v.tolist() for k, v in layer.items()}
            for layer in score_model(model, "random", seed=seed).unit_importance
        ]

    first = draw(make_model("llama"), (0, 1))
    assert first == draw(make_model("mistral", seed=3), (0, 1))
    assert first != draw(make_model("llama"), (0, 2))
    assert first != draw(make_model("llama"), (1, 1))
    assert first[0] != first[1]
    values = np.concatenate([layer["channel"] for layer in first])
    assert 0 <= values.min() < 0.05 < 0.4 < values.mean() < 0.6


@pytest.mark.parametrize("name", ["taylor_second", "taylor_mixed", "magnitude_l2", "wanda", "fluctuation"])
def test_bf16_models_are_scored_close_to_fp32(name):
    low = score_model(make_model("llama", dtype=torch.bfloat16), name)
    high = score_model(make_model("llama", dtype=torch.bfloat16).float(), name)
    for a, b in zip(low.unit_importance, high.unit_importance, strict=True):
        np.testing.assert_allclose(
            a["channel"], b["channel"], rtol=0.15, atol=0.1 * np.abs(b["channel"]).max()
        )


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if not e.fusible], ids=lambda e: e.name)
def test_gradients_of_the_other_estimators_cannot_be_fused(estimator):
    with pytest.raises(ValueError, match=f"'fused': the estimator {estimator.name} cannot be scored so"):
        score_model(make_model("llama"), estimator.name, micro_batch_size=6, gradients="fused")


@pytest.mark.parametrize("name", ["wanda", "fluctuation"])
def test_an_input_that_is_not_finite_is_named(name):
    """The MLP's output is replaced, so that nothing but the statistics sees it."""
    model = make_model("llama")

    def spoil(module, args):
        x = args[0].clone()
        x[0, 3, 4] = float("nan")
        return (x,)

    down = model.model.layers[2].mlp.down_proj
    down.register_forward_pre_hook(spoil)
    down.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    with pytest.raises(kernels.NonFiniteError, match=r"input of model\.layers\.2\.mlp\.down_proj\.weight"):
        score_model(model, name)


def test_units_whose_inputs_never_vary_are_all_alike():
    """Standardising does not divide zero by zero."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.bias.zero_()
    assert score_model(model, "fluctuation").unit_importance[1]["channel"].tolist() == [0.0] * 88


def test_unknown_estimators_are_refused_with_the_list():
    with pytest.raises(
        ValueError, match=r"estimator is 'taylor', expected one of \['taylor_first', .*'random'"
    ):
        find_estimator("taylor")
