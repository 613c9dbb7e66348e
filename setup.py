"""Install irlfast.

``irlfast/kernels`` is a link to ``kernels/``. That folder must not be a package of its own: it would shadow Hugging
Face's ``kernels`` when Python runs from the repository's root. ``irlfast/configs`` is a link to ``configs/``.

CMake builds the native modules of ``csrc/``. A module that cannot be built is left out, and one line says so. With
``IRLFAST_STRICT=1`` a failed build is an error, but nvcc may be absent. ``IRLFAST_CUDA_ARCHS`` chooses architectures.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "irlfast/__init__.py").read_text()).group(1)

WITHOUT = {  # a native module: its replacement, and the tools that build it
    "_cpu": "PyTorch does its work; it takes a C++17 compiler, cmake and pybind11",
    "_cuda": "Triton and PyTorch do its work; it takes nvcc, a C++17 compiler, cmake and pybind11",
}


class BuildNative(build_ext):
    """Build each native module with CMake, or print the reason why it is left out."""

    def build_extension(self, extension: Extension) -> None:
        name = extension.name.rpartition(".")[2]
        module = Path(self.get_ext_fullpath(extension.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        if name == "_cuda" and not shutil.which(os.environ.get("CUDACXX", "nvcc")):
            return print_left_out(extension.name, WITHOUT[name], "no nvcc")
        try:
            build_native(name, Path(self.build_temp).resolve() / name, module.parent)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "output", None) or str(error)
            if os.environ.get("IRLFAST_STRICT") == "1":
                sys.exit(f"{output}\n{extension.name} could not be built, and IRLFAST_STRICT=1")
            reason = next((line for line in output.splitlines() if "error" in line.lower()), output).strip()
            print_left_out(extension.name, WITHOUT[name], reason)


def print_left_out(module: str, without: str, reason: str) -> None:
    print(f"irlfast: without {module}, {without} ({reason})", file=sys.stderr)


def build_native(name: str, work: Path, destination: Path) -> None:
    import pybind11

    options = {
        "IRLFAST_MODULE": name,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": destination,
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "PYBIND11_FINDPYTHON": "ON",
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    for command in (["cmake", "-S", HERE, "-B", work, *generator, *definitions], ["cmake", "--build", work]):
        subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


setup(
    name="irlfast",
    version=VERSION,
    description="Align language models from demonstrations alone, by inverse reinforcement learning, fast",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=["irlfast", "irlfast.kernels", *(f"irlfast.{name}" for name in find_packages("irlfast"))],
    entry_points={"console_scripts": ["irlfast = irlfast.__main__:main"]},
    ext_modules=[Extension(f"irlfast.{name}", sources=[], optional=True) for name in WITHOUT],
    cmdclass={"build_ext": BuildNative},
    package_data={
        "irlfast": ["configs/*.yaml", "configs/deepspeed/*.json", "py.typed"],
        "irlfast.reports": ["*.html.j2", "*.html", "*.css", "*.js"],
        "irlfast.demo": ["*.jsonl", "*.json"],
        "irlfast.kernels": ["README.md"],
    },
    install_requires=[
        "torch>=2.9",
        "transformers>=5",
        "deepspeed>=0.19.8",
        "datasets>=4",
        "safetensors",
        "pydantic>=2.12",
        "pyyaml",
        "numpy",
        "psutil",
        "jinja2",
        "packaging",
        "rich",
        "peft>=0.18",
        "scikit-learn",
        "altair>=6",
        "vl-convert-python>=1.9",
        "scipy>=1.15",
        "statsmodels>=0.14.4",
        "rapidfuzz>=3",
        "regex",
        "sacrebleu>=2.6",
    ],
    extras_require={
        "qlora": ["bitsandbytes>=0.50", "accelerate"],
        "triton": ["triton>=3.5"],
        "flash": ["flash-attn>=2"],
        "vllm": ["vllm>=0.32"],
        "generate": ["openai>=2"],
        "report": ["tensorboard", "wandb"],
        "trackio": ["trackio>=0.20"],
        "mlflow": ["mlflow>=3"],
        "bench": ["matplotlib", "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1", "trl==1.16.0"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "matplotlib",
            "ruff",
            "mypy",
            "types-PyYAML",
            "trl==1.16.0",
            "build",
            "playwright",
            "rouge-score>=0.1.2",
        ],
    },
)
