# What `snakemake --report` shows.
PICTURES = {
    "neighbours.jpg": "Encoders",
    "map.jpg": "Encoders",
    "detections.png": "Detections",
    "precision_recall.png": "Detections",
}


def report_item(path, category, caption, **labels):
    """A path that `snakemake --report` includes; the caption is a file of workflow/report."""
    caption = f"../report/{caption}.rst"
    return report(path, caption=caption, category=category, labels=labels)


def result_file(path, **labels):
    """A file of a result; `snakemake --report` includes it if it is one of `PICTURES`."""
    name, stem = Path(path).name, Path(path).stem
    if name not in PICTURES:
        return path
    return report_item(path, PICTURES[name], stem, **labels, picture=stem)


def report_file(folder, name):
    """A file of the report; `snakemake --report` includes figures and main tables."""
    path = str(folder / name)
    if name.endswith(".svg"):
        return report_item(path, "Figures", "figure", figure=Path(name).stem)
    if name in ("summary.csv", "report.html"):
        return report_item(path, "Tables", name, file=name)
    return path
