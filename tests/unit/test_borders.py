"""The import borders of the design: floors, no circles, and what each half never loads."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import minserve

ROOT = Path(minserve.__file__).parent

# Top floor first. A package may import its own floor and those below it, within one half.
SERVER_HALF = [
    {"__main__"},
    {"cli"},
    {"archiver", "checking", "console", "replay", "torchserve"},
    {"background"},
    {"playlist"},
    {"recording"},
    {"client"},
    {"server"},
    {"frontends"},
    {"frontend"},
    {"registry"},
    {"worker"},
    {"dispatch", "config", "wire"},
    {"telemetry", "errors"},
]
# What authors import in their tests: it sees a server from outside, as any client does.
TESTING = [{"testing"}, {"config", "wire"}, {"errors"}]
RANKS_HALF = [{"handlers", "compat"}, {"rank"}, {"wire"}, {"errors"}]
SERVER_PACKAGES = set().union(*SERVER_HALF)
RANK_PACKAGES = {"handlers", "compat", "rank"}
FORBIDDEN = {
    **{package: {"torch"} for package in SERVER_PACKAGES},
    **{package: {"aiohttp", "uvloop", "pydantic", "typer", "rich"} for package in RANK_PACKAGES},
}
FORBIDDEN["wire"] = FORBIDDEN["wire"] | {"socket", "asyncio", "aiohttp", "uvloop"}
FORBIDDEN["testing"] = {"torch", "aiohttp", "uvloop", "pydantic", "typer", "rich", "pytest"}
FORBIDDEN["dispatch"] = FORBIDDEN["dispatch"] | {"socket", "aiohttp", "uvloop"}
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imports_of(module: str, node: ast.AST, *, types_too: bool = True) -> Iterator[str]:
    """Every module that the code names in an import, wherever it stands; without types, what is really loaded."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not types_too:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:  # in compat/ts alone, which is also imported as `ts`
                above = module.split(".")[: -child.level + (MODULES[module].name == "__init__.py") or None]
                base = ".".join([*above, *filter(None, [base])])
            for alias in child.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base
        else:
            yield from imports_of(module, child, types_too=types_too)


def package_of(module: str) -> str:
    return [*module.split("."), ""][1]


def may_import(importer: str, imported: str) -> bool:
    for half in (SERVER_HALF, RANKS_HALF, TESTING):
        floors = {package: number for number, floor in enumerate(half) for package in floor}
        if importer in floors and floors[importer] <= floors.get(imported, -1):
            return True
    return False


def test_imports_run_downwards_without_circles_and_keep_to_their_half() -> None:
    violations = []
    packages: dict[str, set[str]] = {}
    loaded: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        package = package_of(module)
        loaded[module] = {name for name in imports_of(module, tree, types_too=False) if name in MODULES} - {module}
        for name in imports_of(module, tree):
            if name.partition(".")[0] in FORBIDDEN.get(package, set()):
                violations.append(f"{module} imports {name}")
            # The bare `minserve` is the version for all, and names for handlers that it looks up on first use.
            if name.startswith("minserve.") and package:
                packages.setdefault(package, set()).add(package_of(name))
                if not may_import(package, package_of(name)):
                    violations.append(f"{module} imports {name}: upwards, or over to the other half")
    assert violations == []
    assert packages.keys() <= SERVER_PACKAGES | RANK_PACKAGES | {"testing"}, "a new package needs a floor here"
    for graph in ({package: below - {package} for package, below in packages.items()}, loaded):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(f"imports run in a circle: {' → '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("minserve", {"torch", "aiohttp", "pydantic", "msgspec", "yaml", "asyncio"}),
        ("minserve.cli", {"torch", "aiohttp"}),
        ("minserve.server", {"torch"}),
        ("minserve.checking", {"torch", "aiohttp"}),
        ("minserve.rank.__main__", {"torch", "aiohttp", "asyncio", "pydantic", "uvloop", "rich"}),
        ("minserve.handlers", {"torch", "aiohttp"}),
        ("minserve.testing", {"torch", "aiohttp", "pydantic", "pytest"}),
        ("minserve.replay", {"torch", "aiohttp"}),
    ],
)
def test_importing_a_module_loads_nothing_that_it_has_no_business_with(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*{absent!r} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == []


def test_in_the_server_half_the_command_line_alone_reads_argv_and_the_environment() -> None:
    readers = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if package_of(module) in SERVER_PACKAGES
        and isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("os.environ", "os.getenv", "sys.argv")
    }
    # The guardian is a program of its own, which knows nothing but its arguments.
    assert {name for name in readers if package_of(name) != "cli"} == {"minserve.worker.guardian"}
