"""Nothing that the project reads can run code: no source reads a pickle."""

import ast
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *(path for folder in ("sdxl_ambient", "eval", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))),
    ROOT / "train_sdxl_ambient.py",
]
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "torch.save", "torch.jit.load", "numpy.load", "np.load", "pandas.read_pickle", "yaml.load"}
# Sharded states of FSDP and DeepSpeed are read by accelerate, after their signature is checked.
GUARDED = {("sdxl_ambient/training/state.py", f"accelerator.{what}_state") for what in ("load", "save")}
# Loaders that make nothing but plain values: a child of yaml's safe one, and NumPy's, which refuses pickles by default.
PLAIN = {("sdxl_ambient/config/parser.py", "yaml.load"), ("benchmarks/neighbours.py", "np.load")}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_no_source_reads_or_writes_a_pickle():
    found = set()
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {(name, one.name) for one in node.names if one.name.split(".")[0] in MODULES}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
                found.add((name, node.module))
            elif isinstance(node, ast.Call):
                what = called(node)
                if what in CALLS or what.endswith(("accelerator.load_state", "accelerator.save_state")):
                    found.add((name, what))
                if any(k.arg == "trust_remote_code" and getattr(k.value, "value", None) is not False for k in node.keywords):
                    found.add((name, "trust_remote_code"))
                assert not any(k.arg == "allow_pickle" for k in node.keywords), name
    assert found == GUARDED | PLAIN
    from sdxl_ambient.config import parser

    loaders = [value for value in vars(parser).values() if isinstance(value, type) and issubclass(value, yaml.Loader)]
    assert not loaders
