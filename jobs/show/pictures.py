"""Whether a picture can be drawn. Commands ask before they begin the work that the picture shows."""

import importlib.util
from pathlib import Path

from segue.pipeline.problems import JobRefused, Problem, shown


def check_can_draw(path: str | None = None) -> None:
    """Raises JobRefused if matplotlib is missing, or if `path` does not name a PNG in a folder that exists."""
    if importlib.util.find_spec("matplotlib") is None:
        raise JobRefused([Problem("", "no matplotlib", "it installed: pip install 'segue[finetune]'")])
    if path is not None and (not path.endswith(".png") or not Path(path).absolute().parent.is_dir()):
        raise JobRefused([Problem("--picture", shown(path), "a file name that ends in .png, in a folder that exists")])
