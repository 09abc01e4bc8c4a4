"""What a product with a packed weight costs beside its arithmetic: microseconds per call for a 64 x 256 matrix, one row, one thread.

    python benchmarks/overhead.py --csv benchmarks/results/overhead.csv

Eager calls are timed one by one, compiled ones as a model of `--layers` layers (every one with weights of its own), divided by
their number. The plain and the packed variant of a row take turns in one run; figures are medians over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import results_file
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iqtorch

N, K = 64, 256
COLUMNS = ("way", "dtype", "plain_us", "packed_us", "extra_us")
GUARDS = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
OPTIONS: dict[str, dict[str, Any]] = {
    "compiled": {},
    "compiled, no module guards": GUARDS,
    "compiled, cpp_wrapper": {"cpp_wrapper": True},
    "compiled, cpp_wrapper, no module guards": {"cpp_wrapper": True, **GUARDS},
}


class Layers(nn.Module):
    """Linear layers that all read the same activations."""

    def __init__(self, count: int, packed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, N, bias=False) for _ in range(count))
        if packed:
            iqtorch.quantize_model(self, iqtorch.Recipe.pure("iq2_kl"), speed="fast", progress=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def compiled(model: Layers, options: dict[str, Any], name: str) -> Callable[[Tensor], list[Tensor]]:
    """A compiled model; its code is its own, for compiled variants of one code object are searched one after the other."""
    code = Layers.forward.__code__.replace(co_name=name)
    forward = types.MethodType(types.FunctionType(code, globals(), name), model)
    return torch.compile(forward, fullgraph=True, options=dict(options))


def rows(layers: int, dtype: torch.dtype) -> Iterator[tuple[str, int, Callable[[], object], Callable[[], object]]]:
    """Ways of calling: a name, products per call, and the calls for the plain and the packed weight."""
    x = torch.randn(1, K, dtype=dtype)
    plain, packed = Layers(layers, False, dtype), Layers(layers, True, dtype)
    dense, weight = plain.layers[0].weight, packed.layers[0].weight
    kind, inner = weight.format.ggml_type, weight.packed
    op = torch.ops.iqtorch_cpu.linear.default
    yield "F.linear", 1, lambda: F.linear(x, dense), lambda: F.linear(x, weight)
    yield "operator alone", 1, lambda: F.linear(x, dense), lambda: op(x, inner, kind, N, None, 1)
    yield "layer", layers, lambda: plain(x), lambda: packed(x)
    for i, (name, options) in enumerate(OPTIONS.items()):
        first, second = compiled(plain, options, f"plain{i}"), compiled(packed, options, f"packed{i}")
        for a, b in zip(second(x), packed(x)):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        first(x)
        yield name, layers, lambda f=first: f(x), lambda f=second: f(x)


def microseconds(call: Callable[[], object], products: int) -> float:
    """Of one product; a turn takes some five milliseconds."""
    count = max(1, 1000 // products)
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count / products * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--csv", type=Path, help="file to write; a header of comment lines describes the machine")
    args = parser.parse_args()

    torch.set_num_threads(1)
    header = results_file.machine(1)
    print("\n".join(header))
    found = []
    with torch.no_grad():
        for name, products, plain, packed in rows(args.layers, getattr(torch, args.dtype)):
            times = [(microseconds(plain, products), microseconds(packed, products)) for _ in range(args.turns + 1)][1:]
            one, other = (statistics.median(column) for column in zip(*times))
            extra = statistics.median(b - a for a, b in times)
            found.append((name, args.dtype, round(one, 2), round(other, 2), round(extra, 2)))
            results_file.show(COLUMNS, found[-1])
    if args.csv:
        results_file.write(args.csv, header, COLUMNS, found)


if __name__ == "__main__":
    main()
