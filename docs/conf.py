"""How Sphinx builds the documentation: ``make docs``.

The theme is the one under PyTorch's own. That, ``pytorch_sphinx_theme2``, loads fonts,
scripts and trackers from other hosts; a page of this site loads nothing from anywhere.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import typer
from docutils import nodes
from math_core import LatexToMathML
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator

import captum_globenc
from captum_globenc.cli import app
from captum_globenc.encoders import table
from captum_globenc.methods import METHODS

HERE = Path(__file__).parent
ROOT = HERE.parent
# Notebooks and commands run with this checkout, too, whatever is installed.
os.environ["PYTHONPATH"] = str(ROOT)
# Notebooks run without anybody's own IPython settings, and with errors only from the
# kernel, which warns each time that it talks over this machine's own network.
profile = Path(tempfile.mkdtemp()) / "profile_default"
profile.mkdir()
(profile / "ipython_kernel_config.json").write_text(
    json.dumps({"IPKernelApp": {"log_level": "ERROR"}}), encoding="utf-8"
)
os.environ["IPYTHONDIR"] = str(profile.parent)
atexit.register(shutil.rmtree, profile.parent, ignore_errors=True)

project = "captum_globenc"
author = "The captum_globenc developers"
version = release = captum_globenc.__version__
html_title = project

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "myst_nb",
]
exclude_patterns = ["benchmark-template.md"]
html_copy_source = False
html_show_sourcelink = False
nitpicky = True

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_in_temp = True
# Progress bars.
nb_output_stderr = "remove"

# Types are in the docstrings, where they come with their shapes.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"no-value": True}
add_module_names = False
napoleon_numpy_docstring = False
# Captum's way to write them, "*Tensor* of shape (...): ...", is no type and a colon.
napoleon_custom_sections = ["Returns", "Yields"]
# Types of other projects, and the words that docstrings use between types: nothing is
# fetched at build time to link them to.
nitpick_ignore_regex = [("py:(class|obj|data)", r"(?!captum_globenc\.).*")]

# The order in which to read the notebooks; others follow.
TUTORIALS = [
    "from_integrated_gradients",
    "encoder_components",
    "which_method",
    "images",
    "your_own_model",
]

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    # Wide pages need the room.
    "secondary_sidebar_items": {
        "**": ["page-toc"],
        "comparison": [],
        "support": [],
        "reference/command-line": [],
        **{f"tutorials/{name}": [] for name in TUTORIALS},
    },
    "navbar_align": "left",
}
# Pages by themselves have no section to navigate.
html_sidebars = {
    page: []
    for page in (
        "index",
        "getting-started",
        "method",
        "support",
        "benchmark/README",
        "comparison",
    )
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def support_table() -> str:
    """The supported models as Markdown, for support.md."""
    return table.to_markdown()


def command_line() -> str:
    """What the commands answer to ``--help``, as Markdown, for command-line.md."""
    page = []
    for arguments in ([], *([name] for name in typer.main.get_command(app).commands)):
        shown = subprocess.run(
            [sys.executable, "-m", "captum_globenc", *arguments, "--help"],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        title = " ".join(["captum-globenc", *arguments])
        page.append(f"## {title}\n\n```text\n{shown.strip()}\n```")
    return "\n\n".join(page)


def methods_table() -> str:
    """The methods by their names as Markdown, for reference/methods.md."""
    rows = [f"| `{name}` | {method.reduction} |" for name, method in METHODS.items()]
    return "\n".join(["| name | scores |", "|---|---|", *rows])


def tutorials() -> str:
    """The table of contents of the notebooks that are there, for tutorials/index.md."""
    found = sorted(path.stem for path in (ROOT / "tutorials").glob("*.ipynb"))
    if not found:
        return "There are none yet."
    found = sorted(found, key=[*TUTORIALS, *found].index)
    return "\n".join(["```{toctree}", ":maxdepth: 1", "", *found, "```"])


# What the build adds at the end of a page.
MADE = {
    "support": support_table,
    "reference/command-line": command_line,
    "reference/methods": methods_table,
    "tutorials/index": tutorials,
}


def fill(_: Sphinx, page: str, source: list[str]) -> None:
    """Add to a page what only the package can say."""
    if page in MADE:
        source[0] += "\n" + MADE[page]() + "\n"


def copy_tutorials(_: Sphinx) -> None:
    """The notebooks, from where readers of the repository look for them."""
    for notebook in (HERE / "tutorials").glob("*.ipynb"):
        notebook.unlink()
    for notebook in (ROOT / "tutorials").glob("*.ipynb"):
        # From here, the pages that they link to are nearer.
        text = notebook.read_text(encoding="utf-8").replace("](../docs/", "](../")
        (HERE / "tutorials" / notebook.name).write_text(text, encoding="utf-8")


def set_lists_apart(
    _app: Sphinx, _kind: str, _name: str, _thing: object, _: object, lines: list[str]
) -> None:
    """Put a blank line before lists: reStructuredText needs it."""
    for at in reversed(range(1, len(lines))):
        above = lines[at - 1].strip()
        if lines[at].lstrip().startswith("- ") and above.endswith(":"):
            lines.insert(at, "")


_mathml = LatexToMathML()


def write_math(translator: HTML5Translator, node: nodes.Element) -> NoReturn:
    """A formula as MathML, which browsers draw without script or font."""
    displayed = isinstance(node, nodes.math_block)
    formula = _mathml.convert_with_local_state(node.astext(), displaystyle=displayed)
    formula = formula.replace("<mo>\N{PRIME}<", '<mo class="prime">\N{PRIME}<')
    if displayed:
        formula = f'<div class="formula">{formula}</div>\n'
    translator.body.append(formula)
    raise nodes.SkipNode


_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["'](?:https?:)?//[^"']+"""
    r"""|<link[^>]+href=["'](?:https?:)?//[^"']+|url\(["']?(?:https?:)?//[^)]+"""
)


def check_self_contained(sphinx: Sphinx, error: Exception | None) -> None:
    """Fail where a page would load something from another host."""
    for path in sphinx.outdir.rglob("*"):
        if error is None and path.suffix in (".html", ".css"):
            found = _LOADED.search(path.read_text(encoding="utf-8"))
            if found:
                raise ExtensionError(f"{path} loads from elsewhere: {found[0]}")


def setup(sphinx: Sphinx) -> None:
    """Add what no extension does."""
    sphinx.connect("builder-inited", copy_tutorials)
    sphinx.connect("source-read", fill)
    # After napoleon, which has priority 500.
    sphinx.connect("autodoc-process-docstring", set_lists_apart, priority=600)
    sphinx.connect("build-finished", check_self_contained)
    sphinx.add_html_math_renderer(
        "mathml",
        inline_renderers=(write_math, None),
        block_renderers=(write_math, None),
    )
