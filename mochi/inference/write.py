"""Features of a folder as a file: NumPy's .npz or Parquet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mochi.data.ingest.raw import as_text
from mochi.errors import UserError
from mochi.inference.folder import FolderFeatures
from mochi.storage.atomic import replacing, require_writable_file, write_rows

FEATURES = (".npz", ".parquet")


def require_output(out: Path, kinds: Sequence[str]) -> None:
    """Refuse a file of another kind, or one that cannot be written, before anything is computed.

    Raises:
        UserError: the name has another suffix.
        StorageError: see `require_writable_file`.
    """
    if out.suffix.lower() not in kinds:
        raise UserError(f"--out: found {out}; expected a name that ends in {' or '.join(kinds)}")
    require_writable_file(out)


def write_features(out: Path, features: FolderFeatures) -> Path | None:
    """Write paths and vectors; returns the CSV of unreadable files, if there are any.

    .npz: `paths` (N,) text and `vectors` (N, D) float32. Parquet: a column `path`, a column `vector`.
    """
    paths = [as_text(path) for path in features.paths]
    with replacing(out) as temporary:
        if out.suffix.lower() == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, paths=np.array(paths, dtype=np.str_), vectors=features.vectors)
        else:
            values = pa.array(features.vectors.reshape(-1))
            vectors = pa.FixedSizeListArray.from_arrays(values, features.vectors.shape[1])
            pq.write_table(pa.table({"path": pa.array(paths, pa.string()), "vector": vectors}), temporary)
    listed = out.with_name(f"{out.stem}.quarantine.csv")
    if not features.quarantined:
        listed.unlink(missing_ok=True)
        return None
    rows = [{"path": as_text(path), "reason": reason} for path, reason in features.quarantined]
    write_rows(listed, ["path", "reason"], rows)
    return listed
