"""The report of an evaluation: tables, figures and the plain values behind them, in one folder, complete or absent.

report.md          what a reader wants first; embeds the tables and figures
evaluation.json    every value, with protocol, hashes, seed and intervals; protocols other than 2 under `protocols`
table.csv table.md protocol 2; classes.csv classes.md for synthetic tissue
loss_curve.png     of the run
gene_map.png       genes of highest variance on the largest held-out section
"""

import csv
import dataclasses
import functools
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storm import files, inference, results
from storm.evaluate import figures, protocols, targets
from storm.evaluate.classes import class_table
from storm.evaluate.expression import Cohort, evaluate, gene_rules, open_cohort, with_val
from storm.export import Pretrained, load
from storm.markdown import clean
from storm.markdown import table as markdown

VALUES = "evaluation.json"
GENES_DRAWN = 3
NOTHING = protocols.Known()

_REPORT = """# Report: {name} (protocol {protocol})

{split}{trained}Input of the model: {input}. Test: {test[sections]} sections of {test[donors]} donors, {test[profiles]}
profiles; training: {train[sections]} sections of {train[donors]} donors, {train[profiles]} profiles.

Pearson within a section per gene, mean over genes, mean over sections; a constant prediction counts as 0. In brackets a
95 % interval: bootstrap of spatial blocks ({replicates} replicates, blocks of {block_um:.0f} um, smaller on small
sections). Columns are target/gene rule; they are not comparable with each other, nor with another rule or data set:

* *lognorm*: log1p(counts / depth x 1e4). Depth alone explains much of it, see the row `true depth`.
* *raw*: log1p(counts).
* *residual*: lognorm after each gene was regressed on the true log depth within the section. The model's prediction for
  it is its composition alone, log1p(1e4 x share): neither measured nor predicted depth enters.
* *var*: the {genes[var]} genes of highest variance among the 1,000 of highest mean.
* *binned*: the {genes[binned]} of highest dispersion within 20 bins of mean; many of them are seen in few profiles.
  Both rules look at training sections alone.
* *image features*: what the model's own image encoder gives of footprint and window before anything else of the model,
  128 principal components fitted in training. A frozen encoder has never seen expression, a trained one has.

{table}

{versus}
{classes}{figures}## Provenance

{provenance}
"""
_CLASSES = """Classes: a visible by colour and density; b visible by texture or arrangement alone; c niche, 100-250 um
away; d spatial fields of expression alone; e noise and donor, where every method must be near 0.
skill = (model - colour ridge) / (oracle - colour ridge): 0 is what colour gives, 1 all that can be known."""
_FOREIGN = "**The model was not trained on these shards.** Whether it has seen these sections is not known."
_SIDE = "{sections} sections of {donors} donors, {profiles} profiles"
_PROVENANCE = (
    "protocol", "input", "symmetries", "split_by", "seed", "model_hash", "shards_sha256", "model_code", "code",
)  # fmt: skip


@dataclass(frozen=True)
class Sources:
    """What an evaluation reads: an export, stores, the shard set that split them; and where there are any, what else
    is known, and the run."""

    model: Path
    stores: Path
    shards: Path
    known: protocols.Known = NOTHING
    run: Path | None = None
    symmetries: int = 1  # of the slide, over which the model's answers are averaged


def write(sources: Sources, out: Path, names: Sequence[str] = (protocols.EXPRESSION,), seed: int = 0) -> str:
    """Evaluate an export, write the report to the folder `out` (replacing a report), and return its tables as text.

    Args:
        names: of protocols.NAMES, in the report's order.

    Raises:
        ValueError: naming file, fact and cure; nothing is then written.
    """
    if out.exists() and not (out / VALUES).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is no report ({VALUES} is absent); choose another folder")
    protocols.check(names)
    lines = read_log(sources.run) if sources.run else []
    pretrained = dataclasses.replace(load(sources.model), symmetries=sources.symmetries)
    cohort = open_cohort(pretrained, sources.stores, sources.shards)
    rival = protocols.open_rival(sources.known, names, sources.shards, pretrained, cohort)
    if protocols.UNCERTAINTY in names:
        cohort = with_val(cohort, sources.stores, sources.shards)
    values: dict[str, Any] = {}
    if protocols.EXPRESSION in names:
        classes = class_table(pretrained, cohort, truth, seed) if (truth := sources.known.truth) else None
        values = evaluate(pretrained, cohort, seed) | ({"gene_classes": classes} if classes else {})
    if others := [name for name in names if name != protocols.EXPRESSION]:
        run = functools.partial(protocols.run, pretrained, cohort, seed, sources.known, rival)
        values["protocols"] = {name: run(name) for name in others}
    with files.replacing_folder(out) as folder:
        _fill(folder, values, lines, pretrained, cohort)
    return "\n\n".join([*_printed(values), f"{out / 'report.md'}"])


def _fill(
    folder: Path, values: dict[str, Any], lines: list[dict[str, Any]], pretrained: Pretrained, cohort: Cohort
) -> None:
    """Write every file of the report."""
    parts = []
    if "columns" in values:
        if lines:
            figures.loss_curve(lines, folder / "loss_curve.png")
        draw_genes(pretrained, cohort, folder / "gene_map.png")
        _tables(values, folder)
        parts.append(report_text(values, bool(lines)))
    parts += [protocol_text(name, of) for name, of in values.get("protocols", {}).items()]
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")
    (folder / VALUES).write_bytes(files.dump_json(values))


def _printed(values: dict[str, Any]) -> list[str]:
    """The tables as text, the expression protocol's first."""
    parts = [_split_line(values), score_table(values), _versus(values)] if "columns" in values else []
    if "gene_classes" in values:
        parts.append(class_rows(values["gene_classes"]))
    for name, of in values.get("protocols", {}).items():
        parts.append(f"## {_heading(name, of)}\n\n{protocols.text(name, of)}")
    return [part for part in parts if part]


def _heading(name: str, values: dict[str, Any]) -> str:
    """A protocol by the word of --protocols, and by its number."""
    return f"{name} (protocol {values['protocol']})"


def protocol_text(name: str, values: dict[str, Any]) -> str:
    """The section of report.md of a protocol other than 2: what was tested on whom, the tables, the provenance."""
    parts = [f"# Report: {_heading(name, values)}"]
    if "skipped" not in values:
        parts += [line] if (line := _split_line(values)) else []
        parts += [] if values["model_trained_on_these_shards"] else [_FOREIGN]
        data = {side: _SIDE.format(**sizes) for side, sizes in values["data"].items()}
        parts.append(f"Input of the model: {values['input']}. Test: {data['test']}; training: {data['train']}.")
    parts.append(protocols.text(name, values))
    if "skipped" not in values:
        parts += ["## Provenance", _provenance(values)]
    return "\n\n".join(parts) + "\n"


def _provenance(values: dict[str, Any]) -> str:
    return markdown(["", ""], [[key, clean(values[key])] for key in _PROVENANCE])


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run's log, one per step: a resumed run's later one replaces the earlier.

    Raises:
        ValueError: no log, a line that is no JSON, or a log of another version.
    """
    path = run_dir / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such log; give the run folder that the export was made of")
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{path}: line {number} is no JSON; remove it") from None
        if "event" not in values:
            by_step[int(values["step"])] = values
    if by_step and not any("train/loss" in record for record in by_step.values()):
        raise ValueError(f"{path}: no line holds train/loss, it is of another version; leave --run out, or train again")
    return [by_step[step] for step in sorted(by_step)]


def draw_genes(pretrained: Pretrained, cohort: Cohort, path: Path) -> None:
    """Measured and predicted maps of the genes of highest training variance, on the largest test section."""
    section = max(cohort.test, key=lambda s: len(s.rows))
    store = cohort.stores[section.slide_id]
    moments = targets.moments([s.counts for s in cohort.train], [s.depth for s in cohort.train])
    rule = gene_rules(cohort)["var"]
    columns = rule[np.argsort(-moments.variance[rule], kind="stable")[:GENES_DRAWN]]
    genes = np.array([pretrained.genes.index[cohort.gene_ids[i]] for i in columns], dtype=np.int64)
    slide = inference.prepare(pretrained, store)
    predicted = inference.predict(pretrained, slide, genes=genes, rows=section.rows).lognorm().astype(np.float64)
    measured = targets.lognorm(section.counts[:, columns], section.depth)
    image, px_per_um = results.thumbnail(store)
    names = [pretrained.genes.symbols[i] for i in genes]
    size_um = float(np.median(slide.profiles.footprint_um))
    figures.gene_map(image, px_per_um, section.xy_um, size_um, names, measured, predicted, path)


def _csv(rows: list[list[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[_inert(cell) for cell in row] for row in rows])
    return text.getvalue().encode()


def _inert(cell: object) -> object:
    """The cell as a spreadsheet shows it and does not run it: a text that begins like a formula gets an apostrophe."""
    text = str(cell)
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|nan|inf)", text)
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) and not number else cell


def _tables(values: dict[str, Any], folder: Path) -> None:
    rows: list[list[object]] = [["method", "role", "column", "pearson", "low", "high"]]
    for method in values["methods"]:
        for column, score in method["scores"].items():
            rows.append(
                [method["name"], method["role"], column, *(f"{score[k]:.4f}" for k in ("value", "low", "high"))]
            )
    (folder / "table.csv").write_bytes(_csv(rows))
    (folder / "table.md").write_text(f"{_split_line(values)}\n\n{score_table(values)}\n".lstrip(), encoding="utf-8")
    if "gene_classes" in values:
        classes = values["gene_classes"]
        header: list[object] = ["class", "genes", *classes["methods"], "skill"]
        body: list[list[object]] = [
            [
                name,
                entry["genes"],
                *(f"{entry['scores'][m]:.4f}" for m in classes["methods"]),
                _number(entry["skill"], ""),
            ]
            for name, entry in classes["classes"].items()
        ]
        (folder / "classes.csv").write_bytes(_csv([header, *body]))
        (folder / "classes.md").write_text(class_rows(classes) + "\n", encoding="utf-8")


def _number(value: float | None, absent: str = "-") -> str:
    return absent if value is None else f"{value:.3f}"


def score_table(values: dict[str, Any]) -> str:
    """Methods by columns as Markdown."""
    rows: list[list[object]] = []
    for method in values["methods"]:
        scores = [method["scores"][column] for column in values["columns"]]  # JSON sorts its keys
        cells = [f"{s['value']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in scores]
        rows.append([f"**{method['name']}**" if method["role"] == "model" else method["name"], method["role"], *cells])
    return markdown(["method", "role", *values["columns"]], rows)


def class_rows(classes: dict[str, Any]) -> str:
    """Gene classes by methods as Markdown."""
    rows: list[list[object]] = [
        [
            clean(name),
            entry["genes"],
            *(_number(entry["scores"][m]) for m in classes["methods"]),
            _number(entry["skill"]),
        ]
        for name, entry in classes["classes"].items()
    ]
    return markdown(["gene class", "genes", *classes["methods"], "skill"], rows)


def _versus(values: dict[str, Any]) -> str:
    """One line per column: the model against the best baseline, and against a ridge on its own embedding (how well its
    heads read what it knows), in words that an interval allows."""
    lines = []
    for role, versus in (("the best baseline, ", "versus_best_baseline"), ("", "versus_own_embedding")):
        for column, entry in values[versus].items():
            below = "is worse than" if entry["high"] < 0 else "is not told apart from"
            lines.append(
                f"* {column}: the model {'is better than' if entry['low'] > 0 else below} {role}{entry['baseline']}: "
                f"{entry['value']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}] (paired)."
            )
    return "\n".join(lines)


def _split_line(values: dict[str, Any]) -> str:
    if values["split_by"] != "section":
        return ""
    return "**split_by: section.** Training and test sections share donors: this is no result on new donors."


def report_text(values: dict[str, Any], curve: bool) -> str:
    """report.md."""
    classes = ""
    if found := values.get("gene_classes"):
        classes = f"\n## Gene classes of the synthetic tissue (target lognorm)\n\n{class_rows(found)}\n\n{_CLASSES}\n"
    drawn = "## Genes\n\n![measured and predicted genes on a held-out section](gene_map.png)\n\n"
    drawn += (
        f"The {GENES_DRAWN} genes of highest variance on the training sections, on the largest test section; the\n"
        "tables hold the means over genes. Colour: lognorm, each map on its own scale, because predictions are\n"
        "smoother than single measurements.\n\n"
    )
    loss = "## Training\n\n![loss by step](loss_curve.png)\n\n" if curve else ""
    trained = ""
    if not values["model_trained_on_these_shards"]:
        trained = f"{_FOREIGN}\n\n"
    return _REPORT.format(
        name=protocols.EXPRESSION, protocol=values["protocol"],
        split=f"{line}\n\n" if (line := _split_line(values)) else "", trained=trained,
        input=values["input"], test=values["data"]["test"], train=values["data"]["train"], genes=values["genes"],
        replicates=values["bootstrap"]["replicates"], block_um=values["bootstrap"]["block_um"],
        table=score_table(values), versus=_versus(values), classes=classes, figures=f"\n{drawn}{loss}",
        provenance=_provenance(values),
    )  # fmt: skip
