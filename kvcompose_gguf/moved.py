"""Hands on names from their old modules for one version; each use warns with the new place.

The modules moved into rooms. A module that is gone is found by a finder, which the package registers; an old module
that is a folder of the same name now hands on its old names with a ``__getattr__``. These moved or
changed without an alias: all inside of the programs ``server`` and ``chat``; the module ``states``; ``Llama.decoder``;
``surrogate`` and ``surrogate_fit``, whose work ``measurements.learned`` does;
in ``scoring`` ``Decoder``, ``collect_attention`` and ``collect_queries``; ``evaluation.variants.EditedPlan``;
``bench.run_bench``; ``tables.layer_bars``; and the fields
``keys``, ``values``, ``states`` and ``unrotate`` of ``Evidence``.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]

#: old module -> the modules that have its names now, all inside of the package
GONE: dict[str, tuple[str, ...]] = {
    "bench_result": ("bench.result",),
    "bench_worker": ("bench.measured_cache",),
    "budget": ("plan.budget",),
    "calibrate": ("learning.calibrate",),
    "calibrate_trials": ("learning.trials",),
    "calibration": ("measurements.calibration", "models.hashes"),
    "chat_cli": ("cli.chat",),
    "checks": ("support.checks",),
    "composed": ("plan.composed",),
    "demo": ("cli.demo.command", "cli.demo.comparison", "cli.demo.questions"),
    "doctor": ("cli.doctor",),
    "environment": ("native.environment",),
    "evaluation.answering": ("tasks.answering",),
    "evaluation.prompts": ("tasks.prompts",),
    "evaluation.ruler": ("tasks.ruler", "tasks.task", "tasks.needles", "tasks.frequencies", "tasks.documents"),
    "evaluation.samples": ("tasks.samples",),
    "evaluation.texts": ("tasks.texts", "tasks.generated", "tasks.packaged", "tasks.questions"),
    "evaluation.variants": ("methods.variant",),
    "files": ("support.files",),
    "geometry": ("plan.geometry",),
    "hub": ("models.hub",),
    "identity": ("models.identity",),
    "options": ("cli.options",),
    "passages": ("learning.passages",),
    "plots": ("support.plots", "bench.plot"),
    "progress": ("support.progress",),
    "queries": ("scoring.requests", "scoring.evidence"),
    "report": ("plan.report",),
    "rows": ("native.rows",),
    "rpc": ("native.rpc",),
    "run": ("load", "models.resolve", "native.vocab_only"),
    "seam": ("plan.seam",),
    "serve": ("cli.serve",),
    "sessions_command": ("cli.saved",),
    "surrogate_quality": ("learning.quality",),
    "tables": ("bench.table", "cli.demo.tables"),
}

#: old modules that are folders now -> their old names, and the module of each
FOLDERS: dict[str, dict[str, str]] = {
    "bench": {
        "BenchOptions": "bench.options",
        "KV_TYPES": "native.kv_types",
        "bench": "bench.command",
        "context_tokens": "bench.measure",
    },
    "cli": {"main": "cli.app"},
    "models": {
        "MODELS": "models.known",
        "Model": "models.known",
        "is_fetched": "models.known",
        "models_dir": "models.known",
        "path": "models.known",
        "sha256": "models.hashes",
    },
    "plan": {"CompositionPlan": "plan.composition"},
    "scoring": {
        "Attention": "scoring.collect",
        "chunk_size": "scoring.collect",
        "spread": "scoring.pieces",
    },
}


def from_folder(package: str, lazy: Mapping[str, str] = MappingProxyType({})) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a folder that was a module; the folder's ``__init__`` calls this.

    Args:
        lazy: names that the folder still has -> their modules, which are imported on first use.
    """
    old = package.removeprefix(f"{PACKAGE}.")

    def find(name: str) -> Any:
        if name in lazy:
            return getattr(importlib.import_module(f"{package}.{lazy[name]}"), name)
        place = FOLDERS[old].get(name)
        return _from(old, (place,) if place else (), name)

    return find


def _from(old: str, places: Sequence[str], name: str) -> Any:
    """Returns the value of a name that moved from the module ``old`` into one of ``places``, and warns the caller."""
    for place in () if name.startswith("_") else places:
        module = importlib.import_module(f"{PACKAGE}.{place}")
        if name in vars(module):
            told = f"{PACKAGE}.{old}.{name} moved to {module.__name__}.{name}: import it from there"
            warnings.warn(told, DeprecationWarning, stacklevel=3)
            return vars(module)[name]
    raise AttributeError(f"module '{PACKAGE}.{old}' has no attribute {name!r}")


class Finder(MetaPathFinder, Loader):
    """Finds the modules that are gone; loads a module that hands on their names."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == PACKAGE and old in GONE else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix(f"{PACKAGE}.")
        places = ", ".join(f"{PACKAGE}.{place}" for place in GONE[old])
        warnings.warn(f"{module.__name__} moved to {places}: import from there", DeprecationWarning, stacklevel=2)
        vars(module)["__getattr__"] = lambda name: _from(old, GONE[old], name)


def register() -> None:
    """Registers the finder, last of all, so that existing modules never meet it."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
