"""A vLLM server that the run starts itself, on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opd_lightning import plugins
from opd_lightning.generation.server import free_port
from opd_lightning.utils.addresses import url_of
from opd_lightning.utils.http import Server

PLUGINS = Path(plugins.__file__).parent
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""Settings of the server where the user has none."""


class StartedServer(Server):
    """A server that is a child of this process, and ends with it.

    Args:
        model: a folder with the model's config.json.
        log: the file of its output.
        options: arguments of `vllm serve`, such as {"gpu_memory_utilization": 0.9}.
        environment: variables of its environment beside this process's.
        python: the interpreter that has vLLM.
        host: the address that it listens on.
        timeout: seconds that one request may take.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
        python: str,
        host: str,
        timeout: float,
    ):
        super().__init__("http://127.0.0.1:1", timeout)
        self.model, self.log, self.options, self.python, self.host = model, log, options, python, host
        self.environment = ENVIRONMENT | os.environ | {"VLLM_SERVER_DEV_MODE": "1"} | dict(environment)
        # vLLM finds plugins by the metadata of installed packages: this is a package with nothing but ours.
        self.environment["PYTHONPATH"] = os.pathsep.join(
            [str(plugin_package(model.parent)), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self.process: subprocess.Popen | None = None

    def start(self, port: int | None = None) -> None:
        """Start it anew, on a free port by default; `wait` until it is healthy."""
        self.stop()
        port = port or free_port(self.host)
        self.url = url_of(self.host, port)
        command = [self.python, str(PLUGINS / "serve.py"), "--model", str(self.model), "--host", self.host, "--port", str(port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command + arguments(self.options),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def gone(self) -> bool:
        """Has its process ended?"""
        return self.process is None or self.process.poll() is not None

    def stop(self) -> None:
        """End it and its children."""
        if self.process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None

    def last_words(self) -> str:
        """The last lines of its output that say something went wrong."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        lines = [line.strip() for line in text.splitlines()[-200:] if "Error" in line and "WARNING" not in line]
        return (lines[-1] if lines else "no error in its output")[-300:]


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as the command line of vLLM's server, underscores as dashes; true and false as flags."""
    line: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            line += [f"--{flag}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return line


def plugin_package(folder: Path) -> Path:
    """A folder for PYTHONPATH in which the environment of the server finds this package's plugins for vLLM."""
    path = folder / "plugins"
    if not path.exists():
        shutil.copytree(PLUGINS, path / "opd_lightning_plugins", ignore=shutil.ignore_patterns("__pycache__"))
        metadata = path / "opd_lightning_plugins-0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: opd-lightning-plugins\nVersion: 0\n")
        entry = "[vllm.general_plugins]\nopd_lightning_files = opd_lightning_plugins:register_vllm\n"
        (metadata / "entry_points.txt").write_text(entry)
    return path


def visible(devices: str) -> str:
    """CUDA devices such as "1,2", counted among those that this process sees, by the numbers that it sees them under."""
    own = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = [name.strip() for name in str(devices).split(",")]
    return ",".join(own[int(name)] if name.isdigit() and int(name) < len(own) else name for name in names)


def interpreter(python: str | None) -> str:
    """The path of the interpreter that has vLLM; None takes this one.

    Raises:
        ValueError: it is not there, or this one has no vLLM.
    """
    if python is None:
        if find_spec("vllm") is None:
            raise ValueError(
                "generator.start=true needs vLLM: pip install vllm, or set generator.python to the interpreter of an "
                "environment that has it (docs/engines.md)."
            )
        return sys.executable
    if shutil.which(python) is None:
        raise ValueError(f"generator.python={python} is no interpreter; give the path of bin/python of vLLM's environment.")
    return python
