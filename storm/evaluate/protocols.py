"""The protocols by name: how each is run, and told as Markdown.

In: an export, a cohort. Out: plain values for JSON; a protocol that cannot be run says why under `skipped`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storm.evaluate import domains, imputation, probes, retrieval, transfer
from storm.evaluate.expression import Cohort
from storm.export import Pretrained

EXPRESSION = "expression"  # protocol 2: its tables and figures are the report's first part
_MODULES = {"imputation": imputation, "retrieval": retrieval, "transfer": transfer, "probes": probes}
NAMES = (EXPRESSION, "imputation", "domains", "retrieval", "transfer", "probes")


def check(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is no protocol, or for none at all."""
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        said = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(f"protocols: {said} is no protocol; choose of {', '.join(NAMES)}")


def run(
    pretrained: Pretrained, cohort: Cohort, seed: int, truth_dir: Path | None, labels_dir: Path | None, name: str
) -> dict[str, Any]:
    """The values of a protocol other than `expression`."""
    if name == "domains":
        return domains.evaluate(pretrained, cohort, seed, truth_dir, labels_dir)
    return _MODULES[name].evaluate(pretrained, cohort, seed)


def text(name: str, values: dict[str, Any]) -> str:
    """The tables of a protocol, or why there are none."""
    if "skipped" in values:
        return f"Skipped: {values['skipped']}."
    return domains.text(values) if name == "domains" else _MODULES[name].text(values)
