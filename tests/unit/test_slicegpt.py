"""SliceGPT on tiny models: rotations, slices beside a plain computation, budgets, the saved form."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_modeling import run_python
from tiny import FAMILIES, VOCABULARY, make_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import adapt_pruner  # noqa: F401  registers the classes
from adapt_pruner.checkpoint import open_checkpoint
from adapt_pruner.slicegpt import MODEL_TYPES, SliceBudget, principal_axes, require_sliceable, slice_model

IDS = torch.randint(3, VOCABULARY, (6, 17), generator=torch.Generator().manual_seed(0))
WHOLE = [48] * 9
WIDTHS = [40, 39, 41, 30, 48, 35, 36, 37, 33]


def sliced(family, widths, **options):
    model = make_model(family, **options)
    with torch.no_grad():
        logits = model(IDS).logits
    return slice_model(model, widths, IDS, micro_batch_size=4), logits


@pytest.fixture
def exact_norms(monkeypatch):
    """Stock RMSNorms in the dtype of their input: they compute in fp32 whatever it is."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def patch(model):
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
                monkeypatch.setattr(type(module), "forward", forward)

    return patch


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_rotation_alone_changes_nothing(family, tied, exact_norms):
    result, logits = sliced(family, WHOLE, tied=tied)
    torch.testing.assert_close(result.model(IDS).logits, logits, rtol=0, atol=1e-4)
    exact_norms(make_model(family))
    result, logits = sliced(family, WHOLE, tied=tied, dtype=torch.float64)
    assert logits.abs().max() > 1
    torch.testing.assert_close(result.model(IDS).logits, logits, rtol=0, atol=1e-10)
    assert result.model.lm_head.weight is not result.model.model.embed_tokens.weight
    assert not any("norm.weight" in n and "q_" not in n and "k_" not in n for n in result.model.state_dict())


def test_a_window_shorter_than_the_text_and_a_model_in_bf16(exact_norms):
    result, logits = sliced("mistral", WHOLE, sliding_window=5)
    torch.testing.assert_close(result.model(IDS).logits, logits, rtol=0, atol=1e-4)
    whole = make_model("mistral")(IDS).logits
    assert not torch.allclose(whole, logits, atol=0.1)
    result, logits = sliced("mistral", WHOLE, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in result.model.parameters())
    assert (result.model(IDS).logits - logits).float().abs().mean() < 0.05 * logits.float().std()


def axes_of(signal):
    """Singular vectors of the activations: the eigenvectors of their second moments, by another algorithm."""
    _, singular, rows = torch.linalg.svd(signal.flatten(0, 1), full_matrices=False)
    return rows.T * rows.T.gather(0, rows.abs().argmax(1)[None]).sign(), singular.square()


def test_slices_equal_a_plain_computation_layer_by_layer(exact_norms):
    """In the original basis a slice is a projection of the residual stream before the stock block."""
    model = make_model("qwen2", dtype=torch.float64)
    exact_norms(model)
    tokens = IDS.numel()
    layers, states = model.model.layers, model.model.embed_tokens(IDS).detach()
    angles = model.model.rotary_emb(states, torch.arange(17)[None])
    moments, axes, seen = [], [], []

    def project(stream):
        vectors, squares = axes_of(stream)
        width = WIDTHS[len(axes)]
        axes.append(vectors)
        moments.append(squares / tokens)
        seen.append(stream @ vectors[:, :width])
        return stream @ vectors[:, :width] @ vectors[:, :width].T

    def normed(stream, norm):
        return norm.weight * stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-6)

    with torch.no_grad():
        states = project(states)
        for layer in layers:
            attended = layer.self_attn(normed(states, layer.input_layernorm), angles, attention_mask=None)[0]
            states = project(states + attended)
            states = project(states + layer.mlp(normed(states, layer.post_attention_layernorm)))
        logits = model.lm_head(normed(states, model.model.norm))
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()

    result, _ = sliced("qwen2", WIDTHS, dtype=torch.float64)
    torch.testing.assert_close(result.model(IDS).logits, logits, rtol=0, atol=1e-9)
    assert math.isclose(result.loss, loss, rel_tol=1e-9)
    for values, expected in zip(result.eigenvalues, moments, strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-9 * expected[0].item())
    # The hidden states themselves, and the matrices of one layer.
    hidden = result.model(IDS, output_hidden_states=True).hidden_states
    for states, expected in zip(hidden[:4], seen[:7:2], strict=True):
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-9)
    stock, layer = make_model("qwen2", dtype=torch.float64).model.layers[1], result.model.model.layers[1]
    before, middle, after = (axes[p][:, : WIDTHS[p]] for p in (2, 3, 4))
    expected = {
        "self_attn.q_proj.weight": stock.self_attn.q_proj.weight * stock.input_layernorm.weight @ before,
        "self_attn.v_proj.bias": stock.self_attn.v_proj.bias,
        "self_attn.o_proj.weight": middle.T @ stock.self_attn.o_proj.weight,
        "attention_shortcut.weight": middle.T @ before,
        "mlp.up_proj.weight": stock.mlp.up_proj.weight * stock.post_attention_layernorm.weight @ middle,
        "mlp.down_proj.weight": after.T @ stock.mlp.down_proj.weight,
        "mlp_shortcut.weight": after.T @ middle,
    }
    for name, weight in expected.items():
        torch.testing.assert_close(layer.get_parameter(name), weight, rtol=0, atol=1e-8)


def test_biases_of_outputs_are_rotated():
    result, _ = sliced("llama", WIDTHS)
    layer = result.model.model.layers[0]
    assert layer.self_attn.o_proj.bias.shape == (39,)
    assert layer.mlp.down_proj.bias.shape == (41,)
    stock = make_model("llama").model.layers[0]
    torch.testing.assert_close(layer.self_attn.q_proj.bias, stock.self_attn.q_proj.bias, rtol=0, atol=0)


def test_the_norm_divides_by_the_original_width():
    result, _ = sliced("qwen2", WIDTHS)
    norm = result.model.model.layers[0].input_layernorm
    states = torch.randn(3, 40)
    expected = states / (states.square().sum(-1, keepdim=True) / 48 + 1e-6).sqrt()
    torch.testing.assert_close(norm(states), expected)


def test_axes_are_orthogonal_in_descending_order_with_fixed_signs():
    batches = [torch.randn(2, 9, 12, dtype=torch.float64) * torch.arange(1.0, 13) for _ in range(3)]
    values, axes = principal_axes(batches)
    torch.testing.assert_close(axes.T @ axes, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (values.diff() <= 0).all()
    assert (axes.gather(0, axes.abs().argmax(0)[None]) > 0).all()
    rows = torch.cat(batches).flatten(0, 1)
    torch.testing.assert_close((rows @ axes).square().mean(0), values)
    assert torch.equal(principal_axes([-b for b in batches])[1], axes)


def test_activations_that_are_not_finite_are_reported_with_their_position():
    model = make_model("qwen2")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 5] = math.nan
    with pytest.raises(
        ValueError, match="position 3 of the residual stream: calibration activations are NaN"
    ):
        slice_model(model, WIDTHS, IDS, micro_batch_size=4)


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_budget_counts_what_the_model_has(family, tied, tmp_path):
    make_model(family, tied=tied).save_pretrained(tmp_path)
    budget = SliceBudget.of(open_checkpoint(tmp_path).tensors, 4)
    result, _ = sliced(family, WIDTHS, tied=tied)
    assert budget.parameters(WIDTHS) == result.model.num_parameters()
    tables = VOCABULARY * (WIDTHS[0] + WIDTHS[-1])
    assert budget.parameters(WIDTHS, embeddings=False) == result.model.num_parameters() - tables


@pytest.mark.parametrize("embeddings", [True, False])
def test_landing_is_below_the_target_by_less_than_one_dimension_of_any_position(embeddings):
    budget = SliceBudget(48, 77, (110, 330, 120, 330, 90), 280)
    least = budget.parameters((1,) * 5, embeddings=embeddings)
    for target in range(least, budget.parameters((48,) * 5, embeddings=embeddings), 617):
        widths = budget.land(target, embeddings=embeddings)
        assert budget.parameters(widths, embeddings=embeddings) <= target
        assert max(widths) - min(widths) <= 1
        for position in range(5):
            if widths[position] == min(widths):
                wider = [w + (p == position) for p, w in enumerate(widths)]
                assert budget.parameters(wider, embeddings=embeddings) > target
    assert budget.land(10**9, embeddings=embeddings) == (48,) * 5
    with pytest.raises(ValueError, match=f"below the {least:,} of hidden states of width 1"):
        budget.land(least - 1, embeddings=embeddings)


def test_architectures_that_a_rotation_changes_are_refused():
    for family in set(FAMILIES) - set(MODEL_TYPES):
        with pytest.raises(
            ValueError, match=f"'{family}', which slicegpt cannot slice: it has norms between"
        ):
            require_sliceable(family)
    with pytest.raises(ValueError, match="'adapt_llama', which slicegpt cannot slice: only stock models"):
        require_sliceable("adapt_llama")
    info = type("Info", (), {"shape": (280, 48), "numel": 280 * 48})
    with pytest.raises(ValueError, match=r"does not know what to do with tensor lm_head\.bias"):
        SliceBudget.of({"model.embed_tokens.weight": info, "lm_head.bias": info}, 4)


@pytest.fixture(params=MODEL_TYPES)
def saved(request, tmp_path):
    model = sliced(request.param, WIDTHS)[0].model
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model(IDS).logits.detach()


def test_round_trip(saved, tmp_path):
    directory, logits = saved
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert type(model).__name__.startswith("Sliced")
    assert torch.equal(model(IDS).logits, logits)
    config = json.loads((directory / "config.json").read_text())
    assert (config["sliced_widths"], config["hidden_size"]) == (WIDTHS, 48)
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert not config["tie_word_embeddings"]
    assert type(AutoModel.from_pretrained(directory)) is type(model.model)
    model.save_pretrained(tmp_path / "again")
    for file in directory.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_cached_generation_equals_uncached(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0]).eval()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    options = {
        "attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip
    uncached = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(model.generate(IDS, use_cache=True, **options), uncached)
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, uncached)


def test_training_step_with_gradient_checkpointing(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0]).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6)


def test_loads_with_remote_code_where_the_package_is_not_imported(tmp_path):
    models = {family: sliced(family, WIDTHS)[0].model for family in MODEL_TYPES}
    for family, model in models.items():
        model.save_pretrained(tmp_path / family)
    logits = {family: model(IDS).logits for family, model in models.items()}
    torch.save({"ids": IDS, "logits": logits}, tmp_path / "expected.pt")
    code = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
expected = torch.load("expected.pt", weights_only=True)
for directory, logits in expected["logits"].items():
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    torch.testing.assert_close(model(expected["ids"]).logits, logits, rtol=1e-5, atol=1e-5)
    assert type(AutoModel.from_pretrained(directory, trust_remote_code=True)) is type(model.model)
assert "adapt_pruner" not in sys.modules
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sliced_widths", [40] * 8, "expected 9 widths from 1 to 48"),
        ("sliced_widths", [40] * 8 + [49], "expected 9 widths from 1 to 48"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True, expected False"),
    ],
)
def test_configs_that_describe_no_sliced_model_are_refused(tmp_path, key, value, message):
    sliced("qwen2", WIDTHS)[0].model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(Exception, match=message):
        AutoConfig.from_pretrained(tmp_path)
