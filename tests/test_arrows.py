"""Which module may import which: floors, of which each knows itself and those below, and no circles."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("kvcomp", "policies", "quantizers", "sparse", "kernels", "integrations", "benchmarks")
# From the ground up. What shares a floor knows nothing of its neighbours; the ground floor is small modules.
FLOORS = (
    ("errors", "text", "modes", "finite", "state", "files", "console", "fingerprint", "ledger", "geometry"),
    ("attention", "layout", "operators", "segments"),
    ("kernels",),
    ("stages",),
    ("architecture",),
    ("calibration",),
    ("policies", "quantizers", "sparse"),
    ("cache",),
    ("cost",),
    ("integrations",),
    ("benchmarks",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
DOOR = "kvcomp"  # the package itself offers names of all floors, and imports none before it is asked
PORCH = "kvcomp.stages"  # offers authors of methods names of higher floors, declared for type checkers alone


def sources() -> dict[str, Path]:
    """Every module by its name as installed."""
    found = {}
    for folder in FOLDERS:
        package = (folder,) if folder == "kvcomp" else ("kvcomp", folder)
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The project's modules that a module imports anywhere, for type checkers too; not the packages around it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if name == PORCH:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base)
    return {other for other in found if other in modules and other not in (name, DOOR)}


MODULES = sources()
ARROWS = {name: imports(name, path, MODULES) for name, path in MODULES.items() if name != DOOR}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_a_floor():
    assert {room(name) for name in ARROWS} == set(FLOOR)


def test_no_module_imports_from_above():
    up = [(a, b) for a, others in ARROWS.items() for b in others if FLOOR[room(b)] > FLOOR[room(a)]]
    assert up == []


def test_neighbours_do_not_know_each_other():
    beside = [
        (a, b)
        for a, others in ARROWS.items()
        for b in others
        if room(a) != room(b) and FLOOR[room(a)] == FLOOR[room(b)] > 0
    ]
    assert beside == []


def test_no_circles_between_files():
    """A package's own file stands for what it re-exports: who imports it imports those."""
    try:
        tuple(TopologicalSorter(ARROWS).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {error.args[1]}") from None


def test_the_engines_do_not_know_each_other():
    engines = ("kvcomp.integrations.huggingface", "kvcomp.integrations.vllm")
    for one, other in (engines, engines[::-1]):
        across = [(a, b) for a, others in ARROWS.items() if a.startswith(one) for b in others if b.startswith(other)]
        assert across == []


def test_the_core_names_no_engine():
    """Nothing below integrations imports transformers or vLLM, not even inside a function."""
    engines = ("transformers", "vllm", "lm_eval")
    for name, path in MODULES.items():
        if name == DOOR or FLOOR[room(name)] >= FLOOR["integrations"]:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asked = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                asked = [node.module or ""]
            assert not [a for a in asked if a.split(".")[0] in engines], name
