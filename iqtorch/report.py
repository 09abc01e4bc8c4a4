"""`report`: what every parameter of a model is stored as, and why."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn

from .model import ASKED, NOTES
from .tensor import IQTensor


@dataclass(frozen=True)
class Row:
    """One parameter: name, shape, format name or dtype, bits per weight, canonical bytes, and the reason."""

    name: str
    shape: tuple[int, ...]
    format: str
    bits_per_weight: float
    nbytes: int
    reason: str
    packed: bool

    @property
    def matrix(self) -> bool:
        """Whether it is one, or one for each expert; the biases of all experts (`[E, N]`) are none."""
        return len(self.shape) >= 2 and not self.name.endswith("bias")


@dataclass(frozen=True)
class Report:
    """What `report` returns; `str(report)` is the table.

    Attributes:
        rows: one per parameter; tied parameters count once.
    """

    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Number of weights of all parameters."""
        return sum(_count(row) for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as stored (canonical bytes for packed ones)."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Mean over all parameters."""
        return 8 * self.nbytes / max(1, self.parameters)

    @property
    def packed_fraction(self) -> float:
        """Share of the weights in matrices (two dimensions or more) that is packed."""
        matrices = [row for row in self.rows if row.matrix]
        return sum(_count(row) for row in matrices if row.packed) / max(1, sum(_count(row) for row in matrices))

    def __str__(self) -> str:
        header = ("parameter", "shape", "format", "bpw", "KiB", "reason")
        lines = [
            (row.name, "x".join(map(str, row.shape)), row.format, f"{row.bits_per_weight:.3f}", f"{row.nbytes / 1024:.1f}", row.reason)
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        right = {3, 4}

        def show(line: tuple[str, ...]) -> str:
            return "  ".join(t.rjust(w) if i in right else t.ljust(w) for i, (t, w) in enumerate(zip(line, widths, strict=True))).rstrip()

        total = (
            f"{self.parameters:,} weights, {self.nbytes / 2**20:.2f} MiB, {self.bits_per_weight:.3f} bits per weight; "
            f"{100 * self.packed_fraction:.1f} % of the weights in matrices are packed"
        )
        return "\n".join([show(header), show(tuple("-" * w for w in widths)), *map(show, lines), total])


def _count(row: Row) -> int:
    count = 1
    for size in row.shape:
        count *= size
    return count


def report(model: nn.Module) -> Report:
    """A table of a model's parameters: format, bits per weight, bytes, and why each was kept, substituted or chosen.

    Args:
        model: any model; what `quantize_model` noted about it is shown as the reason.

    Returns:
        A `Report`; print it, or read its `rows` and totals.
    """
    notes: dict[str, str] = getattr(model, NOTES, {})
    rows = []
    for name, parameter in model.named_parameters():
        if isinstance(parameter, IQTensor):
            nbytes = parameter.shape.numel() // parameter.k * parameter.format.row_bytes(parameter.k)
            stored, bpw = parameter.format.name, parameter.bits_per_weight
        else:
            nbytes = parameter.numel() * parameter.element_size()
            stored, bpw = str(parameter.dtype).removeprefix("torch."), 8.0 * parameter.element_size()
        rows.append(Row(name, tuple(parameter.shape), stored, bpw, nbytes, notes.get(name, ""), isinstance(parameter, IQTensor)))
    return Report(tuple(rows))


#: Share of the weights in matrices that must be packed, those apart that the caller asked to keep.
EXPECTED = 0.99


def warn_if_kept(model: nn.Module, stacklevel: int = 3) -> None:
    """Warns if more than one in a hundred weights in matrices was kept that nobody asked to keep."""
    rows = [row for row in report(model).rows if row.matrix and (row.packed or not row.reason.startswith(ASKED))]
    kept = sorted((row for row in rows if not row.packed), key=_count, reverse=True)
    total = max(1, sum(map(_count, rows)))
    packed = 1 - sum(map(_count, kept)) / total
    if packed < EXPECTED:
        largest = "; ".join(f"{row.name} ({100 * _count(row) / total:.1f} %: {row.reason or 'not looked at'})" for row in kept[:3])
        warnings.warn(
            f"only {100 * packed:.1f} % of the weights in this model's matrices are packed. The largest that are kept: {largest}. "
            "print(iqtorch.report(model)) lists them all; skip=[...] tells that this is wanted",
            stacklevel=stacklevel,
        )
