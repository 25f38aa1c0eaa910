"""Rules of the house that neither ruff nor import-linter checks: commands, sizes of functions, imports inside them."""

import ast

import pytest
from support.source import SCRIPT, functions, imported, modules

# Functions (or modules that import a command) that still break a rule.
EXPECTED = {
    "eval.attacks.run._open",
    "eval.attacks.subject.LoadedModel.decode",
    "eval.attacks.subject.LoadedModel.encode",
    "eval.checkpoints.Checkpoint.t_n",
    "eval.checkpoints._file_problem",
    "eval.checkpoints._whole_weights",
    "eval.checkpoints.run_checkpoints",
    "eval.drawing.open_checkpoint.base_unet",
    "eval.drawing.open_checkpoint.draw",
    "eval.drawing.open_checkpoint.pipe",
    "eval.drawing.open_vae",
    "eval.embedders.registry._fingerprint",
    "eval.embedders.registry._sscd",
    "eval.evaluation.plan_models",
    "eval.neighbours.search",
    "eval.reporting.figures.make_references",
    "eval.statistics.calibrate.copied_share",
    "sdxl_ambient.config.data.DataOptions.geometry",
    "sdxl_ambient.config.groups.LossOptions.objective",
    "sdxl_ambient.config.training.TrainOptions.restore_options",
    "sdxl_ambient.formats.original.original_model",
    "sdxl_ambient.images.sources.open_records",
    "sdxl_ambient.objective._consistency",
    "sdxl_ambient.objective.consistency_loss",
    "sdxl_ambient.option_template",
    "sdxl_ambient.pipeline.load_pipeline",
    "sdxl_ambient.store.batches.Stream.__init__",
    "sdxl_ambient.store.build.build_store",
    "sdxl_ambient.training.heldout_loss.band_losses",
    "train_sdxl_ambient.quick_look",
    "train_sdxl_ambient.train",
}

MOST_LINES, MOST_PARAMETERS = 60, 8
MANY_PARAMETERS = {"sdxl_ambient.pipeline.sample"}  # the public call: every setting of sampling by its name
RUNS_THE_SCRIPT = {"benchmarks.script"}  # trains in its own process, for the study and the tests
# Imported where they are used: packages that need not be installed, and those that take long to import.
OPTIONAL = {"bitsandbytes", "faiss", "opacus", "prodigyopt", "schedulefree", "wandb"}
SLOW = {"datasets", "diffusers", "matplotlib", "torch", "transformers"}
# Own modules that are imported late, so that what comes before starts quickly. A main() may always do so.
LATE = {
    "benchmarks.script.train_here",
    "benchmarks.study.run.prepare",
    "benchmarks.study.run.work",
    "benchmarks.train_miniature.draw_grid",
}


@pytest.fixture(scope="module")
def trees():
    found = modules()
    assert {SCRIPT, "eval.memorization", "benchmarks.study.__main__", "sdxl_ambient.store.build"} <= found.keys()
    return found


def named(trees):
    """Every function's full name with its node."""
    return [(f"{module}.{name}", node) for module, tree in trees.items() for name, node in functions(tree)]


def test_no_module_imports_a_command(trees):
    commands = {
        name for name, tree in trees.items() if any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in tree.body)
    }
    assert {SCRIPT, "eval.memorization", "sdxl_ambient.latents", "benchmarks.dp_lora"} <= commands
    found = {module for module, tree in trees.items() for node in ast.walk(tree) if imported(node) & (commands - {module})}
    assert sorted(found - RUNS_THE_SCRIPT - EXPECTED) == []


def test_functions_are_short(trees):
    found = {name: (node.end_lineno or node.lineno) - node.lineno + 1 for name, node in named(trees)}
    assert {name: lines for name, lines in found.items() if lines > MOST_LINES and name not in EXPECTED} == {}


def test_functions_have_few_parameters(trees):
    found = {}
    for name, node in named(trees):
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        found[name] = sum(p.arg not in ("self", "cls") for p in parameters)
    wanted = {name: n for name, n in found.items() if n > MOST_PARAMETERS and name not in MANY_PARAMETERS | EXPECTED}
    assert wanted == {}


def test_imports_stand_at_the_top(trees):
    """But for those of packages that are optional or slow, in a main(), and the few that are listed."""
    found = set()
    for name, node in named(trees):
        for inner in ast.walk(node):
            own = {module.split(".")[0] for module in imported(inner)} - OPTIONAL - SLOW
            if own and node.name != "main" and not name.startswith(tuple(f"{other}." for other in LATE)):
                found.add(name)
    # Of functions in one another, the innermost is meant.
    found = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    assert sorted(found - LATE - EXPECTED) == []
