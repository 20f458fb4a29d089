"""The bundled model under lm-evaluation-harness, dense and sparse, on a task that needs no download.

pip install -e '.[lm_eval]'
python examples/lm_eval_harness.py            # about a minute on two CPU cores
python examples/lm_eval_harness.py --task variable_tracking --length 4096 --threshold 0.3
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

# The file runs from any folder: its neighbours are found from the repository's root.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import modelopt_sparse as mtsa  # noqa: E402 (after the path)
from examples.tiny_lm.tasks import TASKS, sample  # noqa: E402
from examples.tiny_lm.text import held_out_text  # noqa: E402

# As the harness calls them: `acc` is the share of answers that greedy decoding gives, and `perplexity` is
# exp(-mean log p(answer | prompt)), of whole answers.
METRICS = ("acc", "perplexity")


def write_task(task: str, length: int, samples: int, folder: Path) -> None:
    """A task as the harness reads it: JSON lines of prompts with their answers, and a YAML file.

    Args:
        task: a name in TASKS.
        length: of prompt and answer together, in tokens.
        folder: what `--include_path` of the harness's own command takes, too.
    """
    # In ASCII a byte is a character, so that no token is lost between bytes and text.
    text, rng = held_out_text().decode("ascii", "ignore").encode(), random.Random(0)
    lines = []
    for _ in range(samples):
        drawn = sample(task, length, rng, text)
        said = bytes(drawn.tokens[1:].tolist()).decode()  # the tokenizer puts BOS before it
        start = drawn.answers[0][0] - 1
        lines.append(json.dumps({"prompt": said[:start], "answer": said[start:]}) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{task}.jsonl"
    data.write_text("".join(lines))
    described = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": metric} for metric in METRICS],
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(described, sort_keys=False))


def main(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "frequent_words",
    threshold: Annotated[float, typer.Option(help="Lambda, above 0 and up to 1.")] = 0.1,
    length: Annotated[int, typer.Option(help="Tokens of each prompt.", min=256, max=8192)] = 1024,
    samples: Annotated[int, typer.Option(help="Prompts.", min=2)] = 16,
    folder: Annotated[Path, typer.Option(help="Where the task goes.")] = Path("out/lm_eval"),
) -> None:
    """Print the harness's scores of the model, dense and sparse, with their standard errors."""
    if task not in TASKS:
        raise typer.BadParameter(f"--task: got {task!r}; takes one of {', '.join(TASKS)}")
    config = mtsa.SKIP_SOFTMAX_TRITON_DEFAULT.with_rule("*", skip_softmax_threshold=threshold)
    folder = folder.resolve()
    write_task(task, length, samples, folder)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    path = ROOT / "examples/tiny_lm/model"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(path))

    def scores() -> dict[str, float]:
        found = simple_evaluate(harness, tasks=[task], task_manager=tasks, bootstrap_iters=1000)
        return found["results"][task]

    dense = scores()
    mtsa.sparsify(model, config)
    sparse = scores()
    mtsa.print_sparse_attention_summary(model)
    print(f"{task}, {samples} prompts of {length} tokens, lambda {threshold}")
    for name, found in (("dense", dense), ("sparse", sparse)):
        shown = (
            f"{metric} {found[f'{metric},none']:.4f} +- {found[f'{metric}_stderr,none']:.4f}"
            for metric in METRICS
        )
        print(f"{name:6}", ", ".join(shown))


if __name__ == "__main__":
    typer.run(main)
