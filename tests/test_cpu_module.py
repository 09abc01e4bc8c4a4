"""The compiled module: instruction sets by name, modules that are missing, damaged, of other sources or outdated."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from iqtorch import cpu_ext
from iqtorch.formats import get_format

UNAVAILABLE: str | None = cpu_ext.supports(get_format("iq2_kl"), 16, 256)

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


def run_python(code: str, isa: str | None = None) -> str:
    env = {**os.environ, **({} if isa is None else {"IQTORCH_ISA": isa})}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_forcing_an_instruction_set() -> None:
    assert run_python("from iqtorch import cpu_ext; print(cpu_ext.capabilities()['isa'])", "scalar").strip() == "scalar"
    code = (
        "import torch, iqtorch\n"
        "from iqtorch import cpu_ext, errors, formats\n"
        "supports = lambda: cpu_ext.supports(formats.get_format('iq2_kl'), 16, 256)\n"
        "place = lambda: iqtorch.IQTensor.from_blocks(torch.zeros(16, 144, dtype=torch.uint8), 'iq4_nl')\n"
        "for call in (cpu_ext.capabilities, supports, place):\n"
        "    try: call()\n"
        "    except errors.KernelUnavailableError as error: print(error)\n"
    )
    missing = next(isa for isa, reason in cpu_ext.capabilities().items() if isa != "isa" and reason != "available")
    for forced in (missing, "sse9"):
        messages = run_python(code, forced).splitlines()
        assert len(messages) == 3
        assert len(set(messages)) == 1
        assert f"IQTORCH_ISA={forced}" in messages[0]


#: Imports `cpu_ext` as where there are no compiled kernels, neither beside it nor among installed packages.
HIDDEN = """
import importlib.util as u, sys, warnings
from pathlib import Path
import torch, iqtorch
find, path = u.find_spec, sys.path[:]
u.find_spec = lambda name, *a: None if name.endswith("cpu_ext._C") else find(name, *a)
sys.path[:] = [p for p in path if not Path(p, "iqtorch/cpu_ext/_C.so").exists()]
with warnings.catch_warnings(record=True) as seen:
    from iqtorch import cpu_ext
u.find_spec, sys.path[:] = find, path
"""


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError('undefined symbol: x'))", "do not load with torch"),
        ("sys.modules['iqtorch.cpu_ext.layout'].INTERFACE -= 1", "different versions"),
    ],
)
def test_an_unusable_module_warns_and_is_shown(damage: str, reason: str) -> None:
    code = (
        f"{HIDDEN}{damage}\n"
        "cpu_ext.layout.cache_clear()\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    cpu_ext._unavailable = cpu_ext._load()\n"
        "print(len(seen), seen[0].message, '|', iqtorch.kernel_info()['backends']['cpu'])\n"
    )
    warning, shown = run_python(code).split("|")
    assert warning.startswith("1 ")
    assert "pip install -e" in warning
    assert reason in warning
    assert reason in shown


def test_without_the_compiled_module_everything_runs_on_plain_torch() -> None:
    code = (
        f"{HIDDEN}"
        "w = iqtorch.quantize(torch.randn(32, 256), 'iq4_nl')\n"
        "x = torch.randn(2, 256)\n"
        "y, ref = torch.nn.functional.linear(x, w), x @ w.dequantize(torch.float32).T\n"
        "assert (y - ref).norm() / ref.norm() < 0.02\n"
        "print(w.backend, '|', cpu_ext.supports(w.format, 32, 256), '|', len(seen), seen[0].message)\n"
    )
    backend, reason, warning = run_python(code).split("|")
    assert backend.strip() == "torch"
    assert "without its compiled kernels" in reason
    assert warning.startswith(" 1 ") and "many times slower. Remedy: pip install" in warning


def test_kernels_of_the_same_sources_are_found_from_a_clone(own_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python in a clone's folder imports the package from there, and `pip install .` has put the kernels elsewhere."""
    file, _ = cpu_ext.kernel_file.find()
    monkeypatch.setattr(cpu_ext.kernel_file.importlib.util, "find_spec", lambda *args: None)
    assert file is not None and cpu_ext.kernel_file.find() == (file, [])
    (own_sources / "pack.cpp").write_text("// another\n")
    with pytest.warns(RuntimeWarning, match=r"kernels were built from other C\+\+ sources than those here \(pack\.cpp\); matrix"):
        assert "without" not in str(cpu_ext._load())
    shutil.rmtree(own_sources)  # then nothing can be the same, not even a file that does not say what it was built from
    unsaid = tmp_path / "path" / "iqtorch" / "cpu_ext" / "_C.so"
    unsaid.parent.mkdir(parents=True)
    unsaid.write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path / "path")
    assert cpu_ext.kernel_file.find() == (None, [])


@pytest.fixture
def own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the C++ sources that the kernels were built from, in their place."""
    sources = tmp_path / "csrc"
    shutil.copytree(cpu_ext.kernel_file.SOURCES, sources)
    monkeypatch.setattr(cpu_ext.kernel_file, "SOURCES", sources)
    return sources


def test_sources_that_changed_since_the_build_are_named(own_sources: Path) -> None:
    (own_sources / ".#pack.cpp").symlink_to("someone@somewhere.1")  # what editors leave there
    (own_sources / ".cache").mkdir()
    (own_sources / "pack.cpp~").write_text("")
    file, changed = cpu_ext.kernel_file.find()
    assert file is not None and changed == []
    (own_sources / "pack.cpp").write_text("// another\n")
    (own_sources / "more.inl").write_text("")
    with pytest.warns(UserWarning, match=r"C\+\+ sources changed since the kernels were built \(more\.inl, pack\.cpp\); rebuild: pip"):
        assert cpu_ext._load() is None


def test_every_operator_is_looked_for() -> None:
    """One that an older build lacks is missed when the extension is loaded, not when it is called."""
    sources = "".join(file.read_text(encoding="utf-8") for file in cpu_ext.kernel_file.SOURCES.glob("*binding.cpp"))
    assert sorted(re.findall(r'm\.def\(\s*"(\w+)\(', sources)) == sorted(cpu_ext._OPERATORS)
