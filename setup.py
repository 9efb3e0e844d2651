"Everything that pip needs to know, read from `settings.ini`, where nbdev keeps it."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): cfg[key].split()
    for key in cfg
    if key.endswith("_requirements")
}

# Notebook templates, reports and grids have one home each; a wheel carries them inside the package.
carried = {
    "vlmadapt.experiments": "nbs/experiments",
    "vlmadapt.reports": "nbs/reports",
    "vlmadapt.params": "params",
}
carried = {package: folder for package, folder in carried.items() if (root / folder).is_dir()}
patterns = ["*.ipynb", "*.yml", "weights/*", "configs/*.json", "facts.json", "*.csv", "py.typed"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={
        "Source": cfg["git_url"],
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Issues": cfg["git_url"] + "/issues",
    },
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": ["vlmadapt=vlmadapt._modidx:d"],
    },
    packages=[*find_packages(include=["vlmadapt*"]), *carried],
    package_dir=carried,
    package_data={"": patterns},
    include_package_data=False,
    zip_safe=False,
)
