"""The order of the house: imports point down the list of layers, and no weight file can run code."""

import ast
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parents[1] / "lora_rm"

LAYERS = [
    {"errors", "processes"},
    {"console", "unfinished"},
    {"config"},
    {"losses", "data"},
    {"model"},
    {"checkpoint", "metrics", "evaluate"},
    {"train", "merge", "combine", "verify"},
    {"export", "score", "score_file", "plan"},
    {"workflow", "doctor"},
    {"cli"},
]
"""From the ground up; an import goes to a lower layer, or stays within one."""

STRANGERS = [("train", "merge"), ("train", "verify"), ("losses", "data")]
"""Neighbours in a layer that must not know each other."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_name(file):
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(file): file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}


def imports(source, module):
    """Every module that a source names in an import, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")[: -node.level] if node.level else []
            start = ".".join([*parts, node.module] if node.module else parts)
            found |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            found |= {word.value for word in node.args if isinstance(word, ast.Constant)}
    return {name for name in found if isinstance(name, str)}


def part_of(module):
    """The part of the package a module belongs to: its name after `lora_rm.`, or nothing."""
    package, _, rest = module.partition(".")
    return rest.split(".")[0] if package == "lora_rm" else ""


def wrong_arrows(source, module):
    """Imports that point up, or at a stranger."""
    own = part_of(module)
    others = {part_of(name) for name in imports(source, module)} & LEVEL.keys()
    return sorted(
        f"{module} imports {other}"
        for other in others
        if LEVEL[other] > LEVEL[own] or (own, other) in STRANGERS or (other, own) in STRANGERS
    )


def file_arrows():
    """For every file of the package the files it imports."""
    return {module: imports(source, module) & FILES.keys() - {module} for module, source in FILES.items()}


def find_cycle(arrows):
    """Names along a cycle of imports, or nothing."""
    done = set()

    def walk(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next((c for other in sorted(arrows.get(name, ())) if (c := walk(other, [*path, name]))), [])
        done.add(name)
        return found

    return next((cycle for name in arrows if (cycle := walk(name, []))), [])


def unsafe(source, module):
    """Ways to read a file that may run code in it."""
    readers = {"torch.load", "torch.serialization.load"}
    named = imports(source, module)
    found = [
        name for name in named if name.split(".")[0] in ("pickle", "dill", "cloudpickle") or name in readers
    ]
    words = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return found + [word for word in words if word in readers]


def test_what_the_package_offers_is_no_module():
    """A function with the name of its module would be hidden by it as soon as the module is imported."""
    import lora_rm

    for name in lora_rm.__all__:
        assert not isinstance(getattr(lora_rm, name), ModuleType), name


def undocumented(source, module):
    """Public functions, methods and classes without docstring; bodies of `...` have nothing to tell."""
    found = [] if ast.get_docstring(ast.parse(source)) else [module]

    def walk(node, path):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                continue
            name = f"{path}.{child.name}"
            if child.name.startswith("_"):
                continue
            is_stub = ast.unparse(child.body[-1]) == "..." and len(child.body) == 1
            if not ast.get_docstring(child) and not is_stub:
                found.append(name)
            if isinstance(child, ast.ClassDef):
                walk(child, name)

    walk(ast.parse(source), module)
    return found


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    if module == "lora_rm":  # its names are imported when they are used: see test_config
        assert not any(part_of(name) for name in imports(FILES[module], module))
        return
    assert part_of(module) in LEVEL, f"{module} has no layer yet: give it one in LAYERS"
    assert wrong_arrows(FILES[module], module) == []


def test_no_layer_is_left_over_and_the_files_are_seen():
    assert {part_of(module) for module in FILES} - {""} == LEVEL.keys()
    assert "lora_rm.data.tokens" in file_arrows()["lora_rm.data.batches"]
    assert sum(map(len, file_arrows().values())) > 60


def test_no_two_files_import_each_other():
    assert find_cycle(file_arrows()) == []
    assert find_cycle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("lora_rm.data.tokens", "from lora_rm.model.base import find_base"),
        ("lora_rm.data.tokens", "from lora_rm.model import base"),
        ("lora_rm.data.tokens", "from lora_rm import model"),
        ("lora_rm.data.tokens", "from ..model import base"),
        ("lora_rm.data.tokens", "from .. import model"),
        ("lora_rm.data.tokens", "import lora_rm.model.base as base"),
        ("lora_rm.data.tokens", "importlib.import_module('lora_rm.model.base')"),
        ("lora_rm.train", "from lora_rm.merge import merge"),
        ("lora_rm.merge", "from lora_rm.train import train"),
        ("lora_rm.train", "from lora_rm import verify"),
        ("lora_rm.losses", "from lora_rm.data.tokens import TokenTree"),
        ("lora_rm.errors", "import lora_rm.console"),
        ("lora_rm.config", "from lora_rm.losses import preference_losses"),
        ("lora_rm.model.base", "from lora_rm.train import train"),
        ("lora_rm.score", "from lora_rm.cli import main"),
    ],
)
def test_a_wrong_arrow_is_found_wherever_it_stands(module, line):
    (name,) = [name for name in LEVEL if wrong_arrows(line, module) == [f"{module} imports {name}"]]
    assert name in line
    for place in (
        f"def f():\n    {line}",
        f"if a:\n    def f():\n        try:\n            {line}\n        finally: ...",
    ):
        assert wrong_arrows(place, module) == [f"{module} imports {name}"]
    assert wrong_arrows("from lora_rm.errors import DataError\nimport torch, json", module) == []


@pytest.mark.parametrize("module", FILES)
def test_everything_public_has_a_docstring(module):
    assert undocumented(FILES[module], module) == []


def test_a_missing_docstring_is_found():
    source = (
        "class A:\n    def b(self): return 1\n    def _c(self): return 1\n    def d(self): ...\ndef e(): pass"
    )
    assert undocumented(source, "m") == ["m", "m.A", "m.A.b", "m.e"]
    documented = "'Text.'\nclass A:\n    'Text.'\n    def b(self):\n        'Text.'\n        return 1\n"
    assert undocumented(documented, "m") == []


@pytest.mark.parametrize("module", FILES)
def test_nothing_reads_files_that_can_run_code(module):
    assert unsafe(FILES[module], module) == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import load", "torch.load('a')", "from torch import load", "f = torch.load",
     "def f():\n    import pickle as p"],
)  # fmt: skip
def test_an_unsafe_reader_is_found(line):
    assert unsafe(line, "lora_rm.model.base")
    assert not unsafe(
        "import json\nfrom safetensors.torch import load_file\njson.load(a)", "lora_rm.model.base"
    )
