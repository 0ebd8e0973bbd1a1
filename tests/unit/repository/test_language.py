"""What the sources must not say or do: name a package index, unpickle, or need torch outside the trainer."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PRODUCT = ("streams", "registry", "agents", "trainer", "serving", "sidstream")

# Hosts that packages, models or images are fetched from. Where they come from is the business of the
# machine's own configuration, so that any mirror will do.
INDEXES = re.compile(
    r"(pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|(cdn-lfs\.|api-inference\.)?huggingface\.co"
    r"|conda\.anaconda\.org|ghcr\.io|quay\.io|docker\.io|proxy\.golang\.org|crates\.io|archive\.apache\.org"
    r"|repo1?\.maven\.(org|apache\.org)|--(extra-)?index-url|--find-links|--trusted-host)",
    re.IGNORECASE,
)
# Maven Central is where Kafka's pinned jars come from by default, and what the documents say of that.
MAY_NAME_MAVEN = re.compile(
    r"^(sidstream/stack/kafka_jars\.py|sidstream\.example\.toml|docs/first-event\.md)$"
)
MAVEN = re.compile(r"maven", re.IGNORECASE)

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
TRAINING = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "sklearn",
    "matplotlib",
    "onnxscript",
}


def tracked() -> list[Path]:
    """Files of the repository: tracked, and new ones that are not ignored."""
    if (ROOT / ".git").exists():
        ls_files_output = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        files = [ROOT / name for name in ls_files_output.split("\0") if name]
    else:
        files = [path for path in ROOT.rglob("*") if not any(part.startswith(".") for part in path.parts)]
    return [path for path in files if path.is_file()]


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import below `tree` with the top name of what it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node, name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node, node.module.split(".")[0]


def unpickling(source: str) -> list[str]:
    """What in a Python source reads or writes pickles."""
    tree = ast.parse(source)
    pickle_uses = [name for _, name in imports(tree) if name in PICKLES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        owner = ast.unparse(node.func.value)
        call = f"{owner}.{node.func.attr}"
        if call == "torch.load" and not _is(keywords.get("weights_only"), True):
            pickle_uses.append("torch.load without weights_only=True")
        if call in ("torch.save", "torch.jit.load"):
            pickle_uses.append(call)
        if (
            node.func.attr == "load"
            and owner in ("np", "numpy")
            and not _is(keywords.get("allow_pickle"), None)
        ):
            pickle_uses.append("numpy.load with allow_pickle")
        if node.func.attr in ("to_pickle", "read_pickle"):
            pickle_uses.append(node.func.attr)
    return pickle_uses


def _is(node: ast.expr | None, value: object) -> bool:
    if node is None:
        return value is None
    return isinstance(node, ast.Constant) and node.value is value


def test_no_file_names_a_package_index() -> None:
    named = []
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # Parquet and images
        for match in INDEXES.finditer(text):
            if not (MAY_NAME_MAVEN.match(name) and MAVEN.search(match.group())):
                line = text.count("\n", 0, match.start()) + 1
                named.append(f"{name}:{line}: {match.group()}")
    assert named == []


@pytest.mark.parametrize(
    "line",
    ["pip install --index-url https://x/simple y", "https://PyPI.org/simple", "image: ghcr.io/a/b:1",
     "https://repo1.maven.org/maven2", "https://repo.maven.apache.org/maven2"],
)  # fmt: skip
def test_the_search_for_indexes_sees_one(line: str) -> None:
    assert INDEXES.search(line)


def test_the_product_neither_pickles_nor_unpickles() -> None:
    pickle_uses = {
        path.relative_to(ROOT).as_posix(): unpickling(path.read_text()) for path in sources(*PRODUCT)
    }
    assert {name: how for name, how in pickle_uses.items() if how} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "def f():\n    from joblib import load", "import torch\ntorch.load(p)",
     "torch.save(m, p)", "np.load(p, allow_pickle=True)", "frame.to_pickle(p)",
     "torch.load(p, weights_only=False)"],
)  # fmt: skip
def test_the_search_for_pickles_sees_one(source: str) -> None:
    assert unpickling(source)


def test_the_search_for_pickles_lets_safe_calls_pass() -> None:
    assert unpickling("torch.load(p, weights_only=True)\nnp.load(p)\nsafetensors.torch.load(p)") == []


def test_only_the_trainer_imports_training_libraries() -> None:
    offences = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(*(package for package in PRODUCT if package != "trainer"))
        for _, name in imports(ast.parse(path.read_text()))
        if name in TRAINING
    ]
    assert offences == []


def test_the_front_door_opens_the_trainer_only_inside_functions() -> None:
    """Settings are light; any other module of the trainer, imported at the top, would bring torch along."""
    offences = []
    for path in sources("sidstream"):
        for node in ast.parse(path.read_text()).body:
            for statement, name in (
                imports(node) if not isinstance(node, ast.FunctionDef | ast.ClassDef) else ()
            ):
                inside = ast.unparse(statement)
                if name == "trainer" and "trainer.settings" not in inside and not _type_checking(node):
                    offences.append(f"{path.relative_to(ROOT)}: {inside}")
    assert offences == []


def _type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def test_everything_but_the_trainer_imports_where_the_training_libraries_are_absent() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources("streams", "registry", "agents", "serving", "sidstream")
        if path.name != "__main__.py"
    ]
    assert len(modules) > 20
    program = f"""
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(TRAINING | {"onnx"})!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
for module in {modules!r}:
    importlib.import_module(module)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
