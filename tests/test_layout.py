"""The repository's shape: imports go one way, and every way of installing gives the same package."""

import ast
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.helpers.tiers import full, slow

ROOT = Path(__file__).parent.parent
# Each room imports only from itself and from those before it (docs/design.md: data goes left to right and never back).
ORDER = [
    "__init__",
    "demo",
    "_cpu",
    "_cuda",
    "native",
    "optim",
    "kernels",
    "ops",
    "integrations",
    "common",
    "config",
    "data",
    "runs",
    "models",
    "losses",
    "sampling",
    "engine",
    "methods",
    "startup",
    "evaluation",
    "reports",
    "train",
    "plan",
    "bon",
    "evaluate",
    "data.select",
    "generate",
    "report",
    "watch",
    "recipes",
    "doctor",
    "chat",
    "__main__",
]


def room_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT / "irlfast").with_suffix("").parts)
    return name if name in ORDER else name.split(".")[0]


def imported(path: Path) -> set[str]:
    """The rooms that a module imports from."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "irlfast":
            names |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
    return {name for name in names if (ROOT / "irlfast" / name).exists() or (ROOT / "irlfast" / f"{name}.py").exists()}


@pytest.mark.parametrize("path", sorted((ROOT / "irlfast").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = room_of(path)
    assert own in ORDER, f"{own} has no place in the order yet"
    late = {name for name in imported(path) if ORDER.index(name) > ORDER.index(own)}
    assert not late, f"{own} imports from after it: {late}"


def test_files_and_functions_stay_small():
    for path in [*ROOT.glob("irlfast/**/*.py"), *ROOT.glob("kernels/*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                manual = len((ast.get_docstring(node) or "").splitlines())
                assert node.end_lineno - node.lineno - manual <= 60, f"{path}: {node.name}"


def test_hugging_faces_package_kernels_is_not_shadowed():
    """Transformers imports a package of this name; ours from the root must not be it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "irlfast" / "kernels").is_symlink()


def environment(folder: Path) -> tuple[str, str, list[str]]:
    """A new one that sees the installed packages, but not this project: its Python, packages, and pip's command."""
    venv.create(folder, with_pip=False)
    [site] = folder.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "outer.pth").write_text("\n".join(packages))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(site)]
    return str(folder / "bin" / "python"), str(site), pip


def run(*command: str, cwd: Path) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


NATIVE = "from irlfast import native; print(native.cpu is not None, native.cuda is not None)"
IMPORTS = (
    "import irlfast.kernels, irlfast.ops, irlfast.methods.irft, irlfast.report, pathlib;"
    "here = pathlib.Path(irlfast.__file__).parent; print(here);"
    "names = ['demo/train.jsonl', *(f'reports/{name}' for name in ('report.html.j2', 'style.css', 'charts.js'))];"
    "assert all((here / name).exists() for name in names)"
)
HAS_COMPILER, HAS_NVCC = (shutil.which(name) is not None for name in ("c++", "nvcc"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy as a clone would have it: what git tracks."""
    clone = tmp_path_factory.mktemp("clone")
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    run("tar", "--create", "--file", str(clone / "all.tar"), *(f for f in tracked if (ROOT / f).exists()), cwd=ROOT)
    run("tar", "--extract", "--file", "all.tar", cwd=clone)
    (clone / "all.tar").unlink()
    return clone


@full
def test_the_wheel_made_from_the_sdist_imports_from_elsewhere(clone, tmp_path, monkeypatch):
    """Where there is a compiler, but no nvcc, whose sources it has nevertheless."""
    monkeypatch.setenv("IRLFAST_STRICT", str(int(HAS_COMPILER)))
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), cwd=clone)
    [sdist], [wheel] = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    names = {name.partition("/")[2] for name in run("tar", "--list", "--file", str(sdist), cwd=tmp_path).splitlines()}
    assert {str(path.relative_to(clone)) for path in (clone / "csrc").rglob("*.*")} <= names
    python, site, pip = environment(tmp_path / "env")
    run(*pip, str(wheel), cwd=tmp_path)
    assert run(python, "-c", IMPORTS, cwd=tmp_path).strip().startswith(site)
    assert run(python, "-c", NATIVE, cwd=tmp_path).strip() == f"{HAS_COMPILER} False"
    works_in_an_empty_folder(tmp_path / "empty", python, f"{site}/bin/irlfast")


def works_in_an_empty_folder(folder: Path, *irlfast: str) -> None:
    """The console script that pip wrote: recipes by name, with the model config and the data that they name."""
    folder.mkdir()
    assert run(*irlfast, "--version", cwd=folder).startswith("irlfast 0.")
    listed = run(*irlfast, "recipes", cwd=folder)
    assert all(path.stem in listed for path in (ROOT / "configs").glob("*.yaml"))
    small = "max_train_samples=64 max_eval_samples=8 sft_steps=2 stages=1 inner_steps=2 max_new_tokens=4".split()
    run(*irlfast, "train", "irft", *small, cwd=folder)
    assert (folder / "runs" / "irft" / "final" / "model.safetensors").exists()
    run(*irlfast, "report", "runs/irft", cwd=folder)


@slow
def test_editable_install_imports(clone, tmp_path, monkeypatch):
    """From the root too, where ``import kernels`` must not find our folder as a package with code."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    python, _, pip = environment(tmp_path / "env")
    run(*pip, "--editable", str(clone), cwd=tmp_path)
    for cwd in (clone, tmp_path):
        assert run(python, "-c", IMPORTS, cwd=cwd).strip().startswith(str(clone))
        assert run(python, "-c", NATIVE, cwd=cwd).strip() == "False False"


def test_this_installation_has_what_could_be_built_here():
    assert run(sys.executable, "-c", NATIVE, cwd=ROOT).strip() == f"{HAS_COMPILER} {HAS_COMPILER and HAS_NVCC}"


@full
@pytest.mark.parametrize("strict", [False, True])
def test_without_a_compiler_it_installs_with_fewer_backends_or_says_why_not(clone, tmp_path, strict, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    if strict:
        monkeypatch.setenv("IRLFAST_STRICT", "1")
    python, _, pip = environment(tmp_path / "env")
    done = subprocess.run([*pip, "-v", str(clone)], cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if strict:
        assert done.returncode and "irlfast._cpu could not be built, and IRLFAST_STRICT=1" in said
        return
    assert done.returncode == 0, said
    assert "irlfast: without irlfast._cpu, PyTorch does its work; it takes a C++17 compiler" in said
    assert "irlfast: without irlfast._cuda, Triton and PyTorch do its work; it takes nvcc" in said
    assert run(python, "-c", NATIVE, cwd=tmp_path).strip() == "False False"
