"""The tree keeps its shape: imports and includes point one way, files and functions stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "groupvit_fast"
COMMANDS = {"train", "evaluate", "segment", "shards", "convert", "demo"}
# What each part of the package may import of it; a command line may import anything but another one.
ALLOWED = {
    "": set(),
    "console": set(),
    "ops": {"ops"},
    "model": {"model", "ops", "console"},
    "data": {"data", "ops", "console"},
    "training": {"training", "model", "data", "ops", "console"},
    "segmentation": {"segmentation", "model", "data", "ops", "console"},
    **{command: {"training", "segmentation", "model", "data", "ops", "console", ""} for command in COMMANDS},
}
SOURCES = ("*.py", "*.h", "*.cpp", "*.cu", "*.cuh")
MOST_LINES = {"groupvit_fast": 300, "csrc": 300, "kernels": 420, "tests": 400, "benchmarks": 400}
MOST_FUNCTION_LINES = 45


def sources(*patterns):
    """Files of the tree, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def part_of(path):
    """The part of the package that a module belongs to: "ops", "train", or "" for the package itself."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported_parts(path, source):
    """(part, line) of every import of the package in a module, relative ones resolved."""
    package = ["groupvit_fast", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "groupvit_fast":
                known = len(name) > 1 and name[1] in ALLOWED
                yield (name[1] if known else ""), node.lineno


def wrong_imports(path, source):
    own = part_of(path)
    allowed = ALLOWED.get(own, set())
    return [
        f"{path.name}:{line}: {own or 'groupvit_fast'} imports {part or 'groupvit_fast'}"
        for part, line in imported_parts(path, source)
        if part not in allowed
    ]


def test_every_module_has_a_place():
    parts = {part_of(path) for path in sources("groupvit_fast/*.py")}
    assert parts <= set(ALLOWED)


def test_python_imports_point_one_way():
    wrong = [line for path in sources("groupvit_fast/*.py") for line in wrong_imports(path, path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops/bad.py", "from groupvit_fast.console import UserError"),
        ("ops/bad.py", "from .. import model"),
        ("model/bad.py", "from ..data import text"),
        ("data/bad.py", "def f():\n    import groupvit_fast.training.losses"),
        ("training/bad.py", "from groupvit_fast import segmentation"),
        ("segmentation/bad.py", "from ..training.losses import contrastive_loss"),
        ("evaluate.py", "from groupvit_fast.train import main"),
    ],
)
def test_a_wrong_import_is_seen(module, source):
    assert wrong_imports(PACKAGE / module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops/good.py", "from . import reference"),
        ("ops/good.py", "from .checks import check_number"),
        ("training/good.py", "from ..model.groupvit import GroupViT"),
        ("train.py", "from groupvit_fast import __version__"),
    ],
)
def test_a_right_import_passes(module, source):
    assert not wrong_imports(PACKAGE / module, source)


def test_ops_need_nothing_but_torch():
    names = set()
    for path in sources("groupvit_fast/ops/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch"}


def loaded_after(statement, condition):
    """Names of the modules m that satisfy `condition` after `statement` ran in a fresh interpreter."""
    probe = f"import sys\n{statement}\nprint(*(m for m in sys.modules if {condition}))"
    return subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()


def test_importing_the_package_is_light():
    assert not loaded_after("import groupvit_fast", "m in ('torch', 'numpy', 'nvidia')")
    own = loaded_after("import groupvit_fast.ops", "m.startswith('groupvit_fast.')")
    assert {name.split(".")[1] for name in own} == {"ops"}


# ---- C++ -------------------------------------------------------------------------------------------------

TORCH_ALLOWED = re.compile(
    r"csrc/(tensor_checks|cuda_context|huge_pages)\.h|csrc/library_\w+\.cpp|csrc/\w+_cpu\w*\.(cpp|h)|csrc/cpu_\w+\.h"
)


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', path.read_text(), flags=re.MULTILINE)


def test_kernels_include_kernels_and_cuda_only():
    for path in sources("kernels/*"):
        for name in includes(path):
            own = (ROOT / "kernels" / name).exists() or name == "host_cuda.h"
            plain = "/" not in name and not name.startswith("torch") and not name.endswith(".cuh")
            assert own or plain, f"{path.name} includes {name}"


def test_torch_stays_out_of_the_launch_code():
    for path in sources("csrc/*"):
        name = str(path.relative_to(ROOT))
        uses_torch = any(include.startswith(("torch/", "ATen/", "c10/")) for include in includes(path))
        assert not uses_torch or TORCH_ALLOWED.fullmatch(name), f"{name} includes torch"
    launch = [*sources("csrc/*.cu"), ROOT / "csrc/launchers.h"]
    assert not [
        path for path in launch if {"csrc/tensor_checks.h", "csrc/cuda_context.h"} & set(includes(path))
    ]


def test_cuda_syntax_stays_in_one_place():
    for path in sources("kernels/*", "csrc/*"):
        if path.name != "portability.cuh":
            code = re.sub(r"//.*", "", path.read_text())
            assert "<<<" not in code, path
            assert "extern __shared__" not in code, path
            assert "__syncthreads" not in code, path


def test_only_the_stable_part_of_torch_is_included():
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for path in sources("csrc/*"):
        for name in includes(path):
            assert not name.startswith(("torch/", "ATen/", "c10/")) or name.startswith(stable), (
                f"{path}: {name}"
            )


# ---- sizes -----------------------------------------------------------------------------------------------


def test_files_stay_small():
    large = []
    for path in sources(*SOURCES):
        lines = path.read_text().count("\n")
        most = MOST_LINES.get(path.relative_to(ROOT).parts[0], 300)
        if lines > most:
            large.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {most}")
    assert not large, "\n".join(large)


def body_lines(function):
    """Lines of a function below its signature and docstring."""
    first = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - first[0].lineno + 1 if first else 0


def test_functions_stay_small():
    large = []
    for path in sources("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and body_lines(node) > MOST_FUNCTION_LINES
            ):
                large.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}, {body_lines(node)} lines")
    assert not large, "\n".join(large)
