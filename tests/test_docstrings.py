"""What the package offers by name (`__all__`) says what it takes, in words: read from the sources, nothing imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ssmamba_models"


def exported() -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Dotted name -> definition, of every name of an `__all__`."""
    found = {}
    for init in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(init.read_text(encoding="utf-8"))
        origin = {
            alias.asname or alias.name: node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for name in map(ast.literal_eval, node.value.elts):
                    # A name that comes from another package's __all__, or is looked up when asked for, is found there.
                    if name in origin and not name.startswith("__") and source(origin[name]).exists():
                        found[f"{origin[name]}.{name}"] = definition(origin[name], name)
    return found


def definition(module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    # Where there are overloads, the function itself comes last.
    *_, node = [item for item in tree.body if getattr(item, "name", None) == name]
    return node


def source(module: str) -> Path:
    return PACKAGE.parent / f"{module.replace('.', '/')}.py"


EXPORTED = exported()


def test_there_are_names():
    assert {"ssmamba_models.zoo.create_model", "ssmamba_models.ops.selective.selective_scan"} <= set(EXPORTED)


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_a_public_name_tells_its_arguments_and_errors(name):
    node = EXPORTED[name]
    text = ast.get_docstring(node)
    assert text, f"{name} has no docstring"
    function = node
    if isinstance(node, ast.ClassDef):
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        public = [item for item in methods if not item.name.startswith("_") and item.name != "forward"]
        assert [item.name for item in public if not ast.get_docstring(item)] == []
        function = next((item for item in methods if item.name == "__init__"), None)
    if function is not None:
        arguments = [a.arg for a in [*function.args.args, *function.args.kwonlyargs] if a.arg != "self"]
        assert [argument for argument in arguments if not re.search(rf"\b{argument}\b", text)] == []
    if isinstance(node, ast.FunctionDef) and any(isinstance(item, ast.Raise) for item in ast.walk(node)):
        assert "Raises:" in text
