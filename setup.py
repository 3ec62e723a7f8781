"""Installs the packages and the configurations; what they need is listed in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FAST = ["simplejpeg>=1.9"]
PACKAGES = ["common", "configs", "instdisc", "metric_learning", "moco"]


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in (line.partition("#")[0].strip() for line in lines) if line]


setup(
    name="contrastive-backbones",
    version="0.1.0",
    description="Contrastive pretraining of image backbones: MoCo, InstDisc, and metric learning with labels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)]),
    package_data={"": ["py.typed"], "configs": ["*.yaml"]},
    install_requires=requirements(),
    extras_require={
        "fast": FAST,
        "export": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"],
        "bench": [*FAST, "lightly>=1.6", "kornia>=0.9", "matplotlib>=3.8"],
        "test": ["pytest>=9", "pytest-xdist>=3.8", "hypothesis>=6.100", "pytorch-metric-learning>=2.8"],
        "dev": ["ruff>=0.17", "mypy>=2.4", "types-PyYAML"],
    },
)
