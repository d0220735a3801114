"""The dataset card of a shard set: what it holds, under which terms, how it was made.

In: the shard manifest. Out: Markdown. Counts per organ, platform, species and study; never a slide, a donor or a path.
"""

import re
from typing import Any

from storm.markdown import clean, table

_CARD = """# Spatial transcriptomics with H&E: {slides:,} slides, {profiles:,} profiles

WebDataset shards of STORM (this project). A sample is a group of neighbouring regions of one slide: tiles of {tile_px}
px at {tile_mpp:g} um/px, and the profiles (spots, bins, cells) on them with their counts as measured.

## What it holds

{split_table}

{split_by}{left_out}

{organs}

{platforms}

{species}

{studies}

Genes: {genes:,} in one order (`genes.tsv`, hash `{gene_hash}`), in {panels} panels. A gene outside a slide's panel was
not measured there, which is not zero.{appended}

## Licences and terms

The most restrictive that is visible: **{strictest}**. Whoever uses or passes on these shards has to keep to the terms
of every study in them; "not stated" grants nothing. Sorted by their words alone, the most restrictive first:

{terms}

## How it was made

`python -m data_prep.pack`, schema version {schema_version}; the same stores and config give the same bytes. {config}

## How to read it

`storm.shards.ShardSet(FOLDER)` checks every group against its sha256; any WebDataset reader opens the tars. Every file
is in `manifest.json` with its sha256: `python -m data_prep.verify FOLDER`.
"""

# What the words of a licence say of its limits, the strictest first; no legal advice, a way to see it at once.
_RANKS = (
    ("not stated", ()),
    ("non-commercial or no derivatives", ("nc", "noncommercial", "non commercial", "nd", "research only", "academic",
                                          "no redistribution", "restricted", "gated", "controlled", "consent")),
    ("share alike", ("sa", "gpl", "agpl", "lgpl", "odbl", "share alike", "sharealike")),
    ("other terms", ()),
    ("attribution", ("cc by", "mit", "bsd", "apache", "odc by", "artistic")),
    ("public domain", ("cc0", "public domain", "pddl", "unlicense")),
)  # fmt: skip
_OTHER = 3


def strictness(license_text: str, use_terms: str) -> int:
    """Place in the order of restriction of a study's licence and terms, by their words; 0 is the most restrictive."""
    parts = [re.sub(r"[^a-z0-9]+", " ", part.lower()) for part in f"{license_text};{use_terms}".split(";")]
    return min((_rank(part) for part in parts if part.strip()), default=0)


def _rank(part: str) -> int:
    found = (i for i, (_, words) in enumerate(_RANKS) if any(re.search(rf"\b{word}\b", part) for word in words))
    return next(found, _OTHER)


def _counted(manifest: dict[str, Any], what: str) -> str:
    rows: dict[str, list[int]] = {}
    for entry in manifest["slides"].values():
        row = rows.setdefault(entry[what], [0, 0])
        row[0] += 1
        row[1] += entry["profiles"]
    return table([what, "slides", "profiles"], [[clean(name), *row] for name, row in sorted(rows.items())])


def _splits(manifest: dict[str, Any]) -> str:
    rows = []
    for split, entry in manifest["splits"].items():
        slides = [s for s in manifest["slides"].values() if s["split"] == split]
        donors = len({(s["study"], s["donor"]) for s in slides})
        size = sum(shard["bytes"] for shard in entry["shards"]) / 1e6
        rows.append([split, len(slides), donors, entry["groups"], entry["profiles"], entry["tiles"],
                     len(entry["shards"]), f"{size:.1f}"])  # fmt: skip
    return table(["split", "slides", "donors", "groups", "profiles", "tiles", "shards", "MB"], rows)


def _terms(licenses: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """(the most restrictive kind, table of all studies)."""
    ranked = sorted((strictness(e["license"], e["use_terms"]), study, e) for study, e in licenses.items())
    rows = [
        [clean(study), clean(e["license"]) or "not stated", clean(e["use_terms"]) or "not stated", _RANKS[rank][0],
         e["slides"], e["profiles"]]
        for rank, study, e in ranked
    ]  # fmt: skip
    columns = ["study", "licence", "terms of use", "kind", "slides", "profiles"]
    return _RANKS[ranked[0][0]][0], table(columns, rows)


def _left_out(counts: dict[str, int]) -> str:
    """How many slides are not in the set, and why; '' where all are."""
    kinds = (("missing", "not built, failed or damaged"), ("without_profiles", "images without measured profiles"))
    parts = [f"{counts[key]:,} {text}" for key, text in kinds if counts[key]]
    return f"\n\nSlides of the corpus that were left out: {', '.join(parts)}." if parts else ""


def _config(changed: dict[str, Any]) -> str:
    if not changed:
        return "The config is the default."
    rows = [[clean(key), clean(value)] for key, value in sorted(changed.items())]
    return f"Where the config is not the default:\n\n{table(['key', 'value'], rows)}"


def dataset_card(manifest: dict[str, Any], genes: int, defaults: dict[str, Any]) -> str:
    """The card of a shard set.

    Args:
        manifest: complete, with its splits.
        genes: number of genes.
        defaults: the config's defaults; what differs is told.
    """
    strictest, terms = _terms(manifest["licenses"])
    changed = {key: value for key, value in manifest["prep"].items() if value != defaults.get(key)}
    profiles = sum(entry["profiles"] for entry in manifest["splits"].values())
    by_section = manifest["split_by"] == "section"
    appended = (
        f"\n\nThese shards add to an older set and keep its genes; {manifest['genes_left_out']:,} genes that the new "
        "slides measured are not among them and are left out."
    )
    return _CARD.format(
        slides=len(manifest["slides"]), profiles=profiles, tile_px=manifest["tile_px"], tile_mpp=manifest["tile_mpp"],
        split_table=_splits(manifest),
        split_by="**Split by section: sections of one donor may lie on both sides of a split.**" if by_section
        else "Split by donor: no donor lies on both sides of a split.",
        organs=_counted(manifest, "organ"), platforms=_counted(manifest, "platform"),
        species=_counted(manifest, "species"), studies=_counted(manifest, "study"), genes=genes,
        gene_hash=manifest["gene_hash"][:16], panels=len(manifest["panels"]),
        appended=appended if manifest["appended_to"] else "", strictest=strictest, terms=terms,
        schema_version=manifest["schema_version"],
        config=_config(changed), left_out=_left_out(manifest["left_out"]),
    )  # fmt: skip
