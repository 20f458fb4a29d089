"""The command ``modelopt-sparse``.

A package of its own, because importing anything of `modelopt_sparse` imports torch and transformers, which
takes seconds: here that happens inside of a command, so ``--help`` and usage errors are there at once.
"""

from .app import app, main

__all__ = ["app", "main"]
