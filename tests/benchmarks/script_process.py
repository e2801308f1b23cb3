"""A process that has imported the large libraries and is forked for each script: a program, run by `scripts.py`.

Each line of its standard input is a script to run, as JSON: `argv`, `env`, `out` and `err` (files), `hidden` (modules
that are to be as if they were not installed) and `seconds` (it is killed afterwards). It answers with a line with the
exit status. Nothing of Lorikeet is imported here, so the script imports all of it.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "matplotlib.pyplot")


def next_job() -> dict[str, Any] | None:
    """In a process of its own: what to run there. In this one: None, at the end of the input."""
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            job: dict[str, Any] = json.loads(line)
            return job
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def prepare(job: dict[str, Any]) -> None:
    """Make this process what an interpreter that was started with the script would be."""
    files = ((os.devnull, os.O_RDONLY), (job["out"], os.O_WRONLY), (job["err"], os.O_WRONLY))
    for number, (path, flags) in enumerate(files):
        os.dup2(os.open(path, flags | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(job["env"])
    sys.modules.update(dict.fromkeys(job["hidden"]))
    sys.argv = job["argv"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    signal.alarm(job["seconds"])


def main() -> None:
    """See the module."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    job = next_job()
    if job is not None:
        prepare(job)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
