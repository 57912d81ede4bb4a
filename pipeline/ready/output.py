"""Whether results can go into a folder or bucket, and no later run would read them as input.

Looks at folders and lists buckets; writes nothing.
"""

import os
import re
from collections.abc import Sequence

from fsspec.utils import glob_translate

from segue.pipeline.dataset.files import InputFile
from segue.pipeline.dataset.listing import glob_root, has_magic, is_local
from segue.pipeline.jobfile.schema import scheme_of
from segue.pipeline.problems import Problem, shown
from segue.pipeline.storage.open import open_store
from segue.pipeline.storage.store import OutputStorageError

SHARD = "part-000000-0.parquet"  # a name that a shard may have


def check_output(output: str, input_paths: Sequence[str], inputs: Sequence[InputFile]) -> list[Problem]:
    """What is wrong with `output.path`. `input_paths`: as the job file has them."""
    if scheme_of(output):  # s3, as job files allow no other
        return _check_bucket(output) or _check_remote_overlap(output, input_paths, inputs)
    return _check_folder(output) or _check_overlap(output, input_paths, inputs)


def _check_bucket(output: str) -> list[Problem]:
    """Whether the place can be listed. Writes nothing."""
    try:
        open_store(output).names()
    except OutputStorageError as error:
        wanted = "a bucket that can be listed and written to with the credentials at hand"
        return [Problem("output.path", str(error), wanted)]
    return []


def _check_remote_overlap(output: str, input_paths: Sequence[str], inputs: Sequence[InputFile]) -> list[Problem]:
    """`_check_overlap` for URLs, which have no links."""
    folder = output.rstrip("/") + "/"
    for path in input_paths:
        is_inside = folder.startswith(path.rstrip("/") + "/")
        if is_inside or (has_magic(path) and re.match(glob_translate(path), folder + SHARD)):
            got = f"{shown(output)}, where input.path {shown(path)} would read the results"
            return [Problem("output.path", got, "a prefix outside the input")]
    for file in inputs:
        if file.path.startswith(folder):
            got = f"{shown(output)}, which holds the input file {shown(file.path)}"
            return [Problem("output.path", got, "a prefix without input files")]
    return []


def _check_folder(output: str) -> list[Problem]:
    """A folder that is there and writable, or that can be made."""
    above = output
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        return [Problem("output.path", f"{shown(above)}, which is a file", "a folder, existing or new")]
    # The effective user is the one who will write.
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return [Problem("output.path", f"{shown(above)}, which is not writable", "a folder that can be written to")]
    return []


def _check_overlap(output: str, input_paths: Sequence[str], inputs: Sequence[InputFile]) -> list[Problem]:
    """Whether an input path would read the output, or the output folder holds an input file."""
    real = os.path.realpath(output)
    problems: list[Problem] = []
    for path in filter(is_local, input_paths):
        if _reads(os.path.abspath(path), real):
            got = f"{shown(output)}, where input.path {shown(path)} would read the results"
            problems.append(Problem("output.path", got, "a folder outside the input"))
    for file in inputs:
        if is_local(file.path) and os.path.realpath(file.path).startswith(real.rstrip("/") + "/"):
            got = f"{shown(output)}, which holds the input file {shown(file.path)}"
            return problems or [Problem("output.path", got, "a folder without input files")]
    return problems


def _reads(path: str, output: str) -> bool:
    """Whether an input folder or glob takes in files of the (real) folder `output`."""
    if os.path.isdir(path):
        return output == os.path.realpath(path) or output.startswith(os.path.realpath(path).rstrip("/") + "/")
    if os.path.lexists(path) or not has_magic(path):
        return False
    root = glob_root(path)
    relative = os.path.relpath(output, os.path.realpath(root))
    if relative.startswith(".."):
        return False
    shard = os.path.normpath(os.path.join(root, relative, SHARD))
    return re.match(glob_translate(path), shard) is not None
