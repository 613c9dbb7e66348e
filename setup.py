"""Installs irlfast. ``irlfast/kernels`` is a link to ``kernels/``, which must not be a package of its own: it would
shadow Hugging Face's ``kernels`` when Python runs from the repository's root."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "irlfast/__init__.py").read_text()).group(1)

setup(
    name="irlfast",
    version=VERSION,
    description="Align language models from demonstrations alone, by inverse reinforcement learning, fast",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=["irlfast", "irlfast.demo", "irlfast.integrations", "irlfast.kernels", "irlfast.methods", "irlfast.ops"],
    package_data={
        "irlfast": ["report.html.j2"],
        "irlfast.demo": ["*.jsonl", "*.json"],
        "irlfast.kernels": ["README.md"],
    },
    install_requires=[
        "torch>=2.9",
        "transformers>=5",
        "deepspeed>=0.19",
        "datasets>=4",
        "safetensors",
        "pydantic>=2.12",
        "pyyaml",
        "numpy",
        "jinja2",
        "matplotlib",
        "rich",
        "tqdm",
        "peft>=0.18",
    ],
    extras_require={
        "triton": ["triton>=3.5"],
        "flash": ["flash-attn"],
        "vllm": ["vllm"],
        "report": ["tensorboard", "wandb"],
        "bench": ["liger-kernel==0.8.5", "cut-cross-entropy==25.1.1", "trl==1.16.0"],
        "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "types-PyYAML", "trl==1.16.0", "build"],
    },
)
