"""Run several training commands in one rank process: starting a rank takes seconds.

Arguments: a JSON file with the flags of each command by name, and a directory for what came of them.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from craft_ds.cli import exit_without_teardown, run_command


def main() -> None:
    commands, results = map(Path, sys.argv[1:])
    ended = {}
    for name, flags in json.loads(commands.read_text()).items():
        print(name, flush=True)
        sys.argv = ["train_craft.py", *flags]
        status, output, errors = 0, io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                run_command("train", sys.argv[1:])
        except SystemExit as leaving:
            status = leaving.code
        ended[name] = {"status": status, "output": output.getvalue(), "errors": errors.getvalue()}
    (results / f"{os.environ['RANK']}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    exit_without_teardown(main)
