"""The dataset card: counts and terms, what others wrote is text, and nobody is named."""

import dataclasses
from pathlib import Path

import pytest

from data_prep import pack, records
from data_prep.packing.card import strictness
from data_prep.packing.manifest import Options
from storm import files, shards
from storm.prep_config import PrepConfig
from tests.data_prep.test_pack import CONFIG, info, write_store


def test_the_card_counts_and_names_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "secret_place"
    donors = {"slide_one": ("donor_one", "train"), "slide_two": ("donor_two", "test")}
    for n, (name, (donor, split)) in enumerate(donors.items()):
        own = dataclasses.replace(
            info(name, donor, split, section=f"section_{n}"), study=f"st{n}", organ=f"organ{n}",
            license=("CC-BY-NC-4.0", "")[n], use_terms=("no <b>resale</b> | none", "")[n],
        )  # fmt: skip
        write_store(folder / "stores", own, 20 + n)
    out = folder / "out"
    pack.pack(folder / "stores", out, CONFIG)
    text = (out / shards.CARD).read_text()
    assert "left out" not in text
    for word in [*donors, "donor_one", "donor_two", "section_0", "secret_place", str(tmp_path)]:
        assert word not in text
    assert "2 slides, 41 profiles" in text
    assert "| organ0 | 1 | 20 |" in text
    assert "| visium | 2 | 41 |" in text
    assert "| human | 2 | 41 |" in text
    assert "**not stated**" in text
    assert "no &lt;b&gt;resale&lt;/b&gt; &#124; none" in text
    assert text.index("| st1 |") < text.index("| st0 | CC-BY-NC")  # the most restrictive first, in the terms
    assert "| min_profiles | 32 |" in text
    assert "Split by donor" in text
    manifest = files.read_json(out / shards.MANIFEST)
    assert {p.name for p in out.iterdir()} == {shards.CARD, shards.GENES, shards.MANIFEST, *manifest["splits"]}


def test_markdown_in_names_is_text(tmp_path: Path) -> None:
    own = dataclasses.replace(info("a", "d"), study="[x](javascript:alert(1))\n# head", organ="<script>", species="`m`")
    write_store(tmp_path / "stores", own, 20)
    pack.pack(tmp_path / "stores", tmp_path / "out", CONFIG)
    text = (tmp_path / "out" / shards.CARD).read_text()
    assert "<script>" not in text
    assert "[x](" not in text
    assert "\n# head" not in text
    assert "&lt;script&gt;" in text


def test_the_card_counts_what_was_left_out(tmp_path: Path) -> None:
    write_store(tmp_path / "stores", info("a", "d1"), 20)
    write_store(tmp_path / "stores", info("picture", "d2"), 0, tiles=5)
    for name in ("broken", "cut"):
        records.write(tmp_path / "stores", records.Record(name, "failed", "its slide is damaged; restore it"))
    manifest = pack.pack(tmp_path / "stores", tmp_path / "out", CONFIG, Options(allow_missing=True))
    assert manifest["left_out"] == {"missing": 2, "without_profiles": 1}
    text = (tmp_path / "out" / shards.CARD).read_text()
    told = (
        "Slides of the corpus that were left out: 2 not built, failed or damaged, 1 images without measured profiles."
    )
    assert told in text
    assert not any(name in text for name in ("picture", "broken", "cut"))


def test_a_default_config_has_no_table(tmp_path: Path) -> None:
    config = PrepConfig()
    own = dataclasses.replace(info("a", "d1"), tile_px=config.tile_px, tile_mpp=config.tile_mpp)
    write_store(tmp_path / "stores", own, 40)
    pack.pack(tmp_path / "stores", tmp_path / "out", config)
    text = (tmp_path / "out" / shards.CARD).read_text()
    assert "The config is the default." in text
    assert "| key | value |" not in text


@pytest.mark.parametrize(
    ("license_text", "use_terms", "rank"),
    [
        ("", "", 0),
        ("CC-BY-NC-SA-4.0", "", 1),
        ("CC-BY-4.0", "research only", 1),
        ("CC-BY-SA 4.0", "", 2),
        ("GPL-3", "", 2),
        ("10x EULA", "", 3),
        ("CC-BY-4.0", "", 4),
        ("MIT", "", 4),
        ("limited to members", "", 3),
        ("CC-BY-4.0; own terms", "", 3),
        ("CC-BY-4.0", "ask the authors", 3),
        ("", "Non-commercial use", 1),
        ("unrestricted", "", 3),
        ("CC0-1.0", "", 5),
    ],
)
def test_strictness(license_text: str, use_terms: str, rank: int) -> None:
    assert strictness(license_text, use_terms) == rank
