"""``modelopt-sparse report``: what a sparse model does and what that costs, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .evaluate import LengthOption, SamplesOption, token_batches
from .folders import check_output_file, write_whole
from .loading import import_libraries, load_sparse_model
from .options import (
    ConfigOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    PresetOption,
    TextOption,
    check_not_both,
    config_if_given,
)
from .reporting import progress, reporting

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from modelopt_sparse import CalibrationCheck

DECODED = 16
"""Tokens at the end of each window that are decoded, where that skips anything."""


def command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="Where to write it.")],
    preset: PresetOption = None,
    config: ConfigOption = None,
    text: TextOption = None,
    length: LengthOption = 2048,
    samples: SamplesOption = 4,
    bench: Annotated[
        Path | None,
        typer.Option(
            "--bench",
            metavar="FILE",
            help="Times to show: what `bench --json` wrote.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML file: tiles skipped and error by layer and head, calibration, quality, speed.

    Takes --preset or --config, or a checkpoint that is sparse already. The file needs no other, and is
    written whole or not at all.
    """
    check_not_both(preset, config)
    check_output_file(output, force)
    with reporting(as_json) as report:
        import_libraries()
        import modelopt_sparse as mtsa
        from modelopt_sparse.report_html import html_report

        times = None if bench is None else _times(bench)
        sparse = load_sparse_model(model, config_if_given(preset, config))
        batches = token_batches(model, sparse, text or (), length, samples)
        with progress() as bar:
            found = mtsa.compare(sparse, bar.track(batches, description="dense and sparse"))
            decoded = None
            if skips_in_decode(sparse):
                tracked = bar.track(batches, description="tokens decoded")
                decoded = mtsa.compare(sparse, tracked, num_decode_tokens=DECODED)
            check = _check(sparse, batches, bar)
        page = html_report(sparse, model, found, decoded=decoded, check=check, bench=times)
        write_whole(output, page)
        report.console.print(f"Written: {output}", soft_wrap=True)
        report.document = {
            "model": model,
            "output": str(output),
            "comparison": found.to_dict(),
            "decoded": None if decoded is None else decoded.to_dict(),
            "check": None if check is None else check.to_dict(),
        }


def skips_in_decode(model: PreTrainedModel) -> bool:
    """Whether any enabled module skips tiles in decode."""
    from modelopt_sparse.module_state import sparse_modules

    plans = (module.method.plan() for _, module in sparse_modules(model) if module.enabled)
    return any(plan.skip_decode is not None for plan in plans)


def _check(model: PreTrainedModel, batches: list[Tensor], bar: Any) -> CalibrationCheck | None:
    """Target against achieved on the same prompts, whole and halved twice.

    Of one that leaves the model no room for what it writes after it, as much as does.
    None if nothing is calibrated, or all of them are shorter than what was.
    """
    import modelopt_sparse as mtsa
    from modelopt_sparse.calibration.prompts import context_of
    from modelopt_sparse.methods.calibrated import SkipSoftmaxConfig
    from modelopt_sparse.methods.fields import least_context
    from modelopt_sparse.module_state import sparse_modules

    from .fitted import fitted_thresholds

    if not any(row["target"] for row in fitted_thresholds(model)):
        return None
    configs = (module.method.config for _, module in sparse_modules(model))
    least = min(least_context(x.min_context) for x in configs if isinstance(x, SkipSoftmaxConfig))
    context, written = context_of(model), mtsa.CalibrationConfig().num_decode_tokens
    longest = None if context is None else context - written
    halves = [
        ids[:, : ids.shape[1] >> halved][:, :longest] for halved in range(3) for ids in batches
    ]
    parts = [ids for ids in halves if ids.shape[1] >= least]
    if not parts:
        return None
    return mtsa.check_calibration(model, bar.track(parts, description="target against achieved"))


def _times(path: Path) -> Any:
    from modelopt_sparse.bench.report import load

    try:
        return load(path)
    except (ValueError, TypeError, KeyError) as error:
        takes = "what `modelopt-sparse bench --json` wrote"
        raise typer.BadParameter(
            f"--bench: got {str(path)!r} ({error!r}); takes {takes}."
        ) from None
