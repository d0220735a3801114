"""The report: all that was built and all that failed, escaped, without paths, and looked at in a browser."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import report
from storm import shards, store
from tests.data_prep.vendors import tissue, write_manifest, write_tiff

Built = Callable[..., tuple[int, Path]]
EVIL = "<script>document.title='owned'</script>"


def page(folder: Path, tmp_path: Path, *words: str) -> str:
    out = tmp_path / "report.html"
    assert report.main(["--store", str(folder), "--out", str(out), *words]) == 0
    return out.read_text(encoding="utf-8")


def mixed(built: Built, corpus: Path) -> tuple[Path, Path]:
    """(store folder, manifest) of five slides: three are sound, one's image is none, one was never tried."""
    (corpus / "images" / "bad.svs").write_bytes(b"no slide")
    v = {"image": "images/v.tif", "measurement": "v/outs", "platform": "visium"}
    rows = [
        {"slide_id": "v", **v, "donor": "d1"},
        {"slide_id": "twin", **v, "donor": "d2", "organ": EVIL, "study": EVIL, "license": f"{EVIL}&"},
        {"slide_id": "i", "image": "images/i.tif", "platform": "image", "donor": "d3"},
        {"slide_id": "bad", "image": "images/bad.svs", "platform": "image", "donor": "d4"},
    ]
    code, folder = built(manifest=write_manifest(corpus / "m.csv", rows))
    assert code == 1
    more = [*rows, {"slide_id": "later", "image": "images/i.tif", "platform": "image"}]
    return folder, write_manifest(corpus / "more.csv", more)


def text_of(html: str) -> str:
    """What the page says, without its marks and styles."""
    bare = re.sub(r"<(script|style|svg).*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL)
    return " ".join(bare.split())


def test_built_failed_and_missing_slides_are_told(built: Built, corpus: Path, tmp_path: Path) -> None:
    folder, manifest = mixed(built, corpus)
    html = page(folder, tmp_path, "--manifest", str(manifest))
    text = text_of(html)
    assert "3 slides 3 donors 2 studies 2 organs 128 profiles" in text
    assert "bad bad.svs: is no slide and no image that can be read restore or convert it" in text
    assert "In the manifest, and never tried (1): later" in text
    assert "duplicate? v and twin share" in text or "duplicate? twin and v share" in text
    assert html.count('<article class="sheet"') == 3
    assert len(re.findall(r'src="data:image/(jpeg|png);base64,', html)) == 3 * 2 + 2  # small, slide; two with profiles
    assert html.count("<svg") == 4 + 2 + 2 * 4 + 2  # per platform, per slide


def test_the_check_of_the_alignment_frightens_only_with_a_reason(built: Built, tmp_path: Path) -> None:
    _, folder = built()
    page = report.render(folder).decode()
    assert "counts per profile (log)" in page and "tissue per tile (log" not in page
    checked = store.SlideStore(folder / "v.zarr.zip").info.facts["alignment_check"]
    assert checked["checked"] and not checked["note"]
    assert f"fit r {round(checked['r'], 2) + 0:.2f} <small>no better shift found</small>" in page
    assert "quarters" not in page


def test_the_page_is_reproducible_and_tells_no_path(built: Built, corpus: Path, tmp_path: Path) -> None:
    folder, manifest = mixed(built, corpus)
    html = page(folder, tmp_path, "--manifest", str(manifest))
    assert page(folder, tmp_path, "--manifest", str(manifest)) == html
    assert str(tmp_path) not in html and str(corpus) not in html
    assert not re.search(r'(src|href)=(?!"(data:image/|#))', html)
    assert not re.search(r"https?://|@import|url\(", html)


def test_all_that_others_wrote_is_escaped(built: Built, corpus: Path, tmp_path: Path) -> None:
    folder, _ = mixed(built, corpus)
    html = page(folder, tmp_path)
    assert EVIL not in html
    assert "&lt;script&gt;document.title=&#39;owned&#39;&lt;/script&gt;&amp;" in html
    assert html.count("<script>") == 1


def test_a_damaged_store_is_a_failure_with_its_cure(built: Built, tmp_path: Path) -> None:
    _, folder = built()
    path = folder / "v.zarr.zip"
    path.write_bytes(path.read_bytes()[:2000])
    text = text_of(page(folder, tmp_path))
    assert "v v.zarr.zip: no complete slide store" in text
    assert "delete it and run data_prep.build" in text


def test_the_store_that_a_failed_slide_left_from_before_is_not_shown(
    built: Built, corpus: Path, tmp_path: Path
) -> None:
    built()
    (corpus / "images" / "v.tif").write_bytes(b"no slide")
    _, folder = built()
    assert (folder / "v.zarr.zip").is_file()
    html = page(folder, tmp_path)
    assert 'id="s-v"' not in html and 'id="s-t"' in html
    assert "v.tif: is no slide" in html


def test_shards_are_told(tiny_store: Path, tiny_shards: Path, tmp_path: Path) -> None:
    text = text_of(page(tiny_store, tmp_path, "--shards", str(tiny_shards)))
    groups = sum(entry["groups"] for entry in shards.ShardSet(tiny_shards).manifest["splits"].values())
    told = re.search(r"split shards groups profiles tiles size test 1 (\d+) .* train 1 (\d+) ", text)
    assert told and int(told[1]) + int(told[2]) == groups


def test_notes_that_warn_are_listed_apart_up_to_a_limit(
    built: Built, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visium = {"measurement": "v/outs", "platform": "visium", "mpp": "0.6"}
    rows = [
        {"slide_id": "w", "image": "images/v.tif", **visium},
        {"slide_id": "x", "image": "images/t.tif", **visium, "section": "w"},
    ]
    _, folder = built(manifest=write_manifest(corpus / "m.csv", rows))
    look = text_of(page(folder, tmp_path)).partition("To look at slide what")[2].partition("Corpus")[0]
    assert look.strip().startswith("w mpp 0.6000 (manifest) and 1.0000 (lattice)")
    assert " x mpp 0.6000" in look
    monkeypatch.setattr(report, "_MOST_ROWS", 1)
    look = text_of(page(folder, tmp_path)).partition("To look at slide what")[2].partition("Corpus")[0]
    assert " x mpp 0.6000" not in look
    assert re.search(r"The first 1 of 0 pairs and of 8 warnings", look)


def test_wrong_usage_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--store", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    assert "holds no slide store" in capsys.readouterr().err


def chromium(*words: str, profile: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a headless browser without network; skip, or in CI fail, where there is none."""
    found = shutil.which("chromium")
    if not found:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]  # fmt: skip
    return subprocess.run([found, *quiet, f"--user-data-dir={profile}", *words], capture_output=True, check=True,
                          timeout=120)  # fmt: skip


def test_a_browser_shows_it_and_runs_nothing_but_its_own_script(built: Built, corpus: Path, tmp_path: Path) -> None:
    folder, manifest = mixed(built, corpus)
    page(folder, tmp_path, "--manifest", str(manifest))
    url = (tmp_path / "report.html").as_uri()
    dom = chromium("--dump-dom", url, profile=tmp_path / "p1").stdout.decode()
    assert "<title>stores: preparation</title>" in dom  # not owned
    assert '<th tabindex="0">slide</th>' in dom  # its own script ran: columns can be sorted
    assert dom.count('<article class="sheet"') == 3
    picture = tmp_path / "seen.png"
    chromium(f"--screenshot={picture}", "--window-size=1280,3000", url, profile=tmp_path / "p2")
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (3000, 1280, 3)
    pink = (pixels[..., 0].astype(int) - pixels[..., 1] > 40) & (pixels[..., 2].astype(int) - pixels[..., 1] > 20)
    assert pink[1000:].mean() > 0.01  # the tissue is there


def test_slides_of_real_scanners(real_data: Path, built: Built, corpus: Path, tmp_path: Path) -> None:
    image = real_data / "wsi/tests/fixtures/svs-images/cmu-1-small-region.svs"
    rows = [{"slide_id": "cmu", "image": str(image), "platform": "image"}]
    code, folder = built(manifest=write_manifest(corpus / "m.csv", rows))
    assert code == 0
    text = text_of(page(folder, tmp_path))
    assert "2,220 x 2,967 px" in text and "0.4990 um embedded" in text and "image alone" in text
    assert len(store.SlideStore(folder / "cmu.zarr.zip")) > 50


def test_a_slide_without_tissue_has_its_row(built: Built, corpus: Path, tmp_path: Path) -> None:
    write_tiff(corpus / "images" / "empty.tif", np.full_like(tissue(500, 500), 245))
    rows = [{"slide_id": "e", "image": "images/empty.tif", "platform": "image"}]
    _, folder = built(manifest=write_manifest(corpus / "m.csv", rows))
    assert "no tile holds tissue or is read by a profile" in text_of(page(folder, tmp_path))
