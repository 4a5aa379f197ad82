"""What setup.cfg promises: all code is packaged, and file names are unique, as flat remote code needs."""

import ast
import configparser
from pathlib import Path

import pytest

import varidepth


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def options():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser["options"]


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


def mapping(options):
    return {name: ROOT / folder for name, folder in (line.split(" = ") for line in lines(options["package_dir"]))}


def test_every_folder_with_code_is_a_package(options):
    packages = set(lines(options["packages"]))
    roots = mapping(options)
    assert packages >= set(roots)
    missing = []
    for name, root in roots.items():
        for folder in {path.parent for path in root.rglob("*.py")}:
            package = ".".join([name, *folder.relative_to(root).parts])
            if "__pycache__" not in package and package not in packages:
                missing.append(package)
            assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py"
    assert not missing, f"add to `packages` in setup.cfg: {missing}"


def test_listed_packages_exist(options):
    roots = mapping(options)
    for name in lines(options["packages"]):
        root = next(parent for parent in (name, *_parents(name)) if parent in roots)
        rest = name.removeprefix(root).strip(".").split(".") if name != root else []
        assert (roots[root].joinpath(*rest) / "__init__.py").exists(), name


def _parents(name):
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def test_file_stems_are_unique(options):
    """Remote code is flat: two files of one name would overwrite each other."""
    stems = [p.stem for root in mapping(options).values() for p in root.rglob("*.py") if not p.stem.startswith("__")]
    assert sorted(stems) == sorted(set(stems))


def test_version_is_a_literal():
    """setuptools reads it without importing torch."""
    tree = ast.parse((ROOT / "src" / "varidepth" / "__init__.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"]
    assert ast.literal_eval(assigned[0].value) == varidepth.__version__
    assert f"[{varidepth.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


ALLOWED = {"configuration": {"configuration"}, "modeling": {"configuration", "modeling"}}


@pytest.mark.parametrize("room", ALLOWED)
def test_remote_code_depends_on_nothing_above_it(room):
    """configuration/ and modeling/ are exported with checkpoints: stdlib, torch, transformers and each other only."""
    import sys

    outside = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for path in (ROOT / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module.partition(".")[0]]
            elif isinstance(node, ast.ImportFrom) and node.level == 2:
                assert node.module.partition(".")[0] in ALLOWED[room], f"{path.name} imports {node.module}"
            for name in names:
                assert name in outside, f"{path.name} imports {name}"
