"""The project's own source, as syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("sdxl_ambient", "eval", "benchmarks")
SCRIPT = "train_sdxl_ambient"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    """The name that a file is imported by; a package's __init__.py has the package's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, ast.Module]:
    """All modules of the project by their names, without the tests."""
    paths = [ROOT / f"{SCRIPT}.py", *(p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py")))]
    return {module_name(p): ast.parse(p.read_text(encoding="utf-8"), str(p)) for p in paths}


def functions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with its qualified name, those of classes and of other functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function | ast.ClassDef):
            name = f"{within}{node.name}"
            if isinstance(node, Function):
                yield name, node
            yield from functions(node, f"{name}.")
        else:
            yield from functions(node, within)


def imported(node: ast.AST) -> set[str]:
    """The names of modules that an import statement may load: ``from a.b import c`` gives a.b and a.b.c."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()
