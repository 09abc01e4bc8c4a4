"""What the host does around the Triton kernels: which kernel, how often it compiles, tuned choices. No GPU, no kernel runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has no signatures", allow_module_level=True)

from torch._subclasses.fake_tensor import FakeTensorMode

from iqtorch import kernels, ops
from iqtorch.errors import KernelUnavailableError, UnsupportedOperationError
from iqtorch.formats import get_format
from iqtorch.kernels import choices, launch, library, matrix, routed, tuning, vector
from iqtorch.kernels.layout import layout

H200 = choices.Device(132, True)


class Recorder:
    """Takes the place of a kernel: notes what Triton would compile for the arguments of each launch, and the grid."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.keys: set[tuple[Any, ...]] = set()
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            values = dict(zip(self.kernel.arg_names, args, strict=False)) | options
            parts: list[Any] = []
            for parameter in self.kernel.params:
                value = values.pop(parameter.name)
                if parameter.is_constexpr or value is None:
                    parts.append(value)
                elif isinstance(value, Tensor):
                    parts.append((value.dtype, value.storage_offset() * value.itemsize % 16 == 0))
                elif parameter.do_not_specialize:
                    parts.append("int" if -(1 << 31) <= value < 1 << 31 else "long")
                else:
                    parts.append((value == 1, value % 16 == 0))
            self.keys.add((*parts, *sorted(values.items())))
            self.grids.append(grid)

        return run


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    made = {}
    for module, names in ((vector, ("gemv",)), (matrix, ("stage", "gemm", "combine", "dequantize")), (routed, ("gated", "weighted"))):
        for name in names:
            made[name] = Recorder(getattr(module, name))
            monkeypatch.setattr(module, name, made[name])
    monkeypatch.setattr(launch, "device_facts", lambda device: H200)
    return made


def packed(name: str, rows: int, k: int, *experts: int) -> Tensor:
    return torch.zeros((*experts, layout(get_format(name)).packed_bytes(rows, k)), dtype=torch.uint8)


BUCKETS = [
    (1,),
    (2,),
    (3, 4),
    range(5, 17),
    range(17, 33),
    range(33, 65),
    range(65, 129),
    range(129, 257),
    range(257, 513),
    range(513, 1025),
]


@pytest.mark.parametrize("rows", [512, 8192])
@pytest.mark.parametrize("name", ["iq2_kl", "iq4_kt"])
def test_no_number_of_tokens_compiles_again_inside_a_bucket(recorded: dict[str, Recorder], name: str, rows: int) -> None:
    data, kind = packed(name, rows, 1024), get_format(name).ggml_type
    for bucket in BUCKETS:
        for recorder in recorded.values():
            recorder.keys.clear()
        for tokens in {*bucket[:2], *bucket[-2:], bucket[len(bucket) // 2]}:
            launch.linear(torch.empty(tokens, 1024, dtype=torch.bfloat16), data, kind, rows, None, 1)
        counts = {kernel: len(recorder.keys) for kernel, recorder in recorded.items() if recorder.keys}
        assert counts and all(count == 1 for count in counts.values()), (bucket, counts)


def test_kernels_of_a_decoding_model_compile_once(recorded: dict[str, Recorder]) -> None:
    """Every matrix of a Llama-8B-shaped model, one to four tokens: as many kernels as shapes make different tiles, not more."""
    for rows, k in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]:
        data = packed("iq2_kl", rows, k)
        for tokens in (1, 2, 3, 4):
            launch.linear(torch.empty(tokens, k, dtype=torch.bfloat16), data, get_format("iq2_kl").ggml_type, rows, None, 1)
    # 1 and 2 tokens, times three tiles: short and long rows, and a matrix of few rows
    assert len(recorded["gemv"].keys) <= 6


def test_routing_is_not_seen_by_the_host(recorded: dict[str, Recorder]) -> None:
    """Under fake tensors, reading a value or allocating by one is an error: launches depend on shapes alone."""
    fmt, experts = get_format("iq2_kl"), 16
    kind, plan = fmt.ggml_type, layout(fmt)
    plan.tables(torch.device("cpu"))
    for tokens in (2, 9, 400):
        grids: list[Any] = []
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(tokens, 512, dtype=torch.bfloat16)
            data = torch.empty(experts, plan.packed_bytes(64, 512), dtype=torch.uint8)
            ids = torch.empty(tokens, 4, dtype=torch.int64)
            launch.linear(x, data[0], kind, 64, None, 1)
            launch.grouped_linear(x, data, torch.empty(experts, dtype=torch.int64), kind, 64, 1)
            launch.routed_linear(x, data, ids, kind, 64, 1)
            h = routed.routed_gated(x, data, ids, kind, 64, "silu", 1)
            assert h.shape == (tokens, 4, 32)
            inner = torch.empty(tokens, 4, 512, dtype=torch.bfloat16)
            out = routed.routed_weighted(inner, data, ids, torch.empty(tokens, 4), kind, 64, 1)
            assert out.shape == (tokens, 64)
        grids += [recorder.grids[-1] for recorder in recorded.values() if recorder.grids]
        assert all(isinstance(n, int) for grid in grids for n in grid)


def test_operands_on_other_devices_are_refused(recorded: dict[str, Recorder]) -> None:
    """By every operator, before any kernel: a message that names what is where."""
    fmt, data = get_format("iq2_kl"), packed("iq2_kl", 64, 512, 4)
    kind, x, far = fmt.ggml_type, torch.zeros(2, 512), torch.device("meta")
    ids, mix = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    for what, call in (
        ("activations", lambda: launch.linear(x.to(far), data[0], kind, 64, None, 1)),
        ("activations", lambda: launch.linear(x, data[0].to(far), kind, 64, None, 1)),
        ("biases", lambda: launch.linear(x, data[0], kind, 64, torch.zeros(64, device=far), 1)),
        ("gradients", lambda: launch.linear_transposed(torch.zeros(2, 64, device=far), data[0], kind, 512)),
        ("ids", lambda: launch.embedding(torch.zeros(1, dtype=torch.int64, device=far), data[0], kind, 64, 512, torch.float32)),
        ("offsets", lambda: launch.grouped_linear(x, data, torch.zeros(4, dtype=torch.int32, device=far), kind, 64, 1)),
        ("expert ids", lambda: launch.routed_linear(x, data, ids.to(far), kind, 64, 1)),
        ("expert ids", lambda: routed.routed_gated(x, data, ids.to(far), kind, 64, "silu", 1)),
        ("routing weights", lambda: routed.routed_weighted(x[:, None], data, ids, mix.to(far), kind, 64, 1)),
    ):
        with pytest.raises(UnsupportedOperationError, match=f"{what} are on .*meta|{what} are on cpu, the packed weight is on meta"):
            call()
    assert not any(recorder.grids for recorder in recorded.values())


def arguments(operator: str, data: Tensor) -> tuple[Any, ...]:
    """Of an operator, for experts `data` of 64 x 512 in iq2_kl."""
    kind, x, ids = get_format("iq2_kl").ggml_type, torch.zeros(2, 512), torch.zeros(2, 1, dtype=torch.int64)
    return {
        "linear": (x, data[0], kind, 64, None, 1),
        "linear_many": (x, [data[0]], [kind], [64], [None], 1),
        "linear_transposed": (torch.zeros(2, 64), data[0], kind, 512),
        "dequantize": (data, kind, 64, 512, 0),
        "embedding": (ids, data[0], kind, 64, 512, 0),
        "grouped_linear": (x, data, torch.zeros(4, dtype=torch.int32), kind, 64, 1),
        "routed_linear": (x, data, ids, kind, 64, 1),
        "routed_gated": (x, data, ids, kind, 64, "silu", 1),
        "routed_weighted": (x[:, None], data, ids, torch.ones(2, 1), kind, 64, 1),
    }[operator]


@pytest.mark.parametrize("operator", library._OPERATORS)
def test_processor_tensors_are_refused_by_gpu_operators(operator: str) -> None:
    """By name, with what to do; nothing falls back in silence."""
    with pytest.raises(UnsupportedOperationError, match=rf"iqtorch_triton::{operator} computes on cuda, its tensors are on cpu; move"):
        getattr(torch.ops.iqtorch_triton, operator)(*arguments(operator, packed("iq2_kl", 64, 512, 4)))


@pytest.mark.parametrize("operator", ["linear", "linear_many", "linear_transposed", "dequantize", "embedding", "grouped_linear"])
def test_gpu_tensors_are_refused_by_processor_operators(operator: str) -> None:
    """What the dispatcher calls for tensors of a GPU, called as it does, without the GPU."""
    from iqtorch import cpu_ext

    if cpu_ext._unavailable is not None:
        pytest.skip(cpu_ext._unavailable)
    of_gpus = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    call = getattr(torch.ops.iqtorch_cpu, operator).default
    with pytest.raises(UnsupportedOperationError, match=rf"iqtorch_cpu::{operator} computes on cpu, its tensors are on .*; move"):
        call.redispatch(of_gpus, *arguments(operator, packed("iq2_kl", 64, 512, 4).to("meta")))


def test_a_card_that_is_too_old_falls_back_visibly(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Plain torch, a line in the log, and an entry in `kernel_info`; a forced backend refuses."""
    fmt, cuda = get_format("iq2_kl"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Tesla T4")
    monkeypatch.setattr(ops, "_fallbacks", {})
    kernels._unusable.cache_clear()
    try:
        with caplog.at_level("WARNING", logger="iqtorch"):
            assert ops.choose_backend(fmt, 64, 512, cuda) == "torch"
        info = ops.kernel_info()
        reason = info["backends"]["triton"]
        assert reason.startswith("Tesla T4 (cuda:0) has compute capability 7.5, the kernels need 8.0")
        assert reason in caplog.text
        assert {"format": "iq2_kl", "backend": "triton", "reason": reason} in info["fallbacks"]
        monkeypatch.setattr(ops, "_forced", "triton")
        with pytest.raises(KernelUnavailableError, match="Tesla T4"):
            ops.choose_backend(fmt, 64, 512, cuda)
    finally:
        kernels._unusable.cache_clear()


def test_pairs_of_tokens_and_experts_compile_by_powers_of_two(recorded: dict[str, Recorder]) -> None:
    fmt = get_format("iq4_ks")
    data = packed("iq4_ks", 256, 256, 8)
    for tokens in range(5, 9):
        x, ids = torch.empty(tokens, 256, dtype=torch.bfloat16), torch.zeros(tokens, 4, dtype=torch.int64)
        h = routed.routed_gated(x, data, ids, fmt.ggml_type, 256, "silu", 1)
        assert h.shape == (tokens, 4, 128)
    assert len(recorded["gated"].keys) == 1


def test_tuned_choices_replace_the_closed_forms(recorded: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, k = 512, 1024
    names = {
        launch.key("gemv", "iq2_kl", rows, k, 2, 1): {"rows": 2, "passes": 1, "runs": 64, "warps": 2},
        launch.key("gemm", "iq2_kl", rows, k, 16): {"split": 2, "stages": 4},
        launch.key("large", "iq2_kl", rows, k, 0): {"above": 256},
    }
    monkeypatch.setenv("IQTORCH_TUNING", str(tmp_path))
    path = tuning.tuning_path("NVIDIA H200")
    assert path.name == "triton-nvidia-h200.json"
    tuning.write(path, "NVIDIA H200", names)
    tuning.write(path, "NVIDIA H200", {})  # keeps what is there
    facts = choices.Device(132, True, choices.load_tuned("NVIDIA H200"))
    monkeypatch.setattr(launch, "device_facts", lambda device: facts)
    data, kind = packed("iq2_kl", rows, k), get_format("iq2_kl").ggml_type
    launch.linear(torch.empty(2, k, dtype=torch.bfloat16), data, kind, rows, None, 1)
    assert recorded["gemv"].grids[-1] == (256, 1, 1)
    launch.linear(torch.empty(9, k, dtype=torch.bfloat16), data, kind, rows, None, 1)
    assert recorded["gemm"].grids[-1] == (8, 1, 2)
    launch.linear(torch.empty(300, k, dtype=torch.bfloat16), data, kind, rows, None, 1)
    assert len(recorded["gemm"].grids) == 1 and recorded["dequantize"].grids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "not of version 1"),
        ({"card": "NVIDIA A100"}, "made on 'NVIDIA A100'"),
        ({"choices": []}, "no table of choices"),
        ({"choices": {"gemv iq2_kl 8x256 tokens 1 digits 1": {"rows": 3}}}, "may choose"),
        ({"choices": {"gemv iq2_kl 8x256 tokens 1 digits 1": {"split": 1}}}, "may choose"),
        ({"choices": {"other": {"rows": 2}}}, "may choose"),
        (None, "cannot be read as JSON"),
    ],
)
def test_a_damaged_tuning_file_is_refused_by_name(
    change: dict[str, Any] | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("IQTORCH_TUNING", str(tmp_path))
    path = tuning.tuning_path("NVIDIA H200")
    good = {"version": 1, "card": "NVIDIA H200", "choices": {}}
    path.write_text("{" if change is None else json.dumps({**good, **change}))
    with pytest.raises(tuning.TuningError, match=message):
        tuning.read(path, "NVIDIA H200")
    with caplog.at_level("WARNING", logger="iqtorch"):
        assert choices.load_tuned("NVIDIA H200") == {}
    assert message in caplog.text and "iqtorch bench --tune" in caplog.text


def test_tuning_measures_and_writes(recorded: dict[str, Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of `tune` on the CPU, with kernels that do nothing and a clock that prefers one tile."""
    from iqtorch.kernels import timing

    monkeypatch.setattr(choices.device_facts, "cache_clear", lambda: None, raising=False)
    monkeypatch.setattr(launch, "device_facts", type("Facts", (), {"__call__": lambda self, d: H200, "cache_clear": lambda self: None})())

    def clock(call: Callable[[int], object], copies: int, device: torch.device) -> float:
        call(copies - 1)
        option = next(iter((launch.override or {"": {}}).values()))
        return {8: 50.0}.get(option.get("warps", 0), 100.0) - option.get("split", 1)

    monkeypatch.setattr(timing, "microseconds", clock)
    lines: list[str] = []
    if not torch.cuda.is_available():
        with pytest.raises(KernelUnavailableError, match="no CUDA or ROCm device"):
            tuning.tune(["iq2_kl"], [(64, 512)])
    monkeypatch.setattr("iqtorch.kernels.supports", lambda *a: None)
    path = tuning.tune(["iq2_kl"], [(64, 512)], "cpu", tmp_path / "t.json", lines.append)
    found = tuning.read(path, "cpu")
    assert found[launch.key("gemv", "iq2_kl", 64, 512, 2, 2)]["warps"] == 8
    assert found[launch.key("gemm", "iq2_kl", 64, 512, 64)]["split"] == 8
    assert found[launch.key("large", "iq2_kl", 64, 512, 0)] == {"above": 2048}
    assert launch.override is None and any("dequantized above" in line for line in lines)


def test_grids_are_none_that_cuda_refuses(recorded: dict[str, Recorder]) -> None:
    """The second and third axis of a grid have 65535 programs at most: many rows, many tokens."""
    fmt = get_format("iq2_kl")
    kind, tokens, rows = fmt.ggml_type, 70001, 300000
    x = torch.empty(tokens, 256, dtype=torch.float32, device="meta")
    data, wide = packed("iq2_kl", 2, 256, 3).to("meta"), packed("iq2_kl", rows, 256).to("meta")
    ids = torch.empty(tokens, 1, dtype=torch.int64, device="meta")
    launch.dequantize(wide, kind, rows, 256, torch.float16)
    launch.embedding(ids, wide, kind, rows, 256, torch.float16)
    launch.linear(x[:4], wide, kind, rows, None, 0)
    launch.routed_linear(x, data, ids, kind, 2, 1)
    launch.grouped_linear(x, data, torch.empty(3, dtype=torch.int32, device="meta"), kind, 2, 1)
    many = torch.empty(1 << 24, 256, dtype=torch.bfloat16, device="meta")
    launch.grouped_linear(many, data, torch.empty(3, dtype=torch.int32, device="meta"), kind, 2, 1)
    routed.routed_gated(x, data, ids, kind, 2, "silu", 1)
    routed.routed_weighted(x[:, None], data, ids, torch.empty(tokens, 1, device="meta"), kind, 2, 1)
    grids = [(name, (*grid, 1, 1)) for name, recorder in recorded.items() for grid in recorder.grids]
    assert {name for name, _ in grids} == {"dequantize", "gemv", "gated", "weighted", "stage", "gemm"}
    for name, (first, second, third, *_) in grids:
        assert first < 1 << 31 and second <= 65535 and third <= 65535, (name, first, second, third)
        if name == "gemm":
            assert second * third >= (1 << 24) // 128 + 3
        elif name in ("gemv", "gated", "weighted"):
            assert second * third in (2, tokens, tokens + 1), (name, second, third)
