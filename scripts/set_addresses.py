"""Write setup.py's REPOSITORY into the notebooks: their Colab badges and their cells that install.

python scripts/set_addresses.py
"""

from pathlib import Path
import re

ROOT = Path(__file__).resolve().parents[1]


def repository() -> str:
    """OWNER/NAME, from setup.py's text: running it would build a package."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    return re.search(r'^REPOSITORY = "(.+)"$', text, re.MULTILINE)[1]


def with_addresses(notebook: str, name: str) -> str:
    """A notebook's JSON with every address of the repository replaced by OWNER/NAME."""
    badge = r"(colab\.research\.google\.com/github/)[^/]+/[^/]+(/blob/)"
    notebook = re.sub(badge, rf"\g<1>{name}\g<2>", notebook)
    return re.sub(r'(REPOSITORY = \\")[^"\\]+(\\")', rf"\g<1>{name}\g<2>", notebook)


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        path.write_text(with_addresses(text, repository()), encoding="utf-8")
