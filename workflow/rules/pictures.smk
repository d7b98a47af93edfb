# What `snakemake --report` shows.
PICTURES = {
    "neighbours.jpg": "Encoders",
    "map.jpg": "Encoders",
    "detections.png": "Detections",
    "precision_recall.png": "Detections",
}


def in_report(path, category, caption, **labels):
    """The path, marked for `snakemake --report`; the caption is a file of workflow/report."""
    caption = f"../report/{caption}.rst"
    return report(path, caption=caption, category=category, labels=labels)


def marked(path, **labels):
    """A file of a result; its pictures are marked for `snakemake --report`."""
    name, kind = Path(path).name, Path(path).stem
    if name not in PICTURES:
        return path
    return in_report(path, PICTURES[name], kind, **labels, picture=kind)


def shown(folder, name):
    """A file of the report; figures and main tables are marked for `snakemake --report`."""
    path = str(folder / name)
    if name.endswith(".svg"):
        return in_report(path, "Figures", "figure", figure=Path(name).stem)
    if name in ("summary.csv", "report.html"):
        return in_report(path, "Tables", name, file=name)
    return path
