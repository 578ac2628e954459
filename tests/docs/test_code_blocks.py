"""Every code block of README and docs runs, or says why not; every error of the FAQ is raised.

In the sources: `<!-- run first ... -->` is code that a block needs and a reader does not; a block
after `<!-- not run: why -->` is left alone, and so is a page with `<!-- no block of this page is
run: why -->`. Blocks of a page share their names. In a console block `...` stands for any lines.
"""

import io
import os
import re
import shlex
import textwrap
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt

from asgd_jax.stability.__main__ import main as calculate

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (\S.{9,})-->", re.DOTALL)
PAGE_NOT_RUN = re.compile(r"<!-- no block of this page is run: (\S.{9,}?)-->", re.DOTALL)
COMMENT = re.compile(r"<!-- (run first|raises)\n(.*?)-->", re.DOTALL)


class Block(NamedTuple):
    """A block of code and the comment right before it."""

    language: str
    code: str
    comment: str
    line: int


def blocks_of(page):
    comment = ""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "html_block":
            comment += token.content
        elif token.type in ("fence", "code_block"):
            yield Block(token.info.strip(), token.content, comment, token.map[0] + 1)
            comment = ""
        elif token.type in ("paragraph_open", "heading_open"):
            comment = ""


def in_console(code):
    """Runs the commands of a console block and compares what they print."""
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n?)*)", code, re.MULTILINE):
        words = shlex.split(command)
        if words[:3] == ["python", "-m", "asgd_jax.stability"]:
            words = words[3:]
        elif words[0] == "asgd-stability":
            words = words[1:]
        else:
            raise AssertionError(f"no test runs {command!r}: say why not before it")
        said = io.StringIO()
        with redirect_stdout(said):
            assert calculate(words) == 0
        lines = [line.rstrip() for line in said.getvalue().strip().splitlines()]
        wanted = [line.rstrip() for line in expected.strip().splitlines()]
        pattern = "\n".join("(?s:.*)" if line == "..." else re.escape(line) for line in wanted)
        assert re.fullmatch(pattern, "\n".join(lines)), "\n".join(lines)


@pytest.fixture(name="here")
def _here(monkeypatch, tmp_path):
    """Blocks may make files, and change the folder."""
    monkeypatch.chdir(tmp_path)
    before = os.environ.copy()
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs_or_says_why_not(page, here):
    if PAGE_NOT_RUN.search(page.read_text()):
        return
    names = {"__name__": "docs"}
    for block in blocks_of(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        found = COMMENT.search(block.comment)
        if found and found[1] == "raises":
            check_error(found[2], block.code, names, where)
        elif NOT_RUN.search(block.comment):
            continue
        elif block.language == "python":
            for code in ([found[2]] if found else []) + [block.code]:
                exec(compile(textwrap.dedent(code), where, "exec"), names)
        elif block.language == "console":
            in_console(block.code)
        else:
            raise AssertionError(f"{where}: a {block.language or 'plain'} block says not why")


def check_error(code, text, names, where):
    """The last statement raises what the block shows."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it raises, by its text
        exec(compile(code, where, "exec"), names)
    assert str(caught.value) == text.strip(), where


def test_the_questions_of_the_faq_quote_their_errors():
    """A heading that names an error is part of it."""
    text = (ROOT / "docs" / "faq.md").read_text()
    entries = re.findall(
        r"^## (.*?)\n\n<!-- raises.*?-->\n\n```text\n(.*?)\n```", text, re.M | re.S
    )
    assert len(entries) >= 10
    for heading, error in entries:
        for part in heading.split("..."):
            assert part.strip() in error, heading


def anchors_of(page):
    """The anchors that headings have on a page, as they are shown in the repository."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_into_the_repository_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for address in re.findall(r"\]\(([^)#:]+(?:#[^)]*)?)\)", text):
        path, _, anchor = address.partition("#")
        assert (ROOT / path).exists(), address
        assert not anchor or anchor in anchors_of(ROOT / path), address


def test_a_block_that_says_not_why_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: it only shows -->\n\n```sh\nls\n```\n\ntext\n\n```sh\nls\n```\n")
    first, second = blocks_of(page)
    assert NOT_RUN.search(first.comment)
    assert not NOT_RUN.search(second.comment)
    with pytest.raises(AssertionError, match="no test runs 'rm x'"):
        in_console("$ rm x\n")
