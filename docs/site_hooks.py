"""mkdocs hook: tutorials, which are scripts in jupytext's percent format, become pages of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]

TUTORIAL = re.compile(r"(tutorials/\w+)\.py\b")


def on_files(files: Files, *, config: Any) -> Files:
    """Add a page for each tutorial."""
    for script in sorted(Path(config["docs_dir"]).glob("tutorials/*.py")):
        page = f"tutorials/{script.stem}.md"
        files.append(File.generated(config, page, content=markdown(script.read_text())))
    return files


def on_page_markdown(text: str, **_: Any) -> str:
    """Links to a tutorial's script lead to its page."""
    return TUTORIAL.sub(r"\1.md", text)


def markdown(script: str) -> str:
    """Markdown of a script: markdown cells as they are, code cells in fences; the jupytext header is left out."""
    cells = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)[1:]
    parts = []
    for kind, body in zip(cells[::2], cells[1::2], strict=True):
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip())
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"
