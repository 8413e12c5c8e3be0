"""Second moments of inputs, least-squares compensation and obs importance, against plain float64."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_pruner import SETTINGS, bytes_of, settings  # noqa: F401
from tiny import make_model

from adapt_pruner import PruneConfig, apply_plan, prune
from adapt_pruner.cli import main
from adapt_pruner.compensation import compensated_weights, least_squares, replace_weights
from adapt_pruner.config import RIDGE as DEFAULT_RIDGE
from adapt_pruner.families import find_family, layer_widths
from adapt_pruner.kernels import NonFiniteError
from adapt_pruner.methods import resolve
from adapt_pruner.run import RunDirectory
from adapt_pruner.scoring.estimators import OBS, OBS_FISHER, TAYLOR_FIRST
from adapt_pruner.scoring.gram import InputGram, InputGrams, column_weights
from adapt_pruner.scoring.obs import obs_importance
from adapt_pruner.scoring.taylor import Scores, score
from adapt_pruner.surgery import prune_layer

RIDGE = 0.01


def everything(widths):
    return tuple(
        {"kv_group": np.arange(w.num_key_value_heads), "channel": np.arange(w.intermediate_size)}
        for w in widths
    )


def gram_of(x, name="w"):
    gram = InputGram.zeros(name, x.shape[-1], torch.device("cpu"))
    gram.update(x)
    return gram


@pytest.fixture(scope="module")
def collected():
    """A tiny model, its Gram matrices over 12 sequences of 16, and the inputs themselves in float64."""
    model = make_model("llama")
    family, widths = find_family("llama"), layer_widths(model.config.to_dict())
    inputs = {}

    def watch(name):
        return lambda module, args: inputs.setdefault(name, []).append(
            args[0].double().reshape(-1, args[0].shape[-1])
        )

    names = [
        n for i, w in enumerate(widths) for n in column_weights(family, i, w, dict(model.named_parameters()))
    ]
    handles = [
        model.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(watch(n)) for n in names
    ]
    batch = torch.randint(4, 260, (12, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), InputGrams(model, family, widths) as grams:
        for part in batch.split(5):
            model(input_ids=part)
    for handle in handles:
        handle.remove()
    return model, family, widths, grams, {n: torch.cat(x) for n, x in inputs.items()}, batch


def test_grams_are_those_of_the_inputs(collected):
    model, _, widths, grams, inputs, _ = collected
    assert len(grams) == 2 * len(widths)
    for name, gram in grams.items():
        x = inputs[name]
        torch.testing.assert_close(gram.products, x.T @ x, rtol=1e-5, atol=1e-4)
        assert gram.gradients is None
    assert not any(m._forward_pre_hooks for m in model.modules()), "hooks are gone"


def test_grams_do_not_depend_on_the_micro_batches_or_the_gradients(collected):
    model, family, widths, grams, _, batch = collected
    by_obs = score(model, family, widths, batch, micro_batch_size=12, estimator=OBS)
    with InputGrams(model, family, widths) as beside_taylor:
        taylor = score(model, family, widths, batch, micro_batch_size=4)
    assert by_obs.loss == pytest.approx(taylor.loss, rel=1e-6)
    np.testing.assert_allclose(by_obs.layer_importance, taylor.layer_importance, rtol=1e-6)
    for name, gram in grams.items():
        for other in (by_obs.grams[name], beside_taylor[name]):
            torch.testing.assert_close(other.products, gram.products, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "out"), [(200, 13, 7), (5, 13, 7), (64, 1, 3), (64, 40, 1)])
def test_least_squares_solves_the_ridge_problem(dtype, rows, columns, out):
    """Against numpy's solver on the stacked system [X_S; R], R^2 = ridge * diag(X_S^T X_S)."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    weight = torch.randn(out, columns, generator=generator).to(dtype)
    kept = torch.arange(0, columns, 2)
    gram = gram_of(x)
    ours = least_squares(weight, gram, kept, ridge=RIDGE)
    assert (ours.shape, ours.dtype) == ((out, len(kept)), torch.float64)
    x64, w64 = x.double().numpy(), weight.double().numpy()
    root = np.sqrt(RIDGE * np.square(x64[:, ::2]).sum(0))
    system = np.concatenate([x64[:, ::2], np.diag(root)])
    aim = np.concatenate([x64 @ w64.T, root[:, None] * w64[:, ::2].T])
    np.testing.assert_allclose(
        ours.numpy(), np.linalg.lstsq(system, aim, rcond=None)[0].T, rtol=1e-4, atol=1e-5
    )


def test_least_squares_of_everything_and_of_dead_inputs_changes_nothing():
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    everything = least_squares(weight, gram_of(torch.randn(50, 8)), torch.arange(8), ridge=RIDGE)
    assert torch.equal(everything, weight.double())
    kept = torch.tensor([1, 4])
    dead = least_squares(weight, gram_of(torch.zeros(50, 8)), kept, ridge=RIDGE)
    assert torch.equal(dead, weight.double()[:, kept])


def test_a_removed_column_that_others_span_costs_nothing_and_is_made_up_for():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 12, generator=generator)
    x[:, 5] = 0.5 * x[:, 2] - 2 * x[:, 9]
    weight = torch.randn(48, 12, generator=generator)
    gram = gram_of(x)
    kept = torch.tensor([i for i in range(12) if i != 5])
    compensated = least_squares(weight, gram, kept, ridge=1e-6)
    exact = x.double() @ weight.double().T
    assert (x.double()[:, kept] @ compensated.T - exact).norm() < 1e-3 * exact.norm()
    assert (x.double()[:, kept] @ weight.double()[:, kept].T - exact).norm() > 0.1 * exact.norm()
    # The same as a unit of a model: its obs importance is about 0 where the others' is not.
    model = make_model("llama")
    family, widths = find_family("llama"), layer_widths(model.config.to_dict())
    grams = InputGrams(model, family, widths).seen
    for name, empty in grams.items():
        inputs = torch.randn(300, empty.products.shape[0], generator=generator)
        if "down_proj" in name:
            inputs[:, 5] = 0.5 * inputs[:, 2] - 2 * inputs[:, 9]
        else:  # all of group 1, out of the groups beside it
            inputs[:, 20:40] = inputs[:, :20] - 3 * inputs[:, 40:60]
        empty.update(inputs)
    for layer in obs_importance(model, family, widths, grams, ridge=1e-6):
        for kind, unit in (("channel", 5), ("kv_group", 1)):
            others = np.delete(layer[kind], [unit, *((2, 9) if kind == "channel" else (0, 2))])
            assert 0 <= layer[kind][unit] < 1e-3 * others.min()


@pytest.mark.parametrize("granularity", ["kv_group", "query_head"])
def test_obs_is_the_error_that_least_squares_leaves(collected, granularity):
    """Each unit removed for real, the rest solved for: ||.||^2 in the metric of K = X^T X + R^2."""
    model, family, widths, grams, inputs, _ = collected
    family = family.with_granularity(granularity)
    scores = obs_importance(model, family, widths, grams, ridge=RIDGE)
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    for layer, layer_widths_ in enumerate(widths):
        for kind in family.unit_kinds:
            tensor = next(t for t in family.unit_tensors(kind, layer, layer_widths_, weights) if t.dim == 1)
            x, weight = inputs[tensor.name], weights[tensor.name]
            root = (RIDGE * x.square().sum(0)).sqrt().diag()
            stacked = torch.cat([x, root])
            units = np.arange(x.shape[1]).reshape(-1, tensor.group_size)
            assert scores[layer][kind.name].dtype == np.float64
            assert len(scores[layer][kind.name]) == len(units)
            for unit in range(0, len(units), max(1, len(units) // 5)):
                kept = np.delete(units, unit, axis=0).ravel()
                aim = stacked @ weight.T
                left = torch.linalg.lstsq(stacked[:, kept], aim).solution
                error = (stacked[:, kept] @ left - aim).square().sum().item()
                assert scores[layer][kind.name][unit] == pytest.approx(error, rel=1e-4)


def test_compensation_is_closer_on_text_it_has_not_seen(collected):
    """For every layer and matrix: outputs on held-out sequences, against leaving the kept weights alone."""
    model, family, widths, _, _, _ = collected
    generator = torch.Generator().manual_seed(7)
    grams = [InputGrams(model, family, widths) for _ in range(2)]
    for context, sequences in zip(grams, (64, 16), strict=True):
        with torch.no_grad(), context:
            model(input_ids=torch.randint(4, 260, (sequences, 16), generator=generator))
    seen, held_out = (context.seen for context in grams)
    keep = {"channel": np.arange(0, 88, 2), "kv_group": np.array([0, 2, 3])}
    columns = {"mlp": keep["channel"], "self_attn": np.arange(80).reshape(4, 20)[keep["kv_group"]].ravel()}
    for layer, layer_widths_ in enumerate(widths):
        compensated = compensated_weights(model, family, layer, layer_widths_, keep, seen, ridge=RIDGE)
        assert len(compensated) == 2
        for name, value in compensated.items():
            weight, kept = model.get_parameter(name).detach(), columns[name.split(".")[3]]
            ours, plain = (torch.zeros_like(weight, dtype=torch.float64) for _ in range(2))
            ours[:, kept], plain[:, kept] = value.double(), weight.double()[:, kept]
            errors = [
                ((d := weight.double() - w) @ held_out[name].products @ d.T).trace().item()
                for w in (ours, plain)
            ]
            assert errors[0] < errors[1], name


def test_layers_that_lose_nothing_are_left_alone(collected):
    model, family, widths, grams, _, _ = collected
    keep = {"channel": np.arange(88), "kv_group": np.array([0, 1, 3])}
    assert [*compensated_weights(model, family, 1, widths[1], keep, grams, ridge=RIDGE)] == [
        "model.layers.1.self_attn.o_proj.weight"
    ]


def test_singular_and_non_finite_moments_are_named():
    x = torch.randn(4, 9)
    with pytest.raises(ValueError, match=r"moments of the input of layer.w are singular \(5 columns\)"):
        least_squares(torch.randn(3, 9), gram_of(x, "layer.w"), torch.arange(5), ridge=0.0)
    x[1, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"input of layer.w: 1 of 9 columns hold NaN"):
        least_squares(torch.randn(3, 9), gram_of(x, "layer.w"), torch.arange(5), ridge=RIDGE)
    with pytest.raises(NonFiniteError, match=r"input of layer.w: 9 of 9 columns"):
        gram_of(torch.full((2, 9), 1e30), "layer.w").regularised(RIDGE)


def test_scores_and_moments_are_averages_over_the_rounds(collected):
    """With the weights 1 of this round and 0.5 of the one before, on the units that are left."""
    _, family, widths, _, _, batch = collected
    generator = np.random.default_rng(0)
    keep = tuple(
        {"kv_group": np.arange(2), "channel": np.sort(generator.permutation(88)[:60])} for _ in widths
    )
    for estimator in (TAYLOR_FIRST, OBS_FISHER):
        model = make_model("llama")
        what = {"micro_batch_size": 4, "estimator": estimator, "grams": True}
        first = score(model, family, widths, batch[:6], **what).kept(model, family, widths, keep)
        engine_widths = tuple(
            prune_layer(model, family, i, w, k) for i, (w, k) in enumerate(zip(widths, keep, strict=True))
        )
        alone = score(model, family, engine_widths, batch[6:], **what)
        both = score(model, family, engine_widths, batch[6:], earlier=first, share=2 / 3, **what)
        assert both.loss == alone.loss
        np.testing.assert_allclose(
            both.layer_importance, 2 / 3 * alone.layer_importance + 1 / 3 * first.layer_importance, rtol=1e-12
        )
        for name, gram in both.grams.items():
            expected = 2 / 3 * alone.grams[name].products + 1 / 3 * first.grams[name].products
            torch.testing.assert_close(gram.products, expected, rtol=1e-12, atol=0)
        if estimator is OBS_FISHER:  # ranked by the averaged moments
            again = obs_importance(model, family, engine_widths, both.grams, ridge=DEFAULT_RIDGE)
            for ours, theirs in zip(both.unit_importance, again, strict=True):
                np.testing.assert_allclose(ours["channel"], theirs["channel"], rtol=1e-6)
        else:
            for now, before, average in zip(
                alone.unit_importance, first.unit_importance, both.unit_importance, strict=True
            ):
                for kind in now:
                    expected = 2 / 3 * now[kind] + 1 / 3 * before[kind]
                    np.testing.assert_allclose(average[kind], expected, rtol=1e-12)
        stored = Scores.from_tensors(
            both.kept(model, family, engine_widths, everything(engine_widths)).tensors(), torch.device("cpu")
        )
        np.testing.assert_array_equal(stored.layer_importance, both.layer_importance)
        for name, gram in stored.grams.items():
            assert torch.equal(gram.products, both.grams[name].products.float().double())


def test_values_that_do_not_fit_the_model_are_refused():
    model = make_model("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=r"float32 \(48, 87\), expected torch.float32 \(48, 88\)"):
        replace_weights(model, {name: torch.zeros(48, 87)})
    with pytest.raises(ValueError, match=r"bfloat16"):
        replace_weights(model, {name: torch.zeros(48, 88, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    "choice",
    [
        {"compensation": "least_squares"},
        {"compensation": "least_squares", "estimator": "obs"},
        {"carry_over": 0.5},
        {"method": "adapt-pruner+", "iterations": 8},
    ],
    ids=lambda choice: "-".join(map(str, choice.values())),
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_runs_repeat_and_resume_to_the_same_bytes(settings, tmp_path, monkeypatch, choice, dtype):  # noqa: F811
    def config(name, **more):
        return settings("llama", target=0.6, output=str(tmp_path / name), dtype=dtype, **choice, **more)

    whole = prune(config("whole"))
    assert whole.metrics["iterations"] >= 3
    assert bytes_of(prune(config("again")).run_directory) == bytes_of(whole.run_directory)
    # A failure stands in for a kill: once behind the tensors and before the progress, once behind both.
    from adapt_pruner import run

    for place in ("tensors", "progress"):
        calls = []
        name = "write_text" if place == "tensors" else "save_iteration"
        owner = run if place == "tensors" else RunDirectory
        original = getattr(owner, name)

        def failing(*args, original=original, calls=calls, place=place, **kwargs):
            mine = place == "progress" or args[0].name == "progress.json"
            calls.append(mine)
            if sum(calls) == 3 and mine:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(KeyboardInterrupt):
                prune(config(place))
        state = tmp_path / place / "state"
        assert json.loads((state / "progress.json").read_text())["iteration"] == 2
        assert (state / "tensors-002.safetensors").exists()
        resumed = prune(config(place, resume=True))
        assert bytes_of(resumed.run_directory) == bytes_of(whole.run_directory)
        assert not state.exists()


def test_compensated_runs_land_and_differ_only_where_they_should(settings, tiny_models, tmp_path):  # noqa: F811
    result = prune(settings("llama", compensation="least_squares", iterations=3))
    original = load_file(tiny_models["llama"] / "model.safetensors")
    pruned = load_file(result.model_directory / "model.safetensors")
    for layer, keep in enumerate(result.plan.keep_indices):
        channels = torch.from_numpy(keep["channel"])
        up, down = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("up", "down"))
        assert torch.equal(pruned[up], original[up][channels])
        if len(channels) < 88:
            assert not torch.equal(pruned[down], original[down][:, channels])


def test_a_plan_with_compensation_is_not_replayed_silently(settings, tiny_models, tmp_path):  # noqa: F811
    result = prune(settings("llama", compensation="least_squares", iterations=3, attention_rate=1.0))
    assert result.plan.settings["compensation"] == "least_squares"
    with pytest.raises(ValueError, match="not the compensated weights"):
        apply_plan(result.plan, tiny_models["llama"], tmp_path / "applied")
    assert not (tmp_path / "applied").exists()
    command = ["apply", str(result.run_directory), str(tiny_models["llama"])]
    command += ["--output", str(tmp_path / "applied")]
    assert main(command) == 1
    assert main([*command, "--uncompensated"]) == 0
    ours, theirs = (
        load_file(d / "model.safetensors") for d in (result.model_directory, tmp_path / "applied")
    )
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    differing = {n.split(".")[-2] for n in ours if not torch.equal(ours[n], theirs[n])}
    assert differing == {"down_proj", "o_proj"}


def test_settings_are_checked(tmp_path):
    config = PruneConfig("m", 0.5, str(tmp_path), **SETTINGS)
    with pytest.raises(ValueError, match="ridge is 0, expected finite, above 0"):
        dataclasses.replace(config, ridge=0)
    with pytest.raises(ValueError, match="compensation is 'both'"):
        dataclasses.replace(config, compensation="both")
    fused = dataclasses.replace(config, estimator="obs", gradients="fused", micro_batch_size=8)
    with pytest.raises(ValueError, match="gradients is 'fused': the estimator obs cannot be scored so"):
        resolve(fused, 2)
