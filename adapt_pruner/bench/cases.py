"""Every op of the benchmark: the bytes it must move, and how each provider computes it.

A provider is a function without arguments that computes the op once on buffers that exist already and
returns its results. `plain` is the expression one would write in PyTorch, "eager" runs it as it is, "compile"
compiles it; `preallocated` is the same with its temporaries in buffers that are reused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adapt_pruner.bench.layers import Shape
from adapt_pruner.kernels import (
    UnitSet,
    activation_stats,
    gather_units,
    linear_importance,
    residual_similarity,
    roofline,
    unit_importances,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROVIDERS = ("eager", "eager_preallocated", "compile", "ours")
KEPT = 0.75  # share of the units that a gather keeps
HEAD_SIZES = (128, 64)  # columns of a run: those of an attention head, the first that divides the matrix
TOKENS = 2048  # rows of the activations of a linear layer

Results = tuple[Tensor, ...]
Run = Callable[[], Results]


class Buffers:
    """The tensors that all cases of one shape, dtype and device share; each made when it is first needed.

    Attributes:
        weight, other: [rows, columns]; a weight and its gradient, or two residual streams that are alike.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.shape, self.dtype, self.device, self.seed = shape, dtype, device, seed
        self.weight = self._random(shape, 0)
        self.other = self._random(shape, 1).add_(self.weight)

    def _random(self, shape: Shape, stream: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed + stream)
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    @property
    def bytes(self) -> int:
        """Of one tensor of the shape."""
        return self.weight.nbytes

    def keep(self, dim: int, group_size: int = 1) -> Tensor:
        """Sorted random units of a dimension, on the host as in a plan."""
        units = self.shape[dim] // group_size
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(units, generator=generator)[: kept_of(units)].sort().values

    def kept(self, rows: int, columns: int) -> Tensor:
        """Where a gather writes: views of one buffer, which are never used at the same time."""
        return self._kept[: rows * columns].view(rows, columns)

    @cached_property
    def _kept(self) -> Tensor:
        return self._zeros(max(kept_of(self.shape[d]) * self.shape[1 - d] for d in (0, 1)))

    @cached_property
    def temporary(self) -> Tensor:
        """[rows, columns], like the weight."""
        return self._zeros(*self.shape)

    @cached_property
    def temporary_fp32(self) -> Tensor:
        """[rows, columns]."""
        is_fp32 = self.dtype == torch.float32
        return self.temporary if is_fp32 else self._zeros(*self.shape, dtype=torch.float32)

    @cached_property
    def row_scores(self) -> Tensor:
        return self._zeros(self.shape[0])

    @cached_property
    def column_scores(self) -> Tensor:
        return self._zeros(self.shape[1])

    @cached_property
    def x(self) -> Tensor:
        """[tokens, columns], the input of a linear layer of this weight."""
        return self._random((TOKENS, self.shape[1]), 2)

    @cached_property
    def dy(self) -> Tensor:
        """[tokens, rows], the gradient of its output."""
        return self._random((TOKENS, self.shape[0]), 3)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, centred second moment and count of no activations yet."""
        mean, m2 = (self._zeros(self.shape[1], dtype=torch.float64) for _ in range(2))
        return mean, m2, self._zeros(dtype=torch.int64)


def kept_of(units: int) -> int:
    return max(1, int(units * KEPT))


@dataclass(frozen=True)
class Op:
    """What is measured.

    Attributes:
        family: the public op, or "roofline"; a name on the command line stands for all of its family.
        bound: the roofline it is measured against on CPUs: "read", "read_one", "memcpy" or "gemm".
        bytes_moved: bytes that it must move, of a shape and an element size.
        temporaries: tensors of the shape that plain PyTorch holds at once at most, for the memory estimate.
        providers: makes the function of a provider; the last argument is a backend of ours.
        group: columns that have to divide the shape's, if any do.
    """

    name: str
    family: str
    bound: str
    bytes_moved: Callable[[Shape, int], int]
    temporaries: float
    providers: Callable[[Buffers, str, str], Run]
    needs_heads: bool = False

    def bound_on(self, device: torch.device) -> str:
        """On GPUs everything that the memory bounds is measured against the rate of a copy."""
        return self.bound if device.type == "cpu" or self.bound == "gemm" else "copy"


def compiled(function: Callable[..., Any], *arguments: Any) -> Run:
    fast = torch.compile(function, dynamic=False, fullgraph=True)  # whole, or an error: never eager in part
    return lambda: fast(*arguments)


def choose(
    provider: str, plain: Callable[..., Results], arguments: Sequence[Tensor], preallocated: Run, ours: Run
) -> Run:
    """The function of a provider. Buffers that `preallocated` asks for are made when it runs first."""
    if provider == "compile":
        return compiled(plain, *arguments)
    runs = {"eager": lambda: plain(*arguments), "eager_preallocated": preallocated, "ours": ours}
    return runs[provider]


def checks_scores(b: Buffers) -> bool:
    """Whether ours looks for NaN, as by default: not on a GPU, where it would wait for the device."""
    return b.device.type == "cpu"


# ---- unit_importance


def _importance(name: str, dims: Sequence[int]) -> Op:
    def plain(weight: Tensor, grad: Tensor) -> Results:
        saliency = (weight * grad).abs()
        return tuple(saliency.sum(1 - dim) for dim in dims)

    def providers(b: Buffers, provider: str, backend: str) -> Run:
        sets = [UnitSet([b.weight], [b.other], [dim], [1]) for dim in dims]
        check = checks_scores(b)

        def preallocated() -> Results:
            torch.mul(b.weight, b.other, out=b.temporary).abs_()
            scores = (b.row_scores, b.column_scores)
            return tuple(torch.sum(b.temporary, 1 - dim, out=scores[dim]) for dim in dims)

        def ours() -> Results:
            return tuple(unit_importances(sets, check_finite=check, backend=backend))

        return choose(provider, plain, (b.weight, b.other), preallocated, ours)

    def moved(shape: Shape, size: int) -> int:
        return 2 * math.prod(shape) * size

    return Op(f"unit_importance_{name}", "unit_importance", "read", moved, 2, providers)


# ---- gather_units


def head_size(columns: int) -> int | None:
    """Columns of a run, None where they are not two heads of any size or more."""
    return next((size for size in HEAD_SIZES if columns % size == 0 and columns > size), None)


def _gather(name: str, dim: int, *, heads: bool = False) -> Op:
    def kept_elements(shape: Shape) -> int:
        group_size = (head_size(shape[1]) or 1) if heads else 1
        return kept_of(shape[dim] // group_size) * group_size * shape[1 - dim]

    def moved(shape: Shape, size: int) -> int:
        scattered = dim == 1 and not heads  # no line of the source is left out
        read = math.prod(shape) if scattered else kept_elements(shape)
        return (read + kept_elements(shape)) * size

    def providers(b: Buffers, provider: str, backend: str) -> Run:
        rows, columns = b.shape
        group_size = (head_size(columns) or 1) if heads else 1
        keep = b.keep(dim, group_size)
        kept = kept_elements(b.shape)
        out = b.kept(kept // columns, columns) if dim == 0 else b.kept(rows, kept // rows)
        if provider == "ours":
            return lambda: tuple(
                gather_units([b.weight], [dim], [group_size], keep, out=[out], backend=backend)
            )
        # index_select is fastest on whole units: [rows, units, group size]
        source, target = (t.view(t.shape[0], -1, group_size) if heads else t for t in (b.weight, out))
        index = keep.to(b.device)
        if provider == "eager":
            return lambda: (source.index_select(dim, index).view_as(out),)
        if provider == "compile":

            def into(source: Tensor, index: Tensor, target: Tensor) -> None:
                target.copy_(source.index_select(dim, index))

            run = compiled(into, source, index, target)
        else:

            def run() -> Any:
                torch.index_select(source, dim, index, out=target)

        def written() -> Results:
            run()
            return (out,)

        return written

    return Op(f"gather_units_{name}", "gather_units", "memcpy", moved, KEPT, providers, needs_heads=heads)


# ---- residual_similarity


def _similarity(metric: str) -> Op:
    def plain(a: Tensor, b: Tensor) -> Results:
        if metric == "cosine":
            return (torch.nn.functional.cosine_similarity(a, b, dim=-1).mean(),)
        if metric == "euclidean":
            return (torch.linalg.vector_norm(a - b, dim=-1).mean(),)
        return ((a - b).abs().sum(-1).mean(),)

    def providers(b: Buffers, provider: str, backend: str) -> Run:
        def preallocated() -> Results:
            tokens = b.row_scores
            if metric == "cosine":
                torch.mul(b.weight, b.other, out=b.temporary)
                dot = torch.sum(b.temporary, -1, out=tokens)
                norms = [torch.linalg.vector_norm(h, dim=-1).clamp_min_(1e-8) for h in (b.weight, b.other)]
                return ((dot / (norms[0] * norms[1])).mean(),)
            torch.sub(b.weight, b.other, out=b.temporary)
            if metric == "euclidean":
                return (torch.linalg.vector_norm(b.temporary, dim=-1, out=tokens).mean(),)
            return (torch.sum(b.temporary.abs_(), -1, out=tokens).mean(),)

        def ours() -> Results:
            return (residual_similarity(b.weight, b.other, metric, backend=backend),)

        return choose(provider, plain, (b.weight, b.other), preallocated, ours)

    def moved(shape: Shape, size: int) -> int:
        return 2 * math.prod(shape) * size

    return Op(f"residual_similarity_{metric}", "residual_similarity", "read", moved, 3, providers)


# ---- activation_stats


def _merge(mean: Tensor, m2: Tensor, count: Tensor, rows: int, new_mean: Tensor, new_m2: Tensor) -> Results:
    """The batch's statistics into the running ones, in place."""
    delta = new_mean - mean
    share = rows / (count + rows)
    m2 += new_m2 + delta.square() * (share * count)
    mean += delta * share
    count += rows
    return mean, m2


def _plain_stats(x: Tensor, mean: Tensor, m2: Tensor, count: Tensor) -> Results:
    x_mean = x.mean(0, dtype=torch.float32)
    return _merge(mean, m2, count, x.shape[0], x_mean, (x - x_mean).square().sum(0))


def _stats_providers(b: Buffers, provider: str, backend: str) -> Run:
    state = b.statistics()

    def ours() -> Results:
        activation_stats(b.weight, *state, backend=backend)
        return state[:2]

    def preallocated() -> Results:
        values = b.temporary_fp32.copy_(b.weight)
        mean = values.mean(0)
        return _merge(*state, values.shape[0], mean, values.sub_(mean).square_().sum(0))

    return choose(provider, _plain_stats, (b.weight, *state), preallocated, ours)


def _stats_bytes(shape: Shape, size: int) -> int:
    return math.prod(shape) * size


# ---- linear_importance


def _plain_linear(x: Tensor, dy: Tensor, weight: Tensor) -> Results:
    return ((weight * (dy.T @ x)).abs().sum(1),)


def _linear_providers(b: Buffers, provider: str, backend: str) -> Run:
    arguments, check = (b.x, b.dy, b.weight), checks_scores(b)

    def ours() -> Results:
        return (linear_importance(*arguments, 0, check_finite=check, backend=backend),)

    def preallocated() -> Results:
        grad = torch.mm(b.dy.T, b.x, out=b.temporary)
        return (torch.sum(grad.mul_(b.weight).abs_(), 1, out=b.row_scores),)

    return choose(provider, _plain_linear, arguments, preallocated, ours)


def _linear_bytes(shape: Shape, size: int) -> int:
    return (math.prod(shape) + TOKENS * sum(shape)) * size


OPS = (
    _importance("rows", [0]),
    _importance("columns", [1]),
    _importance("both", [0, 1]),
    _gather("rows", 0),
    _gather("columns", 1),
    _gather("runs", 1, heads=True),
    _similarity("cosine"),
    _similarity("euclidean"),
    _similarity("manhattan"),
    Op("activation_stats", "activation_stats", "read_one", _stats_bytes, 3, _stats_providers),
    Op("linear_importance", "linear_importance", "gemm", _linear_bytes, 3, _linear_providers),
)


# ---- what bounds them


@dataclass(frozen=True)
class Roofline:
    """A bound, measured like an op. `bound` is the roofline that its own rate is compared with."""

    name: str
    bound: str
    bytes_moved: int
    run: Callable[[], object]


def rooflines(b: Buffers, ops: Sequence[Op]) -> Iterator[Roofline]:
    """Those that bound the ops, on the same buffers, and the copies and reads that tell more."""
    bounds = {op.bound_on(b.device) for op in ops}
    kept = kept_of(b.shape[0]) * b.shape[1]
    source, target = b.weight.view(-1)[:kept], b._kept[:kept] if bounds & {"memcpy", "copy"} else None
    half = b.weight.numel() // 2
    halves = b.weight.view(-1)[:half], b.weight.view(-1)[half : 2 * half]
    if bounds & {"read", "copy"}:
        own = "read" if b.device.type == "cpu" else "copy"
        yield Roofline("read", own, 2 * b.bytes, lambda: roofline.read_pair(b.weight, b.other))
    if "read" in bounds:
        early = lambda: roofline.read_pair(b.weight, b.other, ahead=True)  # noqa: E731
        yield Roofline("read_ahead", "read", 2 * b.bytes, early)
    if "read_one" in bounds:
        size = 2 * half * b.weight.element_size()
        yield Roofline("read_one", "read_one", size, lambda: roofline.read_pair(*halves))
    if target is not None:
        name = "memcpy" if b.device.type == "cpu" else "copy"
        yield Roofline(name, name, 2 * target.nbytes, lambda: roofline.copy(target, source))
    if target is not None and b.device.type == "cpu":
        stream = lambda: roofline.copy(target, source, streaming=True)  # noqa: E731
        yield Roofline("copy_streaming", "memcpy", 2 * target.nbytes, stream)
    if "gemm" in bounds:
        size = _linear_bytes(b.shape, b.weight.element_size())
        yield Roofline("gemm", "gemm", size, lambda: torch.mm(b.dy.T, b.x, out=b.temporary))
