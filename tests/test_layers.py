"""Who may import whom: a module imports only from rows above its own, and the halves stay apart."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "xdonnx"
ROWS = [
    {"errors", "events", "files", "figures", "scorecache", "strict"},
    {
        "model",
        "prepare",
        "intervals",
        "columns",
        "structure",
        "interpolation",
        "coverage",
        "augment",
        "mistakes",
        "devices",
        "shelf",
        "machine",
        "journal",
        "lowrank",
        "sheet",
        "tomlfile",
        "matches",
        "amounts",
    },
    {"moments", "tries", "descent"},
    {"runtime", "report", "paths", "draw", "images", "labels", "cost", "connection", "operators", "removal"},
    {"layers", "reshaping", "sources", "stem", "feeds", "solve", "contributions", "worst", "limits", "junit", "plot"},
    {"rows", "tensors", "summary"},
    {"rules", "gate", "shots", "preprocessing", "fidelity", "methods", "crossval", "page"},
    {"graph", "verification", "memory", "publication", "direct", "pool"},
    {
        "patch",
        "budget",
        "tallies",
        "convert",
        "doctor",
        "keywords",
        "samples",
        "relatedness",
        "likeness",
        "wiring",
        "rectified",
    },
    {
        "walk",
        "survey",
        "student",
        "planfile",
        "agreement",
        "judging",
        "collection",
        "ranks",
        "matching",
        "methods.bench",
    },
    {
        "methods.joint",
        "replay",
        "methods.wide",
        "methods.attention",
        "wanted",
        "splitting",
        "sizing",
        "tables",
        "matchfile",
        "methods.pairwalk",
    },
    {"methods.layerwise", "methods.adversary", "room", "decomposition", "pacing", "given", "contents"},
    {"methods.training", "methods.mixing", "allocation", "accounting"},
    {"methods.cross", "methods.l1_norm", "methods.thinet", "methods.channel_pruning", "methods.fskd", "methods.tune"},
    {"methods.bp", "methods.fitnet", "methods.squeeze", "methods.crossing", "targets"},
    {"resuming", "delivery", "foreign"},
    {"job"},
    {"api", "sweep", "sweep.records", "sweep.identity"},
    {"sweep.options", "sweep.measuring"},
    {"sweep.description", "sweep.local"},
    {"sweep.trials", "sweep.cluster"},
    {"sweep.front"},
    {"sweep.results", "sweep.search"},
    {"sweep.chart"},
    {"sweep.page"},
    {"sweep.conduct"},
]
TORCH_FREE = {
    "errors", "events", "model", "prepare", "intervals", "runtime", "images", "labels", "cost", "layers", "reshaping",
    "sources", "report", "feeds", "rules", "gate", "shots", "graph", "verification", "fidelity", "patch", "budget",
    "worst", "limits", "summary", "junit", "plot", "page", "publication", "survey", "coverage", "methods", "paths",
    "planfile", "agreement", "draw", "rows", "stem", "preprocessing", "memory", "keywords", "api",
    "tensors", "samples", "judging", "files", "figures", "wanted", "machine", "journal", "pool", "scorecache",
    "sheet", "relatedness", "collection", "ranks", "splitting", "decomposition",
    "strict", "amounts", "tries", "tallies", "sizing", "tables", "pacing",
    "likeness", "wiring", "matching", "matchfile", "given", "matches", "contents", "tomlfile",
}  # fmt: skip
ONNX_FREE = {
    "columns", "moments", "structure", "connection", "contributions", "solve", "removal", "interpolation", "augment",
    "crossval", "direct", "shelf", "lowrank", "descent", "rectified",
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Return what a module imports when it is imported; what stands inside functions or TYPE_CHECKING is not."""
    found: set[str] = set()
    body = list(ast.parse(path.read_text()).body)
    while body:
        node = body.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Try):
            body += node.body
    return found


def test_every_module_has_a_row() -> None:
    assert set(modules()) == set().union(*ROWS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_from_rows_above_its_own(name: str) -> None:
    row = {module: at for at, modules in enumerate(ROWS) for module in modules}
    ours = {i.removeprefix("xdonnx.") for i in imports(modules()[name]) if i.startswith("xdonnx.")}
    for other in ours & set(row):
        assert row[other] < row[name], f"{name} (row {row[name]}) imports {other} (row {row[other]})"


@pytest.mark.parametrize("name", sorted(TORCH_FREE & set(modules())))
def test_the_onnx_half_never_imports_torch(name: str) -> None:
    assert not {i.split(".")[0] for i in imports(modules()[name])} & {"torch", "onnx2torch", "torchvision"}


@pytest.mark.parametrize("name", sorted(ONNX_FREE))
def test_the_math_half_never_imports_onnx(name: str) -> None:
    assert not {i.split(".")[0] for i in imports(modules()[name])} & {"onnx", "onnx_ir", "onnxruntime", "onnxscript"}
