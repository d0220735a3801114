"""The model card of an export: what it was trained on, under which terms, what it is for and what it cannot know.

In: the export's config (plain values). Out: Markdown. Counts per study, organ and platform; never a donor or a slide.
"""

from typing import Any

from storm.markdown import clean, table

_CARD = """# {title}

A STORM (this project) model: {parameters:,} parameters, {genes:,} genes, {step:,} optimizer steps.

## Load it

```python
import storm
model = storm.load("{folder}")              # torch, safetensors and numpy suffice; every file is checked by sha256
adata = storm.predict(model, "slide.zarr.zip")  # or storm.embed; needs storm-tissue[use]
```

## Trained on
{split}
{studies}

{organs}

{platforms}

Data: shard set `{data_hash}`, genes `{gene_hash}`; code `{code}`; seed {seed}.

## Licences and terms of the training data

{licenses}

The licence of this export itself is in LICENSE.
{encoder}
## Meant for

Research on tissue: embedding spots, bins and cells, predicting relative expression from H&E within a slide, as a start
for further training. It is no medical device; no prediction of it has been validated for diagnosis or treatment.

## Limits

* **Absolute depth is not identified from H&E.** How many molecules a profile yields is decided by the sequencing.
  Predicted counts are the composition times a predicted depth whose level is a constant taken from the training data
  (mean log density {density:.4g} per um2, reference footprint {footprint_um:g} um, platform {platform}); only contrasts
  within a slide and the composition are read from the image.
* Compositions sum to 1 over the reference panel of {panel_genes:,} genes. A gene outside the vocabulary is
  {outside}.
* Tiles are {tile_px} px at {tile_mpp:g} um/px ({tile_um:g} um): an image must be resampled to
  that from its measured mpp.
* Tissues, stains, scanners and platforms that are not listed above are new to the model.

## What is measured

Of this model, nothing in this folder: it holds weights and provenance, no evaluation. `storm evaluate` writes the table
for held-out slides beside its baselines; a use it has no row for is unmeasured. The counts above are counts of the
training data.
"""

_ENCODER = """
## Image encoder

`{name}`, {train}, from a file of weights with sha256 `{sha256}`. Its weights{changed} are part of
model.safetensors: **the licence and terms of that encoder apply to this export too.**
"""

_SECTION_SPLIT = """
> **split_by: section.** Sections of one donor lie on both sides of the split. A score on the held-out slides does not
> tell how the model does on a new donor.
"""
_DONOR_SPLIT = "\nSplit by donor: no donor lies on both sides of the split.\n"


def _counted(what: str, counts: dict[str, dict[str, int]]) -> str:
    rows: list[list[object]] = [
        [clean(name), entry["slides"], entry["profiles"]] for name, entry in sorted(counts.items())
    ]
    return table([what, "slides", "profiles"], rows)


def terms(licenses: dict[str, dict[str, Any]]) -> str:
    """Licence and use terms per study, as a table; what nobody stated is said to be unstated."""
    rows: list[list[object]] = [
        [clean(study), clean(entry["license"]) or "not stated", clean(entry["use_terms"]) or "not stated"]
        for study, entry in sorted(licenses.items())
    ]
    return table(["study", "licence", "terms of use"], rows)


def model_card(title: str, config: dict[str, Any], parameters: int, panel_genes: int) -> str:
    """The card of an export whose config.json is `config`."""
    reference, data, model = config["reference"], config["data"], config["model"]
    described = "predicted from its row in a table of descriptors alone, and refused without one"
    return _CARD.format(
        title=clean(title), folder=clean(title), parameters=parameters, genes=config["n_genes"], step=config["step"],
        split=_SECTION_SPLIT if data["split_by"] == "section" else _DONOR_SPLIT,
        studies=_counted("study", data["studies"]), organs=_counted("organ", data["organs"]),
        platforms=_counted("platform", data["platforms"]), data_hash=data["shards_hash"][:16],
        gene_hash=data["gene_hash"][:16], code=clean(config["code_version"]), seed=data["seed"],
        licenses=terms(data["licenses"]), density=reference["slide_log_density"], platform=clean(reference["platform"]),
        footprint_um=reference["footprint_um"], panel_genes=panel_genes, tile_px=model["tile_px"],
        tile_mpp=model["tile_mpp"], tile_um=model["tile_px"] * model["tile_mpp"], encoder=_encoder(model),
        outside=described if model.get("descriptor_width") else "refused, not guessed",
    )  # fmt: skip


def _encoder(model: dict[str, Any]) -> str:
    """What is said of an image encoder whose weights others made; nothing where there is none."""
    if not model.get("encoder_sha256"):
        return ""
    trained = {"frozen": "frozen", "lora": "with LoRA adapters", "full": "trained on"}[model["encoder_train"]]
    changed = ", changed," if model["encoder_train"] == "full" else ""
    return _ENCODER.format(
        name=clean(model["encoder"]), train=trained, sha256=clean(model["encoder_sha256"]), changed=changed
    )


def license_notice(licenses: dict[str, dict[str, Any]]) -> str:
    """The LICENSE of an export whose maker named none: what the training data say, and that a choice is due."""
    return (
        "No licence has been chosen for these weights.\n\n"
        "Whoever publishes this folder has to choose one that the training data allow, and replace this file\n"
        "(`storm export --license FILE`). Until then all rights are reserved by the maker of the export.\n\n"
        "The training data state:\n\n"
        f"{terms(licenses)}\n"
    )
