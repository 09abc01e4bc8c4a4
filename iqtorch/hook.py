"""Modules of ours that register themselves with another package, as soon as that is imported, whichever comes first."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: The other package's registry -> our module.
AFTER = {
    "transformers.quantizers.auto": "iqtorch.hf.quantizer",
    "diffusers.quantizers.auto": "iqtorch.hf.diffusers",
    "torch.utils.flop_counter": "iqtorch.flops",
}


def install() -> None:
    """Imports what belongs to the registries that are loaded, and has the others call later; imports no other package."""
    for registry, ours in AFTER.items():
        if registry in sys.modules:
            _register(ours)
        elif not any(isinstance(finder, _Finder) and finder.registry == registry for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(registry))


def _register(ours: str) -> None:
    try:
        importlib.import_module(ours)
    except ModuleNotFoundError as error:
        if error.name != "transformers":  # without which diffusers works, and our part for it does not
            raise


class _Finder(MetaPathFinder):
    """Finds one registry as the other finders do, and has our module imported once it is loaded."""

    def __init__(self, registry: str) -> None:
        self.registry = registry

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.registry:
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must end up as if it had been loaded without us (inspect, pickle and reload look at its loader).
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register(AFTER[self.finder.registry])
