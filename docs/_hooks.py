"""What the site shows from elsewhere in the repository: each study's README, notes and plots."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

# Pages, and what they show or link to.
SHOWN = (".md", ".png", ".py", ".json")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds experiments/<study>/ to the site, under the same paths as in the repository."""
    root = Path(config.config_file_path).parent
    for path in sorted(root.glob("experiments/*/**/*")):
        if path.suffix in SHOWN and "__pycache__" not in path.parts:
            uri = path.relative_to(root).as_posix()
            level = InclusionLevel.NOT_IN_NAV  # mkdocs.yml names the READMEs; they link to the rest
            files.append(File.generated(config, uri, abs_src_path=str(path), inclusion=level))
    return files
