"""vLLM's OpenAI server, which ends with the program that started it: python serve.py <arguments of the server>.

The program holds the other end of standard input, which closes however the program ends.
"""

import os
import runpy
import signal
import sys
import threading


def follow() -> None:
    """End this process and its children when standard input closes."""
    sys.stdin.buffer.read()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder
    threading.Thread(target=follow, daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
