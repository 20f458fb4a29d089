"""Models and tokenizers by folder or name; what is wrong with a name is said in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .interrupts import interrupted_afterwards
from .reporting import progress, waiting

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from modelopt_sparse import SparseAttentionConfig

# What code of transformers runs into where a configuration holds other things than it has seen.
_BLAMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


def import_libraries() -> None:
    """Imports torch and transformers, which takes seconds, and says so. Interrupted, it does that first."""
    with waiting("importing torch and transformers"), interrupted_afterwards():
        import modelopt_sparse  # noqa: F401 (with all that it needs)


def load_model(name: str) -> PreTrainedModel:
    """The causal language model, in eval mode and in the dtype that it was saved in.

    Raises:
        ArgumentError: there is no such model, or transformers can't load it.
        StateError: its config.json is malformed, or says what implementation runs.
    """
    from transformers import AutoModelForCausalLM

    from modelopt_sparse.integrations.hf_loading import check_configuration

    with blaming(name):
        check_configuration(name, {})
        # As it comes, in eval mode.
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model


def load_sparse_model(name: str, config: SparseAttentionConfig | None) -> PreTrainedModel:
    """The model, sparse: by `config`, or if there is none as its checkpoint says. On a GPU if there is one.

    Raises:
        ArgumentError: as `load_model`, or there is no configuration and the checkpoint isn't sparse.
    """
    from transformers import AutoModelForCausalLM

    import modelopt_sparse as mtsa

    if config is None:
        check_is_sparse(name)
        with blaming(name):
            sparse: PreTrainedModel = mtsa.from_pretrained(AutoModelForCausalLM, name, dtype="auto")
        return on_gpu(sparse)
    model = on_gpu(load_model(name))
    make_sparse(model, config)
    return model


def make_sparse(model: PreTrainedModel, config: SparseAttentionConfig) -> None:
    """Makes the model sparse, with a bar where that calibrates it."""
    import modelopt_sparse as mtsa

    with progress() as bar:
        mtsa.sparsify(model, config, calibration_prompts(model, config, bar))


def calibration_prompts(
    model: PreTrainedModel, config: SparseAttentionConfig, bar: Progress
) -> Iterable[Tensor] | None:
    """What `sparsify` calibrates with where nothing is given, tracked by the bar; None if it doesn't."""
    from modelopt_sparse.calibration.prompts import prompts

    aim = config.calibration
    if aim is None:
        return None
    return bar.track(prompts(model, aim), total=aim.samples, description="calibrating")


def check_is_sparse(name: str) -> None:
    """Raises ArgumentError unless the checkpoint says what it does, as `save_pretrained` of a sparse one."""
    from modelopt_sparse.config.checkpoints import BLOCK_NAMES
    from modelopt_sparse.errors import ArgumentError, describe
    from modelopt_sparse.integrations.hf_checkpoint import is_ours

    config = load_model_config(name)
    if not any(is_ours(getattr(config, block, None)) for block in BLOCK_NAMES):
        takes = "one that modelopt_sparse saved"
        remedy = "Make it sparse with --preset or --config, or with `modelopt-sparse sparsify`."
        raise ArgumentError(describe("MODEL", f"{name!r}, which isn't sparse", takes, remedy))


def on_gpu(model: PreTrainedModel) -> PreTrainedModel:
    """The model, on the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]  # transformers wraps it, and loses self
    return model


def load_model_config(name: str) -> PretrainedConfig:
    """Its configuration alone.

    Raises:
        ArgumentError, StateError: as `load_model`.
    """
    from transformers import AutoConfig

    from modelopt_sparse.integrations.hf_loading import check_configuration

    with blaming(name):
        check_configuration(name, {})
        config: PretrainedConfig = AutoConfig.from_pretrained(name)
    return config


def find_tokenizer(name: str) -> Any | None:
    """Its tokenizer; None where the checkpoint has none."""
    from modelopt_sparse.calibration.prompts import tokenizer_of

    return tokenizer_of(name)


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """What transformers finds wrong with a model in this block is an ArgumentError that names it."""
    from modelopt_sparse.errors import ArgumentError, SparseAttentionError, describe

    try:
        yield
    except SparseAttentionError:
        raise  # it says itself what is wrong
    except _BLAMED as error:
        takes = "a folder or hub name of a causal language model that transformers can load"
        problem = " ".join(str(error).split())[:1000] or type(error).__name__
        if isinstance(error, FileNotFoundError):
            problem = f"Not there: {problem}"
        raise ArgumentError(describe("MODEL", repr(name), takes, problem)) from error
