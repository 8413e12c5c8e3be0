"""MobileLLM: a checkpoint as the hub has it, loaded as Llama and without the code it names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from adapt_pruner import EvaluateConfig, PruneConfig, apply_plan, evaluate, prune, summarize
from adapt_pruner.checkpoint import CheckpointError
from adapt_pruner.engines.in_memory import load_model

IDS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
# The keys of the hub's config.json, at a small size.
CONFIG = {
    "architectures": ["MobileLLMForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
        "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
    },
    "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8, "hidden_act": "silu", "hidden_size": 48,
    "initializer_range": 0.02, "intermediate_size": 88, "layer_sharing": False,
    "max_position_embeddings": 256, "mlp_bias": False, "model_type": "mobilellm",
    "num_attention_heads": 6, "num_hidden_layers": 4,
    "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 10000.0, "share_embedding": True, "tie_word_embeddings": False, "torch_dtype": "float32",
    "transformers_version": "4.41.2", "use_cache": True, "vocab_size": VOCABULARY,
}  # fmt: skip


def twin(**changes):
    """The Llama with the same tensors."""
    return make_model(
        "llama", num_attention_heads=6, num_key_value_heads=3, head_dim=8, rms_norm_eps=1e-5,
        attention_bias=False, mlp_bias=False, **changes,
    )  # fmt: skip


def write(directory, tokenizer, *, shared=True, **changes):
    directory.mkdir()
    tensors = twin(tied=shared).state_dict()
    if shared:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {**CONFIG, "share_embedding": shared, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(directory)
    for name in ("configuration", "modeling"):  # code of the checkpoint is never run
        (directory / f"{name}_mobilellm.py").write_text("raise SystemExit('ran')\n")
    return directory


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    return write(tmp_path / "mobilellm", tokenizer)


@pytest.mark.parametrize("shared", [True, False])
def test_it_computes_what_llama_does(tmp_path, tokenizer, shared):
    model = load_model(write(tmp_path / "model", tokenizer, shared=shared), device="cpu")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is shared
    assert torch.equal(model(IDS).logits, twin(tied=shared)(IDS).logits)


def test_embeddings_are_shared_unless_the_config_says_otherwise(checkpoint):
    config = {k: v for k, v in CONFIG.items() if k != "share_embedding"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(checkpoint).tie_word_embeddings
    whole = summarize(checkpoint).parameters
    assert whole == twin().num_parameters()
    # A head that was stored although it is not used does not count, and is not copied.
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(VOCABULARY, 48)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert summarize(checkpoint).parameters == whole
    assert torch.equal(load_model(checkpoint, device="cpu")(IDS).logits, twin()(IDS).logits)


@pytest.mark.parametrize(("target", "name"), [(0.7, "AdaptLlamaForCausalLM"), (1.0, "LlamaForCausalLM")])
def test_the_result_is_a_llama(checkpoint, calibration_file, tmp_path, target, name):
    result = prune(
        PruneConfig(
            str(checkpoint),
            target,
            str(tmp_path / "run"),
            iterations=10,
            amplitude=0.05,
            num_sequences=4,
            sequence_length=16,
            calibration=str(calibration_file),
            device="cpu",
        )
    )
    assert 0 <= result.metrics["parameters_below_target"] < 3 * 48
    model = AutoModelForCausalLM.from_pretrained(result.model_directory)
    assert type(model).__name__ == name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    config = json.loads((result.model_directory / "config.json").read_text())
    assert not {"share_embedding", "layer_sharing"} & set(config)
    with safe_open(result.model_directory / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    applied = apply_plan(result.plan, checkpoint, tmp_path / "applied")
    weights = [d / "model.safetensors" for d in (applied, result.model_directory)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    ours, theirs = (AutoConfig.from_pretrained(d).to_dict() for d in (applied, result.model_directory))
    assert ours | {"_name_or_path": ""} == theirs | {"_name_or_path": ""}
    assert not {"share_embedding", "layer_sharing"} & set(json.loads((applied / "config.json").read_text()))
    assert model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (2, 21)
    evaluated = evaluate(
        EvaluateConfig(
            str(result.run_directory), str(calibration_file), context=16, max_tokens=256, device="cpu"
        )
    )
    assert 1 < evaluated.perplexity.perplexity < 10 * VOCABULARY
    if target == 1.0:
        assert torch.equal(model(IDS).logits, twin()(IDS).logits)


def test_shared_layers_are_refused_before_anything_is_loaded(tmp_path, tokenizer):
    directory = write(tmp_path / "model", tokenizer, layer_sharing=True)
    with pytest.raises(CheckpointError, match=r"layer_sharing is true .* every layer runs more than once"):
        prune(PruneConfig(str(directory), 0.7, str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
