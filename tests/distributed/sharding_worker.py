"""What each of two gloo processes does for test_sharding.py; run by torch.distributed.run.

Argument: a directory with the states that one process has saved, to which the results are added.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tiny import make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from adapt_pruner.families import find_family, layer_widths
from adapt_pruner.modeling.conversion import convert_pruned_model
from adapt_pruner.recovery.training_state import load_training_state, save_training_state
from adapt_pruner.saving import save_model
from adapt_pruner.sharding import is_sharded, shard, world
from adapt_pruner.surgery import prune_layer

STEPS = 4
AFTER = 3  # further steps behind a saved state
# Few different tokens, so that there is something to learn.
BATCH = torch.randint(3, 20, (STEPS + AFTER, 4, 24), generator=torch.Generator().manual_seed(0))
# What stays of 4 KV groups and 88 channels, per layer. One channel: a part of its layer is empty on a rank.
KEEP = [([0, 2, 3], 60), ([1], 7), ([0, 1, 2, 3], 1), ([0, 3], 33)]
CASES = ("plain", "tied", "pruned")


def make_case(case: str, seed: int = 0):
    """A tiny causal LM: plain Llama with biases, tied Qwen 2, or tied Llama with a width for each layer."""
    if case != "pruned":
        tied = case == "tied"
        return make_model("qwen2" if tied else "llama", tied=tied, seed=seed).train()
    model = make_model("llama", seed=seed)
    widths = layer_widths(model.config.to_dict())
    pruned = [
        prune_layer(
            model,
            find_family("llama"),
            layer,
            widths[layer],
            {"kv_group": np.array(groups), "channel": np.arange(88 - channels, 88)},
        )
        for layer, (groups, channels) in enumerate(KEEP)
    ]
    return convert_pruned_model(model, pruned).train()


def make_optimizer(model):
    """Groups with settings of their own, and an eps that keeps rounding from deciding a step's sign."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-4)


def train(model, optimizer, steps: range, loss_of=None) -> list[float]:
    """Mean loss over the ranks at each step; every rank has its own part of the batch."""
    rank, size = world()
    losses = []
    for step in steps:
        ids = BATCH[step].chunk(size)[rank]
        loss = loss_of(ids) if loss_of else model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / size)
    return losses


def evaluate(model) -> None:
    """A forward pass without a backward pass, after which a sharded root still has its whole weights."""
    with torch.no_grad():
        model(input_ids=BATCH[0])


def check_parts(model, dtype) -> None:
    tensors = model.state_dict()
    assert all(is_sharded(module) for module in (model, *model.model.layers))
    assert all(isinstance(t, DTensor) for t in tensors.values())
    assert all(t.placements == (Shard(0),) and t.dtype == dtype for t in tensors.values())
    elements = [sum(t.numel() for t in tensors.values()), sum(t.to_local().numel() for t in tensors.values())]
    assert elements[1] < 0.6 * elements[0]


def run_case(case: str, mesh, out: Path) -> dict:
    model = shard(make_case(case), mesh)
    check_parts(model, torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (case != "plain")
    optimizer = make_optimizer(model)
    result = {"losses": train(model, optimizer, range(STEPS))}
    evaluate(model)
    save_training_state(out / f"state-{case}", model, optimizer)
    evaluate(model)
    save_model(out / f"model-{case}", model)
    save_model(out / f"bf16-{case}", model, dtype=torch.bfloat16)
    save_training_state(out / f"again-{case}", model, optimizer)
    result["after"] = train(model, optimizer, range(STEPS, STEPS + AFTER))

    other = shard(make_case(case, seed=1), mesh)
    optimizer = make_optimizer(other)
    optimizer.param_groups[0]["lr"] = 5.0
    for name in ("state", "one"):
        evaluate(other)
        load_training_state(out / f"{name}-{case}", other, optimizer)
        check_parts(other, torch.float32)
        assert (other.lm_head.weight is other.model.embed_tokens.weight) == (case != "plain")
        result[f"after_loading_{name}"] = train(other, optimizer, range(STEPS, STEPS + AFTER))

    mixed = shard(make_case(case), mesh, mixed_precision=torch.bfloat16)
    optimizer = make_optimizer(mixed)
    result["bf16_losses"] = train(mixed, optimizer, range(STEPS))
    check_parts(mixed, torch.float32)
    save_model(out / f"mixed-{case}", mixed)

    recomputed = shard(make_case(case), mesh)
    recomputed.gradient_checkpointing_enable()
    result["recomputed_losses"] = train(recomputed, make_optimizer(recomputed), range(STEPS))
    return result


def check_mixed_precision(mesh) -> None:
    """The weights of a bf16 model are kept in fp32, and its gradients are summed in fp32."""
    half = make_case("tied").to(torch.bfloat16)
    expected = {name: tensor.float() for name, tensor in half.state_dict().items()}
    model = shard(half, mesh, mixed_precision=torch.bfloat16)
    check_parts(model, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.full_tensor(), expected[name]), name
    ids = BATCH[0].chunk(2)[world().rank]
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad.full_tensor() for p in model.parameters()]
    # The mean of two bf16 numbers, were it rounded to bf16, would not change when rounded again.
    assert any(not torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients)


def run_replicated(out: Path) -> None:
    """A model that is whole on both ranks: rank 0 writes, both read."""
    model = make_case("tied")
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        model(input_ids=BATCH[step], labels=BATCH[step]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_training_state(out / "replicated", model, optimizer)
    save_model(out / "replicated-model", model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for value in model.state_dict().values():
        value.zero_()
    load_training_state(out / "replicated", model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def run_failures(mesh, out: Path) -> dict:
    """Every way in which one rank fails; the messages that this rank gets."""
    model = shard(make_case("tied"), mesh)
    optimizer = make_optimizer(model)
    messages = {}

    def expect(name, function, *arguments):
        try:
            function(*arguments)
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"

    plain_rename, plain_open = Path.rename, Path.open

    def rename(self, target):
        raise OSError("stopped before the rename")

    def no_space(self, mode="r", *arguments, **options):
        if mode == "wb" and self.name == "model.safetensors":
            raise OSError("no space left")
        return plain_open(self, mode, *arguments, **options)

    if world().rank == 0:
        Path.rename = rename
    expect("state", save_training_state, out / "stopped-state", model, optimizer)
    expect("model", save_model, out / "stopped-model", model)
    Path.rename = plain_rename
    if world().rank == 0:
        Path.open = no_space
    expect("full", save_model, out / "stopped-full", model)
    Path.open = plain_open
    expect("taken", save_training_state, out / "state-tied", model, optimizer)
    expect("other", load_training_state, out / "state-plain", model, optimizer)
    save_model(out / "after-failures", model)  # the ranks are still in step
    return messages


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world().size,))
    results = {case: run_case(case, mesh, out) for case in CASES}
    check_mixed_precision(mesh)
    run_replicated(out)
    results["failures"] = run_failures(mesh, out)
    (out / f"results-{world().rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
