import os
import subprocess
import sys


def start(environ: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """`minserve start` in a process of its own, for it takes signals and event loop with it."""
    command = [sys.executable, "-m", "minserve", "start", *map(str, arguments)]
    return subprocess.run(
        command,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=environ["MINSERVE_RUNTIME_DIR"],
    )
