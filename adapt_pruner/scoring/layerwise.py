"""A causal LM of which only one part has its weights at a time: the embedding, a decoder layer, or the head.

Each part runs by the model's own forward pass, in which decoder layers let the residual stream through
unchanged: what a layer is called with (masks, positions) is then seen without knowing the architecture.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapt_pruner.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 64 * 2**20  # of the fp32 logits of a chunk


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextlib.contextmanager
    def measure(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


class LayerwiseModel:
    """Parts of a model that does not exist as a whole, and how they run.

    Attributes:
        skeleton: the model in evaluation mode; its parameters have no memory while they are not in use.
        layers: its decoder layers.
        device: where it computes.
        hidden_size: of the residual stream.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        family: Family,
        device: torch.device,
        *,
        read: Callable[[str], Tensor],
        read_rows: Callable[[str, Tensor], Tensor],
    ) -> None:
        """
        Args:
            skeleton: with parameters on the meta device and buffers that are there.
            read: gives a parameter, by its name in the skeleton, on the device.
            read_rows: some rows of one, ascending.
        """
        self.skeleton, self.device, self._read, self._read_rows = skeleton, device, read, read_rows
        layers = skeleton.get_submodule(family.layers_module)
        assert isinstance(layers, nn.ModuleList)
        self.layers = list(layers)
        self._prefixes = [family.layer_prefix.format(layer=i) for i in range(len(self.layers))]
        owner, _, _ = family.layers_module.rpartition(".")
        self._base = skeleton.get_submodule(owner)
        embedding: Any = skeleton.get_input_embeddings()
        head: Any = skeleton.get_output_embeddings()
        self._embedding, self._head, self.hidden_size = embedding, head, int(embedding.embedding_dim)
        embedding.padding_idx = None  # it will have other rows
        self._names = {id(p): name for name, p in skeleton.named_parameters()}  # tied ones have one
        self._embedding_name, self._head_name = (self._names[id(m.weight)] for m in (embedding, head))
        skeleton.requires_grad_(False)
        for module in skeleton.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(device)
        within = f"{family.layers_module}."
        for name in self._names.values():  # the final norm and the like, which are small
            if not name.startswith(within) and name not in (self._embedding_name, self._head_name):
                owner, _, leaf = name.rpartition(".")
                setattr(skeleton.get_submodule(owner), leaf, nn.Parameter(read(name), requires_grad=False))

    def embed(self, batch: Tensor, size: int) -> Iterator[tuple[range, Tensor, list[dict[str, Any]]]]:
        """What goes into the first layer, in micro-batches, and what every layer is called with besides.

        Args:
            batch: [sequences, length] int64 token ids.
            size: sequences of a micro-batch.
        Yields:
            Which sequences, [sequences, length, hidden], and the arguments by layer, which belong to
            micro-batches of as many sequences.
        """
        present, tokens = batch.unique(return_inverse=True)
        weights = {"weight": self._read_rows(self._embedding_name, present.cpu())}
        arguments: dict[int, list[dict[str, Any]]] = {}
        with _filled(self._embedding, weights), torch.no_grad():
            for start in range(0, len(batch), size):
                rows = range(start, min(start + size, len(batch)))
                seen: list[tuple[Tensor, dict[str, Any]]] = []
                with self._bypassed(seen):
                    self._base(input_ids=tokens[rows.start : rows.stop].to(self.device), use_cache=False)
                arguments.setdefault(len(rows), [more for _, more in seen])
                yield rows, seen[0][0], arguments[len(rows)]

    def sweep(self, order: Sequence[int], clock: Clock) -> Iterator[int]:
        """The numbers of layers, each of which has its weights until the next one is asked for.

        The weights of the next layer are read meanwhile, so those of two are in memory at a time.
        """
        device = torch.cuda.current_device() if self.device.type == "cuda" else None

        def start() -> None:
            if device is not None:  # each thread has one of its own
                torch.cuda.set_device(device)

        with ThreadPoolExecutor(1, "read-layer", start) as reading:
            coming = reading.submit(self._read_layer, order[0])
            for layer, following in zip(order, [*order[1:], None], strict=True):
                with clock.measure("read"):
                    weights = coming.result()
                if following is not None:
                    coming = reading.submit(self._read_layer, following)
                else:
                    del coming
                with _filled(self.layers[layer], weights):
                    del weights
                    yield layer
                _return_freed_memory()  # or blocks of earlier layers would add up

    def parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """Those of a layer, by their names in the model."""
        prefix = self._prefixes[layer]
        return {f"{prefix}.{name}": p for name, p in self.layers[layer].named_parameters()}

    @contextlib.contextmanager
    def head(self) -> Iterator[Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor | None]]]:
        """The final norm, the head and the loss, for as long as the head's weight is there: `_loss`."""
        with _filled(self._head, {"weight": self._read(self._head_name)}):
            yield self._loss
        _return_freed_memory()

    def _loss(
        self, hidden: Tensor, sequences: Tensor, labels: int, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of the next tokens as `losses.text_loss` has it, and its gradient, in chunks of tokens.

        Args:
            hidden: [sequences, length, hidden], what comes out of the last layer.
            sequences: [sequences, length] int64.
            labels: what the sum over tokens is divided by.
        Returns:
            A float64 scalar, and the gradient with respect to `hidden`.
        """
        gradient = torch.zeros_like(hidden) if with_gradient else None
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        positions = hidden.shape[1] - 1  # the last one has no label
        fitting = max(1, CHUNK_BYTES // (4 * self._head.weight.shape[0]))
        rows, columns = max(1, fitting // positions), min(positions, fitting)
        for row in range(0, len(hidden), rows):
            for column in range(0, positions, columns):
                part = slice(row, row + rows), slice(column, min(column + columns, positions))
                chunk = hidden[part].detach().requires_grad_(with_gradient)
                targets = sequences[:, 1:][part].contiguous()
                with self._bypassed([]), torch.set_grad_enabled(with_gradient):
                    loss = self.skeleton(
                        inputs_embeds=chunk,
                        labels=targets,
                        shift_labels=targets,
                        num_items_in_batch=labels,
                        use_cache=False,
                    ).loss
                    if gradient is not None:
                        (gradient[part],) = torch.autograd.grad(loss, chunk)
                total += loss.detach().double()
        return total, gradient

    def _read_layer(self, layer: int) -> dict[str, Tensor]:
        prefix = self._prefixes[layer]
        return {name: self._read(f"{prefix}.{name}") for name, _ in self.layers[layer].named_parameters()}

    @contextlib.contextmanager
    def _bypassed(self, seen: list[tuple[Tensor, dict[str, Any]]]) -> Iterator[None]:
        """Every layer gives back what it gets, and adds it to `seen` together with its other arguments."""

        def forward(hidden_states: Tensor, **more: Any) -> Tensor:
            seen.append((hidden_states, more))
            return hidden_states

        for layer in self.layers:
            layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__["forward"]


def run_layer(layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """What a decoder layer makes of the residual stream, [sequences, length, hidden]."""
    output = layer(hidden, **arguments)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@contextlib.contextmanager
def _filled(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters of a module have these values inside the block, and no memory before and after it."""
    empty = {name: module.get_parameter(name) for name in weights}
    _put(module, {name: nn.Parameter(value, requires_grad=False) for name, value in weights.items()})
    del weights
    try:
        yield
    finally:
        _put(module, empty)


def _put(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)


def _return_freed_memory() -> None:
    """Gives what the process has freed back to the system, where glibc would keep it between other blocks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
