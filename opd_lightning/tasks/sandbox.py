"""A verifier that runs a model's code in a separate process, with limits on time, memory and files.

The limits protect a run from endless loops and large programs, not from malice. A malicious program can read this user's
files, use the network, outlive its time in another session, or claim that it passed. Train on code inside a container
without secrets and network.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

from opd_lightning.types import Verdict
from opd_lightning.utils.secrets import redact_secrets

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)

LIMITED = """
import resource, sys
seconds, memory = map(int, sys.argv[1:])
limits = {"CPU": seconds, "AS": memory, "FSIZE": 2**20, "NOFILE": 64, "CORE": 0}
for name, most in limits.items():
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
exec(compile(sys.stdin.read(), "completion", "exec"), {"__name__": "__main__"})
"""


class Code:
    """The verdict on Python code (the last fenced block, or all of the completion): the answer's statements must pass.

    The format is whether there is a fenced block, the feedback the last line of the program's error stream.

    Args:
        seconds: limit of wall-clock time; of processor time at most one second more.
        memory_mib: limit of address space, in MiB.

    Raises:
        ValueError: a limit is too small.
    """

    def __init__(self, seconds: float = 5.0, memory_mib: int = 1024):
        for name, value in (("seconds", seconds), ("memory_mib", memory_mib)):
            if not value >= (64 if name == "memory_mib" else 0.1):
                raise ValueError(f"task.verifier.{name}={value} is too little for Python to start.")
        self.seconds, self.memory = seconds, memory_mib * 2**20

    def __call__(self, completion: str, answer: str) -> Verdict:
        """Right if the program reaches the end of the answer's statements."""
        blocks = FENCE.findall(completion)
        code = blocks[-1] if blocks else completion
        token = secrets.token_hex(8)  # a program that ends early does not print it
        output, errors = self.run(f"{code}\n{answer}\nprint({token!r})\n")
        passed = output.rstrip().endswith(token)
        last = errors.strip().splitlines()[-1:] or ["it was stopped before its end"]
        # The feedback may get into a teacher's prompt, and the program may have read this process's environment.
        return Verdict(float(passed), float(bool(blocks)), None if passed else redact_secrets(last[0][:200]))

    def run(self, program: str) -> tuple[str, str]:
        """The output and error streams of a program within its time, in an empty folder with an empty environment."""
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", LIMITED, str(int(self.seconds) + 1), str(self.memory)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=errors,
                cwd=folder,
                env={"HOME": folder},
                start_new_session=True,
            )
            try:
                with suppress(subprocess.TimeoutExpired, BrokenPipeError):
                    process.communicate(program.encode(errors="replace"), timeout=self.seconds)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with its child processes
                process.wait()
            return tail(out), tail(errors)


def tail(file) -> str:
    """The last ten thousand bytes of a file, as text."""
    file.seek(max(0, file.seek(0, 2) - 10_000))
    return str(file.read().decode(errors="replace"))
