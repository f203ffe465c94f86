"""Arena: many parameters side by side in one flat buffer, so that an optimizer or an average is one kernel instead of hundreds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from aime_fast.runtime import streams
from aime_fast.runtime.spans import span

ALIGNMENT = 32  # elements: each parameter begins on a boundary of 128 bytes, for vector loads


class Arena:
    """Parameters whose memory is one flat tensor; the parameters themselves become views of it, values and layouts unchanged.

    A parameter's memory layout does not change (channels-last weights stay so): `flatten` brings gradients of any layout into the same
    order. The padding between parameters stays zero. Move a model to its device before its arena is made, not after.

    Args:
        parameters: of one dtype and device, dense (no expanded or sliced tensors).

    Attributes:
        parameters: in the order given.
        flat: [P], P being the number of elements with padding.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self._orders = [memory_order(p) for p in self.parameters]
        self._padding = [-p.numel() % ALIGNMENT for p in self.parameters]
        like = self.parameters[0]
        self.flat = torch.zeros(
            sum(p.numel() + pad for p, pad in zip(self.parameters, self._padding)), dtype=like.dtype, device=like.device
        )
        for parameter, view in zip(self.parameters, self.split(self.flat)):
            view.copy_(parameter.detach())
            parameter.data = view

    def part(self, chosen: slice) -> Arena:
        """Parameters that lie side by side as an arena of their own, in the same memory."""
        part = copy.copy(self)
        part.parameters, part._orders, part._padding = self.parameters[chosen], self._orders[chosen], self._padding[chosen]
        part.flat = self.flat[self.extent(chosen)]
        return part

    def extent(self, chosen: slice) -> slice:
        """Where parameters that lie side by side are in a flat tensor [P], padding included."""
        begin = chosen.indices(len(self.parameters))[0]
        first, size = (
            sum(p.numel() + padding for p, padding in zip(self.parameters[part], self._padding[part])) for part in (slice(begin), chosen)
        )
        return slice(first, first + size)

    def split(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor [P] that belong to the parameters, as views in their shapes and layouts."""
        views, offset = [], flat.storage_offset()
        for parameter, padding in zip(self.parameters, self._padding):
            views.append(flat.as_strided(parameter.shape, parameter.stride(), offset))
            offset += parameter.numel() + padding
        return views

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One tensor a parameter, of its shape -> flat [P]; None counts as zero."""
        like, pieces = self.flat, []
        for tensor, parameter, order, padding in zip(tensors, self.parameters, self._orders, self._padding):
            missing = padding
            if tensor is None:
                missing += parameter.numel()
            else:
                pieces.append(tensor.permute(order).reshape(-1).to(like.dtype))
            if missing:
                pieces.append(like.new_zeros(missing))
        return torch.cat(pieces)


class GradientRows:
    """Gradients of several losses over the parameters of an arena: [n, P], a row for each loss.

    Eager code reuses one buffer from step to step; compiled code makes new rows, since writing into slices of a buffer would copy all of
    it.

    Args:
        arena: the parameters.
        losses: n.
    """

    def __init__(self, arena: Arena, losses: int):
        self.arena = arena
        self.losses = losses
        self._flat: Tensor | None = None
        self._views: list[list[Tensor]] = []

    def zeros(self) -> Tensor:
        """New rows [n, P] to add to."""
        return self.arena.flat.new_zeros(self.losses, self.arena.flat.numel())

    def gather(
        self,
        losses: dict[str, Tensor],
        before: Tensor | None = None,
        share: float = 1.0,
        beside: Mapping[str, str | None] | None = None,
        complete: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Gradients of scalar losses of one graph -> [n, P], zero where a loss does not depend on a parameter.

        Frees what the last loss depends on; the rest of the graph goes with the losses. With side streams all of it does, once they have
        joined.

        Args:
            losses: by name, in the order of the rows.
            before: rows to add to, as an earlier `gather` returned them; they are overwritten.
            share: factor of the gradients.
            beside: the side stream of each loss, or None, in the order in which to begin; all join at the end. None: there are none.
            complete: called as soon as a row is made, on the stream of its loss, with the part of it, a view [P'], from the first parameter
                that the loss depends on to the last; the rest is zero where the losses of `before` depended on the same ones. Not where
                there is none, and never in compiled code.
        """
        beside = dict.fromkeys(losses) if beside is None else beside
        order = list(beside)
        last = next((name for name in reversed(order) if losses[name].requires_grad), None)
        if torch.compiler.is_compiling():
            found = {name: self.arena.flatten(self._differentiate(losses[name], share, name != last)) for name in order}
            rows = torch.stack([found[name] for name in losses])
            return rows if before is None else before + rows
        if self._flat is None:
            self._flat = self.zeros()
            self._views = [self.arena.split(row) for row in self._flat]
        rows = {name: i for i, name in enumerate(losses)}
        streams.fork(*beside.values())
        for name in order:
            with span(f"step: backward {name}"), streams.on(beside[name]):
                gradients = self._differentiate(losses[name], share, name != last or streams.has_side_streams())
                streams.record([gradient for gradient in gradients if gradient is not None])
                self._add(rows[name], gradients, before is None)
                if complete is not None and (part := self._reached_part(rows[name], gradients)) is not None:
                    complete(part)
        streams.join(*beside.values())
        return self._flat

    def _differentiate(self, loss: Tensor, share: float, keep: bool) -> Sequence[Tensor | None]:
        """Gradients of `share` of a loss for the parameters, None where there is none; the graph is freed unless `keep`."""
        if not loss.requires_grad:
            return [None] * len(self.arena.parameters)
        loss = loss if share == 1 else loss * share  # a product with 1 would be a kernel
        return torch.autograd.grad(loss, self.arena.parameters, retain_graph=keep, allow_unused=True)

    def _add(self, row: int, gradients: Sequence[Tensor | None], overwrite: bool) -> None:
        if overwrite:
            self._flat[row].zero_()
        reached = [(view, gradient) for view, gradient in zip(self._views[row], gradients) if gradient is not None]
        # Apart: one gradient of another layout would make a kernel of each.
        for alike in (True, False):
            pairs = [(view, gradient) for view, gradient in reached if (view.stride() == gradient.stride()) == alike]
            if pairs:
                torch._foreach_add_([view for view, _ in pairs], [gradient for _, gradient in pairs])

    def _reached_part(self, row: int, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """The part of a row, a view, from the first parameter with a gradient to the last."""
        reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if not reached:
            return None
        return self._flat[row, self.arena.extent(slice(reached[0], reached[-1] + 1))]


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The axes of a dense tensor [...], slowest in memory first. Raises ValueError if its memory has gaps or overlaps."""
    order = tuple(sorted(range(tensor.dim()), key=lambda axis: (-tensor.stride(axis), axis)))
    if not tensor.permute(order).is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense; make it contiguous first")
    return order
