"""The documentation builds without a warning, its code runs, and what is generated in it is up to date."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import modelopt_sparse as mtsa
from modelopt_sparse import kernels
from modelopt_sparse.bench import tables
from modelopt_sparse.methods import sparse_methods
from tests.blocks import ROOT, blocks_of, pages

# Pages whose blocks take long on one core.
SLOW: frozenset[str] = frozenset()
PAGES = [str(page.relative_to(ROOT)) for page in pages()]


def module_at(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """Runs the blocks of a page, in a process of its own, and returns what it printed where one fails."""
    log = tmp_path_factory.mktemp("blocks") / "log"
    # Code runs as a user's would: without the interpreter that other tests run kernels in.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    with log.open("wb") as stderr:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.blocks"],
            cwd=ROOT,
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    with server:

        def run(page: str) -> str:
            before = log.stat().st_size
            server.stdin.write(f"{page}\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            said = log.read_bytes()[before:].decode()
            return "" if answer == f"{page}: ran\n" else f"{answer}{said}"

        yield run


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES]
)
def test_the_code_of_a_page_runs(page, runner):
    failure = runner(page)
    assert not failure, failure


def test_a_page_that_fails_is_told_by_its_line(tmp_path, runner):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    failure = runner(str(page))
    assert "FAILED" in failure and "AssertionError" in failure and 'page.md", line 8' in failure


def test_blocks_that_need_a_gpu_are_only_compiled_without_one(tmp_path, runner):
    page = tmp_path / "page.md"
    page.write_text(
        "```python {.gpu}\nimport torch\n\nassert torch.cuda.is_available()\n```\n"
        "```sh\nnot python\n```\n"
    )
    assert len(blocks_of(page.read_text())) == 1
    assert not runner(str(page))
    page.write_text("```python {.gpu}\nthis is no code\n```\n")
    assert "SyntaxError" in runner(str(page))
    with pytest.raises(ValueError, match="line 1"):
        blocks_of("```python {.other}\nx = 1\n```\n")


def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    site = tmp_path / "site"
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / ("" if page.stem == "index" else page.stem) / "index.html").is_file()
    changelog = (site / "changelog/index.html").read_text()
    assert "<code>sparsify</code>" in changelog and "~~~" not in changelog
    names = (site / "api/index.html").read_text()
    for name in (*mtsa.__all__, *kernels.__all__):
        value = getattr(mtsa, name, None) or getattr(kernels, name)
        if inspect.isroutine(value) or isinstance(value, type):
            assert f'<h3 id="{name.lower()}">' in names
    assert not list(site.rglob("*.py"))
    # Nothing is fetched from elsewhere to show a page.
    text = (site / "index.html").read_text()
    assert 'src="http' not in text and 'rel="stylesheet" href="http' not in text


def test_tables_of_fields_are_those_of_the_classes():
    reference = module_at(ROOT / "docs/reference.py")
    text = reference.PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- /fields") == len(reference.BLOCK.findall(text))
    assert reference.refreshed(text) == text, "Run: python docs/reference.py"
    for name in ("skip_softmax_threshold", "thresholds", "sparsity_n", "target_sparse_ratio"):
        assert f"| `{name}` |" in text


def test_pages_name_every_method_and_preset():
    def text_of(page: str) -> str:
        return (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")

    for name, method in sparse_methods().items():
        if method.__module__.startswith("modelopt_sparse."):
            assert f"`{name}`" in text_of("methods")
    for name in mtsa.PRESETS:
        assert f"`{name}`" in text_of("configuration")


def test_figures_are_those_of_the_committed_files():
    page = ROOT / "docs/benchmarks.md"
    text = page.read_text(encoding="utf-8")
    assert tables.refreshed(page) == text, "Run: make docs"
    for results in (ROOT / "docs/benchmarks").glob("*.json"):
        _, rows = tables.load(results)
        shown = {
            group
            for name, groups in tables.BLOCKS.shown(text)
            if name == f"benchmarks/{results.name}"
            for group in groups
        }
        assert shown == {row.group for row in rows}


def test_markup_of_the_changelog_that_is_not_read_is_refused():
    hooks = module_at(ROOT / "docs/hooks.py")
    assert hooks.as_markdown("A\n=\n\nb\n~\n\n- ``c``\n") == "# A\n\n### b\n\n- ``c``\n"
    with pytest.raises(ValueError, match=r"\.\. note"):
        hooks.as_markdown("A\n=\n\n.. note::\n")


def test_a_field_without_a_description_is_refused():
    reference = module_at(ROOT / "docs/reference.py")

    class Config(reference.BaseModel):
        """Args:
        known: a number.
        """

        unknown: int = 1

    with pytest.raises(ValueError, match="unknown"):
        reference.table(Config)
