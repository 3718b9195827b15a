"""A description of the machine and the library versions with which numbers were measured."""

import os
import platform
from importlib.metadata import version

import torch


def environment(device: torch.device) -> dict:
    """Describe the machine, the device and the versions of libraries."""
    return {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()} threads",
        "system": platform.platform(),
        "python": platform.python_version(),
        **{
            name: version(name)
            for name in ("torch", "numpy", "scipy", "scikit-learn", "dp-accounting", "prv-accountant")
        },
    }
