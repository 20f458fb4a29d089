"""Models and tokenizers by folder or name; what is wrong with a name is said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .reporting import waiting

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def import_libraries() -> None:
    """Imports torch and transformers, which takes seconds, and says so."""
    with waiting("importing torch and transformers"):
        import modelopt_sparse  # noqa: F401 (with all that it needs)


def load_model(name: str) -> PreTrainedModel:
    """The causal language model, in eval mode and in the dtype that it was saved in.

    Raises:
        ArgumentError: there is no such model, or transformers can't load it.
    """
    from transformers import AutoModelForCausalLM

    with blaming(name):
        # As it comes, in eval mode.
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model


def load_model_config(name: str) -> PretrainedConfig:
    """Its configuration alone.

    Raises:
        ArgumentError: as `load_model`.
    """
    from transformers import AutoConfig

    with blaming(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(name)
    return config


def find_tokenizer(name: str) -> Any | None:
    """Its tokenizer; None where the checkpoint has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError):  # by family, what it raises without files
        return None


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """What transformers finds wrong with a model in this block is an ArgumentError that names it."""
    from modelopt_sparse.errors import ArgumentError, describe

    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        takes = "a folder or hub name of a causal language model that transformers can load"
        raise ArgumentError(describe("MODEL", repr(name), takes, str(error))) from error
