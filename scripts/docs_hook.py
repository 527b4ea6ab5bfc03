"""mkdocs' hook: the pages that code writes, and links as the site has them. See scripts/docs_pages.py.

Run: make docs
"""

import os
import sys
from typing import Any

from docs_pages import ROOT, anchor, pages, relinked
from mkdocs.structure.files import File


def on_config(config: Any) -> Any:
    """Headings have GitHub's anchors; a repository's address comes from the environment."""
    config.mdx_configs["toc"] = {**config.mdx_configs.get("toc", {}), "slugify": anchor}
    config.repo_url = os.environ.get("QGUARD_REPOSITORY") or None
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that code writes."""
    sys.path.insert(0, str(ROOT))  # the command line is read there, and nothing of this project is installed
    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Links of the repository become links of the site."""
    return relinked(markdown, page.file.src_uri, config.repo_url)
