"""A sparse model and its tokenizer, saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .folders import folder_written_whole
from .loading import find_tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel


def save_checkpoint(model: PreTrainedModel, name: str, output: Path) -> bool:
    """Writes the model and the tokenizer of the checkpoint `name`, whole or not at all.

    Returns:
        Whether there was a tokenizer.
    """
    tokenizer = find_tokenizer(name)
    with folder_written_whole(output) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return tokenizer is not None


def say_saved(console: Console, name: str, output: Path, has_tokenizer: bool) -> None:
    """Prints how to load what was saved."""
    if not has_tokenizer:
        console.print(f"{name} has no tokenizer, so none was saved.", soft_wrap=True)
    call = f"modelopt_sparse.from_pretrained(AutoModelForCausalLM, {str(output)!r})"
    console.print(f"Saved. Load with {call}", soft_wrap=True)
