"""The house stays in order: imports go downwards only, and importing the library does no work.

The rooms, from the ground up; a room imports itself and the rooms named beside it, nothing else:

    files                         what others wrote; the standard library
    core, kernels                 the idea; jax, numpy and chex
    optim checkpoint sharding ... one noun each, on core alone
    models -> formats, generate   the only users of Flax
    data, train, sweep, cli       the loop, many loops at once, and their command line
"""

import ast
import graphlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(importlib.util.find_spec("lora_jax").submodule_search_locations[0])

ON_CORE = {"core", "kernels"}
TRAIN = ON_CORE | {
    "files",
    "optim",
    "checkpoint",
    "sharding",
    "memory",
    "data",
    "models",
    "formats",
}
ROOMS = {
    "files": set(),
    "core": ON_CORE,
    "kernels": ON_CORE,
    "optim": ON_CORE,
    "checkpoint": ON_CORE | {"files"},
    "sharding": ON_CORE,
    "memory": ON_CORE,
    "init": ON_CORE,
    "arithmetic": ON_CORE,
    "analysis": ON_CORE,
    "bank": ON_CORE,
    "models": ON_CORE | {"files"},
    "nnx": ON_CORE,
    "formats": ON_CORE | {"files", "models"},
    "generate": ON_CORE | {"models"},
    "data": {"files"},
    "train": TRAIN,
    "sweep": TRAIN | {"train"},
    "cli": TRAIN | {"train", "sweep", "generate", "init", "arithmetic", "analysis", "bank"},
}

FOUNDATION = {"jax", "jaxlib", "numpy", "chex"}
ONLY_ON_FOUNDATION = {"core", "kernels"}
FLAX_ROOMS = {"models", "nnx"}


def module_files() -> dict[str, Path]:
    """Every module's dotted name, `lora_jax` itself included, and its file."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = module_files()


def imports(module: str) -> set[str]:
    """Names of all modules that `module` imports, at its top or inside its functions."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                found.add(submodule if submodule in MODULES else source)
    return found


def room(module: str) -> str:
    """`lora_jax.core.tree` lives in `core`; `lora_jax` itself in no room."""
    return module.split(".")[1] if "." in module else ""


HOUSED = sorted(module for module in MODULES if room(module))


def test_every_room_is_known():
    assert {room(module) for module in HOUSED} <= set(ROOMS), "give the new room its place in ROOMS"


@pytest.mark.parametrize("module", HOUSED)
def test_imports_go_downwards(module):
    own = {name for name in imports(module) if name.split(".")[0] == "lora_jax"}
    allowed = ROOMS[room(module)] | {room(module)}
    assert {room(name) for name in own} <= allowed, f"{module} imports {sorted(own)}"


@pytest.mark.parametrize("module", HOUSED)
def test_third_parties_stay_in_their_rooms(module):
    tops = {name.split(".")[0] for name in imports(module)}
    third_party = tops - {"lora_jax"} - sys.stdlib_module_names
    assert "torch" not in third_party
    if room(module) in ONLY_ON_FOUNDATION:
        assert third_party <= FOUNDATION
    if room(module) not in FLAX_ROOMS:
        assert "flax" not in third_party


def test_no_cycles():
    # A package's __init__ re-exports its own modules, which therefore do not depend on it.
    graph = {
        module: {
            name for name in imports(module) & set(MODULES) if not module.startswith(f"{name}.")
        }
        for module in MODULES
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which spells out the cycle


def run_python(code: str) -> str:
    """Runs `code` in a fresh interpreter, warnings as errors, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_fetches_jax_and_little_else():
    """What `import lora_jax` adds to `import jax`: itself, chex and the standard library."""
    code = """
import sys, jax, numpy
before = {name.partition(".")[0] for name in sys.modules}
import lora_jax
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - sys.stdlib_module_names))
"""
    assert set(run_python(code).split()) <= {
        "lora_jax",
        "chex",
        "absl",
        "toolz",
        "typing_extensions",
    }


def test_no_work_at_import():
    """Importing every module leaves JAX without a backend, hence without a single array."""
    names = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "lora_jax.")]
    imported = "\n".join(f"import {name}" for name in names if not name.endswith("__main__"))
    # JAX refuses to change its number of devices once any backend has started.
    code = f"{imported}\nimport jax\njax.config.update('jax_num_cpu_devices', 3)\n"
    run_python(code)
