"""``python -m modelopt_sparse``: the command ``modelopt-sparse``."""

from modelopt_sparse_cli import main

if __name__ == "__main__":
    main()
