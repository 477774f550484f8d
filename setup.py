"""Packaging; every fact about the project is read from settings.ini."""
import configparser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
readme = here/"README.md"
status = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}[cfg["status"]]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "", long_description_content_type="text/markdown",
    author=cfg["author"], url=cfg["git_url"] or None, license_expression="Apache-2.0", license_files=["LICENSE"],
    classifiers=[f"Development Status :: {status}", f"Intended Audience :: {cfg['audience']}",
                 f"Natural Language :: {cfg['language']}", "Programming Language :: Python :: 3 :: Only", "Framework :: Jupyter",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=["dlsm*"]), package_data={"dlsm": ["*.json"]}, python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")},
)
