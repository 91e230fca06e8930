"""Client of the fork server: start ranks, kill some of them, and record how the others exit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

_POLL_S = 0.01


class FaultInjector(NamedTuple):
    """A function that runs in a rank before its program.

    Attributes:
        function: `module:function`; the module is in tests/faults.
        arguments: Its keyword arguments, plain values.
    """

    function: str
    arguments: dict[str, Any]


class Kill(NamedTuple):
    """SIGKILL from outside.

    Attributes:
        seconds: Delay after the start.
        ranks: The killed ranks.
    """

    seconds: float
    ranks: tuple[int, ...]


@dataclass
class LaunchResult:
    """Outcome of one launch.

    Attributes:
        statuses: Exit status of each rank; negative for a signal.
        outputs: Output of each rank.
        seconds: From the start to the exit of the last rank.
        hung: Ranks that did not exit by themselves after another had failed, and were killed.
    """

    statuses: list[int]
    outputs: list[str]
    seconds: float
    hung: list[int] = field(default_factory=list)

    @property
    def killed(self) -> bool:
        """True if any rank was ended by SIGKILL."""
        return -signal.SIGKILL in self.statuses

    def check(self) -> Self:
        """Assert that every rank exited with status 0."""
        assert not any(self.statuses), f"statuses {self.statuses}\n" + "\n".join(
            f"--- rank {rank}\n{output[-6000:]}" for rank, output in enumerate(self.outputs)
        )
        return self


class ForkServer:
    """Client of the process in `fork_server`, which starts ranks without the seconds of imports.

    Args:
        scratch: Directory for the ranks' output.
    """

    def __init__(self, scratch: Path):
        self._scratch = scratch
        here = Path(__file__).parent
        paths = [str(here / "faults"), str(here.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": "1",
            # Forked ranks cannot use CUDA, and their bits are compared: always run on the CPU.
            "CUDA_VISIBLE_DEVICES": "",
            # Otherwise pyarrow's allocator starts a thread.
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
            # Otherwise torch's compiler starts workers on import.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        self._errors = (scratch / "fork_server.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(here / "fork_server.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
        )
        self.hello: dict[str, Any] = self._answer()
        self._launches = 0

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the fork server ended:\n{self._errors.read()[-6000:]}")
        return json.loads(line)

    def close(self) -> None:
        """Stop the server and the ranks that are still running."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._errors.close()

    def run(
        self,
        argv: Sequence[object],
        world_size: int,
        *,
        program: Path | None = None,
        kill: Kill | None = None,
        injectors: Mapping[int, Sequence[FaultInjector]] | None = None,
        timeout: float = 120.0,
        grace: float = 10.0,
    ) -> LaunchResult:
        """Run the training command, or another program, on some ranks until all have exited.

        Args:
            argv: Arguments of the command.
            world_size: Number of ranks.
            program: A Python file to run in place of the training command.
            kill: Ranks to kill, and when.
            injectors: Fault injectors by rank.
            timeout: Seconds after which ranks print their stacks and exit.
            grace: Seconds that ranks have to exit by themselves after another has failed.
        """
        self._launches += 1
        scratch = self._scratch / f"launch_{self._launches:03d}"
        scratch.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = time.monotonic()
        running: dict[int, int] = {}
        outputs = [scratch / f"{rank}.txt" for rank in range(world_size)]
        for rank, output in enumerate(outputs):
            output.touch()  # a rank may be killed before it has opened it
            request = {
                "environment": {
                    key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()
                },
                "program": None if program is None else str(program),
                "argv": [str(argument) for argument in argv],
                "injectors": [
                    (*one.function.split(":"), one.arguments) for one in (injectors or {}).get(rank, ())
                ],
                "output": str(output),
                "timeout": timeout,
            }
            running[self._ask({"fork": request})] = rank
        statuses, hung = self._wait(running, started, kill, timeout, grace)
        return LaunchResult(
            [statuses[rank] for rank in range(world_size)],
            [output.read_text(errors="replace") for output in outputs],
            time.monotonic() - started,
            hung,
        )

    def _wait(
        self, running: dict[int, int], started: float, kill: Kill | None, timeout: float, grace: float
    ) -> tuple[dict[int, int], list[int]]:
        statuses: dict[int, int] = {}
        deadline = started + timeout + 10.0  # after the ranks' own deadline, which prints their stacks
        failed_at = None
        hung: list[int] = []
        while running:
            now = time.monotonic()
            for process, status in self._ask({"ended": True}).items():
                statuses[running.pop(int(process))] = status
            if failed_at is None and any(statuses.values()):
                failed_at = now
            if kill is not None and now - started >= kill.seconds:
                self._kill(process for process, rank in running.items() if rank in kill.ranks)
                kill = None
            if running and (now > deadline or (failed_at is not None and now - failed_at >= grace)):
                if not hung:
                    hung = sorted(running.values())
                self._kill(running)
            time.sleep(_POLL_S)
        return statuses, hung

    @staticmethod
    def _kill(processes: Any) -> None:
        for process in processes:
            os.kill(process, signal.SIGKILL)
