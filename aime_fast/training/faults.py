"""Values that are not finite: named by `check_tensor`, counted on the device by `Faults`, which reads nothing back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from aime_fast.errors import NonFiniteError


def check_tensor(name: str, tensor: Tensor, step: int | None = None) -> Tensor:
    """Return `tensor` [...] if every element is finite. Waits for the device: for finding a fault, not for the loop.

    Raises:
        NonFiniteError: "latents at step 12: 3 of 960 elements are not finite (2 nan, 1 inf), the first at index (0, 4, 2)".
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    bad = ~torch.isfinite(tensor.detach())
    if count := int(bad.sum()):
        nans = int(torch.isnan(tensor.detach()).sum())
        first = tuple(bad.nonzero()[0].tolist())
        at = "" if step is None else f" at step {step}"
        where = f", the first at index {first} of shape {list(tensor.shape)}" if tensor.dim() else ""
        raise NonFiniteError(
            f"{name}{at}: {count} of {tensor.numel()} elements are not finite ({nans} nan, {count - nans} infinite){where}"
        )
    return tensor


def first_error(terms: Iterable[tuple[str, Tensor]], step: int) -> NonFiniteError | None:
    """The error of the first of the named tensors that is not finite, or None."""
    for name, tensor in terms:
        try:
            check_tensor(name, tensor, step)
        except NonFiniteError as error:
            return error
    return None


class FaultReport(NamedTuple):
    """The state of `Faults`, on the host."""

    skipped: int  # updates not made, since the start of the run
    in_a_row: int  # of them, those since the last that was made
    ago: int  # how many updates ago the first of them since the last report was; 0 is the newest update
    terms: tuple[str, ...]  # what was not finite there, in the order of computation; empty where nothing happened


MAX_SKIPS = 20  # consecutive updates that --on-nan skip may skip: after so many a run does not recover


class Faults:
    """Counts updates that were not made, on the device, and records the bad terms of the first one since the last `read`.

    Args:
        names: scalars that `record` may be given, in the order of computation.
        device: where they are.
    """

    def __init__(self, names: Iterable[str], device: torch.device):
        self.names = tuple(names)
        self._counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("skipped", "in_a_row", "since")}
        self._terms = torch.zeros(len(self.names), dtype=torch.bool, device=device)

    def record(self, checked: dict[str, Tensor]) -> Tensor:
        """One update: scalars by name -> whether all are finite, bool scalar. Waits for nothing."""
        given = [name for name in self.names if name in checked]
        finite_terms = torch.isfinite(torch.stack([checked[name].float() for name in given]))
        finite = finite_terms.all()
        bad = (~finite).long()
        skipped, in_a_row, since = self._counts["skipped"], self._counts["in_a_row"], self._counts["since"]
        skipped += bad
        in_a_row.copy_((in_a_row + 1) * bad)
        known = since > 0  # `since` is 0 until the first fault, then counts updates with that one as 1
        everything = dict(zip(given, (~finite_terms).unbind()))
        nothing = torch.zeros_like(finite)
        terms = torch.stack([everything.get(name, nothing) for name in self.names])
        self._terms.copy_(torch.where(known, self._terms, terms))
        since.copy_(torch.where(known, since + 1, bad))
        return finite

    def read(self) -> FaultReport:
        """What happened since the last `read`. Waits for the device."""
        counts = torch.stack([self._counts[name] for name in ("skipped", "in_a_row", "since")])
        skipped, in_a_row, since, *bad = torch.cat([counts, self._terms.long()]).tolist()
        self._counts["since"].zero_()
        terms = tuple(name for name, is_bad in zip(self.names, bad) if is_bad) if since else ()
        return FaultReport(skipped, in_a_row, max(since - 1, 0), terms)

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, as int64 scalars."""
        return self._counts

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for name, count in self._counts.items():
            count.copy_(state[name])
