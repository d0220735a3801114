"""plan: every fault at once, each slide in one task, what is complete left out, and the room that is needed."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import build, cost, manifest, plan, records
from storm import files, store
from storm.prep_config import PrepConfig
from tests.data_prep.vendors import tissue, write_manifest, write_tiff, write_visium

Built = Callable[..., tuple[int, Path]]
OPTIONS = ("tile_px=112", "tile_mpp=1.0")


def run(manifest: Path, folder: Path, *words: str) -> tuple[int, list[list[str]]]:
    """(exit code, tasks) of a plan that is written."""
    out = folder / "plan.json"
    out.unlink(missing_ok=True)
    code = plan.main([str(manifest), "--store", str(folder), "--out", str(out), *OPTIONS, *words])
    return code, files.read_json(out)["tasks"] if out.is_file() else []


def slides_of(tasks: list[list[str]]) -> list[str]:
    return sorted(name for task in tasks for name in task)


def test_every_slide_is_in_one_task_and_build_takes_it(corpus: Path, tmp_path: Path) -> None:
    code, tasks = run(corpus / "manifest.csv", tmp_path, "--tasks", "2")
    assert (code, len(tasks), slides_of(tasks)) == (0, 2, ["i", "t", "v"])
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["manifest_sha256"] == files.sha256_file(corpus / "manifest.csv")
    words = [str(corpus / "manifest.csv"), "--store", str(tmp_path / "s"), "--plan", str(tmp_path / "plan.json")]
    assert build.main([*words, "--task", "1", "--workers", "1", *OPTIONS]) == 0
    assert [p.name for p in store.paths(tmp_path / "s")] == sorted(f"{name}.zarr.zip" for name in tasks[1])


def test_a_plan_is_reproducible_and_a_dry_run_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    run(corpus / "manifest.csv", tmp_path)
    first = (tmp_path / "plan.json").read_bytes()
    run(corpus / "manifest.csv", tmp_path)
    assert (tmp_path / "plan.json").read_bytes() == first
    assert plan.main([str(corpus / "manifest.csv"), "--store", str(tmp_path / "new"), "--dry-run", *OPTIONS]) == 0
    assert not (tmp_path / "new").exists()


def test_complete_slides_are_left_out_until_something_changes(built: Built, corpus: Path) -> None:
    _, folder = built()
    manifest = corpus / "manifest.csv"
    assert run(manifest, folder)[1] == []
    assert slides_of(run(manifest, folder, "--all")[1]) == ["i", "t", "v"]
    assert slides_of(run(manifest, folder, "jpeg_quality=70")[1]) == ["i", "t", "v"]
    write_tiff(corpus / "images" / "i.tif", tissue(950, 1000)[::-1].copy())
    (folder / "v.zarr.zip").unlink()
    assert slides_of(run(manifest, folder)[1]) == ["i", "v"]
    manifest.write_text(manifest.read_text().replace("d2", "d9"))
    assert slides_of(run(manifest, folder)[1]) == ["i", "t", "v"]


def test_copied_inputs_are_current_and_not_planned_again(built: Built, corpus: Path) -> None:
    _, folder = built()
    before = {path.name: path.read_bytes() for path in store.paths(folder)}
    (corpus / "images" / "i.tif").touch()  # as a copy leaves it: another time, the same content
    assert run(corpus / "manifest.csv", folder)[1] == [["i"]]
    assert built()[0] == 0
    assert run(corpus / "manifest.csv", folder)[1] == []
    assert {path.name: path.read_bytes() for path in store.paths(folder)} == before


def test_the_profiles_of_small_measurements_are_those_of_the_build(built: Built, corpus: Path, tmp_path: Path) -> None:
    rows, config = manifest.read(corpus / "manifest.csv", None), PrepConfig(tile_px=112, tile_mpp=1.0)
    _, folder = built()
    for place in (tmp_path / "new", folder):  # before the build, and by its record after it
        for row in rows:
            built_one = store.SlideStore(store.store_path(folder, row.slide_id))
            assert plan.check(row, place, config).work.profiles == built_one.info.facts.get("profiles", 0), row.slide_id


def test_after_a_failure_only_the_failed_slide_is_planned(built: Built, corpus: Path) -> None:
    image = corpus / "images" / "i.tif"
    whole = image.read_bytes()
    image.write_bytes(b"no slide")
    code, folder = built()
    assert (code, list(records.failures(folder))) == (1, ["i"])
    image.write_bytes(whole)
    assert run(corpus / "manifest.csv", folder) == (0, [["i"]])


def test_all_faults_of_all_slides_come_at_once_and_the_rest_is_planned(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = corpus / "images"
    (images / "broken.svs").write_bytes(b"no slide")
    write_tiff(images / "no_mpp.tif", tissue(300, 300), mpp=None)
    write_visium(corpus / "cut" / "outs")
    (corpus / "cut" / "outs" / "filtered_feature_bc_matrix.h5").write_bytes(b"no h5")
    (corpus / "bent.csv").write_text("1,0,0\n")
    visium = {"image": "images/v.tif", "measurement": "v/outs", "platform": "visium"}
    rows = [
        {"slide_id": "good", "image": "images/i.tif", "platform": "image"},
        {"slide_id": "broken", "image": "images/broken.svs", "platform": "image"},
        {"slide_id": "no_mpp", "image": "images/no_mpp.tif", "platform": "image"},
        {"slide_id": "coarse", "image": "images/i.tif", "platform": "image", "mpp": "9"},
        {"slide_id": "bent", "alignment": "bent.csv", **visium},
        {"slide_id": "two", **visium, "image": "images/absent.svs", "measurement": "cut/outs"},
        {"slide_id": "none", **visium, "measurement": "nowhere"},
    ]
    code, tasks = run(write_manifest(corpus / "m.csv", rows), tmp_path)
    assert (code, tasks) == (1, [["good"]])
    told = capsys.readouterr().out.partition("6 of 7 slides cannot be built:\n")[2].splitlines()[:-1]
    expected = [
        ("broken", "broken.svs: is no slide"),
        ("no_mpp", "no_mpp.tif: the pixel size (mpp) is unknown; give um per pixel in the column mpp"),
        ("coarse", "9.00 um per pixel is too coarse"),
        ("bent", "bent.csv: no invertible affine 3 x 3 matrix"),
        ("two", "filtered_feature_bc_matrix.h5: no readable matrix"),
        ("two", "absent.svs: no such"),
        ("none", "nowhere: is no folder"),
    ]
    assert [line.split(":")[0].strip() for line in told] == [slide for slide, _ in expected]
    for line, (_, text) in zip(told, expected, strict=True):
        assert text in line


def test_a_faulty_manifest_is_2(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(corpus / "m.csv", [{"slide_id": "a.b", "donor": ""}])
    assert run(corpus / "m.csv", tmp_path) == (2, [])
    err = capsys.readouterr().err
    assert "column slide_id" in err and "column donor" in err and "column platform" in err


def test_an_input_of_two_slides_is_told(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.link(corpus / "images" / "i.tif", corpus / "images" / "copy.tif")
    rows = [{"slide_id": n, "image": f"images/{f}.tif", "platform": "image"} for n, f in (("a", "i"), ("b", "copy"))]
    assert run(write_manifest(corpus / "m.csv", rows), tmp_path)[0] == 0
    assert "i.tif is an input of 2 slides (a, b); is one of them a duplicate?" in capsys.readouterr().out


def test_tasks_are_balanced_longest_first() -> None:
    rng = np.random.default_rng(0)
    seconds = {f"s{i:03d}": float(v) for i, v in enumerate(rng.exponential(60, 200))}
    tasks = plan.balanced(seconds, 16)
    loads = [sum(seconds[name] for name in task) for task in tasks]
    assert sorted(name for task in tasks for name in task) == sorted(seconds)
    assert max(loads) <= 4 / 3 * max(sum(loads) / 16, max(seconds.values()))  # Graham's bound
    assert plan.balanced(dict(reversed(seconds.items())), 16) == tasks
    assert plan.balanced({"a": 1.0}, 5) == [["a"]]


def test_the_number_of_tasks_respects_minutes_and_the_array(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = corpus / "manifest.csv"
    assert len(run(manifest, tmp_path, "--task-minutes", "1")[1]) == 1
    assert len(run(manifest, tmp_path, "--tasks", "50")[1]) == 3
    assert len(run(manifest, tmp_path, "--tasks", "3", "--max-array", "2")[1]) == 2
    assert "3 tasks would be more than an array may have; they are 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(manifest, tmp_path, "--tasks", "0")


def test_counts_bytes_and_files_are_told_and_scaled(
    built: Built, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = built()
    capsys.readouterr()
    assert run(corpus / "manifest.csv", folder, "--all", "--extrapolate", "1200", "--extrapolate", "120000")[0] == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert lines["visium"][1:6] == ["skin", "1", "1", "0", "64"]
    real = sum(path.stat().st_size for path in store.paths(folder))
    told = re.search(r"needs ([\d.]+) MB for stores", out)
    assert told and float(told[1]) == pytest.approx(real / 1e6, abs=0.1)  # fitted to these very slides
    assert "at most 3)" in out and "costs from 3 records of the store" in out
    assert float(lines["120000"][-1]) <= 3
    assert float(lines["120000"][1]) == pytest.approx(100 * float(lines["1200"][1]), rel=1e-3)


def test_slides_that_make_too_many_shards_are_told_the_size_that_does_not(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(corpus / "manifest.csv", tmp_path, "shard_mb=0.1")[0] == 0
    told = re.search(r"shard_mb=(\d+) keeps them at 3 files each", capsys.readouterr().out)
    assert told
    assert run(corpus / "manifest.csv", tmp_path, f"shard_mb={told[1]}")[0] == 0
    out = capsys.readouterr().out
    assert "keeps them" not in out
    per_slide = re.search(r"\(([\d.]+) per slide, at most 3\)", out)
    assert per_slide and float(per_slide[1]) <= 3


def test_too_little_room_is_a_fault(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    device = cost._device(tmp_path)
    (tools / "quota").write_text(
        "#!/bin/sh\necho 'Disk quotas for user someone (uid 1):'\n"
        "echo '     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace'\n"
        f"echo '{device} 900* 800 901 0 10 100 0 0'\n"
    )
    (tools / "quota").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert cost.room(tmp_path / "not" / "there").quota_bytes == 1024
    assert run(corpus / "manifest.csv", tmp_path)[0] == 1
    out = capsys.readouterr().out
    assert "left of your quota: 1.0 kB, 90 files: TOO LITTLE for the stores" in out
    assert "someone" not in out
    (tools / "quota").write_text(f"#!/bin/sh\necho '{device} 900* 800 901 6days 10 100 0 none'\n")  # of another make
    assert cost.room(tmp_path).quota_bytes is None
    (tools / "quota").write_text("#!/bin/sh\necho 'Disk quotas for user someone (uid 1): none'\nexit 1\n")
    assert cost.room(tmp_path).quota_bytes is None
    assert run(corpus / "manifest.csv", tmp_path)[0] == 0


def test_real_slides(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = Path(__file__).parents[2]
    words = ["--root", str(real_data / "her2st"), "--config", str(repo / "configs" / "prep_her2st.yaml")]
    assert run(repo / "configs" / "her2st.csv", tmp_path, *words)[0] == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("st ")]
    assert line.split()[1:5] == ["breast", "3", "0", "0"]
    assert 400 < int(line.split()[5]) < 700  # really 551: tables of text are guessed from their size
    assert line.split()[6:8] == ["2.0", "M"]  # really 2.1 M


def test_a_store_folder_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = [str(corpus / "manifest.csv"), "--store", str(tmp_path / "file" / "s"), *OPTIONS]
    assert plan.main(words) == 2
    shutil.rmtree(corpus)
    assert plan.main(words) == 2


def test_what_failed_last_time_is_told_until_a_file_changes(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write(tmp_path, records.Record("i", "failed", "i.tif: odd; mend it"))
    assert run(corpus / "manifest.csv", tmp_path)[0] == 0
    text = "warning: i failed last time, and none of its files changed since: i.tif: odd; mend it"
    assert text in capsys.readouterr().out
    (corpus / "images" / "i.tif").touch()
    run(corpus / "manifest.csv", tmp_path)
    assert "failed last time" not in capsys.readouterr().out


def test_a_split_without_slides_is_told(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(corpus / "manifest.csv", tmp_path)
    assert "split:" not in capsys.readouterr().out
    rows = [{"slide_id": "i", "image": "images/i.tif", "platform": "image", "split": "train"}]
    assert run(write_manifest(corpus / "m.csv", rows), tmp_path)[0] == 0
    out = capsys.readouterr().out
    assert "warning: no test split: none of the 1 slides would be in it" in out and "no train split" not in out
    del rows[0]["split"]
    blank = write_manifest(corpus / "m.csv", rows)
    assert run(blank, tmp_path, "--dry-run")[0] == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "split:" in line]
    assert "(no row names it, and test_share is 0), so nothing can be evaluated; give rows of some donors the" in line
    assert run(blank, tmp_path, "test_share=0.5", "--dry-run")[0] == 0
    out = capsys.readouterr().out
    assert "no train split" in out and "no test split" not in out
    assert "1 slide in 1 task, 1 at a time: 1 s, <0.001 core-hours in all" in out


def test_one_section_in_several_units_is_one_line(corpus: Path, tmp_path: Path) -> None:
    image, outs = corpus / "images" / "v.tif", corpus / "v" / "outs"

    def lines(*rows: manifest.ManifestRow) -> list[str]:
        checked = [plan.Checked(row, found=[image, outs / "filtered_feature_bc_matrix.h5"]) for row in rows]
        return plan.shared_inputs(checked, PrepConfig())

    cells = manifest.ManifestRow("c", image, outs, "xenium")
    squares = [dataclasses.replace(cells, slide_id=f"s{n}", unit=f"square{n}um") for n in (8, 16)]
    assert lines(cells, *squares) == [
        "note: c, s8, s16 are one section in 3 units (its usual unit, square8um, square16um)"
    ]
    (told,) = lines(cells, dataclasses.replace(cells, slide_id="again"))
    assert told.endswith("v.tif and 1 more are inputs of 2 slides (c, again); is one of them a duplicate?")


def test_times_and_hours_are_for_people() -> None:
    assert [plan._time(s) for s in (3.2, 850, 9000)] == ["4 s", "14 min", "2.5 h"]
    assert [plan._hours(s) for s in (1.0, 12, 900, 7300, 360_000)] == ["<0.001", "0.0033", "0.25", "2.03", "100.0"]
