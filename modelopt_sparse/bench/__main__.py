"""``python -m modelopt_sparse.bench``: how fast our kernels are beside others, on this GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console

from .break_even import advice, break_evens
from .captured import Source, captured_cases
from .case import Case, Setting
from .decode_step import small_step_cases, step_cases
from .inputs import Shape
from .plots import save_plots
from .report import break_even_table, environment, progress, said_of, save, save_csv, table_of
from .run import Row, measure
from .serving import serving_cases, small_serving_cases
from .suites import smoke_cases, standard_cases
from .timing import FULL, QUICK, Effort
from .whole_model import small_whole_model_cases, whole_model_cases

SMOKE = Effort(0.0, 3, 3)
SMALL_LENGTHS = (300,)
TABLE_WIDTH = 150


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a result was wrong; 2 if nothing could be run."""
    options = _options(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    cases = standard_cases() + serving_cases() + step_cases() + whole_model_cases()
    if options.smoke:
        cases = smoke_cases() + small_serving_cases() + small_step_cases()
        cases += small_whole_model_cases()
    if options.model is not None:
        source = Source(options.model, options.text)
        cases += captured_cases(source, SMALL_LENGTHS) if options.smoke else captured_cases(source)
    cases = [case for case in cases if _is_chosen(case, options.only, options.without)]
    if options.list:
        for case in cases:
            print(f"{case.group}: {case.name}")
        return 0
    if not cases:
        print("No case has such a name; --list alone shows them all.", file=sys.stderr)
        return 2
    if options.plots is not None and find_spec("matplotlib") is None:
        print("--plots needs matplotlib: pip install 'modelopt-sparse[bench]'", file=sys.stderr)
        return 2
    if options.smoke:
        setting = Setting(torch.device("cpu"), torch.float32, Shape(2, 1, 32))
    elif torch.cuda.is_available():
        setting = Setting(torch.device("cuda"), torch.bfloat16)
    else:
        print(
            "The benchmark needs a CUDA GPU, and PyTorch sees none. "
            "With --smoke it runs small cases on the CPU.",
            file=sys.stderr,
        )
        return 2

    effort = SMOKE if options.smoke else QUICK if options.quick else FULL
    where = environment(setting.device)
    console.print(", ".join(f"{name} {value}" for name, value in where.items()), highlight=False)
    rows: list[Row] = []
    with progress() as bar:
        tracked = bar.track(cases, description="cases")
        for group, members in groupby(tracked, key=lambda case: case.group):
            of_group: list[Row] = []
            for case in members:
                of_group += measure(case, setting, effort)
                if options.json is not None:
                    save(options.json, where, [*rows, *of_group])
                if options.csv is not None:
                    save_csv(options.csv, [*rows, *of_group])
                if setting.device.type == "cuda":
                    torch.cuda.empty_cache()
            bar.stop()  # both may be in one terminal
            console.print(table_of(group, of_group), highlight=False)
            bar.start()
            rows += of_group
    if options.plots is not None:
        for path in save_plots(options.plots, rows):
            print(f"wrote {path}")
    found = break_evens(rows)
    if found:
        console.print(break_even_table(found), highlight=False)
    if any(each.length is not None for each in found):
        console.print(said_of(advice(found)), highlight=False)
    return int(any(row.failed for row in rows))


def _is_chosen(case: Case, only: Sequence[str], without: Sequence[str]) -> bool:
    def is_named(names: Sequence[str]) -> bool:
        return any(name == case.group or name in case.name for name in names)

    return (not only or is_named(only)) and not is_named(without)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m modelopt_sparse.bench",
        description="Times our kernels in turn with others on one CUDA GPU, results checked first. "
        "Ratios are their median time over ours: above 1 ours is faster.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a group, or part of a case's name; may be repeated",
    )
    parser.add_argument(
        "--without", action="append", default=[], metavar="NAME", help="leave these out, likewise"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there as well")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="and there, a line a row")
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="draw into that folder; needs matplotlib"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="group captured: a checkpoint with its tokenizer",
    )
    parser.add_argument("--text", type=Path, metavar="PATH", help="and a text for it to read")
    parser.add_argument("--smoke", action="store_true", help="small cases on the CPU")
    parser.add_argument("--list", action="store_true", help="name the cases, run none")
    options = parser.parse_args(argv)
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text are given together")
    return options


if __name__ == "__main__":
    sys.exit(main())
