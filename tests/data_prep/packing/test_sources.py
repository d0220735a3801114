"""Which stores are packed: those that say what the manifest says."""

from pathlib import Path

import pytest

from data_prep import pack
from tests.conftest import PREP_TINY
from tests.data_prep.test_pack import info, write_store
from tests.data_prep.vendors import write_manifest


def test_stores_that_say_other_than_the_manifest_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores, table = tmp_path / "stores", tmp_path / "manifest.csv"
    names = [f"s{i:02}" for i in range(13)]
    for name in names:
        write_store(stores, info(name, name, "train", "" if name > "s00" else "cut"), 12)
    said = [{"donor": name, "study": "t", "split": "train", "section": ""} for name in names]
    words = ["--store", str(stores), "--out", str(tmp_path / "out"), "--config", str(PREP_TINY)]
    words += ["--manifest", str(table)]

    def told(*changes: dict[str, str]) -> str:
        rows = [{"slide_id": name, "image": "x", "platform": "image"} | one
                for name, one in zip(names, said, strict=True)]  # fmt: skip
        for row, change in zip(rows, changes, strict=False):
            row.update(change)
        write_manifest(table, rows)
        return capsys.readouterr().err if pack.main(words) == 2 else ""

    same = {"section": "cut"}
    assert told(same) == ""
    found = told({"section": "cut", "split": "test"}, {"donor": "d9", "split": ""}, {"study": "u"}, {"section": "cut"})
    assert (
        "4 slides were built from another manifest, or before this one was edited; run data_prep.build again" in found
    )
    assert found.partition("then pack:\n")[2].splitlines() == [  # although the set that was packed is still current
        "  s00: its store says split train, the manifest test",
        "  s01: its store says split train, the manifest (blank); donor s01, the manifest d9",
        "  s02: its store says study t, the manifest u",
        "  s03: its store says section s03, the manifest cut",
    ]
    lines = told(*[same | {"split": "test"}] * 13).splitlines()
    assert (lines[-2][:6], lines[-1]) == ("  s09:", "  and 3 more")
