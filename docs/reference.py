"""Writes what pages say of classes and functions from these themselves.

``python docs/reference.py`` writes the blocks of docs/configuration.md anew. A block begins with the line
``<!-- fields: NAMES -->`` and ends with ``<!-- /fields -->``: tables of fields of configurations. A name is
a class's of `CLASSES`; "methods" stands for every method's. The page of public names is made when the site is
built, by hooks.py.
"""

from __future__ import annotations

import inspect
import re
import sys
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this checkout

from pydantic import BaseModel  # noqa: E402
from pydantic_core import to_jsonable_python  # noqa: E402

from modelopt_sparse.config import SparseAttentionConfig  # noqa: E402
from modelopt_sparse.config.calibration import CalibrationConfig  # noqa: E402
from modelopt_sparse.config.rules import Rules  # noqa: E402
from modelopt_sparse.methods import PhaseThresholds, SparseMethodConfig, sparse_methods  # noqa: E402
from modelopt_sparse.methods.calibrated import (  # noqa: E402
    CalibratedThreshold,
    ScaleFormula,
    ScaleTable,
)

PAGE = ROOT / "docs/configuration.md"
MODULES = "modelopt_sparse", "modelopt_sparse.kernels", "modelopt_sparse.modes"
BLOCK = re.compile(r"(<!-- fields: ([\w ]+) -->\n)(.*?)(<!-- /fields -->)", re.DOTALL)
CLASSES: dict[str, type[BaseModel]] = {
    cls.__name__: cls
    for cls in (
        SparseAttentionConfig,
        CalibrationConfig,
        PhaseThresholds,
        CalibratedThreshold,
        ScaleFormula,
        ScaleTable,
    )
}
_ARGUMENT = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def descriptions(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each argument under "Args:"."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = (inspect.cleandoc(base.__dict__.get("__doc__") or "")).partition("Args:\n")
        names: list[str] = []
        for line in section.splitlines():
            if argument := _ARGUMENT.fullmatch(line):
                names = argument[1].split(", ")
                found |= dict.fromkeys(names, argument[2])
            elif names and line.startswith(" " * 8):
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                break
    return found


def type_name(annotation: Any) -> str:
    """A type as people write it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " or ".join(f'"{x}"' if isinstance(x, str) else str(x) for x in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(type_name, arguments)))
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    if annotation is NoneType:
        return "None"
    if annotation is Rules:
        return "mapping of patterns to rules"
    return str(annotation.__name__)


def default(field: Any) -> str:
    """A field's default as Python writes it; empty where there is none."""
    if field.is_required():
        return ""
    value = to_jsonable_python(field.get_default(call_default_factory=True))
    if isinstance(value, str):
        return f'`"{value}"`'
    return f"`{value!r}`".replace("'", '"')


def table(cls: type[BaseModel]) -> str:
    """The fields of a configuration class: name, type, default, description.

    Raises:
        ValueError: no docstring describes a field.
    """
    said = descriptions(cls)
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for name, field in cls.model_fields.items():
        if name not in said:
            raise ValueError(f"{cls.__name__}.{name}: no docstring describes it under Args:")
        text = said[name].replace("``", "`").replace("|", r"\|")
        text = text[0].upper() + text[1:]
        lines.append(f"| `{name}` | {type_name(field.annotation)} | {default(field)} | {text} |")
    return "\n".join(lines)


def section(cls: type[BaseModel]) -> str:
    """The table, under a method's name, and what else its fields may be called."""
    if not issubclass(cls, SparseMethodConfig):
        return table(cls)
    name = cls.model_fields["method"].default
    parts = [f"### {name}", table(cls)]
    if cls.aliases:
        also = ", ".join(f"`{alias}` for `{field}`" for alias, field in cls.aliases.items())
        parts.append(f"Also taken: {also}.")
    return "\n\n".join(parts)


def signature(call: Any) -> str:
    """The arguments of a function or of a class's constructor, with their defaults, without types."""
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for parameter in inspect.signature(call).parameters.values()
    ]
    plain = inspect.Signature(parameters)
    return re.sub(r"=Plan\([^()]*\)", "=DENSE", str(plain))


def entries(module_name: str) -> list[str]:
    """The functions and classes that a module makes public, by name, each with its docstring."""
    module = import_module(module_name)
    parts = []
    for name in sorted(module.__all__, key=str.lower):
        value = getattr(module, name)
        if not isinstance(value, type) and not inspect.isroutine(value):
            continue
        has_fields = isinstance(value, type) and issubclass(value, BaseModel | Exception | Enum)
        heading = name if has_fields or is_typeddict(value) else name + signature(value)
        said = (inspect.getdoc(value) or "").strip()
        first, _, rest = said.partition("\n\n")
        first = " ".join(first.split()).replace("``", "`")
        parts.append(f"### {name}")
        if heading != name:
            parts.append(f"```text\n{heading}\n```")
        parts.append(first)
        if rest:
            parts.append(f"```text\n{rest}\n```")
    return parts


def names_page() -> str:
    """The page of public names."""
    parts = [
        "# Names",
        "The functions and classes that modules make public. Fields of configurations are in the "
        "[configuration reference](configuration.md#fields), and so are [presets](configuration.md#presets).",
    ]
    for module in MODULES:
        parts += [f"## {module}", *entries(module)]
    return "\n\n".join(parts) + "\n"


def refreshed(text: str) -> str:
    """The text of the page with its blocks written anew."""
    own = [
        method.Config
        for _, method in sorted(sparse_methods().items())
        if method.__module__.startswith("modelopt_sparse.")
    ]

    def block(found: re.Match[str]) -> str:
        begin, names, _, end = found.groups()
        wanted = (own if name == "methods" else [CLASSES[name]] for name in names.split())
        parts = [section(cls) for classes in wanted for cls in classes]
        return "\n\n".join([begin.rstrip("\n"), *parts, end])

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
