"""The shipped gene tables are what tables.json says: rows, sha256, order, one row per id."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "storm/tables"
TABLES = json.loads((FOLDER / "tables.json").read_text())


@pytest.mark.parametrize(
    ("name", "id_pattern", "known"),
    [
        ("genes_human.tsv.gz", r"ENSG\d{11}", {"ENSG00000206503": "HLA-A", "ENSG00000141736": "ERBB2"}),
        ("genes_mouse.tsv.gz", r"ENSMUSG\d{11}", {"ENSMUSG00000024610": "Cd74", "ENSMUSG00000064351": "mt-Co1"}),
    ],
)
def test_table(name: str, id_pattern: str, known: dict[str, str]) -> None:
    compressed = (FOLDER / name).read_bytes()
    data = gzip.decompress(compressed)
    header, *rows = [line.split("\t") for line in data.decode("ascii").splitlines()]
    assert hashlib.sha256(data).hexdigest() == TABLES[name]["sha256"]
    assert len(rows) == TABLES[name]["rows"]
    assert header == ["ensembl_id", "symbol"]
    ids = [gene_id for gene_id, _ in rows]
    assert ids == sorted(set(ids))
    assert all(re.fullmatch(id_pattern, gene_id) and symbol for gene_id, symbol in rows)
    assert known.items() <= {(gene_id, symbol) for gene_id, symbol in rows}
    assert compressed[4:8] == b"\0\0\0\0", "a time stamp in the gzip header: the bytes would change at every writing"
