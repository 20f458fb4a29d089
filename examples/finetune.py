"""Fine-tune the bundled model with most of its attention left out, and see what that buys back.

python examples/finetune.py                     # 200 steps at 70 % of tiles skipped, on a GPU
python examples/finetune.py --steps 5 --length 1024 --batch 1 --windows 2 --target-sparsity 0.4

The forward skips tiles and the backward is exact for what was kept. Two copies of the model take the same
steps on the same text, one sparse and one dense, so that what any training on text brings isn't counted
as a gain of training sparse. Before and after, thresholds are picked anew for an equal share of skipped
tiles, on text of packages that are never trained on.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

# The file runs from any folder: its neighbours are found from the repository's root.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import modelopt_sparse as mtsa  # noqa: E402 (as users write it)
from examples.tiny_lm.evaluate import bits_per_byte, text_windows  # noqa: E402 (after the path)
from examples.tiny_lm.optimizer import decay, make_optimizers  # noqa: E402
from examples.tiny_lm.text import held_out_text, training_text  # noqa: E402

# How near a target a threshold is sought, and how far from it is taken where few tiles leave no nearer
# one: two models' shares are then at most a point apart.
NEAR, FAR = 0.002, 0.005
LOWEST_THRESHOLD = 1e-4
FOLLOW_STEPS = 5
# Tenfold the threshold, and about a fifth more of the tiles are skipped.
LOG_THRESHOLD_PER_SHARE = math.log(10) / 0.2


@dataclass(frozen=True)
class Scores:
    """Bits per byte of each window, dense and at the threshold that skips the target share."""

    dense: list[float]
    sparse: list[float]
    threshold: float
    sparsity: float


def main(
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 200,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=256, max=8192)] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 8,
    target_sparsity: Annotated[
        float, typer.Option(help="Share of tiles to skip.", min=0.05, max=0.95)
    ] = 0.7,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW.")] = 3e-5,
    windows: Annotated[int, typer.Option(help="Held-out windows to score.", min=2)] = 32,
    device: Annotated[str, typer.Option(help="Default: cuda where there is one, else cpu.")] = "",
    seed: Annotated[int, typer.Option(help="Chooses the training text.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write it all.")] = None,
) -> None:
    """Train sparse and train dense, then compare both with the model as it was, at equal sparsity."""
    begin = time.monotonic()
    console = Console()
    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shipped = AutoModelForCausalLM.from_pretrained(
        ROOT / "examples/tiny_lm/model", dtype=torch.float32
    )
    shipped = shipped.to(device).eval()
    with console.status("scoring the model as shipped"):
        held_out = text_windows(held_out_text(8_000_000), windows, length + 1)
        before = score(shipped, held_out, target_sparsity)
    with console.status("reading the sources of installed packages"):
        text = training_text(50_000_000)

    def batch_of(step: int) -> torch.Tensor:
        return text_windows(text, batch, length + 1, seed=seed * 1_000_000 + step).to(device)

    with Progress(console=console) as progress:
        bar = progress.add_task("", total=2 * steps)

        def train(model: PreTrainedModel, threshold: float | None, label: str) -> list[dict]:
            progress.update(bar, description=label)
            follow = None if threshold is None else Follow(model, threshold, target_sparsity)
            return finetune(
                model, batch_of, steps, learning_rate, follow, lambda: progress.advance(bar)
            )

        sparse_model, dense_model = copy.deepcopy(shipped), copy.deepcopy(shipped)
        sparse_curve = train(sparse_model, before.threshold, "training sparse")
        dense_curve = train(dense_model, None, "training dense")
    with console.status("scoring both"):
        after = score(sparse_model, held_out, target_sparsity)
        control = score(dense_model, held_out, target_sparsity)

    title = f"{windows} windows of held-out source, {length} tokens, {steps} steps of {batch}"
    console.print(table_of(before, after, control, title))
    found = compared(before, after, control)
    skipped = statistics.fmean(row["sparsity"] for row in sparse_curve)
    console.print(f"Skipped in training: {skipped:.1%} of tiles.")
    console.print(
        "Loss of the sparse model: {loss_before:.4f} to {loss_after:.4f} bits per byte.\n"
        "Gap to dense: {gap_before:.4f} to {gap_after:.4f}, closer by {closer:+.4f} ± "
        "{closer_standard_error:.4f} (standard error).".format(**found)
    )
    if json_file:
        settings = {
            "steps": steps,
            "length": length,
            "batch": batch,
            "target_sparsity": target_sparsity,
            "learning_rate": learning_rate,
            "windows": windows,
            "device": device,
            "seed": seed,
        }
        results = {
            "settings": settings,
            **found,
            "training_sparsity": skipped,
            "seconds": round(time.monotonic() - begin, 1),
            "before": asdict(before),
            "trained_sparse": asdict(after),
            "trained_dense": asdict(control),
            "curves": {"trained_sparse": sparse_curve, "trained_dense": dense_curve},
        }
        json_file.write_text(json.dumps(results, indent=2) + "\n")


class Follow:
    """Keeps the share of skipped tiles near its target while training changes the model.

    The counts of the training steps themselves say where it is.
    """

    def __init__(self, model: PreTrainedModel, threshold: float, target: float):
        self.model, self.threshold, self.target = model, threshold, target
        make_sparse(model, threshold)

    def update(self) -> float:
        """Moves the threshold by what was counted since the last call; returns the share skipped."""
        share = share_skipped(self.model)
        factor = math.exp((self.target - share) * LOG_THRESHOLD_PER_SHARE / 2)
        self.threshold = min(1.0, max(LOWEST_THRESHOLD, self.threshold * factor))
        make_sparse(self.model, self.threshold)
        return share


def finetune(
    model: PreTrainedModel,
    batch_of: Callable[[int], torch.Tensor],
    steps: int,
    learning_rate: float,
    follow: Follow | None,
    advance: Callable[[], None],
) -> list[dict]:
    """Trains in place with AdamW; returns step and loss, in a sparse run sparsity and threshold too.

    Args:
        batch_of: tokens [batch, length + 1] of a step.
    """
    [optimizer] = make_optimizers(model, learning_rate, weight_decay=0.0, muon=False)
    curve = []
    losses: list[torch.Tensor] = []
    model.train()
    for step in range(steps):
        tokens = batch_of(step)
        with autocast(model):
            logits = model(tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * decay(step, steps // 2, steps, max(1, steps // 10))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        advance()
        if (step + 1) % FOLLOW_STEPS == 0 or step + 1 == steps:
            bits = torch.stack(losses).mean().item() / math.log(2)
            losses.clear()
            curve.append({"step": step + 1, "bits_per_byte": bits})
            if follow:
                curve[-1] |= {"threshold": follow.threshold, "sparsity": follow.update()}
    model.eval()
    return curve


def score(model: PreTrainedModel, windows: torch.Tensor, target: float) -> Scores:
    """Bits per byte dense, and sparse at the threshold that skips `target` of these windows' tiles.

    The threshold is found by bisection, with a guess in place of the middle where there is a good one. It
    follows from counts of tiles alone, never from the loss. The model is dense afterwards.
    """
    mtsa.unsparsify(model)
    dense = bits_of(model, windows)
    low, high = math.log(LOWEST_THRESHOLD), 0.0
    best = try_threshold(model, windows, dense, math.exp(high))
    here = best
    while abs(best.sparsity - target) > NEAR and high - low > 0.02:
        at = math.log(here.threshold)
        low, high = (low, at) if here.sparsity > target else (at, high)
        guess = at + (target - here.sparsity) * LOG_THRESHOLD_PER_SHARE
        margin = 0.1 * (high - low)
        guess = min(max(guess, low + margin), high - margin)
        here = try_threshold(model, windows, dense, math.exp(guess))
        best = min(best, here, key=lambda scores: abs(scores.sparsity - target))
    mtsa.unsparsify(model)
    if abs(best.sparsity - target) > FAR:
        raise typer.BadParameter(
            f"--target-sparsity: got {target}; the nearest is {best.sparsity:.3f}, at threshold "
            f"{best.threshold:.3g}. Longer sequences have more to skip, more windows finer steps."
        )
    return best


def try_threshold(
    model: PreTrainedModel, windows: torch.Tensor, dense: list[float], threshold: float
) -> Scores:
    """The scores at a threshold; leaves the model sparse."""
    make_sparse(model, threshold)
    sparse = bits_of(model, windows)
    return Scores(dense, sparse, threshold, share_skipped(model))


def bits_of(model: PreTrainedModel, windows: torch.Tensor) -> list[float]:
    """Bits per byte of each window."""
    with autocast(model):
        return [bits_per_byte(model, window[None]) for window in windows]


def autocast(model: PreTrainedModel) -> torch.autocast:
    """bf16 products on a GPU, fp32 on a CPU, where bf16 is slow; the weights are fp32 on both."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type != "cpu")


def make_sparse(model: PreTrainedModel, threshold: float) -> None:
    """Skip-softmax at `threshold` in every layer, nothing counted yet."""
    config = mtsa.SKIP_SOFTMAX_TRITON_DEFAULT.with_rule("*", skip_softmax_threshold=threshold)
    mtsa.sparsify(model, config)
    mtsa.reset_stats(model)


def share_skipped(model: PreTrainedModel) -> float:
    """Skipped of visible tiles, over all layers and heads, since the model was made sparse."""
    counts = [entry["prefill"] for entry in mtsa.get_stats(model).values()]
    return sum(sum(c["skipped"]) for c in counts) / sum(sum(c["visible"]) for c in counts)


def compared(before: Scores, after: Scores, control: Scores) -> dict[str, float]:
    """What training sparse changed: the loss, and the gap to a dense model that was trained as long.

    The standard error is of the change of the gap, window by window: windows vary far more than that.
    """
    gap_before = gaps(before.sparse, before.dense)
    gap_after = gaps(after.sparse, control.dense)
    closer = gaps(gap_before, gap_after)
    return {
        "loss_before": statistics.fmean(before.sparse),
        "loss_after": statistics.fmean(after.sparse),
        "gap_before": statistics.fmean(gap_before),
        "gap_after": statistics.fmean(gap_after),
        "closer": statistics.fmean(closer),
        "closer_standard_error": statistics.stdev(closer) / len(closer) ** 0.5,
    }


def gaps(values: list[float], others: list[float]) -> list[float]:
    """The differences, window by window."""
    return [value - other for value, other in zip(values, others, strict=True)]


def table_of(before: Scores, after: Scores, control: Scores, title: str) -> Table:
    """One row a model. The gap is to a dense model that was trained as long."""
    table = Table(title=title)
    table.add_column("bits per byte")
    for header in ("dense", "sparse", "gap to dense", "threshold", "tiles skipped"):
        table.add_column(header, justify="right")
    rows = (
        ("as shipped", before, before),
        ("trained sparse", after, control),
        ("trained dense", control, control),
    )
    for label, scores, dense in rows:
        table.add_row(
            label,
            f"{statistics.fmean(scores.dense):.4f}",
            f"{statistics.fmean(scores.sparse):.4f}",
            f"{statistics.fmean(gaps(scores.sparse, dense.dense)):.4f}",
            f"{scores.threshold:.3f}",
            f"{scores.sparsity:.1%}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
