"""A launcher as mpirun: starts two wrapped ranks and reads their output. Arguments: port, program, flags."""

import os
import subprocess
import sys

port, *command = sys.argv[1:]
WRAPPER = (
    'export RANK=$OMPI_COMM_WORLD_RANK LOCAL_RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=2; "$@"; status=$?; '
    "exit $status"
)
ranks = [
    subprocess.Popen(
        ["bash", "-c", WRAPPER, "wrapper", sys.executable, *command],
        env=os.environ | {"OMPI_COMM_WORLD_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for rank in range(2)
]
for line in ranks[0].stdout:
    print(line, end="", flush=True)
sys.exit(max(rank.wait() for rank in ranks))
