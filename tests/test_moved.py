"""Old import paths work for one version, and say where the names are now."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest

import kvcompose_gguf
from kvcompose_gguf import moved

pytestmark = pytest.mark.filterwarnings("ignore:kvcompose_gguf:DeprecationWarning")  # two warnings for one import

#: names that documents named, or that users of the library need, by their old modules
NAMES = [
    "bench.BenchOptions", "bench_result.BenchResult", "budget.composites_for_ratio", "calibration.Calibration",
    "calibration.load_calibration", "calibration.model_sha256", "checks.check_integer", "checks.parse_bytes",
    "cli.main", "composed.Composed", "environment.system", "evaluation.answering.answer",
    "evaluation.prompts.chat_frame", "evaluation.ruler.TASKS", "evaluation.ruler.make_sample",
    "evaluation.samples.Sample", "evaluation.texts.load_texts", "evaluation.variants.Variant", "files.write_file",
    "geometry.KVCells", "geometry.LayerGeometry", "hub.fetch_hub", "hub.parse_spec", "identity.Identity",
    "models.MODELS", "models.models_dir", "models.sha256", "plan.CompositionPlan", "progress.Progress",
    "queries.AttentionRequest", "queries.Evidence", "queries.Prefill", "queries.Prompts", "queries.QueryStates",
    "queries.Repeat", "queries.StateRequest", "queries.Window", "report.KVReport", "rows.cached_rows",
    "rpc.add_rpc_server", "run.load_model", "run.open_vocabulary", "run.resolve_model", "scoring.Attention",
    "seam.common_prefix", "serve.serve",
    "surrogate_quality.compare", "tables.bench_table",
]  # fmt: skip
#: names that kept their modules, though these became folders
KEPT = ["models.fetch", "models.names", "sessions.SessionInfo", "sessions.sessions_dir", "methods.base.Method"]


def get(place: str) -> object:
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(f"kvcompose_gguf.{module}"), name)


@pytest.mark.parametrize("place", NAMES)
def test_an_old_name_is_the_new_thing_and_the_warning_says_where(place: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{place} moved to ") as told:
        found = get(place)
    where = str(told[-1].message).split(" moved to ")[1].partition(":")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found is get(where.removeprefix("kvcompose_gguf."))
    assert where != f"kvcompose_gguf.{place}"


@pytest.mark.parametrize("old", sorted(moved.GONE))
def test_a_module_that_is_gone_can_be_imported_and_warns_the_importer(old: str) -> None:
    sys.modules.pop(f"kvcompose_gguf.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"kvcompose_gguf.{old} moved to kvcompose_gguf.") as told:
        importlib.import_module(f"kvcompose_gguf.{old}")
    assert "moved.py" not in told[0].filename
    for place in moved.GONE[old]:
        assert importlib.util.find_spec(f"kvcompose_gguf.{place}") is not None, place


@pytest.mark.parametrize("place", KEPT)
def test_names_that_kept_their_modules_do_not_warn(place: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get(place)


@pytest.mark.parametrize("folder", sorted(moved.FOLDERS))
def test_names_of_folders_lead_to_what_exists(folder: str) -> None:
    for name in moved.FOLDERS[folder]:
        with pytest.warns(DeprecationWarning, match=f"kvcompose_gguf.{folder}.{name} moved to") as told:
            get(f"{folder}.{name}")
        assert told[-1].filename == __file__  # Python hides warnings about other people's lines


def test_unknown_modules_and_names_are_errors_as_ever() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        importlib.import_module("kvcompose_gguf.nothing")
    with pytest.raises(ImportError, match="Nothing"), pytest.warns(DeprecationWarning, match="queries moved"):
        exec("import sys; sys.modules.pop('kvcompose_gguf.queries', 0)\nfrom kvcompose_gguf.queries import Nothing")
    with pytest.raises(AttributeError, match=r"'kvcompose_gguf\.plan' has no attribute 'Nothing'"):
        get("plan.Nothing")


def test_the_package_itself_uses_no_old_name() -> None:
    program = "import pkgutil, importlib, kvcompose_gguf as k\n" + (
        "for m in pkgutil.walk_packages(k.__path__, 'kvcompose_gguf.'):\n"
        "    if '.lib' not in m.name and '__main__' not in m.name: importlib.import_module(m.name)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error:kvcompose_gguf:DeprecationWarning", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_finder_is_registered_once_and_after_all_others() -> None:
    moved.register()
    finders = [finder for finder in sys.meta_path if isinstance(finder, moved.Finder)]
    assert len(finders) == 1
    assert kvcompose_gguf.moved is moved
