"""Two devices in host memory (`device.cpp`), for tests of what moves between devices on machines that have none.

    PYTHONPATH=tests pytest -p simulated_device tests/test_hf_placement.py

They carry the name of a device that transformers and accelerate know, because both ask a fixed list of devices whether they are there:
`musa:0` and `musa:1`. Importing this package compiles them (once per temporary folder) and registers them.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import load

NAME = "musa"


def _build() -> Any:
    folder = Path(tempfile.gettempdir()) / f"iqtorch_simulated_device_{os.getuid()}_{torch.__version__}"
    folder.mkdir(exist_ok=True)
    load("simulated_device", [Path(__file__).with_name("device.cpp")], build_directory=folder, extra_cflags=["-O1"], is_python_module=False)
    return torch.ops.simulated_device


def _module(ops: Any) -> types.ModuleType:
    """What PyTorch, transformers and accelerate expect of `torch.musa`."""

    def index(device: Any) -> int:
        if isinstance(device, (str, torch.device)):
            device = torch.device(device).index
        return ops.current_device() if device is None else device

    class Use:
        """`with torch.musa.device(i):`"""

        def __init__(self, device: Any) -> None:
            self.index = index(device)

        def __enter__(self) -> None:
            self.before = ops.current_device()
            ops.set_device(self.index)

        def __exit__(self, *error: Any) -> None:
            ops.set_device(self.before)

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    module = types.ModuleType(f"torch.{NAME}")
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        device_count=ops.device_count,
        current_device=ops.current_device,
        set_device=lambda device: ops.set_device(index(device)),
        device=Use,
        mem_get_info=lambda device=None: (2**30 - ops.memory_allocated(index(device)), 2**30),
        memory_allocated=lambda device=None: ops.memory_allocated(index(device)),
        max_memory_allocated=lambda device=None: ops.max_memory_allocated(index(device)),
        reset_peak_memory_stats=lambda device=None: ops.reset_peak_memory_stats(index(device)),
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        **dict.fromkeys(("init", "_lazy_init", "synchronize", "empty_cache", "manual_seed", "manual_seed_all"), nothing),
    )
    return module


def _register() -> None:
    ops = _build()
    ops.start()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module(ops))
    torch.utils.generate_methods_for_privateuse1_backend()
    package = types.ModuleType(f"torch_{NAME}")  # transformers and accelerate look whether this can be imported
    package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None)
    sys.modules[package.__name__] = package


_register()
