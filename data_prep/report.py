"""The corpus in one HTML file: what was built and from what, how good it is, what failed and how to mend it.

    python -m data_prep.report --store DIR [--manifest FILE] [--shards DIR] --out report.html

In: slide stores with their records, and where given the manifest and a shard set. Out: a page that holds its pictures
and needs no network; equal stores and records give equal bytes. All that others wrote is escaped, and no path of a
machine is told.
"""

import argparse
import base64
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from data_prep import check_shards, fingerprints, manifest, progress, records, report_figures
from data_prep.records import Record
from data_prep.report_figures import AXES, Picture
from storm import files, schema, shards, store
from storm.commands import guarded

_PICTURE_BYTES = 36_000_000  # of all pictures; base64 and the rest make it about 55 MB at most
_MOST_PICTURE_BYTES = 160_000  # of one slide
_MOST_ROWS = 300  # of pairs of slides, and of warnings
_FIRST_FACTS = ("tiles", "profiles", "genes", "median_depth", "median_genes", "tissue_mm2", "sharpness_median")
_QUIET_FACTS = {"fingerprints", "notes", "flagged", "alignment_check"}  # told in their own place, or not for people
_SCRIPT = resources.files("data_prep").joinpath("report_page.js")
_PAGE = resources.files("data_prep").joinpath("report_page.html")


@dataclass
class Slide:
    """One slide of the report."""

    info: store.SlideInfo
    record: Record | None
    picture: Picture
    histograms: dict[str, npt.NDArray[np.int64]]
    flags: dict[str, int]  # flag -> profiles
    flagged: int  # profiles with any flag

    @property
    def facts(self) -> dict[str, Any]:
        """What the build found."""
        return self.info.facts

    @property
    def residual_um(self) -> float | None:
        """Residual of the lattice."""
        return None if self.info.residual_px0 is None else self.info.residual_px0 * self.info.mpp

    @property
    def alignment(self) -> dict[str, Any]:
        """Counts against nuclei; empty where it was not checked."""
        found: dict[str, Any] = self.facts.get("alignment_check", {})
        return found if found.get("checked") else {}

    @property
    def other_facts(self) -> list[tuple[str, str]]:
        """Names and values of whatever else is known, for people."""
        found = {k: v for k, v in self.facts.items() if k not in _QUIET_FACTS | set(_FIRST_FACTS)}
        return sorted((name, value) for name, value in _flat(found).items() if len(value) <= 200)


def _flat(values: dict[str, Any], before: str = "") -> dict[str, str]:
    """Nested facts as 'name.part' -> text."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return found


def _slide(path: Path, record: Record | None, budget_bytes: int) -> Slide:
    """Raises ValueError: the store is damaged."""
    opened = store.SlideStore(path)
    quality = opened.quality()
    flags = quality["flags"]
    return Slide(
        opened.info, record, report_figures.picture(opened, quality["depth"], budget_bytes),
        report_figures.histograms(opened, quality),
        {name: int((flags >> bit & 1).sum()) for bit, name in enumerate(schema.FLAGS)}, int((flags > 0).sum()),
    )  # fmt: skip


def read_slides(folder: Path) -> tuple[list[Slide], dict[str, str]]:
    """Every store of a folder, by slide id, and why slides failed (slide id -> reason).

    Raises:
        ValueError: the folder holds neither stores nor records.
    """
    known = {record.slide_id: record for record in records.every(folder)}
    failed = {name: record.reason for name, record in known.items() if record.state == "failed"}
    found = sorted(folder.glob(f"*{store.SUFFIX}"))
    if not found and not known:
        store.paths(folder)  # says what is missing
    budget = min(_MOST_PICTURE_BYTES, _PICTURE_BYTES // max(1, len(found)))
    slides = []
    with progress.Progress(len(found)) as shown:
        for path in found:
            slide_id = path.name.removesuffix(store.SUFFIX)
            if slide_id not in failed:  # a store that an older build left is not what the manifest asks for
                try:
                    slides.append(_slide(path, known.get(slide_id), budget))
                except ValueError as error:
                    failed[slide_id] = str(error).replace(f"{path.parent}/", "")
            shown.step()
    return slides, failed


def _failures(failed: dict[str, str]) -> list[dict[str, str]]:
    """Reasons, cut into the fact and its cure."""
    found = []
    for slide_id, reason in sorted(failed.items()):
        fact, _, cure = reason.rpartition("; ")
        found.append({"slide_id": slide_id, "fact": fact or cure, "cure": cure if fact else "see the build's output"})
    return found


def _totals(slides: Sequence[Slide]) -> list[tuple[str, str]]:
    def total(name: str) -> float:
        return sum(float(slide.facts.get(name, 0)) for slide in slides)

    infos = [slide.info for slide in slides]
    size = sum(slide.record.bytes for slide in slides if slide.record)
    return [
        ("slides", str(len(slides))), ("donors", str(len({(i.study, i.donor) for i in infos}))),
        ("studies", str(len({i.study for i in infos}))), ("organs", str(len({i.organ for i in infos}))),
        ("profiles", f"{total('profiles'):,.0f}"), ("tiles", f"{total('tiles'):,.0f}"),
        ("tissue", f"{total('tissue_mm2'):,.0f} mm\u00b2"), ("stores", progress.size(size)),
    ]  # fmt: skip


def _groups(slides: Sequence[Slide]) -> list[dict[str, Any]]:
    """Counts per platform and organ, and the pooled histograms of each platform."""
    found = []
    for platform in sorted({slide.info.platform for slide in slides}):
        mine = [slide for slide in slides if slide.info.platform == platform]
        organs = Counter(slide.info.organ for slide in mine)
        pooled = {}
        for name in AXES:
            counts = [slide.histograms[name] for slide in mine if name in slide.histograms]
            if counts:
                pooled[name] = np.sum(counts, axis=0)
        found.append({
            "platform": platform, "slides": len(mine), "donors": len({(s.info.study, s.info.donor) for s in mine}),
            "organs": ", ".join(f"{organ} {n}" for organ, n in sorted(organs.items())),
            **{key: sum(slide.facts.get(key, 0) for slide in mine) for key in ("profiles", "tiles")},
            "flagged": sum(slide.flagged for slide in mine), "pooled": pooled,
        })  # fmt: skip
    return found


def _spans(slides: Sequence[Slide]) -> dict[str, tuple[int, int]]:
    """The bins that are shown of each figure: those that any slide fills, so that all slides compare."""
    found = {}
    for name in AXES:
        counts = [slide.histograms[name] for slide in slides if name in slide.histograms]
        if counts:
            found[name] = report_figures.span(counts)
    return found


def _shards(folder: Path) -> list[dict[str, Any]]:
    """Counts per split of a shard set. Raises ValueError where there is none, or its manifest was changed."""
    changed = check_shards.check_manifest(folder)
    if changed:
        raise ValueError(changed)
    opened = shards.ShardSet(folder)
    return [
        {"split": split, "shards": len(entry["shards"]), "groups": entry["groups"], "profiles": entry["profiles"],
         "tiles": entry["tiles"], "size": progress.size(sum(s["bytes"] for s in entry["shards"]))}
        for split, entry in opened.manifest["splits"].items()
    ]  # fmt: skip


def _warnings(slides: Sequence[Slide]) -> list[dict[str, str]]:
    """What a person should look at: notes that warn, and measurements that fit better elsewhere."""
    found = []
    for slide in slides:
        notes = [note for note in slide.facts.get("notes", []) if note.startswith("WARNING")]
        notes += [slide.alignment["note"]] if slide.alignment.get("note") else []
        found += [{"slide_id": slide.info.slide_id, "text": note.removeprefix("WARNING: ")} for note in notes]
    return found


def render(folder: Path, rows: Sequence[manifest.ManifestRow] = (), shard_set: Path | None = None) -> bytes:
    """The page of a store folder.

    Args:
        rows: of the manifest: slides of it that were never built are listed.

    Raises:
        ValueError: there is nothing to report, or no shard set where one is named.
    """
    slides, failed = read_slides(folder)
    wanted = {row.slide_id for row in rows}
    built = {slide.info.slide_id for slide in slides}
    spans = _spans(slides)
    script = _SCRIPT.read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = lambda v: "" if v is None else f"{v:,.0f}" if isinstance(v, int | float) else str(v)
    page = environment.from_string(_PAGE.read_text(encoding="utf-8"))
    text = page.render(
        name=folder.resolve().name, slides=slides, totals=_totals(slides), groups=_groups(slides),
        failures=_failures(failed), missing=sorted(wanted - built - set(failed)), axes=AXES,
        strange=sorted(built - wanted) if wanted else [], warnings=_warnings(slides),
        duplicates=fingerprints.notes(slide.info for slide in slides),
        most=_MOST_ROWS, shards=_shards(shard_set) if shard_set else [], script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        ramp=", ".join(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in report_figures.palette()[::2]),
        svg=lambda name, counts: Markup(report_figures.svg(name, counts, spans[name])),
    )  # fmt: skip
    return text.encode()


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.report", description="The corpus in one HTML file.")
    parser.add_argument("--store", type=Path, required=True, help="folder of the slide stores")
    parser.add_argument("--manifest", type=Path, help="also list its slides that were never built")
    parser.add_argument("--root", type=Path, help="folder that the manifest's relative paths start from")
    parser.add_argument("--split-by", choices=("donor", "section"), default="donor", help="as the config's split_by")
    parser.add_argument("--shards", type=Path, help="also tell of this shard set")
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    return guarded(lambda: _run(parser.parse_args(words)))


def _run(args: argparse.Namespace) -> int:
    rows = manifest.read(args.manifest, args.root, args.split_by) if args.manifest else []
    data = render(args.store, rows, args.shards)
    files.write_bytes(args.out, data)
    print(f"{args.out}: {progress.size(len(data))}; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
