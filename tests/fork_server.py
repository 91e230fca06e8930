"""A process that imports everything once and forks training ranks from itself.

Starting a rank takes seconds of imports; forking one takes none. Each rank is still a separate process with
its own id, environment and output. Before each fork the server checks that it has nothing that must not be
forked: threads (their locks would stay locked in the rank forever), a process group or a CUDA context.

It reads requests from standard input, one JSON object per line, and answers each with one line on standard
output: `{"fork": {...}}` with the rank's process id, `{"ended": true}` with the exit statuses of the ranks
that have exited since, by id. A rank keeps its id until then, so that a signal cannot reach another process.
At the end of its input the server kills the ranks that are still running.
"""

import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from draccus.wrappers import docstring

import craft_ds
from craft_ds.cli import run_command

# Modules that a run imports lazily. A name missing in another version only costs time.
_LATE = (
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PpmImagePlugin",
    "datasets.io.parquet",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "lerobot.policies.pi0_fast.modeling_pi0_fast",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "safetensors.torch",
    "scipy.io",
    "setuptools.dist",
    "torch._inductor.compile_fx",
    "transformers.models.gemma.tokenization_gemma",
    "transformers.models.paligemma.modeling_paligemma",
    "transformers.models.siglip.modeling_siglip",
)
# The simulator is not needed, and loads a graphics library.
_UNUSED = ("craft_ds.worlds",)


def preload() -> None:
    """Import everything ranks need."""
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(craft_ds.__path__, "craft_ds."):
        if not module.name.startswith(_UNUSED):
            importlib.import_module(module.name)
    for name in _LATE:
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    # Skip the help texts, for which the parser would read the source of every configuration class again.
    docstring.get_attribute_docstring = lambda *_: docstring.AttributeDocString()
    gc.freeze()  # otherwise every rank's first collection copies the pages it shares with this process


def unforkable() -> list[str]:
    """Return what this process holds that would be broken in a fork."""
    threads = list(Path("/proc/self/task").iterdir())
    found = []
    if len(threads) > 1 or threading.active_count() > 1:
        names = [(thread / "comm").read_text().strip() for thread in threads]
        found.append(f"threads: {', '.join(names)}")
    if dist.is_initialized():
        found.append("a process group")
    if torch.cuda.is_initialized():
        found.append("a CUDA context")
    return found


def run_rank(request: dict[str, Any]) -> int:
    """Run a program or the training command as one rank, after applying its fault injectors."""
    os.environ.update(request["environment"])
    faulthandler.enable()
    # The last resort, with the stacks of all threads, even if the starting process is gone.
    faulthandler.dump_traceback_later(request["timeout"], exit=True)
    # torch replaces its pool of threads at the first use after a fork, without a lock: the threads of its
    # autograd engine would race for it ("Invalid thread pool!").
    torch.set_num_threads(1)
    program = request["program"]
    sys.argv = [program or "train_craft.py", *request["argv"]]
    try:
        for module, function, arguments in request["injectors"]:
            getattr(importlib.import_module(module), function)(**arguments)
        if program:
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
        else:
            run_command("train", sys.argv[1:])
    except SystemExit as exiting:
        return int(exiting.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(request: dict[str, Any]) -> int:
    """Fork one rank.

    Returns:
        Its process id.
    """
    assert not unforkable(), unforkable()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        status = run_rank(request)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(status)  # never return into the server's loop


def ended(children: set[int]) -> dict[str, int]:
    """Return the exit statuses of exited children; negative for a signal."""
    found = {}
    for child in sorted(children):
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            children.discard(child)
            found[str(child)] = os.waitstatus_to_exitcode(status)
    return found


def serve() -> None:
    """Answer requests until the input ends."""
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output during imports must not look like an answer
    started = time.perf_counter()
    preload()
    children: set[int] = set()

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer(
        {"seconds": time.perf_counter() - started, "unforkable": unforkable(), "modules": len(sys.modules)}
    )
    try:
        for line in requests:
            request = json.loads(line)
            if "fork" in request:
                child = fork(request["fork"])
                children.add(child)
                answer(child)
            else:
                answer(ended(children))
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    serve()
