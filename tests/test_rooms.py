"""Imports go one way: the table of docs/architecture.md, held against every file."""

import ast
from pathlib import Path

import pytest

import moe

ROOT = Path(moe.__file__).resolve().parents[1]
ERRORS, RECEIVED, BASE = "moe.errors", "moe.received", "layers.base"
BASE_MODULES = {
    f"layers.{name}" for name in ("logical_axes", "linear", "norms", "positions", "tokens")
}

# What each room may import, beside what those may import, `errors` and `received`.
ROOMS = {
    ERRORS: (),
    RECEIVED: (),
    "routing": (),
    "routing.solvers": ("routing",),
    "routing.algorithms": ("routing.solvers",),
    BASE: ("routing",),
    "layers.kernels": (BASE,),
    "layers.dispatch": ("layers.kernels",),
    "layers.experts": ("layers.dispatch",),
    "layers": ("layers.experts", "routing.algorithms"),
    "moe.machine": (),
    "moe.settings": ("routing",),
    "moe.model": ("layers",),
    "moe.data.corpora": ("routing",),
    "moe.data.tokens": ("moe.data.corpora", "moe.machine"),
    "moe.data": ("moe.data.tokens",),
    "moe.training": ("moe.data", "moe.model"),
    "moe.inference": ("moe.training",),
    "moe.bench": ("moe.inference", "moe.machine"),
    "moe.analysis": ("moe.training",),
    "moe.conformance": ("moe.training",),
    "moe.planning": ("moe.training", "moe.settings"),
    "moe.statistics": (),
    "moe.scaling.laws": (),
    "moe.scaling": ("moe.scaling.laws", "moe.statistics"),
    "moe.runs.storage": ("moe.training", "moe.settings"),
    "moe.runs.tracking": ("moe.runs.storage",),
    "moe.runs": ("moe.runs.tracking", "moe.analysis", "moe.inference"),
    "moe.pruning": ("moe.runs",),
    "moe.sweeps": ("moe.runs", "moe.statistics"),
    "moe.reports": ("moe.sweeps",),
}
EVERYTHING = {"moe.cli", "moe"}  # the command line, and `python -m moe`
RE_EXPORT = {"routing/__init__.py"}


def room_of(module: str) -> str:
    """The folder that a module, or a name in one, lies in."""
    parts = module.split(".")
    while (
        not ROOT.joinpath(*parts).is_dir() and not ROOT.joinpath(*parts).with_suffix(".py").exists()
    ):
        parts = parts[:-1]
    module = ".".join(parts)
    if module in BASE_MODULES:
        return BASE
    if module in (ERRORS, RECEIVED) or ROOT.joinpath(*parts).is_dir():
        return module
    return ".".join(parts[:-1])


def imports_of(path: Path) -> set[str]:
    """Every name of ours that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("moe", "layers", "routing")}


def reach(room: str) -> set[str]:
    """A room, and all that it may import."""
    return {room, ERRORS, RECEIVED}.union(*map(reach, ROOMS[room]))


FILES = sorted(p for top in ("moe", "layers", "routing") for p in (ROOT / top).rglob("*.py"))


def wrong_arrows(path: Path, imports: set[str]) -> list[str]:
    room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    if room in EVERYTHING or str(path.relative_to(ROOT)) in RE_EXPORT:
        return []
    return sorted(
        f"{room} -> {room_of(name)}" for name in imports if room_of(name) not in reach(room)
    )


def test_imports_go_one_way():
    wrong = {
        str(path): arrows for path in FILES if (arrows := wrong_arrows(path, imports_of(path)))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("routing/top_k.py", "routing.algorithms.top_k.TopK"),
        ("layers/kernels/grouped_matmul.py", "layers.moe_layer.MoELayer"),
        ("moe/data/text.py", "moe.training.run_spec.RunSpec"),
        ("moe/runs/train.py", "moe.cli.config"),
    ],
)
def test_an_upward_arrow_is_found(file, name):
    assert wrong_arrows(ROOT / file, {name})


def test_the_page_has_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {room.replace(".", "/") for room in ROOMS if room not in (ERRORS, RECEIVED, BASE)}
    assert not sorted(room for room in rooms if f"`{room}/`" not in page)
