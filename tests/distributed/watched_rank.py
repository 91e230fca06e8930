"""A process that ends with its launcher, or after a minute. Argument: a file for its process id."""

import os
import sys
import time
from pathlib import Path

from craft_ds.distributed.env import settle_environment
from craft_ds.distributed.launcher_watch import end_with_launcher

settle_environment()
end_with_launcher()
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
