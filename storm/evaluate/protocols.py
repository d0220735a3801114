"""The protocols by name: how each is run, and told as Markdown.

In: an export, a cohort. Out: plain values for JSON; a protocol that cannot be run says why under `skipped`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storm import descriptors
from storm.evaluate import domains, footprints, imputation, probes, retrieval, transfer, uncertainty, unseen
from storm.evaluate.expression import Cohort
from storm.evaluate.within import Within, open_within
from storm.export import Pretrained

EXPRESSION = "expression"  # protocol 2: its tables and figures are the report's first part
UNCERTAINTY = "uncertainty"  # protocol 10: it asks for validation sections
_MODULES = {"retrieval": retrieval, "probes": probes, UNCERTAINTY: uncertainty}
_WITH_TRUTH = {"imputation": imputation, "footprints": footprints}
_TEXTS = {**_MODULES, **_WITH_TRUTH, "transfer": transfer, "domains": domains, "unseen": unseen}
NAMES = (EXPRESSION, "imputation", "domains", "retrieval", "transfer", "probes", "unseen", UNCERTAINTY, "footprints")


def check(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is no protocol, or for none at all."""
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        said = repr(unknown[0]) if unknown else "nothing"
        raise ValueError(f"protocols: {said} is no protocol; choose of {', '.join(NAMES)}")


@dataclass(frozen=True)
class Known:
    """What is known beside the cohort, where it is: truth of synthetic tissue, labels of domains (<slide>.csv), and
    tables that describe genes, files as `storm.descriptors` reads them; for transfer an export trained on the target
    platform, with the shard sets of its training."""

    truth: Path | None = None
    labels: Path | None = None
    descriptors: Path | None = None
    within: Path | None = None
    within_shards: tuple[Path, ...] = ()


def open_rival(
    known: Known, names: Sequence[str], shards: Path, pretrained: Pretrained, cohort: Cohort
) -> Within | None:
    """The model that transfer is held against, where one is named; it is refused before anything is computed.

    Args:
        shards: the evaluated set, taken for that of its training where `known` names none.

    Raises:
        ValueError: as `open_within` and `transfer.check`, or no protocol asks for it.
    """
    if known.within is None:
        return None
    if "transfer" not in names:
        raise ValueError(f"--within {known.within}: goes with the protocol transfer; name it in --protocols")
    rival = open_within(known.within, known.within_shards or (shards,), pretrained.symmetries)
    transfer.check(pretrained, cohort, rival)
    return rival


def run(
    pretrained: Pretrained, cohort: Cohort, seed: int, known: Known, rival: Within | None, name: str
) -> dict[str, Any]:
    """The values of a protocol other than `expression`."""
    if name == "transfer":
        return transfer.evaluate(pretrained, cohort, seed, rival)
    if name == "domains":
        return domains.evaluate(pretrained, cohort, seed, known.truth, known.labels)
    if name in _WITH_TRUTH:
        return _WITH_TRUTH[name].evaluate(pretrained, cohort, seed, known.truth)
    if name == "unseen":
        table = descriptors.read(known.descriptors) if known.descriptors else None
        return unseen.evaluate(pretrained, cohort, table, seed)
    return _MODULES[name].evaluate(pretrained, cohort, seed)


def text(name: str, values: dict[str, Any]) -> str:
    """The tables of a protocol, or why there are none."""
    if "skipped" in values:
        return f"Skipped: {values['skipped']}."
    return _TEXTS[name].text(values)
