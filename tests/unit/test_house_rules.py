"""Rules of the house that neither ruff nor import-linter checks: commands, sizes of functions, imports inside them."""

import ast
import re

import pytest
from support.source import SCRIPT, functions, imported, modules

OPTION_MODULES = re.compile(r"(^|\.)((\w+_)?options|config\.\w+)\.\w+$")
MOST_LINES, MOST_PARAMETERS = 60, 8
# The public calls: every setting of a pipeline, and of sampling, by its name.
MANY_PARAMETERS = {"sdxl_ambient.pipeline.load_pipeline", "sdxl_ambient.pipeline.sample"}
RUNS_THE_SCRIPT = {"benchmarks.script"}  # trains in its own process, for the study and the tests
# Imported where they are used: packages that need not be installed, and those that take long to import.
OPTIONAL = {
    *("atheris", "bitsandbytes", "cv2", "faiss", "lycoris", "opacus", "pillow_heif", "prodigyopt", "schedulefree", "wandb"),
}
SLOW = {"datasets", "dp_accounting", "diffusers", "matplotlib", "torch", "transformers"}
# Own modules that are imported late, so that what comes before starts quickly. A main() may always do so.
LATE = {
    "benchmarks.script.train_here",
    "benchmarks.study.run.prepare",
    "benchmarks.study.run.work",
    "benchmarks.train_miniature.draw_grid",
    "eval.checkpoints.resolve_base",
    "eval.options._warn",
}


@pytest.fixture(scope="module")
def trees():
    found = modules()
    assert {SCRIPT, "eval.memorization", "benchmarks.study.__main__", "sdxl_ambient.store.build"} <= found.keys()
    return found


def named(trees):
    """Every function's full name with its node."""
    return [(f"{module}.{name}", node) for module, tree in trees.items() for name, node in functions(tree)]


def commands_of(trees):
    """Modules that have a main(). Their libraries are imported after the options are parsed."""
    return {
        name for name, tree in trees.items() if any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in tree.body)
    }


def _checks_options(name):
    """Whether a function checks options: in a light module, so that what it needs is imported when it is called."""
    module, _, function = name.rpartition(".")
    return OPTION_MODULES.search(module) is not None and function.lstrip("_").startswith(
        ("validate", "check", "models", "tuned")
    )


def test_no_module_imports_a_command(trees):
    commands = commands_of(trees)
    assert {SCRIPT, "eval.memorization", "sdxl_ambient.latents", "benchmarks.dp_lora"} <= commands
    found = {module for module, tree in trees.items() for node in ast.walk(tree) if imported(node) & (commands - {module})}
    assert sorted(found - RUNS_THE_SCRIPT) == []


def test_functions_are_short(trees):
    found = {name: (node.end_lineno or node.lineno) - node.lineno + 1 for name, node in named(trees)}
    assert {name: lines for name, lines in found.items() if lines > MOST_LINES} == {}


def test_functions_have_few_parameters(trees):
    found = {}
    for name, node in named(trees):
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        found[name] = sum(p.arg not in ("self", "cls") for p in parameters)
    wanted = {name: n for name, n in found.items() if n > MOST_PARAMETERS and name not in MANY_PARAMETERS}
    assert wanted == {}


def test_imports_stand_at_the_top(trees):
    """But for optional or slow packages, in commands, in checks of options, and in the few functions that are listed."""
    commands = tuple(f"{name}." for name in commands_of(trees))
    late = set()
    for name, node in named(trees):
        if name.startswith(commands) or _checks_options(name) or name.startswith(tuple(f"{other}." for other in LATE)):
            continue
        for inner in ast.walk(node):
            if {module.split(".")[0] for module in imported(inner)} - OPTIONAL - SLOW:
                late.add(name)
    # Of functions in one another, the innermost is meant.
    late = {name for name in late if not any(other.startswith(f"{name}.") for other in late)}
    assert sorted(late - LATE) == []


def test_variables_are_named_by_what_they_hold(trees):
    """Not by a question or a speaker's word, which fits anything."""
    vague = {"told", "how", "where", "mine", "asked", "say"}
    named_so = set()
    for module, tree in trees.items():
        for node in ast.walk(tree):
            name = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else getattr(node, "arg", None)
            if name in vague and not isinstance(node, ast.keyword):
                named_so.add(f"{module}: {name}")
    assert sorted(named_so) == []
