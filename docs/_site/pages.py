"""What the site has that no page in docs/ says: executed tutorials, figures, API pages, formulas.

A hook of MkDocs. ASGD_JAX_DOCS_RUN=0 shows tutorials without running them.
"""

import ast
import html
import io
import json
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jupytext
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "asgd_jax"

# Pages of the API, in order, and what each is for. A name is shown where it comes first; modules
# without `__all__` show what they define.
API = {
    "asgd_jax": "The optimizer, and what a loop asks it.",
    "delays": "Where staleness comes from.",
    "stability": "Thresholds, growth times, learning-rate rules.",
    "curvature": "Sharpness, eigenpairs and spectra of the Hessian.",
    "predict": "Weight prediction, for `delayed(predict=...)`.",
    "compensate": "Transforms that act on staleness, inside `delayed`.",
    "flax": "Adapters for Flax; importing it needs Flax.",
    "transforms": "Parts that the other pages do not name.",
    "training": "Runs from a configuration; the extra `train`.",
    "training.sweep": "Many runs as one compiled program.",
    "cluster.train": "Real asynchronous training on Ray; the extra `ray`.",
    "cluster.replay": "A recorded run again, in the simulator.",
    "models": "Flax Linen models of the experiments.",
    "data": "Data sets in memory and streamed.",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {**_tutorials(), "figures.md": _figures(), **_api()}
    for address, content in pages.items():
        files.append(File.generated(config, address, content=content))
    for picture in sorted((ROOT / "results").glob("*/*.png")):
        address = f"figures/{picture.name}"
        files.append(File.generated(config, address, abs_src_path=str(picture)))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Turns TeX into MathML, which browsers draw without a script."""
    inline = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
    block = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
    content = block.sub(lambda found: convert(html.unescape(found[1]), display="block"), content)
    return inline.sub(lambda found: convert(html.unescape(found[1])), content)


def _tutorials() -> dict[str, str]:
    executed = os.environ.get("ASGD_JAX_DOCS_RUN", "1") != "0"
    return {
        f"tutorials/{path.stem}.md": _tutorial(path, executed)
        for path in sorted((ROOT / "docs" / "tutorials").glob("*.py"))
    }


def _tutorial(path: Path, executed: bool) -> str:
    """A notebook as a page: text, code and what the code printed."""
    parts, names = [], {"__name__": "__main__"}
    for cell in jupytext.read(path).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        said = io.StringIO()
        if executed:
            with redirect_stdout(said):
                exec(compile(cell.source, str(path), "exec"), names)
        if said.getvalue().strip():
            parts.append(f"```text\n{said.getvalue().rstrip()}\n```")
    name = path.relative_to(ROOT)
    parts.insert(
        1, f"*This page is the program `{name}`, a notebook in jupytext's percent format.*"
    )
    return "\n\n".join(parts) + "\n"


def _figures() -> str:
    """Every figure of results/: claim, how many of its parts hold, whether a proxy, the picture."""
    parts = [_FIGURES_HEAD]
    row = r"^\| \[(\w+)\]\((\w+)/summary\.json\)"
    for name, folder in re.findall(row, _results_page(), re.MULTILINE):
        summary = json.loads((ROOT / "results" / folder / "summary.json").read_text())
        holds = [bool(claim["holds"]) for claim in summary["claims"]]
        title = f"Figure {int(folder[3:])}" if folder.startswith("fig") else folder.capitalize()
        proxy = summary["proxy"]
        parts.append(f"## {title} {{ #{folder} }}\n\n{summary['caption']}")
        parts.append(
            f"*{sum(holds)} of {len(holds)} claims hold. "
            + (f"A proxy: {proxy}." if proxy else "No proxy.")
            + f"* `python scripts/reproduce.py --figure={name}`"
        )
        for picture in sorted((ROOT / "results" / folder).glob("*.png")):
            parts.append(f"![{title}: {summary['caption']}](figures/{picture.name})")
        failed = [_said(claim) for claim in summary["claims"] if not claim["holds"]]
        if failed:
            parts.append("Does not hold here:\n\n" + "\n".join(f"* {text}" for text in failed))
    return "\n\n".join(parts) + "\n"


def _said(claim: dict[str, Any]) -> str:
    measured = claim["measured"]
    number = f"{measured:.4g}" if isinstance(measured, float) else measured
    return f"{claim['claim']}: {number}, expected {claim['expected']}"


def _results_page() -> str:
    return (ROOT / "results" / "README.md").read_text()


_FIGURES_HEAD = """# Figures

The paper's figures and seven beyond them, as `results/` of the repository has them: with records,
configuration, seeds, versions, commit, and every claim with the expected and the measured number.
`make figures` makes all of it again, `make audit` computes every number again from the records.

## What is a proxy?

A *proxy* is a smaller model or data set in the place of the paper's: what runs on two cores. It
shows the effect, not the paper's error rates. Each figure below says whether it is one and of what;
`--preset=paper` runs the paper's own size with the same command."""


def _api() -> dict[str, str]:
    shown: set[str] = set()
    pages, rows = {}, []
    for page, purpose in API.items():
        module = "asgd_jax" if page == "asgd_jax" else f"asgd_jax.{page}"
        entries, listed = [], []
        # Functions first: they are what a reader comes for.
        for name in sorted(_public_names(module), key=lambda name: name[0].isupper()):
            path = _where_defined(module, name)
            if name == "__version__" or path in shown or path.removeprefix("asgd_jax.") in API:
                continue
            shown.add(path)
            entries.append(
                f'::: {path}\n    options: {{heading: "{module}.{name}", toc_label: {name}}}'
            )
            listed.append(f"[`{name}`][{path}]")
        pages[f"api/{page}.md"] = "\n\n".join([f"# {module}", purpose, *entries]) + "\n"
        rows.append(f"## [{module}]({page}.md)\n\n{purpose}\n\n{', '.join(listed)}")
    head = "# API reference\n\nEvery public name, by module."
    pages["api/index.md"] = "\n\n".join([head, *rows]) + "\n"
    return pages


def _body(module: str) -> list[ast.stmt]:
    path = ROOT.joinpath("src", *module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text()).body


def _public_names(module: str) -> list[str]:
    """`__all__`, or what a module without it defines; read, not imported."""
    body = _body(module)
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    defined = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in defined if not name.startswith("_")]


def _where_defined(module: str, name: str) -> str:
    """The path of a name where it is defined: `asgd_jax.transforms.delayed` is a module, too."""
    for node in _body(module):
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("asgd_jax.")
        if ours and any((each.asname or each.name) == name for each in node.names):
            return _where_defined(node.module, name)
    return f"{module}.{name}"
