"""What `pyproject.toml` cannot say: which packages there are, and where the kernels lie."""

from pathlib import Path

from setuptools import find_packages, setup

has_kernels = Path(__file__).with_name("kernels").is_dir()

setup(
    packages=find_packages(include=["mv2v_engine*"])
    + (find_packages("kernels") if has_kernels else []),
    package_dir={"mv2v_kernels": "kernels/mv2v_kernels"} if has_kernels else {},
    package_data={"mv2v_engine": ["assets/**", "py.typed"]},
)
