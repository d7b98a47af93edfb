"""Packages that only some commands import, and the extra of this package that installs each."""

EXTRAS = {
    "faster_coco_eval": "detection",
    "matplotlib": "report",
    "pandas": "report",
    "scipy": "report",
    "skimage": "demo",
    "sklearn": "report",
    "timm": "timm",
}


def not_installed(package: str) -> str:
    """The message if one of these packages is not installed."""
    extra = f"mochi-pipeline[{EXTRAS[package]}]"
    return f'{package} is not installed; this command needs it: pip install "{extra}"'
