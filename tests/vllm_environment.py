"""Requirements of vLLM's CPU wheel without torch and what is built for CUDA: python tests/vllm_environment.py <wheel>.

vLLM pins its own torch and transformers, so it is installed into an environment of its own; see the Makefile.
"""

import re
import sys
import zipfile
from email.parser import Parser

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def requirements(wheel: str) -> list[str]:
    """Those of a wheel's metadata that hold on this machine's kind, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        found = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    plain = [line for line in found if "extra ==" not in line]
    return [line for line in plain if re.split(r"[\s;<>=!\[~]", line)[0].lower() not in LEFT_OUT]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
