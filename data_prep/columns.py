"""The columns of a manifest, and cells that a spreadsheet must not run.

In: a cell. Out: the cell as it is safe to write, and as it was meant.
"""

REQUIRED = ("slide_id", "image", "measurement", "platform", "donor", "study", "organ", "species")
OPTIONAL = (
    "format", "unit", "spots", "mpp", "space_um", "alignment", "split", "section", "assume_aligned", "tissue",
    "license", "use_terms",
)  # fmt: skip
IMAGE_ONLY = "image"  # the platform of a slide that nothing was measured on
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a cell that starts so


def inert(cell: str) -> str:
    """The cell as a spreadsheet shows it and does not run it: one that starts like a formula gets an apostrophe."""
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def bare(cell: str) -> str:
    """The cell of `inert` as it was before."""
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(_FORMULA) else cell
