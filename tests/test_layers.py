"""Imports may only point down the stack, and the core needs torch and triton alone."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
# lowest first; a layer may import itself and what stands before it
LAYERS = [
    ("kernels",),
    ("logps",),
    ("losses",),
    ("data", "models", "report"),
    ("methods",),
    ("rollout",),
    ("train", "plan"),
    ("evaluate",),
    ("integrations", "cli", "quickstart", "__init__"),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def project_imports(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def sources():
    paths = sorted((ROOT / "kernels").glob("*.py")) + sorted((ROOT / "fastpref").rglob("*.py"))
    assert len(paths) > 10
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, "kernels" if parts[0] == "kernels" else parts[1]


def test_imports_point_down():
    for path, layer in sources():
        for name in project_imports(path):
            assert name.split(".")[0] != "kernels", f"{path}: import it as fastpref.kernels"
            assert name != "fastpref" or RANK[layer] == RANK["cli"], f"{path}: import a module"
            if name.startswith("fastpref."):
                other = name.split(".")[1]
                assert RANK[other] <= RANK[layer], f"{path} imports {name}, which stands above it"


def test_only_zero_imports_deepspeed():
    for path, _ in sources():
        if path.name != "zero.py":
            assert not any(name.startswith("deepspeed") for name in project_imports(path)), path


def test_core_imports_torch_and_triton_alone():
    code = (
        "import sys, fastpref\n"
        "names = ('transformers', 'datasets', 'deepspeed', 'jsonargparse', 'rich', 'tokenizers')\n"
        "print([n for n in names if n in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[]"


def test_the_kernels_folder_registers_nothing_when_imported_bare():
    """transformers probes a package of the name ``kernels``: ours must be a docstring alone."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr)
