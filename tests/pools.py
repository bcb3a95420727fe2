"""Small pools of each layout with a planted structure, for tests of single formats and of the whole path.

Row i of shard s is the same for the same seed, whatever the layout: images lie in CLUSTERS directions, every tenth row
is a near copy of the row before it, and a few rows have what PLANTED says.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.stage import Source, Unit

CLUSTERS = 5
PLANTED = {3: "missing_caption", 5: "nan_image_vector", 7: "zero_text_vector", 11: "not_downloaded"}
"""Row of every shard -> what is wrong with it, where the layout can show it; near copies are rows 10, 20, 30..."""


@dataclass(frozen=True)
class Planted:
    """One shard's rows.

    Attributes:
        fields: metadata by column, under DataComp's names.
        image_ND: float32, unit rows but for the planted ones.
        text_ND: float32, unit rows but for the planted ones; nearer to the image for a higher score column.
        cluster_N: int, of each image vector.
    """

    fields: dict[str, list[Any]]
    image_ND: np.ndarray
    text_ND: np.ndarray
    cluster_N: np.ndarray


def planted(shard: int, rows: int, seed: int, dims: int = 32) -> Planted:
    """The rows of one shard."""
    centroid_KD = _unit(np.random.default_rng(seed).normal(size=(CLUSTERS, dims)))
    random = np.random.default_rng([seed, shard])
    cluster_N = random.integers(CLUSTERS, size=rows)
    image_ND = _unit(centroid_KD[cluster_N] + 0.6 / np.sqrt(dims) * random.normal(size=(rows, dims)))
    noise_N = random.uniform(0.2, 3, size=(rows, 1))
    text_ND = _unit(image_ND + noise_N / np.sqrt(dims) * random.normal(size=(rows, dims)))
    for row in range(10, rows, 10):
        cluster_N[row] = cluster_N[row - 1]
        image_ND[row] = _unit(image_ND[row - 1] + 0.002 * random.normal(size=dims))
    score_N = (image_ND * text_ND).sum(axis=1)
    captions = [f"a picture of concept {c} number {row} of shard {shard}" for row, c in enumerate(cluster_N)]
    status = ["success"] * rows
    for row, what in PLANTED.items():
        if row >= rows:
            continue
        if what == "missing_caption":
            captions[row] = ""
        elif what == "nan_image_vector":
            image_ND[row, 0] = np.nan
        elif what == "zero_text_vector":
            text_ND[row] = 0
        else:
            status[row] = "failed_to_download"
    names = [f"{seed}/{shard}/{row}" for row in range(rows)]
    fields = {
        "uid": [hashlib.md5(name.encode()).hexdigest() for name in names],
        "url": [f"https://example.org/{name}.jpg" for name in names],
        "text": captions,
        "original_width": random.integers(64, 2048, size=rows).tolist(),
        "original_height": random.integers(64, 2048, size=rows).tolist(),
        "clip_l14_similarity_score": score_N.tolist(),
        "status": status,
    }
    return Planted(fields, image_ND.astype(np.float32), text_ND.astype(np.float32), cluster_N)


def datacomp_pool(folder: Path, shards: int, rows: int, seed: int, dims: int = 32) -> Path:
    """Metadata parquet and `.npz` (l14_img, l14_txt, b32_img, b32_txt) per shard, without images."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        made = planted(shard, rows, seed, dims)
        stem = hashlib.md5(f"{seed}/{shard}".encode()).hexdigest()
        pq.write_table(pa.table(made.fields), folder / f"{stem}.parquet")
        image, text = made.image_ND.astype(np.float16), made.text_ND.astype(np.float16)
        half = dims // 2
        np.savez(folder / f"{stem}.npz", l14_img=image, l14_txt=text, b32_img=image[:, :half], b32_txt=text[:, :half])
    return folder


def clip_retrieval_pool(folder: Path, shards: int, rows: int, seed: int, dims: int = 32) -> Path:
    """img_emb/, text_emb/ and metadata/ with LAION's columns; rows that were not downloaded are not there."""
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        made = planted(shard, rows, seed, dims)
        there = np.array([status == "success" for status in made.fields["status"]])
        names = {"url": "url", "text": "caption", "clip_l14_similarity_score": "similarity"}
        table = pa.table({names[name]: made.fields[name] for name in names})
        table = table.add_column(0, "image_path", [[f"{shard:05d}{row:04d}" for row in range(rows)]])
        pq.write_table(table.filter(pa.array(there)), folder / f"metadata/metadata_{shard:04d}.parquet")
        np.save(folder / f"img_emb/img_emb_{shard:04d}.npy", made.image_ND[there].astype(np.float16))
        np.save(folder / f"text_emb/text_emb_{shard:04d}.npy", made.text_ND[there].astype(np.float16))
    return folder


def parquet_pool(folder: Path, shards: int, rows: int, seed: int, struct: bool = False) -> Path:
    """Images in a column (`jpg`, or Hugging Face's `image` struct) beside LAION's columns; row 4 has no image."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        made = planted(shard, rows, seed)
        data = [jpeg(made, row) if row != 4 else None for row in range(rows)]
        table = pa.table({"URL": made.fields["url"], "TEXT": made.fields["text"]})
        table = table.append_column("similarity", [made.fields["clip_l14_similarity_score"]])
        if struct:
            column = [{"bytes": image, "path": f"{row}.jpg"} for row, image in enumerate(data)]
            table = table.append_column("image", pa.array(column))
        else:
            table = table.append_column("jpg", [data])
        pq.write_table(table, folder / f"train-{shard:05d}-of-{shards:05d}.parquet", row_group_size=max(1, rows // 3))
    return folder


def webdataset_pool(folder: Path, shards: int, rows: int, seed: int) -> Path:
    """img2dataset's output: tar, sidecar parquet (with the rows that were not downloaded) and `_stats.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        made = planted(shard, rows, seed)
        listed = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(rows):
                fields = {name: values[row] for name, values in made.fields.items() if name not in ("uid", "text")}
                fields = {"caption": made.fields["text"][row], "key": f"{shard:05d}{row:04d}", **fields}
                success = fields["status"] == "success"
                image = jpeg(made, row)
                fields |= {
                    "width": 32 if success else None,
                    "height": 24 if success else None,
                    "sha256": hashlib.sha256(image).hexdigest() if success else None,
                }
                listed.append(fields)
                if success:
                    _add(tar, f"{fields['key']}.jpg", image)
                    _add(tar, f"{fields['key']}.txt", fields["caption"].encode())
                    _add(tar, f"{fields['key']}.json", json.dumps(fields, indent=4).encode())
        pq.write_table(pa.Table.from_pylist(listed[::-1]), folder / f"{shard:05d}.parquet")
        count = sum(fields["status"] == "success" for fields in listed)
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": rows, "successes": count}))
    return folder


def jpeg(made: Planted, row: int) -> bytes:
    """A JPEG of 32 x 24 px in the colour of the row's cluster; near copies are recompressed."""
    first = row - (row % 10 == 0 and row > 0)
    random = np.random.default_rng([first, int(made.cluster_N[first])])
    colour = np.array([(40 * made.cluster_N[first] + 20) % 256, 255 - 50 * made.cluster_N[first], 128])
    pixels = np.clip(colour + random.normal(0, 20, (24, 32, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90 if first == row else 80)
    return buffer.getvalue()


def unit_of(**paths: Path) -> Unit:
    """A unit of local files, by role."""
    sources = {role: Source(str(path), path.stat().st_size, "") for role, path in paths.items()}
    return Unit(next(iter(paths.values())).name, sources)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _unit(vec_ND: np.ndarray) -> np.ndarray:
    return vec_ND / np.linalg.norm(vec_ND, axis=-1, keepdims=True)
