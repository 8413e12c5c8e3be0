"""The streaming engine: the scores and plans of the in-memory engine, with one decoder layer at a time."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, SHAPE, VOCABULARY, make_model

from adapt_pruner import PruneConfig, prune, pruner
from adapt_pruner.checkpoint import WEIGHTS_NAME, CheckpointError, open_checkpoint
from adapt_pruner.engines import InMemoryEngine, choice
from adapt_pruner.engines.streaming import StreamingEngine
from adapt_pruner.methods import resolve
from adapt_pruner.run import RunDirectory
from adapt_pruner.scoring import layerwise
from adapt_pruner.scoring.boundaries import open_boundaries
from adapt_pruner.scoring.estimators import ESTIMATORS, TAYLOR_FIRST
from adapt_pruner.scoring.layerwise import Clock
from adapt_pruner.scoring.streamed import streamable
from adapt_pruner.shard_io import verify_checksums
from adapt_pruner.tensor_reader import TensorReader

BATCH = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(1))
BOUNDARY = BATCH.numel() * SHAPE["hidden_size"] * 4  # bytes of the residual stream in fp32
LAYERS = SHAPE["num_hidden_layers"]
SETTINGS = {
    "target": 0.7, "iterations": 5, "amplitude": 0.05, "num_sequences": 8, "sequence_length": 16,
    "micro_batch_size": 4, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def settings(tiny_models, calibration_file, tmp_path):
    def make(family="qwen2", name="run", **changes):
        options = {
            "model": str(tiny_models.get(family, family)), "output": str(tmp_path / name),
            "calibration": str(calibration_file), **SETTINGS, **changes,
        }  # fmt: skip
        return PruneConfig(**options)

    return make


@pytest.fixture
def engines(tiny_models, tmp_path):
    """Both engines of a model; what goes into the layers is on disk."""

    def make(family, memory=1, **options):
        checkpoint = open_checkpoint(tiny_models.get(family, family))
        streaming = StreamingEngine(checkpoint, directory=tmp_path, memory=memory, device="cpu", **options)
        return InMemoryEngine(checkpoint, device="cpu", **options), streaming

    return make


def assert_same_scores(ours, theirs, rtol=1e-5):
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    np.testing.assert_allclose(ours.layer_importance, theirs.layer_importance, rtol=rtol)
    for a, b in zip(ours.unit_importance, theirs.unit_importance, strict=True):
        assert a.keys() == b.keys()
        for kind in a:
            np.testing.assert_allclose(a[kind], b[kind], rtol=rtol)


def bytes_of(run: Path):
    files = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    files.pop("checksums.json", None)  # of weights that are copied file to file
    return files


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("micro_batch_size", "gradients"), [(4, "auto"), (6, "fused"), (1, "materialised")])
def test_scores_are_those_of_the_model_in_memory(engines, family, micro_batch_size, gradients):
    in_memory, streaming = engines(family)
    options = {"micro_batch_size": micro_batch_size, "gradients": gradients}
    assert_same_scores(streaming.score(BATCH, **options), in_memory.score(BATCH, **options))
    assert streaming.measured["boundaries_on_disk"] == LAYERS + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_on_a_gpu_with_activations_there_on_the_host_and_on_disk(tiny_models, tmp_path, monkeypatch, family):
    checkpoint = open_checkpoint(tiny_models[family])
    free = (4 * BOUNDARY, 4 * BOUNDARY)  # two of them go to the device
    streaming = StreamingEngine(checkpoint, directory=tmp_path, memory=3 * BOUNDARY, device="cuda")
    whole = InMemoryEngine(checkpoint, device="cuda").score(BATCH.cuda(), micro_batch_size=4)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: free)
    assert_same_scores(streaming.score(BATCH, micro_batch_size=4), whole, rtol=1e-4)
    assert streaming.measured["boundaries_in_memory"] == 3
    assert streaming.measured["boundaries_on_disk"] == LAYERS - 2


@pytest.mark.parametrize("estimator", filter(streamable, ESTIMATORS), ids=lambda e: e.name)
@pytest.mark.parametrize("credit", ["owner", "modulo"])
def test_estimators(engines, estimator, credit):
    options = {"micro_batch_size": 4, "estimator": estimator, "gqa_credit": credit, "metric": "euclidean"}
    in_memory, streaming = engines("llama")
    ours, theirs = streaming.score(BATCH, **options), in_memory.score(BATCH, **options)
    # Variances of near-constant inputs are differences of large sums.
    assert_same_scores(ours, theirs, rtol=1e-4 if estimator.of_columns else 1e-5)
    assert ("backward" in streaming.measured["sweep_seconds"]) == (estimator.loss is not None)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("granularity", ["kv_group", "query_head"])
def test_scores_of_what_is_left_after_two_removals(engines, family, granularity):
    pair = engines(family, granularity=granularity)
    earlier = pair[0].score(BATCH, micro_batch_size=4)
    draw = np.random.default_rng(0)
    for _ in range(2):
        counts = [{k: len(v) for k, v in layer.items()} for layer in earlier.unit_importance]
        keep = []
        for number, layer in enumerate(counts):
            lanes = SHAPE["num_key_value_heads"]
            attention = "kv_group" if granularity == "kv_group" else "query_head"
            channels = np.sort(draw.permutation(layer["channel"])[: layer["channel"] - 5 - number])
            heads = np.arange(layer[attention])
            if number == 1:
                each = layer[attention] // (lanes if attention == "query_head" else 1)
                heads = heads[heads % each != each - 1] if each > 1 else heads
            keep.append({attention: heads, "channel": channels})
        for engine in pair:
            engine.remove_units(keep)
        assert pair[0].widths == pair[1].widths
        assert pair[0].num_parameters == pair[1].num_parameters
        earlier, ours = (engine.score(BATCH, micro_batch_size=4) for engine in pair)
        assert_same_scores(ours, earlier)


def test_averages_with_earlier_scores(engines):
    in_memory, streaming = engines("mistral")
    before = in_memory.score(BATCH[:3], micro_batch_size=3)
    options = {"micro_batch_size": 6, "earlier": before, "share": 0.25}
    assert_same_scores(streaming.score(BATCH, **options), in_memory.score(BATCH, **options))


@pytest.mark.parametrize("memory", [1, BOUNDARY, 3 * BOUNDARY + 5, 10**9])
def test_where_activations_are_changes_no_bit(engines, memory, tmp_path):
    _, on_disk = engines("gemma2")
    _, streaming = engines("gemma2", memory=memory)
    expected = on_disk.score(BATCH, micro_batch_size=4)
    scores = streaming.score(BATCH, micro_batch_size=4)
    assert streaming.measured["boundaries_in_memory"] == min(memory // BOUNDARY, LAYERS + 1)
    assert scores.loss == expected.loss
    np.testing.assert_array_equal(scores.layer_importance, expected.layer_importance)
    for a, b in zip(scores.unit_importance, expected.unit_importance, strict=True):
        assert all(np.array_equal(a[kind], b[kind]) for kind in a)
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("memory", [0, 700, 10**6])
def test_boundaries_give_back_what_was_written(tmp_path, memory):
    draw = torch.Generator().manual_seed(0)
    expected = torch.randn(4, 5, 3, 8, generator=draw).bfloat16()  # 240 bytes each
    cpu = torch.device("cpu")
    with open_boundaries(4, (5, 3, 8), torch.bfloat16, cpu, memory=memory, directory=tmp_path) as boundaries:
        assert boundaries.in_memory == min(4, memory // 240)
        for index in range(4):
            for rows in (range(3), range(3, 5)):
                boundaries.write(index, rows, expected[index, rows.start : rows.stop])
        boundaries.write(2, range(1, 2), -expected[2, 1:2])
        expected[2, 1] *= -1
        for index in (3, 0, 2, 1):
            assert torch.equal(boundaries.read(index, range(1, 4)), expected[index, 1:4])


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])  # Gemma 2 caps its logits
@pytest.mark.parametrize("tokens", [1, 5, 11, 25])
def test_the_head_takes_a_chunk_of_tokens(engines, family, tokens, monkeypatch):
    in_memory, streaming = engines(family)
    expected = in_memory.score(BATCH, micro_batch_size=4)
    monkeypatch.setattr(layerwise, "CHUNK_BYTES", tokens * VOCABULARY * 4)
    seen = []
    original = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda x, *a, **k: seen.append(len(x)) or original(x, *a, **k)
    )
    assert_same_scores(streaming.score(BATCH, micro_batch_size=4), expected)
    assert max(seen) == (tokens if tokens <= 11 else 22)
    assert sum(seen) == 6 * 11


def test_at_most_two_layers_are_in_memory(engines):
    _, streaming = engines("llama")
    parts, read = streaming._parts, streaming._reader.read
    alive = []

    def counting(name, kept=None):
        tensor = read(name, kept)
        if ".layers." in name:
            alive[:] = [(layer, ref) for layer, ref in alive if ref() is not None]
            alive.append((int(name.split(".")[2]), weakref.ref(tensor.untyped_storage())))
            assert len({layer for layer, ref in alive if ref() is not None}) <= 2
        return tensor

    streaming._reader.read = counting
    gc.disable()  # nothing may wait for it
    try:
        for layer in parts.sweep(range(LAYERS), Clock(parts.device)):
            loaded = [not any(p.is_meta for p in each.parameters()) for each in parts.layers]
            assert loaded == [i == layer for i in range(LAYERS)]
        assert all(p.is_meta for each in parts.layers for p in each.parameters())
        streaming.score(BATCH, micro_batch_size=4)
    finally:
        gc.enable()
    assert all(p.is_meta for each in parts.layers for p in each.parameters())
    assert not any(each._forward_hooks for each in parts.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_prunes_to_the_bytes_of_the_in_memory_engine(settings, family):
    runs = [prune(settings(family, name, engine=name, memory="3000")) for name in ("in-memory", "streaming")]
    assert runs[0].plan.hash == runs[1].plan.hash
    assert bytes_of(runs[0].run_directory) == bytes_of(runs[1].run_directory)
    saved = runs[1].model_directory
    assert verify_checksums(open_checkpoint(saved)) == len(load_file(saved / WEIGHTS_NAME))
    record = json.loads((runs[1].run_directory / "iterations" / "001.json").read_text())["engine"]
    assert record["weight_bytes_read"] > 2 * 0.8 * open_checkpoint(runs[1].model_directory).num_bytes * 0.7
    assert record["sweep_seconds"].keys() == {"embed", "read", "forward", "head", "backward"}


@pytest.mark.parametrize(
    "changes",
    [
        {"granularity": "query_head", "allocation": "global"},
        {"micro_batch_size": 8, "gradients": "fused"},
        {"dtype": "bf16"},
        {"method": "magnitude"},
        {"method": "wanda-sp"},
        {"method": "reference"},
        {"target": 1.0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_settings_prune_to_the_same_bytes(settings, changes, tmp_path, tokenizer):
    untied = tmp_path / "untied"
    make_model("llama", tied=False).save_pretrained(untied, max_shard_size="100KB")
    (untied / "generation_config.json").unlink()
    tokenizer.save_pretrained(untied)
    runs = [prune(settings(str(untied), name, engine=name, **changes)) for name in ("in-memory", "streaming")]
    assert runs[0].plan.hash == runs[1].plan.hash
    assert bytes_of(runs[0].run_directory) == bytes_of(runs[1].run_directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "layer"}, "granularity is 'layer'"),
        ({"method": "adapt-pruner+"}, "the estimator is 'obs_fisher', expected one of"),
        ({"estimator": "random"}, "the estimator is 'random'"),
        ({"method": "flap"}, "compensation is 'bias', expected 'none'"),
        ({"compensation": "least_squares"}, "compensation is 'least_squares'"),
        ({"allocation": "search"}, "allocation is 'search'"),
        ({"target_latency": 0.9}, "target_latency is 0.9"),
        ({"family": "mixtral"}, "a mixture of experts"),
        ({"method": "slicegpt"}, "expected 'in-memory' for method 'slicegpt'"),
        ({"engine": "sharded"}, "engine is 'sharded', which several processes share"),
        ({"memory": "lots"}, "memory is 'lots', expected a size"),
    ],
)
def test_refused_before_a_weight_is_read(settings, changes, message, monkeypatch):
    def read(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorReader, "read", read)
    with pytest.raises(ValueError, match=message):
        prune(settings(**{"engine": "streaming", **changes}))


def test_auto_takes_what_fits_and_says_why(settings, monkeypatch, caplog):
    monkeypatch.setattr(choice, "available_memory", lambda device: 10**6)
    with caplog.at_level("INFO"):
        result = prune(settings(iterations=1))
    said = "the whole model takes about 0.0 GB, 0.0 GB are available"
    assert f"engine streaming: {said}" in caplog.text
    log = [json.loads(line) for line in (result.run_directory / "log.jsonl").read_text().splitlines()]
    assert (log[0]["engine"], log[0]["engine_because"]) == ("streaming", said)
    assert "engine" in json.loads((result.run_directory / "iterations" / "001.json").read_text())
    assert not {"engine", "memory"} & result.plan.settings.keys()
    monkeypatch.setattr(choice, "available_memory", lambda device: 10**5)
    refused = "but layer by layer it cannot be pruned: compensation is 'bias', expected 'none'"
    with pytest.warns(UserWarning, match=f"^engine in-memory: the whole model.*{refused}"):
        prune(settings(name="flap", method="flap"))


def test_auto_estimates_weights_gradients_activations_and_logits(settings, tiny_models):
    checkpoint = open_checkpoint(tiny_models["mistral"])
    family = StreamingEngine(checkpoint, directory=Path(), device="cpu").family

    def needed(**changes):
        config, estimator = resolve(settings("mistral", **changes), LAYERS)
        return sum(choice.in_memory_bytes(config, estimator, checkpoint, family))

    prunable = sum(i.numel for n, i in checkpoint.tensors.items() if "_proj" in n)
    tokens = 4 * 16
    logits = tokens * VOCABULARY * 16
    activations = tokens * LAYERS * 4 * (8 * 48 + 4 * 88 + 4 * 80)
    rest = checkpoint.num_bytes + logits
    assert needed() == rest + prunable * 4 + activations
    assert needed(method="magnitude") == rest
    in_bf16 = 2 * tokens * (VOCABULARY * 14 + LAYERS * (2 * (8 * 48 + 4 * 88 + 4 * 80) + 16 * 48))
    assert needed(micro_batch_size=8, dtype="bf16") == checkpoint.num_bytes // 2 + prunable * 2 + in_bf16
    assert needed(micro_batch_size=8) - needed(micro_batch_size=8, gradients="fused") == prunable * 4


@pytest.mark.parametrize("finished", [0, 2])
def test_a_run_goes_on_with_the_engine_it_has_begun_with(settings, monkeypatch, finished):
    monkeypatch.setattr(choice, "available_memory", lambda device: 10**6)
    whole = prune(settings(name="whole"))
    calls, save = [], RunDirectory.save_iteration

    def stopping(*args, **more):
        calls.append(1)
        if len(calls) == finished + 1:
            raise KeyboardInterrupt
        save(*args, **more)

    monkeypatch.setattr(RunDirectory, "save_iteration", stopping)
    with pytest.raises(KeyboardInterrupt):
        prune(settings())
    monkeypatch.setattr(choice, "available_memory", lambda device: 10**12)
    with pytest.raises(ValueError, match="engine is 'in-memory', the run was started with 'auto'"):
        prune(settings(engine="in-memory", resume=True))
    result = prune(settings(resume=True, memory="1MB"))
    log = [json.loads(line) for line in (result.run_directory / "log.jsonl").read_text().splitlines()]
    assert [(e["event"], e["engine"]) for e in log if "engine" in e] == [
        ("started", "streaming"), ("resumed" if finished else "started", "streaming"),
    ]  # fmt: skip
    assert bytes_of(result.run_directory) == bytes_of(whole.run_directory)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_weight_that_is_not_finite_is_named(tiny_models, tmp_path, name):
    tensors = load_file(tiny_models["qwen2"] / "model.safetensors")
    tensors[name].view(-1)[int(BATCH[0, 0]) * 48 if "embed" in name else 7] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_models["qwen2"] / "config.json").read_text())
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name}.* NaN or infinite"):
        StreamingEngine(checkpoint, directory=tmp_path, device="cpu").score(BATCH, micro_batch_size=4)


def test_weights_that_scoring_does_not_read_are_looked_at(settings, tiny_models, tmp_path, tokenizer):
    model = make_model("llama", tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = 1e5  # of no token of the text
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(
        CheckpointError, match=r"1 of \d+ values of model.embed_tokens.weight .* torch.float16"
    ):
        StreamingEngine(open_checkpoint(tmp_path / "large"), directory=tmp_path, device="cpu", dtype="fp16")
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = 0
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    config = settings(str(tmp_path / "nan"), engine="streaming", target=1.0)  # nothing is removed
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight are NaN"):
        prune(config)
    assert not (Path(config.output) / "model").exists()


def test_tensors_of_units_that_the_model_does_not_have(tmp_path):
    make_model("mistral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(
        len(tensors["model.layers.0.self_attn.q_proj.weight"])
    )
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.q_proj.bias'\] belong to units"):
        StreamingEngine(open_checkpoint(tmp_path), directory=tmp_path, device="cpu")


def test_files_that_change_under_it_are_named(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    engine = StreamingEngine(open_checkpoint(tmp_path), directory=tmp_path, device="cpu")
    engine.score(BATCH, micro_batch_size=4)
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
        engine.score(BATCH, micro_batch_size=4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed"):
        engine.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_room_for_activations_is_seen_to(settings, monkeypatch):
    asked = []
    monkeypatch.setattr(pruner, "require_free_space", lambda target, num_bytes: asked.append(num_bytes))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    needed = (LAYERS + 1) * 8 * 16 * SHAPE["hidden_size"] * 4
    with pytest.raises(
        OSError, match=f"no room for {needed:,} bytes of activations beyond the 1 of --memory"
    ):
        prune(settings(engine="streaming", memory="1B"))
    assert asked[1] - asked[0] == needed


def test_activations_that_overflow_are_named_by_their_layer(tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(3e38)
    model.save_pretrained(tmp_path)
    engine = StreamingEngine(open_checkpoint(tmp_path), directory=tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"^layer 2: the cosine between its input and output is"):
        engine.score(BATCH, micro_batch_size=4)


def test_tensors_that_do_not_fit_the_config_and_files_that_end_early(tiny_models, tmp_path):
    tensors = load_file(tiny_models["qwen2"] / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_models["qwen2"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"missing_keys.*model\.norm\.weight"):
        StreamingEngine(open_checkpoint(tmp_path), directory=tmp_path, device="cpu")
    make_model("llama").save_pretrained(tmp_path)
    engine = StreamingEngine(open_checkpoint(tmp_path), directory=tmp_path, device="cpu")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    with pytest.raises(CheckpointError, match="ends within a tensor"):
        engine.score(BATCH, micro_batch_size=4)
    with pytest.raises(ValueError, match="has 280 rows, asked for row 280"):
        engine.score(BATCH + VOCABULARY - int(BATCH.max()), micro_batch_size=4)


def test_nothing_but_what_can_be_scored_layer_by_layer():
    refused = {estimator.name for estimator in ESTIMATORS if not streamable(estimator)}
    assert refused == {"obs", "obs_fisher", "random"}
    assert streamable(dataclasses.replace(TAYLOR_FIRST, name="mine"))


KILLED = """
import signal, sys
from dataclasses import replace
import yaml
from adapt_pruner.config import PruneConfig
from adapt_pruner.engines.streaming import StreamingEngine
from adapt_pruner.run import RunDirectory
from adapt_pruner.scoring import streamed

sys.path.append(sys.argv[1])
from dying import child

DYING = {
    "iteration": (RunDirectory, "save_iteration"),
    "forward": (streamed, "_forward"),
    "head": (streamed, "_head"),
    "backward": (streamed, "_backward"),
    "remove": (StreamingEngine, "remove_units"),
    "save": (StreamingEngine, "save"),
}

config = PruneConfig(**yaml.safe_load(sys.stdin))
assert child(config) == 0
for place, count in [("forward", 2), ("head", 3), ("backward", 6), ("iteration", 2), ("remove", 2),
                     ("save", 1)]:
    killed = replace(config, output=f"{config.output}-{place}")
    assert child(killed, DYING[place], count) == signal.SIGKILL, (place, count)
    assert child(replace(killed, resume=True)) == 0, (place, count)
"""


def test_killed_anywhere_and_resumed_gives_the_same_bytes(settings, tmp_path):
    config = yaml.safe_dump(dataclasses.asdict(settings("llama", engine="streaming", memory="20KB")))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parents[1])],
        input=config,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    runs = sorted(p for p in tmp_path.glob("run*") if p.is_dir())
    assert len(runs) == 7
    whole = bytes_of(tmp_path / "run") | {"plan": (tmp_path / "run" / "plan.json").read_bytes()}
    for run in runs:
        assert bytes_of(run) | {"plan": (run / "plan.json").read_bytes()} == whole, run.name
        assert not (run / "state").exists()
        names = {p.name for p in run.iterdir()} - {p.name for p in (tmp_path / "run").iterdir()}
        assert not names, "what a kill left behind is cleaned up"
