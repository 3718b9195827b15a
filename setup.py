"""FastLoDA's package. torch is open for users with GPUs; constraints.txt pins it for development and CI."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="fastloda",
    version="0.1.0",
    description="Differentially private fine-tuning of convolutional models at little extra cost",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[*find_packages(include=["fastloda", "fastloda.*"]), "fastloda.kernels"],
    package_dir={"fastloda.kernels": "kernels"},
    install_requires=[
        "torch>=2.8",
        "numpy>=1.26",
        "scipy>=1.11",
        "opt_einsum>=3.3",
        "dp-accounting>=0.6",
        "prv-accountant>=0.2.0",
        "safetensors>=0.4",
        "platformdirs>=4",
        "tqdm>=4.66",
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
    extras_require={
        "triton": ["triton>=3.4"],  # comes with PyTorch's builds for GPUs
        "opacus": ["opacus>=1.6"],
        "diffusers": ["diffusers>=0.35"],
        "peft": ["peft>=0.17"],
        "timm": ["timm>=1.0"],  # needs torchvision, in a build that fits PyTorch's
        "bench": ["pytest>=8", "pytest-benchmark>=5", "opacus>=1.6"],
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "triton>=3.4",
            "opacus>=1.6",
            "diffusers>=0.35",
            "peft>=0.17",
        ],
    },
    entry_points={"console_scripts": ["fastloda = fastloda.synthesis.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
    ],
)
