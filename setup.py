"""What pyproject.toml cannot say: a wheel holds configs/ and scripts/ inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["eomt*"]), "eomt.configs", "eomt.scripts"],
    package_dir={"eomt.configs": "configs", "eomt.scripts": "scripts"},
    package_data={"eomt.configs": ["**/*.yaml"], "eomt.comparison": ["page.html"]},
)
