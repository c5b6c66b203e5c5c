"""What is installed is what the checkout holds, and nothing shadows it."""

import ast
from itertools import chain
import os
from pathlib import Path
import re
import runpy
import subprocess
import sys
from types import ModuleType

import pytest

import moe
from moe.cli import main as cli
from moe.settings import read

ROOT = Path(moe.__file__).resolve().parents[1]


def python(code: str, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`path` alone is on the path: -S hides a moe that is installed beside the tests."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def copy_of_the_houses_front(folder: Path) -> Path:
    """moe/__init__.py beside empty `layers` and `routing`."""
    for name in ("moe", "layers", "routing"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    source = (ROOT / "moe" / "__init__.py").read_text(encoding="utf-8")
    (folder / "moe" / "__init__.py").write_text(source, encoding="utf-8")
    return folder


@pytest.mark.smoke
def test_the_house_imports_from_another_folder(tmp_path):
    done = python("import moe; print(moe.__version__)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == moe.__version__


def test_jax_looks_for_no_tpu_where_only_its_compiler_is_installed(tmp_path, monkeypatch):
    """libtpu without a TPU, as the extra `plan` leaves a laptop."""
    (tmp_path / "libtpu.py").touch()
    code = "import moe, os; print(os.environ.get('JAX_PLATFORMS'))"

    def platforms(folder):
        return python(code, folder).stdout.strip()

    monkeypatch.delenv("JAX_PLATFORMS")
    assert (platforms(ROOT.parent), platforms(tmp_path)) == ("None", "cpu")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert platforms(tmp_path) == "tpu"


@pytest.mark.parametrize("name", ("layers", "routing"))
@pytest.mark.parametrize("kind", ("folder", "package", "module"))
def test_what_shadows_a_package_is_named(name, kind, tmp_path):
    house = copy_of_the_houses_front(tmp_path / "house")
    theirs = tmp_path / "theirs"
    shadow = theirs / (f"{name}.py" if kind == "module" else name)
    shadow.parent.mkdir() if kind == "module" else shadow.mkdir(parents=True)
    if kind != "folder":
        (shadow if kind == "module" else shadow / "__init__.py").touch()
    else:  # a bare folder wins only where the package itself comes from no folder on the path
        (house / name / "__init__.py").unlink()
    done = python("import moe", theirs, house)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {shadow} shadows the package {name!r} of moe ({house}")
    assert python("import moe", tmp_path, house).returncode == 0


def test_a_missing_package_is_named(tmp_path):
    house = copy_of_the_houses_front(tmp_path / "house")
    (house / "routing" / "__init__.py").unlink()
    (house / "routing").rmdir()
    done = python("import moe", tmp_path, house)
    assert "moe needs its package 'routing' beside it" in done.stderr


def test_configs_are_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    package = tmp_path / "moe"
    (tmp_path / "configs" / "runs").mkdir(parents=True)
    (tmp_path / "configs" / "runs" / "quickstart.gin").touch()
    monkeypatch.setattr(read, "PACKAGE", package)
    assert read.shipped() == tmp_path / "configs"
    assert read.shipped_names() == ["runs/quickstart.gin"]
    (package / "configs" / "runs").mkdir(parents=True)
    (package / "configs" / "runs" / "wheel.gin").touch()
    assert read.shipped_names() == ["runs/wheel.gin"]
    assert read.find("wheel.gin") == package / "configs" / "runs" / "wheel.gin"


def setup_arguments(monkeypatch) -> dict[str, object]:
    """What setup.py hands to setuptools, without building anything."""
    given: dict[str, object] = {}
    fake = ModuleType("setuptools")
    fake.setup = given.update
    fake.find_packages = lambda include: include
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return given


def test_setup_names_the_program_and_takes_the_version_from_the_source(monkeypatch):
    given = setup_arguments(monkeypatch)
    assert given["version"] == moe.__version__
    assert given["entry_points"] == {"console_scripts": ["moe = moe.cli.main:main"]}
    assert callable(cli.main)


def test_every_import_of_the_house_is_declared(monkeypatch):
    """Third-party modules that the packages import at all are requirements, or of an extra."""
    given = setup_arguments(monkeypatch)
    lines = [*given["install_requires"], *chain(*given["extras_require"].values())]
    names = {re.split(r"[<>=\[]", line)[0].lower() for line in lines}
    modules = {"absl": "absl-py", "gin": "gin-config", "orbax": "orbax-checkpoint"}
    own = {"moe", "layers", "routing", *sys.stdlib_module_names}
    for package in ("moe", "layers", "routing"):
        for path in (ROOT / package).rglob("*.py"):
            roots = {name.split(".")[0] for name in imports(path)} - own
            missing = {root for root in roots if modules.get(root, root).lower() not in names}
            assert not missing, f"{path} imports {missing}"


def test_everything_that_is_installed_is_imported(monkeypatch):
    given = setup_arguments(monkeypatch)["install_requires"]
    modules = {"absl-py": "absl", "gin-config": "gin", "orbax-checkpoint": "orbax"}
    names = {re.split(r"[<>=\[]", line)[0] for line in given}
    found = set()
    for package in ("moe", "layers", "routing"):
        for path in (ROOT / package).rglob("*.py"):
            found |= {name.split(".")[0] for name in imports(path)}
    assert not {name for name in names if modules.get(name, name) not in found}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def test_every_module_with_a_configurable_is_listed():
    """A config is checked against those that moe/cli/configurables.py imports."""
    listed = (ROOT / "moe" / "cli" / "configurables.py").read_text(encoding="utf-8")
    for package in ("moe", "layers", "routing"):
        for path in (ROOT / package).rglob("*.py"):
            if re.search(
                r"^@?gin\.(external_)?con(figurable|stant)", path.read_text(), re.MULTILINE
            ):
                room = ".".join(path.relative_to(ROOT).parent.parts)
                pattern = rf"from {room} import [^)]*?\b{path.stem}\b"
                assert re.search(pattern, listed), f"{path} is not in moe/cli/configurables.py"
