"""MkDocs hooks: pages link to figures and examples as files of the repository, and the site carries these files.

A page says ``../benchmarks/results/…``, which is right on GitHub. In the site the folders lie beside the pages.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks/results", "examples")


def on_files(files, config):
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).iterdir()):
            if path.is_file():
                files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    return re.sub(rf"\]\(\.\./((?:\.\./)*)({'|'.join(FOLDERS)})/", r"](\1\2/", markdown)


def on_page_content(html, **_):
    """Docstrings name code by Sphinx's roles; a page shows the name alone."""
    return re.sub(r":(?:func|class|mod|meth|data):<code>[~]?", "<code>", html)
