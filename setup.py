import re
from pathlib import Path

from setuptools import find_packages, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    # An isolated build has no torch: what it installs runs on PyTorch alone, and says so.
    BuildExtension = CppExtension = None

ROOT = Path(__file__).parent

CONFIGS = "sasa_det.model_zoo.configs"


def version():
    # Read, not imported: importing sasa_det takes torch.
    text = (ROOT / "sasa_det" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def kernels():
    if CppExtension is None:
        return {}
    sources = Path("sasa_det", "csrc")
    extension = CppExtension(
        # sasa_det/ops/cpu.py looks for this name: an extension fits the release it is built with.
        "sasa_det._C_torch" + "_".join(torch.__version__.split(".")[:2]),
        sorted(str(path) for path in sources.glob("*.cpp")),
        depends=sorted(str(path) for path in sources.glob("*.h")),
        extra_compile_args=["-O3", "-g0", "-fopenmp", "-Wall", "-Wno-psabi"],
        extra_link_args=["-fopenmp"],
        # Without a compiler the installation goes on without the kernels.
        optional=True,
    )
    # ninja's failures would not count as optional.
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
    }


setup(
    name="sasa_det",
    version=version(),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    description="Stand-alone self-attention for object detection, a detectron2 plugin",
    license="Apache-2.0",
    packages=[*find_packages(include=["sasa_det", "sasa_det.*"]), CONFIGS],
    # configs/ stays at the top, where users of detectron2 look for it, and is installed into the
    # package from there: there are no copies and no symbolic links in the repository. In a checkout
    # and an editable installation sasa_det/config_files.py finds the folder itself.
    package_dir={CONFIGS: "configs"},
    py_modules=["sasa_det_cli"],
    package_data={
        # The CUDA kernels are compiled where they are used.
        "sasa_det": ["py.typed", "csrc/cuda/*"],
        "sasa_det.model_zoo": ["weights/**/*"],
        CONFIGS: ["**/*.py", "**/*.yaml"],
    },
    entry_points={"console_scripts": ["sasa-det = sasa_det_cli:main"]},
    python_requires=">=3.10,<3.13",
    # detectron2 is needed too, but is not on PyPI, where nobody may require anything that is not:
    # tools/install_detectron2.py installs it.
    install_requires=[
        "fvcore>=0.1.5",
        "hydra-core>=1.1",
        "iopath>=0.1.7",
        "matplotlib>=3.7",
        "numpy>=1.26",
        "omegaconf>=2.1",
        "opencv-python>=4.8",
        "Pillow>=12.3",
        "pycocotools>=2.0.6,!=2.0.9,!=2.0.10",  # which fail on a json without "info"
        "PyYAML>=6",
        "safetensors>=0.4",
        "scikit-learn>=1.3",
        "tabulate>=0.9",
        "tensorboard>=2.10",
        "torch>=2.10",  # older ones have holes in reading checkpoints
        "torchvision>=0.25",
        "tqdm>=4.60",
    ],
    **kernels(),
    extras_require={
        "analysis": ["hotcoco>=1.3"],
        "benchmark": ["timm"],
        "docs": ["furo", "myst-parser", "sphinx"],
        "dev": ["hypothesis", "pytest", "pytest-xdist", "ruff"],
        "export": ["onnx>=1.15", "onnxruntime>=1.17"],
    },
)
