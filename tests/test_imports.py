"""Who may import whom. A layer is a folder (or a module) of the package; the arrows point downward only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "longreach"

BASE = {"errors", "runtime", "rundir"}
ALLOWED: dict[str, set[str]] = {
    # imported by all, import nothing of ours but each other
    "errors": set(),
    "runtime": {"errors"},
    "rundir": {"errors", "runtime"},
    # mathematics
    "native": set(),
    "ops": {"errors", "native"},
    "model": {"native", "ops", "errors"},
    # text
    "tokenizer": BASE,
    "chat": BASE | {"tokenizer"},
    # services: independent of one another
    "data": BASE | {"chat", "tokenizer"},
    "optim": {"errors"},
    "checkpoint": BASE | {"model", "ops"},
    "engine": BASE | {"checkpoint", "model", "native", "ops", "tokenizer"},
    "tasks": BASE | {"chat", "tokenizer"},
    # episodes and scores: called by training between steps and by the command line
    "evaluate": BASE | {"chat", "checkpoint", "engine", "model", "tasks", "tokenizer"},
    # applications: never import each other
    "train": BASE
    | {"chat", "checkpoint", "data", "engine", "evaluate", "model", "ops", "optim", "plan", "tasks", "tokenizer"},
    "plan": BASE | {"model"},
    "bench": BASE | {"checkpoint", "engine", "model", "native", "ops", "optim", "plan", "tokenizer"},
    "generate": BASE | {"engine", "native", "tokenizer"},
    "terminal": BASE | {"chat", "engine", "generate", "tokenizer"},  # stands on generate: its options and its clock
    "server": BASE | {"chat", "engine", "model", "native", "tokenizer"},
    # above the applications
    "journey": BASE
    | {
        "bench",
        "chat",
        "checkpoint",
        "data",
        "engine",
        "evaluate",
        "generate",
        "model",
        "ops",
        "optim",
        "plan",
        "tasks",
        "tokenizer",
        "train",
    },
    # the command line names its verbs as text and loads the chosen one
    "cli": {"errors"},
    "__main__": {"cli"},
    "__init__": {"checkpoint", "engine", "errors", "model", "optim"},
}

# Third-party modules by layer where the list is short on purpose: the mathematics can be read and tested with torch alone.
ONLY_THESE_LIBRARIES = {
    "ops": {"torch", "triton"},
    "model": {"torch", "numpy", "safetensors"},
    "errors": set(),
    "cli": {"tyro"},
}

# Decided in integers, so that their tests may walk a hundred thousand steps.
WITHOUT_TORCH = (
    "pages", "prefix", "request", "sampling", "scheduler", "disk", "disk_index", "disk_record", "disk_writer",
)  # fmt: skip

MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Every module named in an import statement, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; this project writes full names"
            found.add(node.module or "")
            if node.module == "longreach":
                found.update(f"longreach.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(PACKAGE)) for p in MODULES])
def test_a_module_imports_only_from_its_own_layer_and_those_below(path):
    layer = layer_of(path)
    assert layer in ALLOWED, f"{layer} is a new layer: say in this test what it may import"
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "longreach" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in ALLOWED[layer] | {layer}, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("layer", sorted(ONLY_THESE_LIBRARIES))
def test_the_lower_layers_need_few_libraries(layer):
    for path in MODULES:
        if layer_of(path) == layer:
            for name in imported_modules(path):
                top = name.split(".")[0]
                known = top in sys.stdlib_module_names or top in ONLY_THESE_LIBRARIES[layer] | {"longreach"}
                assert known, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_scheduler_page_table_and_prefix_index_load_no_torch(name):
    assert not loaded_after(f"import longreach.engine.{name}") & {"torch", "numpy", "tokenizers"}


def test_the_layers_form_no_cycle():
    order: list[str] = []

    def visit(layer: str, above: tuple[str, ...]) -> None:
        assert layer not in above, " → ".join([*above, layer])
        if layer not in order:
            for below in ALLOWED[layer]:
                visit(below, (*above, layer))
            order.append(layer)

    for layer in ALLOWED:
        visit(layer, ())


def loaded_after(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(' '.join(sys.modules), file=sys.__stderr__)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import longreach",
        "import longreach; longreach.LongreachError; dir(longreach)",
        "from longreach.cli import main; main([])",
        "from longreach.cli import main; main(['--version'])",
        "from longreach.cli import main; main(['bench'])",
        "from longreach.cli import main; main(['no-such-command'])",
    ],
)
def test_what_needs_no_model_does_not_load_torch(statement):
    heavy = loaded_after(statement) & {"torch", "numpy", "tokenizers", "safetensors", "tyro", "rich", "matplotlib"}
    assert not heavy


def test_public_names_are_the_objects_of_their_modules():
    import longreach
    from longreach.errors import LongreachError
    from longreach.model.config import ModelConfig

    assert longreach.ModelConfig is ModelConfig
    assert longreach.LongreachError is LongreachError
    for name in longreach.__all__:
        assert getattr(longreach, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Transfomer'"):
        longreach.Transfomer  # noqa: B018
