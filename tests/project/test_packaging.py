"""What pyproject.toml, constraints.txt and the tree must agree on."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCE_FOLDERS = ("adapters", "kernels", "protos", "server")


def requirement_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-").replace(".", "-")


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {requirement_name(line) for line in lines if line and not line.startswith("#")}


def test_every_package_of_the_tree_goes_into_the_wheel():
    found = {"lorikeet"} | {
        ".".join(("lorikeet", *path.parent.relative_to(ROOT).parts))
        for folder in SOURCE_FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert {f.relative_to(ROOT).as_posix() for f in folders if not (f / "__init__.py").is_file()} == set()


def test_every_direct_dependency_is_pinned():
    groups = (PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values())
    direct = {requirement_name(requirement) for group in groups for requirement in group}
    assert direct - {"lorikeet-server"} <= pinned()


def test_constraints_pin_exactly_and_without_a_local_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line)] == []


def test_kernels_is_not_importable_by_that_name(tmp_path):
    """Transformers and bitsandbytes probe for the PyPI package `kernels`; ours would be taken for it."""
    code = "import importlib.util, lorikeet.kernels; print(importlib.util.find_spec('kernels'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "None"
