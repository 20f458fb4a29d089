"""Sparse attention as a mode, and the functions that users call."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from modelopt_sparse.calibration.calibrate import Data
from modelopt_sparse.config import SparseAttentionConfig
from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.convert import configurations, convert, deconvert
from modelopt_sparse.errors import ConfigError, describe
from modelopt_sparse.integrations.hf_checkpoint import take_block, write_block
from modelopt_sparse.integrations.hf_loading import load_checkpoint
from modelopt_sparse.models.attention import attention_targets
from modelopt_sparse.modes.apply import apply_mode, check_model, forget_mode
from modelopt_sparse.modes.base import Metadata, Mode
from modelopt_sparse.modes.registry import register_mode
from modelopt_sparse.modes.state import STATE_VERSION, restore_from_modelopt_state
from modelopt_sparse.modes.undo import undone_on_failure
from modelopt_sparse.module_state import (
    check_decision_tiles,
    module_states,
    resolved_states,
    sparse_modules,
)
from modelopt_sparse.patterns import Pattern
from modelopt_sparse.sparse_parts import changed, chosen_modules, sparsified_parts
from modelopt_sparse.thresholds import calibrate_modules

MODE_NAME = "sparse_attention"


@register_mode
class SparseAttentionMode(Mode[SparseAttentionConfig]):
    """Sparse attention. Its metadata says, module by module, what the model does now."""

    name = MODE_NAME
    Config = SparseAttentionConfig
    replaces_itself = True

    def convert(self, model: nn.Module, config: SparseAttentionConfig) -> Metadata:
        """Makes the modules that the configuration matches sparse."""
        sparsified_parts(model)
        resolved = config.resolve_all(attention_targets(model).values())
        if not resolved:
            takes = "at least one rule that names a method for a module of this model"
            raise ConfigError(describe("sparse_cfg", "no such rule", takes))
        with undone_on_failure(model, *configurations(model)):
            convert(model, resolved)
            states = module_states(model)
            write_block(model, config, states)
        return {"modules": states}

    def restore(self, model: nn.Module, config: SparseAttentionConfig, metadata: Metadata) -> None:
        """Makes the modules that the metadata names sparse, as they were when it was written."""
        sparsified_parts(model)
        resolved, tiles = resolved_states(metadata.get("modules"), attention_targets(model))
        with undone_on_failure(model, *configurations(model)):
            convert(model, resolved)
            check_decision_tiles(model, tiles)
            write_block(model, config, module_states(model))

    def update(
        self, model: nn.Module, config: SparseAttentionConfig, metadata: Metadata
    ) -> Metadata:
        """The modules as they are now: one may have been enabled or disabled since."""
        return {"modules": module_states(model)}

    def dump_config(self, config: SparseAttentionConfig) -> dict[str, Any]:
        """Plain data; a configuration with callables as patterns is refused."""
        return config.to_dict()


Config = SparseAttentionConfig | Mapping[str, Any] | str | PathLike[str]


def sparsify(model: nn.Module, config: Config, forward_loop: Data = None) -> nn.Module:
    """Makes the attention of `model` sparse, in place, all or nothing.

    Args:
        model: a transformers model whose attention modules use the attention interface. One that is
            sparse already gets the new configuration in place of the old one.
        config: a preset, a `SparseAttentionConfig`, the mapping of one, or a path to a JSON or YAML file.
            If it has a ``calibration``, the model is calibrated too, as by `calibrate`.
        forward_loop: what to calibrate with; see `calibrate`.
    Returns:
        `model`, whose matched modules are now `SparseAttentionModule`s.
    Raises:
        ConfigError: the configuration is not valid, or a pattern matches no attention module.
        UnsupportedModel: the model has no attention that can be made sparse, or is a part of one that
            was made sparse as a whole.
        FileNotFoundError: no file at the path.

    The checkpoint that ``save_pretrained`` writes names the sparse modules if `model` is the model that is
    saved, rather than a part of it.
    """
    check_model(model)
    loaded = SparseAttentionConfig.load(config)
    if loaded.calibration is None and forward_loop is not None:
        remedy = "Add calibration={...} to the configuration, or leave the loop out."
        takes = "None: the configuration has no calibration"
        raise ConfigError(describe("forward_loop", "one", takes, remedy))
    with undone_on_failure(model, *configurations(model)):
        apply_mode(model, MODE_NAME, loaded)
        if loaded.calibration is not None:
            calibrate_modules(model, loaded.calibration, forward_loop)
    return model


def calibrate(
    model: nn.Module, config: Config | CalibrationConfig | None = None, forward_loop: Data = None
) -> nn.Module:
    """Gives a model thresholds by which it skips a share of tiles that you name, from one pass over prompts.

    In place of the share, `config` may bound what skipping costs: an error, or the dropped mass.

    The model computes densely meanwhile, and counts what every lambda would skip, by length. Then each
    sequence gets its lambda by its own number of keys. Where the configuration has no ``min_context``, it
    becomes the shortest length that was counted: shorter sequences are dense. `set_sparsity` changes the
    share afterwards.

    Args:
        model: a sparse model: its enabled modules are calibrated. Or any other, with a `config` to
            sparsify it by.
        config: a `CalibrationConfig`, a mapping of its fields, or None for its defaults; or what
            `sparsify` takes, with a ``calibration``.
        forward_loop: what to calibrate with: a function that runs the model it is given; an iterable or a
            dataset of token ids, [B, n] or [n], or of mappings with ``input_ids`` and, where there is
            padding, an ``attention_mask``; or None: prompts that the configuration describes.
    Returns:
        `model`.
    Raises:
        ConfigError: the configuration isn't taken, a method has no threshold, or too little was seen.
        UnsupportedCall: an enabled module is bidirectional; or heads are calibrated apart in several
            processes.
        UnsupportedModel: `model` is only a part of the model that was made sparse; or, without a function,
            has no logits, no cache, or an encoder.
        ArgumentError, ArgumentTypeError: a batch isn't what is taken, or the model is in training mode.
        And what `forward_loop` raises. After any of these the model is as before.
    """
    check_model(model)
    if isinstance(config, Mapping) and not set(config) & set(SparseAttentionConfig.model_fields):
        config = CalibrationConfig.load(config)
    if config is None or isinstance(config, CalibrationConfig):
        calibrate_modules(model, config or CalibrationConfig(), forward_loop)
        return model
    loaded = SparseAttentionConfig.load(config)
    if loaded.calibration is None:
        remedy = "Add calibration={} for its defaults."
        raise ConfigError(describe("config.calibration", None, "a calibration", remedy))
    return sparsify(model, loaded, forward_loop)


def unsparsify(model: nn.Module) -> nn.Module:
    """Gives `model` its own attention back, to the bit. A model that isn't sparse stays as it is.

    Edits of ``model.config`` since then stay.

    Raises:
        UnsupportedModel: `model` is only a part of the model that was made sparse.
    """
    check_model(model)
    sparsified_parts(model)
    with undone_on_failure(model, *configurations(model)):
        deconvert(model)
        forget_mode(model, MODE_NAME)
    return model


def is_attn_sparsified(model: nn.Module) -> bool:
    """Whether any module of `model` is a `SparseAttentionModule`, enabled or not."""
    check_model(model)
    return next(sparse_modules(model), None) is not None


def enable_sparse_attention(model: nn.Module, pattern: Pattern = "*") -> nn.Module:
    """Makes the sparse modules that match `pattern` leave work out again. Returns the model.

    Raises:
        ConfigError: the pattern is not valid or matches no sparse module.
        UnsupportedModel: `model` is only a part of the model that was made sparse.
    """
    return _set_enabled(model, pattern, True)


def disable_sparse_attention(model: nn.Module, pattern: Pattern = "*") -> nn.Module:
    """Makes the sparse modules that match `pattern` dense, keeping their method. Returns the model.

    Raises:
        ConfigError: the pattern is not valid or matches no sparse module.
        UnsupportedModel: `model` is only a part of the model that was made sparse.
    """
    return _set_enabled(model, pattern, False)


def from_pretrained(auto_class: Any, path: str | PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """Loads a checkpoint that ``save_pretrained`` wrote of a sparse model, sparse again.

    Args:
        auto_class: the transformers class to load with, such as ``AutoModelForCausalLM``.
        path, args, kwargs: what its ``from_pretrained`` takes.
    Returns:
        The model.
    Raises:
        StateError: the checkpoint's config.json has no block of this package, or it doesn't fit, or names an
            attention implementation; or the files aren't what transformers loads, or lack weights.
        FileNotFoundError: nothing at an absolute path, or a folder without config.json or safetensors.

    Weights come from safetensors and code from nowhere, unless ``use_safetensors=False`` or
    ``trust_remote_code=True`` says so. Weights that the checkpoint lacks are refused, unless
    ``output_loading_info=True`` asks for their names.
    """
    loaded = load_checkpoint(auto_class, path, args, kwargs)
    # With output_loading_info=True it comes in a tuple.
    restore_from_block(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def restore_from_block(model: nn.Module) -> nn.Module:
    """Makes a model sparse as the block in its configuration says. Returns the model.

    Raises:
        StateError: there is no block of this package, or it doesn't fit.
    """
    entry = {"mode": MODE_NAME, **take_block(model)}
    return restore_from_modelopt_state(model, {"state_version": STATE_VERSION, "modes": [entry]})


def _set_enabled(model: nn.Module, pattern: Pattern, enabled: bool) -> nn.Module:
    modules = chosen_modules(model, pattern)
    with changed(model):
        for module in modules.values():
            module.enabled = enabled
    return model
