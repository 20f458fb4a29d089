"""Sparse attention for Hugging Face models: ``mtsa.sparsify(model, mtsa.SKIP_SOFTMAX_TRITON_DEFAULT)``."""

from . import modes
from .calibration.check import check_calibration
from .calibration.check_results import CalibrationCheck
from .config import SparseAttentionConfig
from .config.calibration import CalibrationConfig
from .continuous_batching import continuous_batching
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    ConfigError,
    SparseAttentionError,
    StateError,
    UnsupportedCall,
    UnsupportedModel,
)
from .export import export_sparse_attention_config
from .faithfulness.compare import compare
from .faithfulness.results import Comparison
from .integrations import hf, hf_paged
from .methods import SparseMethod, SparseMethodConfig, register_sparse_method
from .models.attention import register_attention_class
from .modes import modelopt_state, restore, restore_from_modelopt_state, save
from .module import SparseAttentionModule
from .presets import (
    PRESETS,
    SKIP_SOFTMAX_CALIB,
    SKIP_SOFTMAX_DEFAULT,
    SKIP_SOFTMAX_TRITON_CALIB,
    SKIP_SOFTMAX_TRITON_DEFAULT,
    SKIP_SPARSE_SOFTMAX_DEFAULT,
    SPARSE_SOFTMAX_DEFAULT,
)
from .report import get_stats, print_sparse_attention_summary, reset_stats
from .sparse_mode import (
    calibrate,
    disable_sparse_attention,
    enable_sparse_attention,
    from_pretrained,
    is_attn_sparsified,
    sparsify,
    unsparsify,
)
from .thresholds import set_sparsity
from .version import __version__

# The one thing done at import: transformers must know the names before a model is loaded with them.
hf.register()
hf_paged.register()

__all__ = [
    "PRESETS",
    "SKIP_SOFTMAX_CALIB",
    "SKIP_SOFTMAX_DEFAULT",
    "SKIP_SOFTMAX_TRITON_CALIB",
    "SKIP_SOFTMAX_TRITON_DEFAULT",
    "SKIP_SPARSE_SOFTMAX_DEFAULT",
    "SPARSE_SOFTMAX_DEFAULT",
    "ArgumentError",
    "ArgumentTypeError",
    "CalibrationCheck",
    "CalibrationConfig",
    "Comparison",
    "ConfigError",
    "SparseAttentionConfig",
    "SparseAttentionError",
    "SparseAttentionModule",
    "SparseMethod",
    "SparseMethodConfig",
    "StateError",
    "UnsupportedCall",
    "UnsupportedModel",
    "__version__",
    "calibrate",
    "check_calibration",
    "compare",
    "continuous_batching",
    "disable_sparse_attention",
    "enable_sparse_attention",
    "export_sparse_attention_config",
    "from_pretrained",
    "get_stats",
    "is_attn_sparsified",
    "modelopt_state",
    "modes",
    "print_sparse_attention_summary",
    "register_attention_class",
    "register_sparse_method",
    "reset_stats",
    "restore",
    "restore_from_modelopt_state",
    "save",
    "set_sparsity",
    "sparsify",
    "unsparsify",
]
