"""Arguments of which compiled kernels know nothing: no other value or alignment compiles again."""

from __future__ import annotations

# Triton looks at the numbers in a tuple whatever it is told, so the strides of grids are single arguments.
# That from key to key is always 1, and is not here: unless it is known, Triton 3.6 fails to compile some.
RUN_TIME = [
    "n_sequences", "n_super_blocks", "n_heads", "group", "n_rows", "n_tokens", "n_members", "n_blocks",
    "max_q", "n_splits", "short_tiles", "long_tiles", "short_keys", "long_keys", "long", "n_entries",
    "window",
    "num_sink_tokens", "dense_window_size", "segment_tiles", "log2_threshold", "v_scale",
    "k_table", "v_table", "k_table_stride", "v_table_stride",
    "n_words", "list_stride", "slots", "n_slots", "shares_of", "least",
    "shares", "more_shares", "n_columns", "n_programs", "n_counts", "n_more_counts",
    "q_box_rows", "q_box_columns", "box_rows", "box_page_rows",
    "box_columns", "v_box_columns", "rest_box_columns", "d_out_box_columns",
    "q_start", "q_len", "k_start", "k_len", "start", "length", "bounds", "sinks", "log2_thresholds",
    "mask", "mask_row_start", "mask_key_start", "mask_item", "mask_head", "mask_row",
    "bias", "bias_row_start", "bias_key_start", "bias_item", "bias_head", "bias_row",
    "d_bias", "d_bias_item", "d_bias_head", "d_bias_row",
]  # fmt: skip
