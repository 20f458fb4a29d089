"""Sparse attention on a checkpoint of your own: text before and after, what was skipped, what it cost.

python examples/hf_sa.py --pyt_ckpt_path PATH --sparse_attn skip_softmax --seq_len 4096
"""

from __future__ import annotations

import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# The file runs from any folder: its neighbours are found from the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modelopt_sparse as mtsa
from examples.skip_map import save_picture
from examples.tiny_lm.text import held_out_text
from modelopt_sparse_cli.heads import skipped_by_head, table_of

SparseAttention = StrEnum("SparseAttention", list(mtsa.PRESETS))
"""What can be asked for: a preset."""

# A large vocabulary makes long rows of logits, so only the last ones are computed.
SCORED_TOKENS = 1024


class Backend(StrEnum):
    """Backends that a method may name."""

    triton = "triton"
    pytorch = "pytorch"


def main(
    pyt_ckpt_path: Annotated[str, typer.Option("--pyt_ckpt_path", help="Checkpoint folder.")],
    sparse_attn: Annotated[SparseAttention, typer.Option("--sparse_attn", help="Which preset.")],
    backend: Annotated[
        Backend | None, typer.Option("--backend", help="Refused if the preset has another.")
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq_len", help="Tokens of the prompt.", min=16)] = 2048,
    new_tokens: Annotated[
        int, typer.Option("--new_tokens", help="Tokens to generate.", min=1)
    ] = 32,
    export_dir: Annotated[
        Path | None, typer.Option("--export_dir", help="Where to save the sparse checkpoint.")
    ] = None,
) -> None:
    """Generate and score with a checkpoint, dense and sparse."""
    config = mtsa.PRESETS[sparse_attn.value]
    needed = config.sparse_cfg["*"]["backend"]
    if backend is not None and backend.value != needed:
        raise typer.BadParameter(
            f"--backend: got {backend.value}; {sparse_attn.value} takes {needed}. "
            "Write a configuration of your own for another one."
        )
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(pyt_ckpt_path)
    model = AutoModelForCausalLM.from_pretrained(pyt_ckpt_path, dtype="auto").to(device).eval()
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and seq_len + new_tokens > context:
        raise typer.BadParameter(
            f"--seq_len: got {seq_len}; the model takes {context - new_tokens} and {new_tokens} new ones"
        )
    tokens = prompt(tokenizer, seq_len + 1).to(device)

    with console.status("dense: generating and scoring"):
        dense_text = generate(model, tokenizer, tokens[:, :-1], new_tokens)
        dense_bits = score(model, tokens)
    mtsa.sparsify(model, config)
    with console.status("sparse: generating and scoring"):
        sparse_text = generate(model, tokenizer, tokens[:, :-1], new_tokens)
        sparse_bits = score(model, tokens)

    mtsa.print_sparse_attention_summary(model, console)
    folder = export_dir or Path("out")
    shares = skipped_by_head(mtsa.get_stats(model))
    if shares is not None:
        console.print(table_of(shares))
        save_picture(shares, f"{sparse_attn.value}, {seq_len} tokens", folder / "skipped_tiles.png")
        console.print(f"Heat map of skipped tiles: {folder / 'skipped_tiles.png'}")
    table = Table(
        "", "dense", "sparse", title=f"{seq_len} tokens of real text, {new_tokens} generated"
    )
    table.add_row("bits per token", f"{dense_bits:.4f}", f"{sparse_bits:.4f}")
    table.add_row("generated", repr(dense_text), repr(sparse_text))
    console.print(table)
    if export_dir is not None:
        model.save_pretrained(export_dir)
        tokenizer.save_pretrained(export_dir)
        call = f"modelopt_sparse.from_pretrained(AutoModelForCausalLM, {str(export_dir)!r})"
        console.print(f"Saved. Load with {call}", soft_wrap=True)


def prompt(tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """The first `length` tokens of real text: [1, length]."""
    text = held_out_text(16 * length).decode(errors="ignore")
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)["input_ids"]
    if tokens.shape[1] < length:
        raise typer.BadParameter(
            f"--seq_len: got {length - 1}; the text has {tokens.shape[1] - 1} tokens"
        )
    return tokens


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor, count: int
) -> str:
    """Greedy continuation of `tokens` [1, n], as text."""
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False
    )
    return tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def score(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Bits per token of the last `SCORED_TOKENS` of `tokens` [1, n + 1], after all that precedes them."""
    count = min(SCORED_TOKENS, tokens.shape[1] - 1)
    logits = model(tokens[:, :-1], use_cache=False, logits_to_keep=count).logits[0, -count:]
    return F.cross_entropy(logits.float(), tokens[0, -count:]).item() / math.log(2)


if __name__ == "__main__":
    typer.run(main)
