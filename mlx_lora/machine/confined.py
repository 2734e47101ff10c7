"""A Python process for code that nobody here wrote: it can compute and answer, and reach nothing else.

`start` runs a script of ours in a new process. The script imports what it needs, calls `close`, and only then touches
what came from elsewhere. It talks through its standard input and output.

From its start, on every system:
- Python's isolated mode without `site`, modules from where this process has its own;
- an environment of `KEPT` and the hub's offline variables, no descriptor but the standard three, an empty directory;
- the offline guard.

After `close`, on every system: an audit hook refuses to open, list or change files, to connect, to start a process, and
to call native code through ctypes. It sees what goes through Python's own functions.

After `close`, by the system, whatever the code calls:
- no new descriptor (RLIMIT_NOFILE): no file, pipe or socket can be opened. Linux and macOS;
- no byte written to a file (RLIMIT_FSIZE), no core file. Linux and macOS;
- no new process or thread (RLIMIT_NPROC). Linux: unless run by root. macOS: new processes only, unless run by root;
- the seconds of `limit_processor_time` (RLIMIT_CPU), so that one whose parent was killed ends too. Linux and macOS.
Memory is limited by neither system in a way that is safe here (RLIMIT_AS counts addresses, and macOS ignores it):
whoever starts the process watches it. macOS's `sandbox-exec` is deprecated and not used.
"""

from __future__ import annotations

import math
import os
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mlx_lora.machine import offline

# Variables that the process gets: where Python finds its libraries, and the time zone, which templates write dates by.
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "TZ", "TZDIR")
# Audit events that are refused after `close`, by their beginnings.
REFUSED = ("open", "os.", "shutil.", "subprocess.", "socket.", "ctypes.", "mmap.", "fcntl.", "pty.", "tempfile.")
# The limits of `close`. Of descriptors, the standard three stay open.
LIMITS = {
    resource.RLIMIT_NOFILE: 3,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_NPROC: 0,
}
_RUN = "import sys; sys.path[:] = {paths!r}; from mlx_lora.machine import confined; confined.run()"


def start(script: Path, *arguments: object, directory: str) -> subprocess.Popen[bytes]:
    """Run a script as `__main__` in a confined process, with pipes for its input and output.

    `directory` is the empty directory it starts in; it may be removed once the script has answered. The process is
    alone in its session, so an interrupt meant for this process doesn't reach it.
    """
    packages = str(Path(__file__).parents[2])
    paths = [path for path in dict.fromkeys([*sys.path, packages]) if os.path.isabs(path)]
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _RUN.format(paths=paths), str(script), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, cwd=directory,
        env=environment | offline.QUIET_VARIABLES | offline.OFFLINE_VARIABLES,
    )  # fmt: skip


def run() -> None:
    """In the new process: run the script that the command line names, behind the offline guard."""
    del sys.argv[0]  # what `-c` leaves there
    with offline.network_guard():
        runpy.run_path(sys.argv[0], run_name="__main__")


def close() -> None:
    """From now on, and for good: nothing can be opened, written, connected to or started by this process."""
    time.localtime()  # reads the time zone's file, once
    for limit, most in LIMITS.items():
        resource.setrlimit(limit, (most, most))
    sys.addaudithook(_refuse)


def limit_processor_time(seconds: float) -> None:
    """End this process by SIGXCPU when it has computed for this much longer, rounded up to whole seconds."""
    until, hardest = math.ceil(time.process_time() + seconds), resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = until if hardest == resource.RLIM_INFINITY else min(until, hardest)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hardest))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is refused in this process")
