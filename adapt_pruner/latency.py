"""Latency as a limit: measured, taken as linear in the units, and corrected by what a round would leave."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapt_pruner.allocation import Allocation, Floats, select_units
from adapt_pruner.budget import Counts, Limit, UnitBudget, used
from adapt_pruner.config import PruneConfig, parse_amount
from adapt_pruner.engines.in_memory import InMemoryEngine
from adapt_pruner.plan import Indices
from adapt_pruner.resources import Resource

ROUNDS = 9  # measurements of each model; all take turns, and the median counts
SAMPLE_SECONDS = 0.02  # that one of them lasts at least
TRIALS = 12  # measurements of allocations of one iteration before the best is taken
CLOSE = 0.95  # of the target: a model that takes less time gives units back where nothing else needs them
SAMPLE_LAYERS = 4
FAR = 10.0  # the factor that a unit's time may differ from its share of the parameters
PICO = 10**12

Keep = tuple[dict[str, Indices], ...]
Choice = tuple[Allocation, Keep]


def forward_seconds(model: nn.Module, inputs: Tensor) -> float:
    """Time of one forward pass over `inputs`, [sequences, tokens], until the device is done."""
    cuda = inputs.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(inputs.device)
    start = time.perf_counter()
    model(inputs, use_cache=False)
    if cuda:
        torch.cuda.synchronize(inputs.device)
    return time.perf_counter() - start


def measure(models: Sequence[nn.Module], inputs: Tensor) -> Floats:
    """[rounds, models], seconds of a forward pass of each, the models taking turns.

    One round warms up and tells how many passes a measurement needs to last long enough.
    """

    def total(passes: int) -> list[float]:
        return [sum(forward_seconds(model, inputs) for _ in range(passes)) for model in models]

    with torch.inference_mode():
        passes = math.ceil(SAMPLE_SECONDS / max(1e-9, min(total(1))))
        return np.array([total(passes) for _ in range(ROUNDS)]) / passes


@dataclass(frozen=True)
class _Trial:
    """An allocation of an iteration, and its times as fractions of the original model's; confirmed: by two
    measurements."""

    choice: Choice
    ratios: list[float]

    @property
    def confirmed(self) -> bool:
        return len(self.ratios) >= 2 * ROUNDS


class Latency:
    """The time of a forward pass of the model that an engine holds, as a limit of the allocation.

    What one unit of each kind takes is fitted to the first layers of the original model at several widths.
    Before an iteration removes anything, the model that it would leave is measured, in turns with the
    original model, and where it is not what the fit promised the iteration is allocated anew with corrected
    costs. The original model is kept for that.
    """

    def __init__(
        self,
        config: PruneConfig,
        engine: InMemoryEngine,
        budget: UnitBudget,
        state: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            engine: with the original model.
            budget: of the original model.
            state: what `state` gave, to go on without measuring anew.
        Raises:
            ValueError: the target is above what the original model takes.
        """
        self._dense = engine.copy()
        generator = torch.Generator().manual_seed(0)
        shape = (config.latency_batch, config.latency_tokens)
        vocabulary, longest = self._dense.config.vocab_size, self._dense.config.max_position_embeddings
        if config.latency_tokens > longest:
            raise ValueError(
                f"latency_tokens is {config.latency_tokens}, expected at most {longest}, the model's longest"
            )
        self._inputs = torch.randint(vocabulary, shape, generator=generator).to(engine.model.device)
        if state is not None:
            self.before, self.target, self.amount = state["before"], state["target"], state["amount"]
            self._cost, self._scale = tuple(state["cost"]), state["scale"]
            return
        assert config.target_latency is not None
        self.before = round(float(np.median(measure([self._dense], self._inputs))) * PICO)
        value = parse_amount("target_latency", config.target_latency)
        self.target = int(value * self.before) if isinstance(value, float) else value
        if self.target > self.before:
            raise ValueError(
                f"target_latency is {_milliseconds(self.target)}, the model takes "
                f"{_milliseconds(self.before)}: expected less"
            )
        self.amount = self.before
        self._cost = fit_unit_costs(engine, budget, self._inputs)
        self._scale = 1.0
        self._require_reachable(budget)

    def state(self) -> dict[str, Any]:
        return {
            "before": self.before,
            "target": self.target,
            "amount": self.amount,
            "cost": self._cost,
            "scale": self._scale,
        }

    def limited(self, budget: UnitBudget) -> UnitBudget:
        """The budget with this limit.

        Costs are at least such that the units which may go can meet it: whether they do is measured.
        """
        reach = used(budget.current, self._cost) - used(budget.least, self._cost)
        least = (self.amount - self.target) / reach if reach else 0.0
        scale = max(self._scale, least * (1 + 1e-9))  # rounding must not put the target out of reach
        cost = tuple({kind: math.ceil(c * scale) for kind, c in layer.items()} for layer in self._cost)
        limit = Limit("latency", cost, self.amount, self.target)
        return replace(budget, limits=(*budget.limits, limit))

    def settle(
        self,
        budget: UnitBudget,
        parameters: int,
        choose: Callable[[UnitBudget], Choice],
        engine: InMemoryEngine,
    ) -> Choice:
        """An iteration's allocation and kept units, allocated until what is measured agrees.

        Args:
            budget: without this limit.
            parameters: the target for those.
            choose: allocates under a budget.
        Raises:
            ValueError: the model takes longer than the target even without all units that may go.
        """
        tried: list[_Trial] = []
        for _ in range(TRIALS):
            self._require_reachable(budget)
            choice = choose(self.limited(budget))
            counts = choice[0].counts
            trial = next((trial for trial in tried if trial.choice[0].counts == counts), None)
            if trial is None:
                trial = _Trial(choice, [])
                tried.append(trial)
            elif trial.confirmed:
                break  # no other allocation is to be had
            seconds = measure([self._dense, engine.copy(choice[1])], self._inputs)
            trial.ratios.extend((seconds[:, 1] / seconds[:, 0]).tolist())
            measured = self._measured(trial)
            landed = not budget.over(counts, parameters)
            if measured > self.target:
                done = not choice[0].landed
                if counts == budget.least and trial.confirmed:
                    self._refuse(measured)
            else:
                done = measured >= CLOSE * self.target or not landed
            removed = used(budget.current, self._cost) - used(counts, self._cost)
            if done or not removed:
                if trial.confirmed:
                    break
                continue  # once more, as what is reported must not be a lucky moment
            self._scale = max(self._scale / 4, min(self._scale * 4, (self.amount - measured) / removed))
        best = min([trial for trial in tried if trial.confirmed] or tried, key=self._distance)
        self.amount = self._measured(best)
        return best.choice

    def _measured(self, trial: _Trial) -> int:
        return round(float(np.median(trial.ratios)) * self.before)

    def _distance(self, trial: _Trial) -> tuple[bool, int]:
        """What meets the target first, then what is closest to it."""
        measured = self._measured(trial)
        return measured > self.target, abs(measured - self.target)

    def _require_reachable(self, budget: UnitBudget) -> None:
        if self.amount > self.target and used(budget.current, self._cost) == used(budget.least, self._cost):
            self._refuse(self.amount)

    def _refuse(self, amount: int) -> None:
        raise ValueError(
            f"target_latency is {_milliseconds(self.target)}, of {_milliseconds(self.before)} "
            f"{_milliseconds(amount)} stay when all units that may go and take time are gone"
        )


def _milliseconds(picoseconds: int) -> str:
    return f"{picoseconds / PICO * 1e3:.3f} ms"


def usage(
    resources: Sequence[Resource], latency: Latency | None, budget: UnitBudget
) -> dict[str, dict[str, float]]:
    """What a model uses of each limited resource: before, target and after; latency in seconds."""
    used_now: dict[str, dict[str, float]] = {
        r.name: {"before": r.before, "target": r.target, "after": r.limit(budget).amount} for r in resources
    }
    if latency:
        amounts = {"before": latency.before, "target": latency.target, "after": latency.amount}
        used_now["latency"] = {name: amount / PICO for name, amount in amounts.items()}
    return used_now


def fit_unit_costs(engine: InMemoryEngine, budget: UnitBudget, inputs: Tensor) -> Counts:
    """Picoseconds that one unit of each kind takes, counted as `UnitBudget.cost` is, the same in all layers.

    Measured on the first layers with all units, and with three quarters and half of each kind in turn.
    """
    layers = range(min(SAMPLE_LAYERS, len(engine.widths)))
    kinds = [kind.name for kind in engine.family.unit_kinds]
    points = [(None, 1.0), *((kind, share) for kind in kinds for share in (0.75, 0.5))]
    models, removed = [], []
    for shrunk, share in points:
        counts = [
            {kind: max(1, int(n * (share if kind == shrunk else 1))) for kind, n in budget.current[i].items()}
            for i in layers
        ]
        keep = tuple(
            {
                kind.name: select_units(
                    np.zeros(kind.count(engine.widths[i])), counts[i][kind.name], kind.lanes(engine.widths[i])
                )
                for kind in engine.family.unit_kinds
            }
            for i in layers
        )
        models.append(engine.copy(keep).base_model)
        removed.append(
            [sum(budget.current[i][kind] - count[kind] for i, count in enumerate(counts)) for kind in kinds]
        )
    seconds = np.median(measure(models, inputs), axis=0)
    slopes = np.linalg.lstsq(np.column_stack([np.ones(len(points)), removed]), seconds, rcond=None)[0][1:]
    # Were time in proportion to parameters. A disturbed fit that is far from it would take one kind alone.
    units = [[budget.current[i][kind] * budget.cost[i][kind] for i in layers] for kind in kinds]
    shares = [seconds[0] / np.sum(units) * budget.cost[0][kind] for kind in kinds]
    cost = {
        kind: round(float(np.clip(-slope, share / FAR, share * FAR)) * PICO)
        for kind, slope, share in zip(kinds, slopes, shares, strict=True)
    }
    return tuple(dict(cost) for _ in budget.current)
