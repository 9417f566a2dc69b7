"""The house's arrows: which room may import which, and what is imported at all times.

Read from the source, so no module is imported. CONTRIBUTING.md shows the same rooms.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

MAY_IMPORT = {
    "avalanche_classp.optim": [],
    "avalanche_classp.data": [],
    "avalanche_classp.*": ["avalanche_classp.optim"],
    "avalanche_classp.checkpoint": ["avalanche_classp.optim", "avalanche_classp.*"],
    "avalanche_classp": ["avalanche_classp"],
    "experiments.errors": [],
    "experiments.protocol": ["avalanche_classp", "experiments.errors"],
    "experiments.running": ["avalanche_classp", "experiments.errors", "experiments.protocol"],
    "experiments.reporting": [
        *("avalanche_classp", "experiments.errors"),
        *("experiments.protocol", "experiments.running"),
    ],
    "experiments.tuning": [
        *("avalanche_classp", "experiments.errors"),
        *("experiments.protocol", "experiments.running", "experiments.reporting"),
    ],
    "experiments.speed": [
        *("avalanche_classp", "experiments.errors"),
        *("experiments.protocol", "experiments.running"),
    ],
    "experiments.language": ["avalanche_classp", "experiments.errors", "experiments.running"],
    "experiments": ["avalanche_classp", "experiments"],
}
"""Rooms, and those that a module in one may import beside its own.

``avalanche_classp`` and ``experiments`` are the roofs (``__init__.py``, and the command line); to
import the roof ``avalanche_classp`` is to import any of its rooms. ``avalanche_classp.*`` are the
modules that lie in no folder: the plugin, the strategy, the metrics.
"""

NEVER_IMPORTED = {
    "avalanche_classp": ["avalanche", "torchvision", "experiments"],
    "avalanche_classp.optim.optimizer": ["avalanche", "torchvision"],
    "experiments.protocol.methods": ["avalanche", "torch"],
    "experiments.protocol.benchmarks": ["avalanche", "torch"],
    "experiments.protocol.config": ["avalanche", "torch"],
    "experiments.protocol.models": ["avalanche", "torch"],
    "experiments.protocol.tuned_settings": ["avalanche", "torch"],
    "experiments.cli": ["avalanche", "torch"],
}
"""Modules, and packages that importing one must not import, neither itself nor through others."""


@cache
def modules():
    """Return the files of all modules by their names."""
    files = [
        f
        for top in ("avalanche_classp", "experiments")
        for f in REPOSITORY.glob(f"{top}/**/*.py")
        if "results" not in f.parts
    ]
    names = [f.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".") for f in files]
    return {n.removesuffix(".__init__"): f for n, f in zip(names, files, strict=True)}


def imported(node, name):
    """Yield the modules that an import statement in the module of this name imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    # `experiments` is `avalanche_classp.experiments` in the wheel: it alone imports relatively.
    relative = name.split(".")[0] == "experiments"
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    if node.level:
        assert relative, f"{name} has a relative import in line {node.lineno}"
        package = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
        source = f"{package}.{node.module}" if node.module else package
    else:
        source = node.module
        assert not (relative and source.split(".")[0] == "experiments"), f"{name}: {source}"
    for alias in node.names:
        inner = f"{source}.{alias.name}"
        yield inner if inner in modules() else source


def imports(name, always):
    """Return what a module imports: anywhere, or always, that is whenever it is itself imported."""
    nodes, found = [ast.parse(modules()[name].read_text())], set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(imported(node, name))
        elif always and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif always and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            nodes += node.orelse
        else:
            nodes += ast.iter_child_nodes(node)
    return found


def room_of(module):
    """Return the room that a module belongs to; None if it is not of this house."""
    top, *inner = module.split(".")
    if top not in ("avalanche_classp", "experiments"):
        return None
    if inner[-1:] == ["__main__"]:  # the command line of a room lies under the roof
        return top
    room = f"{top}.{inner[0]}" if inner else top
    if room in MAY_IMPORT:
        return room
    assert modules()[room].name != "__init__.py", f"{room} is a room without a line in MAY_IMPORT"
    return "avalanche_classp.*" if top == "avalanche_classp" else top


def may_import(room, other):
    allowed = MAY_IMPORT[room]
    if other == room or other in allowed:
        return True
    roof = other.split(".")[0]
    # A roof's own modules may look into every room of it, and so may who may import that roof.
    return roof in allowed and (roof != "experiments" or room == "experiments")


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_lies_below_them(room):
    inside = [name for name in modules() if room_of(name) == room]
    assert inside
    wrong = [
        f"{name} imports {other}"
        for name in inside
        for other in sorted(imports(name, always=False))
        if room_of(other) and not may_import(room, room_of(other))
    ]
    assert not wrong


@pytest.mark.parametrize("room", ["avalanche_classp.optim"])
def test_the_optimizer_needs_torch_alone(room):
    inside = [name for name in modules() if room_of(name) == room]
    packages = {other.split(".")[0] for name in inside for other in imports(name, always=False)}
    assert not packages & {"avalanche", "torchvision", "numpy", "scipy", "sklearn"}


@pytest.mark.parametrize("name", NEVER_IMPORTED)
def test_what_must_be_quick_to_import_imports_no_big_package(name):
    via = {name: name}
    todo = [name]
    while todo:
        module = todo.pop()
        parts = module.split(".")
        packages = {".".join(parts[:i]) for i in range(1, len(parts))}  # their __init__ run, too
        for other in imports(module, always=True) | packages if module in modules() else ():
            if other not in via:
                via[other] = f"{via[module]} → {other}"
                todo.append(other)
    wrong = [way for other, way in via.items() if other.split(".")[0] in NEVER_IMPORTED[name]]
    assert not wrong
