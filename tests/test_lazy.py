"""Lazy tensors: every operation gives, range by range, what it gives on the values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iqtorch.errors import UnsupportedOperationError
from iqtorch.lazy import LazyTensor

Operation = Callable[[Tensor, Tensor], Tensor]

#: Operations on two tensors `[6, 4, 8]`.
OPERATIONS: dict[str, Operation] = {
    "detach": lambda a, b: a.detach(),
    "dtype": lambda a, b: a.to(torch.bfloat16),
    "clone": lambda a, b: a.clone(),
    "shift": lambda a, b: a - 1.5,
    "product": lambda a, b: a * b,
    "cat rows": lambda a, b: torch.cat([a, b, a]),
    "cat columns": lambda a, b: torch.cat([a, b], -1),
    "stack": lambda a, b: torch.stack([a, b, b, a]),
    "stack inside": lambda a, b: torch.stack([a, b], 1),
    "transpose": lambda a, b: a.transpose(-1, -2),
    "transpose rows": lambda a, b: a.transpose(0, 1),
    "mT": lambda a, b: a.mT.contiguous(),
    "permute": lambda a, b: a.permute(0, 2, 1),
    "permute rows": lambda a, b: a.permute(2, 0, 1),
    "view": lambda a, b: a.view(6, 32),
    "view rows": lambda a, b: a.reshape(24, 8),
    "unsqueeze": lambda a, b: a.unsqueeze(0),
    "select": lambda a, b: a[-2],
    "select inside": lambda a, b: a[:, 3],
    "slice": lambda a, b: a[2:5],
    "slice from the end": lambda a, b: a[-3:],
    "slice inside": lambda a, b: a[:, 1:3],
    "every second": lambda a, b: a[::2],
    "chunk": lambda a, b: a.chunk(3)[1],
    "chunk inside": lambda a, b: a.chunk(2, 1)[1],
    "split": lambda a, b: a.split([1, 2, 3])[2],
    "index": lambda a, b: a.index_select(0, torch.tensor([5, 0, 0, 3])),
    "index inside": lambda a, b: a.index_select(1, torch.tensor([3, 1])),
    "many": lambda a, b: torch.cat([torch.stack([a[0], b[1]]), a[2:4]], 1).mT.to(torch.float64) + 1,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_ranges_of_a_result(name: str) -> None:
    values = torch.arange(6 * 4 * 8 * 2, dtype=torch.float32).reshape(2, 6, 4, 8)
    asked: list[tuple[int, int]] = []

    def lazy(value: Tensor) -> LazyTensor:
        def read(start: int, stop: int) -> Tensor:
            asked.append((start, stop))
            return value[start:stop]

        return LazyTensor.of(value.shape, value.dtype, read)

    result = OPERATIONS[name](lazy(values[0]), lazy(values[1]))
    expected = OPERATIONS[name](values[0], values[1])
    assert isinstance(result, LazyTensor)
    assert asked == [], "an operation must not read"
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(result.read(), expected)
    rows = expected.shape[0]
    for start in range(rows):
        for stop in range(start, rows + 1):
            made = result.read(start, stop)
            assert torch.equal(made, expected[start:stop])
            assert made.is_contiguous()


def test_a_range_reads_only_what_it_needs() -> None:
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return torch.zeros(stop - start, 8)

    parts = [LazyTensor.of((4, 8), torch.float32, read) for _ in range(3)]
    experts = torch.cat([torch.stack(parts), torch.stack(parts)], 1).mT
    assert isinstance(experts, LazyTensor) and experts.sliceable
    experts.read(1, 2)
    assert asked == [(0, 4), (0, 4)]
    assert not torch.cat(parts).mT.sliceable


def test_scalars_parameters_and_refusals() -> None:
    scalar = LazyTensor.of((), torch.float32, lambda start, stop: torch.tensor(3.0))
    assert scalar.detach().read().item() == 3.0
    parameter = torch.nn.Parameter(LazyTensor.of((2,), torch.float32, lambda start, stop: torch.ones(stop - start)))
    assert isinstance(parameter, LazyTensor) and isinstance(parameter, torch.nn.Parameter)
    assert "LazyTensor(shape=(2,)" in repr(parameter)
    with pytest.raises(UnsupportedOperationError, match="still in a file"), torch.no_grad():
        parameter.zero_()
    wrong = LazyTensor.of((4,), torch.float32, lambda start, stop: torch.ones(7))
    with pytest.raises(RuntimeError, match=r"lazy rows 0:4 are torch.float32 \[7\], expected torch.float32 \[4\]"):
        wrong.read()
