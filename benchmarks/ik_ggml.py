"""Matrix products of a locally built ik_llama.cpp, through the public C interface of its shared `libggml`.

Built with `cmake -B build -DBUILD_SHARED_LIBS=ON` and `cmake --build build --target ggml`; for a build
restricted to AVX2 add `-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DCMAKE_CXX_FLAGS=-mbmi2`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

F32 = 0  # ggml's type id
_POINTER, _SIZE, _INT64, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool)]


class Library:
    """The functions used here of one `libggml`.

    Args:
        path: the library, or a build directory that contains it.
        threads: number of threads of products.
    """

    def __init__(self, path: Path, threads: int) -> None:
        found = [path] if path.is_file() else sorted(path.rglob("libggml.so"))
        if not found:
            raise FileNotFoundError(f"no libggml.so in {path}: build ik_llama.cpp with -DBUILD_SHARED_LIBS=ON")
        self.dll = ctypes.CDLL(str(found[0]))
        for name, result, *arguments in (
            ("ggml_init", _POINTER, _InitParams),
            ("ggml_free", None, _POINTER),
            ("ggml_new_tensor_2d", _POINTER, _POINTER, _INT, _INT64, _INT64),
            ("ggml_mul_mat", _POINTER, _POINTER, _POINTER, _POINTER),
            ("ggml_get_data", _POINTER, _POINTER),
            ("ggml_nbytes", _SIZE, _POINTER),
            ("ggml_new_graph", _POINTER, _POINTER),
            ("ggml_build_forward_expand", None, _POINTER, _POINTER),
            ("ggml_backend_cpu_init", _POINTER),
            ("ggml_backend_cpu_set_n_threads", None, _POINTER, _INT),
            ("ggml_backend_graph_compute", _INT, _POINTER, _POINTER),
        ):
            function = getattr(self.dll, name)
            function.restype, function.argtypes = result, arguments
        self.backend = self.dll.ggml_backend_cpu_init()
        self.dll.ggml_backend_cpu_set_n_threads(self.backend, threads)


class Matrices:
    """`count` copies of one matrix in memory of their own, and products with them.

    Args:
        blocks: canonical bytes, uint8 `[N, row_bytes]`.
        ggml_type: type id of the format.
        k: columns.
    """

    def __init__(self, library: Library, blocks: Tensor, ggml_type: int, k: int, count: int) -> None:
        self.library, self.n, self.k = library, blocks.shape[0], k
        dll = library.dll
        self.context = dll.ggml_init(_InitParams(count * (blocks.nbytes + 4096) + (1 << 20), None, False))
        self.weights = [dll.ggml_new_tensor_2d(self.context, ggml_type, k, self.n) for _ in range(count)]
        for weight in self.weights:
            if dll.ggml_nbytes(weight) != blocks.nbytes:
                raise ValueError(
                    f"ggml type {ggml_type} has {dll.ggml_nbytes(weight)} bytes for {self.n} x {k} weights, got {blocks.nbytes}"
                )
            ctypes.memmove(dll.ggml_get_data(weight), blocks.data_ptr(), blocks.nbytes)

    def close(self) -> None:
        """Frees the weights."""
        self.library.dll.ggml_free(self.context)


class Products:
    """Products of float32 activations `[M, K]` with each of `matrices`."""

    def __init__(self, matrices: Matrices, x: Tensor) -> None:
        self.matrices, self.m = matrices, x.shape[0]
        dll, n = matrices.library.dll, matrices.n
        graphs = len(matrices.weights)
        self.context = dll.ggml_init(_InitParams(x.nbytes + graphs * (4 * self.m * n + (1 << 18)) + (1 << 22), None, False))
        inputs = dll.ggml_new_tensor_2d(self.context, F32, matrices.k, self.m)
        ctypes.memmove(dll.ggml_get_data(inputs), x.contiguous().data_ptr(), x.nbytes)
        self.graphs: list[int] = []
        self.results: list[int] = []
        for weight in matrices.weights:
            result = dll.ggml_mul_mat(self.context, weight, inputs)
            graph = dll.ggml_new_graph(self.context)
            dll.ggml_build_forward_expand(graph, result)
            self.results.append(result)
            self.graphs.append(graph)

    def run(self, which: int) -> None:
        """Multiplies by matrix `which`."""
        library = self.matrices.library
        status = library.dll.ggml_backend_graph_compute(library.backend, self.graphs[which])
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def result(self, which: int) -> Tensor:
        """What `run(which)` computed: float32 `[M, N]`."""
        out = torch.empty(self.m, self.matrices.n)
        ctypes.memmove(out.data_ptr(), self.matrices.library.dll.ggml_get_data(self.results[which]), out.nbytes)
        return out

    def close(self) -> None:
        """Frees graphs and results."""
        self.matrices.library.dll.ggml_free(self.context)
