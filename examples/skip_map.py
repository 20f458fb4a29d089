"""Tiles skipped per layer and head, as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def save_picture(shares: np.ndarray, title: str, path: Path) -> None:
    """Writes a PNG heat map, layers down and heads across."""
    layers, heads = shares.shape
    figure, axes = plt.subplots(figsize=(2 + 0.6 * heads, 1.6 + 0.45 * layers), dpi=150)
    image = axes.imshow(100 * shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set(
        title=title, xlabel="query head", ylabel="layer", xticks=range(heads), yticks=range(layers)
    )
    if shares.size <= 400:
        for layer, head in np.ndindex(shares.shape):
            share = shares[layer, head]
            colour = "white" if share < 0.6 else "black"
            axes.text(
                head,
                layer,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                color=colour,
                fontsize=8,
            )
    figure.colorbar(image, label="tiles skipped, %")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
