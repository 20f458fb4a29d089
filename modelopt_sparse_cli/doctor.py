"""``modelopt-sparse doctor``: what this machine can run, and how to get what is missing."""

from __future__ import annotations

import platform
import sys
from importlib import import_module, metadata
from typing import Any

import typer
from packaging.requirements import Requirement
from rich.table import Table

from .interrupts import interrupted_afterwards
from .options import JsonOption
from .reporting import reporting, waiting

PACKAGE = "modelopt_sparse"
# Import name: what it is for, and how to get it.
OPTIONAL = {
    "matplotlib": ("plots, and the examples' pictures", "pip install 'modelopt_sparse[bench]'"),
    "accelerate": ("models spread over devices", "pip install accelerate"),
    "flash_attn": ("compared with in bench", "pip install flash-attn --no-build-isolation"),
    "flash_attn_interface": ("FlashAttention-3, compared with in bench", "built from its sources"),
    "flash_sparse_attn": ("compared with in bench", "pip install flash-sparse-attn"),
    "flashinfer": ("compared with in bench", "pip install flashinfer-python"),
    "modelopt": ("Model-Optimizer, compared with in bench", "pip install nvidia-modelopt"),
}


def command(as_json: JsonOption = False) -> None:
    """Say what this machine can run. Exit code 1: something required is missing or out of range."""
    with reporting(as_json) as report:
        with waiting("importing torch and triton"), interrupted_afterwards():
            required, devices = required_packages(), gpus()
        optional = optional_packages()
        is_well = all(row["problem"] is None for row in required)
        report.document = {
            "ok": is_well,
            "required": required,
            "devices": devices,
            "optional": optional,
        }
        for table in (_required_table(required), _device_table(devices), _optional_table(optional)):
            report.console.print(table)
    if not is_well:
        raise typer.Exit(1)


def required_packages() -> list[dict[str, Any]]:
    """Python and each requirement: ``name``, ``version``, ``takes``, and the ``problem`` or None."""
    try:
        own = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        problem = "not installed, so its requirements aren't known: pip install modelopt_sparse"
        return [{"name": PACKAGE, "version": None, "takes": "", "problem": problem}]
    rows = [_row("python", own["Requires-Python"] or "", platform.python_version(), "install it")]
    for line in metadata.requires(PACKAGE) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            remedy = f"pip install '{requirement.name}{requirement.specifier}'"
            version = _version_of(requirement.name)
            rows.append(_row(requirement.name, str(requirement.specifier), version, remedy))
    return rows


def gpus() -> dict[str, Any]:
    """What torch sees: ``kernels`` that run, ``interpreter`` and ``gpus``; or the ``problem``."""
    try:
        torch = import_module("torch")
        backends = import_module(f"{PACKAGE}.kernels.backends")
        launch = import_module(f"{PACKAGE}.kernels.launch") if backends.HAS_TRITON else None
    except ImportError as error:
        return {"problem": str(error), "interpreter": False, "gpus": []}
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        kernels = ["reference"]
        if launch is not None:
            kernels += ["prefill", "decode"]
            kernels += ["hopper prefill", "hopper latents"] if launch.is_hopper(device) else []
        found.append(
            {
                "name": torch.cuda.get_device_name(device),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
                "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30),
                "kernels": kernels,
            }
        )
    return {"problem": None, "interpreter": backends.IS_INTERPRETED, "gpus": found}


def optional_packages() -> list[dict[str, Any]]:
    """Each optional package: ``name``, ``version`` or None, what it is ``for`` and how to ``get`` it."""
    names = metadata.packages_distributions()
    return [
        {
            "name": name,
            "version": _version_of(names[name][0]) if name in names else None,
            "for": purpose,
            "get": get,
        }
        for name, (purpose, get) in OPTIONAL.items()
    ]


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _row(name: str, takes: str, version: str | None, remedy: str) -> dict[str, Any]:
    problem = None
    if version is None:
        problem = f"missing: {remedy}"
    elif not Requirement(f"{name}{takes}").specifier.contains(version, prereleases=True):
        problem = f"out of range: {remedy}"
    return {"name": name, "version": version, "takes": takes, "problem": problem}


def _required_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("required", "version", "takes", "", title=f"{PACKAGE} on {sys.platform}")
    for row in rows:
        table.add_row(row["name"], row["version"] or "-", row["takes"], row["problem"] or "ok")
    return table


def _device_table(found: dict[str, Any]) -> Table:
    table = Table("device", "compute capability", "memory", "kernels")
    if found["problem"]:
        table.add_row("unknown", "", "", found["problem"])
    for gpu in found["gpus"]:
        table.add_row(
            gpu["name"], gpu["capability"], f"{gpu['memory_gib']} GiB", ", ".join(gpu["kernels"])
        )
    cpu = "reference"
    if found["interpreter"]:
        cpu += ", and by TRITON_INTERPRET the kernels in Triton's interpreter, slowly"
    table.add_row("cpu", "", "", cpu)
    return table


def _optional_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("optional", "version", "for", "how to get it")
    for row in rows:
        get = "" if row["version"] else row["get"]
        table.add_row(row["name"], row["version"] or "-", row["for"], get)
    return table
