"""Two gloo processes against one: sharded training, its saved state and its saved models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import torchrun
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharding_worker import (
    AFTER,
    CASES,
    STEPS,
    make_case,
    make_optimizer,
    train,
)
from tiny import make_model
from transformers import AutoModelForCausalLM

from adapt_pruner import saving
from adapt_pruner.recovery import training_state
from adapt_pruner.recovery.training_state import STATE_NAME, load_training_state, save_training_state
from adapt_pruner.saving import save_model
from adapt_pruner.sharding import is_sharded, named_tensors, shard, world

pytestmark = pytest.mark.timeout(180)
BEFORE = range(STEPS)
LATER = range(STEPS, STEPS + AFTER)


def train_alone(case: str, directory: Path) -> dict:
    """The same training with whole batches in this process."""
    model = make_case(case)
    optimizer = make_optimizer(model)
    losses = train(model, optimizer, BEFORE)
    save_training_state(directory / f"one-{case}", model, optimizer)
    save_model(directory / f"one-model-{case}", model)
    weights = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    model.save_pretrained(directory / f"pretrained-{case}")
    return {"losses": losses, "weights": weights, "after": train(model, optimizer, LATER)}


def train_alone_in_bf16(case: str) -> dict:
    """fp32 weights that are cast for each pass, by autograd instead of by FSDP."""
    model = make_case(case)
    optimizer = make_optimizer(model)

    def loss_of(ids):
        weights = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
        options = {"input_ids": ids, "labels": ids, "use_cache": False}
        return torch.func.functional_call(model, weights, kwargs=options, tie_weights=True).loss

    losses = train(model, optimizer, BEFORE, loss_of)
    return {"losses": losses, "weights": named_tensors(model)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharding")
    return directory, {case: train_alone(case, directory) for case in CASES}


@pytest.fixture(scope="module")
def together(alone):
    """Directory of what two processes have written, and the results of both."""
    directory, _ = alone
    result = torchrun("sharding_worker.py", directory, timeout=150)
    assert result.returncode == 0, result.stdout + result.stderr
    return directory, [json.loads((directory / f"results-{rank}.json").read_text()) for rank in range(2)]


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def distance(weights, others) -> float:
    assert weights.keys() == others.keys()
    return sum((weights[name] - others[name]).square().sum().item() for name in weights) ** 0.5


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process(case, alone, together):
    expected = alone[1][case]
    directory, results = together
    for result in results:
        assert result[case]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result[case]["recomputed_losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    weights = load_file(directory / f"model-{case}" / "model.safetensors")
    torch.testing.assert_close(weights, expected["weights"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_mixed_precision_differs_from_one_process_by_rounding(case, alone, together):
    exact, rounded = alone[1][case], train_alone_in_bf16(case)
    directory, results = together
    weights = load_file(directory / f"mixed-{case}" / "model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    error = distance(rounded["weights"], exact["weights"])
    assert distance(weights, rounded["weights"]) < error
    # It did compute in bf16, and as well as one process does.
    assert 0.5 * error < distance(weights, exact["weights"]) < 1.5 * error
    budget = max(abs(a - b) for a, b in zip(rounded["losses"], exact["losses"], strict=True))
    assert results[0][case]["bf16_losses"] == pytest.approx(rounded["losses"], abs=2 * budget)


@pytest.mark.parametrize("case", CASES)
def test_state_of_two_ranks_continues_on_two_bit_for_bit(case, together):
    for result in together[1]:
        assert result[case]["after_loading_state"] == result[case]["after"]


@pytest.mark.parametrize("case", CASES)
def test_state_of_two_ranks_continues_on_one(case, alone, together):
    directory, results = together
    model = make_case(case, seed=1)
    optimizer = make_optimizer(model)
    optimizer.param_groups[0]["lr"] = 5.0
    load_training_state(directory / f"state-{case}", model, optimizer)
    saved = load_file(directory / f"model-{case}" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in named_tensors(model).items())
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {state["step"].item() for state in optimizer.state.values()} == {STEPS}
    losses = train(model, optimizer, LATER)
    assert losses == pytest.approx(results[0][case]["after"], rel=1e-5)
    assert losses == pytest.approx(alone[1][case]["after"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_state_of_one_process_continues_on_two(case, alone, together):
    for result in together[1]:
        assert result[case]["after_loading_one"] == pytest.approx(alone[1][case]["after"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_state_is_safetensors_and_json_and_the_same_bytes_each_time(case, together):
    directory, _ = together
    files = files_of(directory / f"state-{case}")
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}
    assert len(files) == 3
    assert files == files_of(directory / f"again-{case}")


def test_replicated_state_is_that_of_one_process(together):
    directory, _ = together
    assert files_of(directory / "replicated") == files_of(directory / "one-tied")
    assert files_of(directory / "replicated-model") == files_of(directory / "one-model-tied")


@pytest.mark.parametrize("case", CASES)
def test_saved_model_is_an_ordinary_checkpoint(case, alone, together):
    directory, _ = together
    expected = files_of(directory / f"pretrained-{case}")
    assert files_of(directory / f"one-model-{case}") == expected
    files = files_of(directory / f"model-{case}")
    assert files.keys() == expected.keys()
    assert all(files[name] == expected[name] for name in files if name != "model.safetensors")
    evaluated = make_case(case)
    evaluated.load_state_dict(load_file(directory / f"model-{case}" / "model.safetensors"), strict=False)
    for name, dtype in (("model", torch.float32), ("bf16", torch.bfloat16)):
        loaded = AutoModelForCausalLM.from_pretrained(directory / f"{name}-{case}", dtype="auto")
        assert type(loaded) is type(evaluated)
        assert loaded.dtype == dtype
        for key, tensor in named_tensors(evaluated).items():
            assert torch.equal(loaded.state_dict()[key], tensor.to(dtype)), key


def test_failures_of_one_rank_reach_all_and_leave_nothing(together):
    directory, (first, second) = together
    for name in ("state", "model"):
        assert first["failures"][name] == "OSError: stopped before the rename"
        assert second["failures"][name] == "RuntimeError: rank 0 has failed: " + repr(
            OSError("stopped before the rename")
        )
    assert first["failures"]["full"] == "OSError: no space left"
    assert "no space left" in second["failures"]["full"]
    assert first["failures"]["taken"].startswith("FileExistsError")
    assert "FileExistsError" in second["failures"]["taken"]
    for result in (first, second):
        assert result["failures"]["other"].startswith("ValueError")
        assert "lm_head.weight" in result["failures"]["other"]
    assert not list(directory.glob("stopped*")) + list(directory.glob(".*"))
    AutoModelForCausalLM.from_pretrained(directory / "after-failures")


@pytest.fixture
def saved_state(alone, tmp_path):
    """A copy of a state, to be damaged."""
    source = alone[0] / "one-tied"
    target = tmp_path / "state"
    target.mkdir()
    for name, content in files_of(source).items():
        (target / name).write_bytes(content)
    return target


def load_into_new(directory: Path, case: str = "tied") -> None:
    """Loads, and when that fails checks that nothing has changed."""
    model = make_case(case, seed=1)
    optimizer = make_optimizer(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load_training_state(directory, model, optimizer)
    except Exception:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not optimizer.state
        raise


def change_tensors(directory: Path, change) -> None:
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.model.norm.weight"), r"1 missing: \['model.model.norm.weight'\]"),
        (lambda t: t.pop("optimizer.model.norm.weight.exp_avg"), "missing.*norm.weight.exp_avg'"),
        (lambda t: t.update({"model.more": torch.zeros(2)}), r"1 unexpected: \['model.more'\]"),
        (
            lambda t: t.update({"model.model.norm.weight": torch.zeros(47)}),
            r"different.*model.norm.weight: \(\(47,\), torch.float32\), expected \(\(48,\), torch.float32\)",
        ),
        (
            lambda t: t.update({"model.model.norm.weight": torch.zeros(48, dtype=torch.bfloat16)}),
            "different.*model.norm.weight: .*bfloat16",
        ),
    ],
)  # fmt: skip
def test_state_that_does_not_fit_is_refused(saved_state, change, message):
    load_into_new(saved_state)
    change_tensors(saved_state, change)
    with pytest.raises(ValueError, match=message):
        load_into_new(saved_state)


def test_state_of_another_model_is_refused(saved_state):
    with pytest.raises(ValueError, match=r"missing: .*lm_head.weight"):
        load_into_new(saved_state, "plain")


@pytest.mark.parametrize("number", ["00001", "00002"])
def test_state_without_the_file_of_a_rank_is_refused(number, together, tmp_path):
    for name, content in files_of(together[0] / "state-tied").items():
        if not name.startswith(f"shard-{number}"):
            (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"lm_head|embed_tokens|norm\.weight"):
        load_into_new(tmp_path)


def test_state_without_the_first_part_of_a_tensor_is_refused(together, tmp_path):
    name = "model.model.layers.0.mlp.up_proj.weight"
    for file, content in files_of(together[0] / "state-tied").items():
        (tmp_path / file).write_bytes(content)
    (first,) = tmp_path.glob("shard-00001*")
    with safe_open(first, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(first)
    tensors.pop(name)
    save_file(tensors, first, metadata)
    with pytest.raises(ValueError, match=rf"1 incomplete: \['{name}'\]"):
        load_into_new(tmp_path)


def test_damaged_state_is_refused(saved_state):
    (file,) = saved_state.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="truncated"):
        load_into_new(saved_state)
    (saved_state / STATE_NAME).unlink()
    with pytest.raises(ValueError, match=f"found no {STATE_NAME}"):
        load_into_new(saved_state)


def test_other_parameter_groups_are_refused(saved_state):
    model = make_case("tied")
    with pytest.raises(ValueError, match=r"parameter groups of \[\d+, \d+\] parameters"):
        load_training_state(saved_state, model, torch.optim.AdamW(model.parameters()))


def test_optimizer_that_has_not_stepped_is_saved_as_such(tmp_path):
    model = make_case("tied")
    optimizer = make_optimizer(model)
    model(**dict.fromkeys(("input_ids", "labels"), torch.arange(3, 30)[None])).loss.backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_training_state(tmp_path / "state", model, optimizer)
    assert not optimizer.state
    assert model.model.norm.weight.grad is not None
    optimizer.step()
    load_training_state(tmp_path / "state", model, optimizer)
    assert not optimizer.state
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_parameters_have_no_state(tmp_path):
    model = make_case("tied")
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, range(1))
    save_training_state(tmp_path / "state", model, optimizer)
    other = make_case("tied", seed=1)
    other.model.embed_tokens.weight.requires_grad_(False)
    again = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad])
    load_training_state(tmp_path / "state", other, again)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert train(other, again, range(1, 3)) == train(model, optimizer, range(1, 3))


def test_optimizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="parameters that the model does not have"):
        save_training_state(tmp_path / "state", make_case("tied"), make_optimizer(make_case("tied")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mixtral", "gemma2", "phi3"])
def test_several_files_hold_what_save_pretrained_writes(family, tmp_path, monkeypatch):
    """Also the experts, one tensor in the module and many in the checkpoint."""
    model = make_model(family)
    model.save_pretrained(tmp_path / "expected")
    save_model(tmp_path / "one", model)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "expected")
    monkeypatch.setattr(saving, "MAX_FILE_BYTES", 100_000)
    save_model(tmp_path / "several", model)
    files = sorted((tmp_path / "several").glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    tensors, weight_map = {}, {}
    for file in files:
        content = load_file(file)
        tensors |= content
        weight_map |= dict.fromkeys(content, file.name)
    assert index["weight_map"] == weight_map
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "several")
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())


def test_state_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(training_state, "_FILE_BYTES", 100_000)
    model = make_case("tied")
    optimizer = make_optimizer(model)
    train(model, optimizer, range(1))
    save_training_state(tmp_path / "state", model, optimizer)
    assert len(list((tmp_path / "state").glob("*.safetensors"))) > 5
    other = make_case("tied", seed=1)
    again = make_optimizer(other)
    load_training_state(tmp_path / "state", other, again)
    assert train(other, again, range(1, 3)) == train(model, optimizer, range(1, 3))


def test_model_with_other_tensors_than_its_config_is_not_saved(tmp_path):
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(48, 80))
    with pytest.raises(ValueError, match=r"not those of its config: .*layers.1.mlp.down_proj.weight"):
        save_model(tmp_path / "model", model)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        save_model(tmp_path / "model", make_model("llama"), dtype=torch.int8)
    assert not list(tmp_path.iterdir())


def test_side_files_are_copied(tmp_path, tiny_models):
    save_model(tmp_path / "model", make_model("llama"), side_files=tiny_models["llama"])
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_without_processes_there_is_one_rank():
    assert world() == (0, 1)
    assert not is_sharded(make_model("llama"))


def test_bad_arguments_of_shard():
    class Mesh:
        ndim, shape = 3, (1, 2, 1)

    with pytest.raises(ValueError, match=r"shape \(1, 2, 1\), expected one dimension or two"):
        shard(make_model("llama"), Mesh())
    Mesh.ndim = 1
    with pytest.raises(ValueError, match=r"mixed_precision is torch\.float16"):
        shard(make_model("llama"), Mesh(), mixed_precision=torch.float16)
