"""Rule of the house: library functions take plain values; only a main() and the set-up of training see an options object."""

import ast

import pytest
from support.source import functions, imported, modules

SET_UP = {"sdxl_ambient.training.setup", "sdxl_ambient.training.settings", "eval.settings"}
# Its keyword arguments are options, which it checks by itself.
KEYWORDS = "benchmarks.private_training"


def declares(module):
    """Whether options are declared there."""
    return module.startswith("sdxl_ambient.config") or module.endswith(("options", KEYWORDS))


def is_command(tree):
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def parameters(node):
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


@pytest.fixture(scope="module")
def trees():
    return modules()


@pytest.fixture(scope="module")
def libraries(trees):
    """The modules that know no options."""
    found = {n: t for n, t in trees.items() if not (declares(n) or n in SET_UP or is_command(t))}
    assert {"sdxl_ambient.training.model", "sdxl_ambient.training.run", "sdxl_ambient.store.build"} <= found.keys()
    assert {"eval.evaluation", "eval.drawing", "eval.attacks.run", "benchmarks.study.cell"} <= found.keys()
    return found


@pytest.fixture(scope="module")
def classes(trees):
    """The names of all classes of options. ObjectiveOptions and RestoreOptions are settings, and lie elsewhere."""
    nodes = [node for module, tree in trees.items() if declares(module) for node in tree.body]
    found = {node.name for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith("Options")}
    assert {
        "TrainOptions",
        "ModelOptions",
        "LoopOptions",
        "MemorizationOptions",
        "AttackOptions",
    } <= found and "ObjectiveOptions" not in found
    return found


def seen_options(tree, trees, classes):
    """Classes of options that a module imports, and modules that declare them where it imports one whole."""
    names = {name for node in ast.walk(tree) for name in imported(node)}
    own = {name for name in names if declares(name.rpartition(".")[0]) and name.rpartition(".")[2] in classes}
    whole = {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    whole |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return own | {name for name in whole if name in trees and declares(name)}


def test_only_commands_and_the_set_up_of_training_import_options(trees, libraries, classes):
    found = {module: sorted(seen_options(tree, trees, classes)) for module, tree in libraries.items()}
    assert {module: names for module, names in found.items() if names} == {}
    assert all(seen_options(trees[module], trees, classes) for module in (*SET_UP, "sdxl_ambient.latents"))


def test_no_class_of_a_library_keeps_options(libraries, classes):
    found = []
    for module, tree in libraries.items():
        for node in ast.walk(tree):
            kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
            if classes & set(kind.replace(".", " ").split()):
                found.append(f"{module}: {ast.unparse(node)}")
    assert found == []


def test_no_library_function_is_given_options(libraries, classes):
    """Nor anything of that name without a type, which would hide them."""
    found = []
    for module, tree in libraries.items():
        for name, node in functions(tree):
            for parameter in parameters(node):
                kind = ast.unparse(parameter.annotation) if parameter.annotation else ""
                hidden = parameter.arg == "options" and kind in ("", "object", "Any")
                if hidden or classes & set(kind.replace(".", " ").split()):
                    found.append(f"{module}.{name}: {parameter.arg}")
    assert found == []
