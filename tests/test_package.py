"""The package as a whole: what is in it, what it imports, and what it shows."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import iqtorch
from iqtorch import cpu_ext, get_format

PACKAGE = Path(iqtorch.__file__).parent


def test_the_kernels_are_compiled() -> None:
    """Tests of the kernels are skipped where there are none, so their absence must show somewhere."""
    assert cpu_ext.supports(get_format("iq2_kl"), 16, 256) is None


def test_types_are_for_users_too() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_public_names() -> None:
    """Each exists, has help, and is known to type checkers; and nothing else is shown."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    known = {alias.asname for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert known == set(iqtorch._LAZY)
    shown = {name for name in dir(iqtorch) if not name.startswith("__")}
    assert shown == {*iqtorch.__all__, *iqtorch._LAZY}
    for name in shown:
        assert inspect.getdoc(getattr(iqtorch, name)), name


def test_imports_go_one_way() -> None:
    """No module imports, when it is loaded, one that imports it; what a function imports when it is called does not count."""
    files = {".".join(("iqtorch", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): file for name, file in files.items()}
    imports = {name: set(_imported(name, file, modules)) - {name} for name, file in modules.items()}
    assert len(imports) > 90 and imports["iqtorch.model"] >= {"iqtorch.quantize", "iqtorch.recipe"}
    imports["iqtorch.tensor"].remove("iqtorch.tensor_ops")  # at its end: the second half of that module
    TopologicalSorter(imports).prepare()  # a CycleError names the circle


def test_imports_are_seen_however_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "new.py"
    file.write_text("import torch, iqtorch.a\nfrom iqtorch import b\nfrom iqtorch.c import x\nfrom . import d\nfrom .e import y\n")
    modules = {f"iqtorch.{name}": file for name in "abcdef"}
    assert sorted(_imported("iqtorch.new", file, modules)) == sorted(modules)[:5]


def _imported(name: str, file: Path, modules: dict[str, Path]) -> Iterator[str]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in _when_loaded(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield from [found for found in (whole, base) if found in modules][:1]


def _when_loaded(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        yield node
        yield from _when_loaded(node)
