"""A process that ends with its launcher, or after a minute. Argument: a file for its process id.

A second file, with the suffix `.watches`, says that it watches its launcher.
"""

import os
import sys
import time
from pathlib import Path

from craft_ds.distributed.env import settle_environment
from craft_ds.distributed.launcher_watch import end_with_launcher

settle_environment()
file = Path(sys.argv[1])
file.write_text(str(os.getpid()))  # before the watch, which may end this process at once
end_with_launcher()
file.with_suffix(".watches").touch()
time.sleep(60)
