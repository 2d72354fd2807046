from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from core.errors import UserError
from core.report.quality import page as quality
from core.report.quality.measures import measure, reasons, robust_z, scores
from core.report.quality.page import write_quality_page
from core.report.quality.pictures import OUTLINE, thumbnail
from core.volumes.cohort.reader import Cohort
from core.volumes.cohort.writer import CohortWriter

SIDE = 16
SCANS = 14
DARK, SMALL, CUT, SPECKLED = 3, 5, 8, 11  # rows of the scans that something is wrong with
PLANTED = {DARK, SMALL, CUT, SPECKLED}


def brain(row: int, generator: np.random.Generator) -> np.ndarray:
    places = np.stack(np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3, indexing="ij"))
    radius = (0.5 if row == SMALL else 0.8) + generator.normal(0, 0.005, places.shape[1:])  # a rough edge
    inside = np.linalg.norm(places, axis=0) < radius
    values = 10 + 3 * places[0] - 2 * places[2] + generator.normal(0, 0.2, inside.shape)
    if row == DARK:
        values = values * 0.6
    if row == SPECKLED:
        values[inside] = generator.permutation(values[inside])
    return np.where(inside, values, 0).astype(np.float32)


def write(folder: Path, scans: int = SCANS, channels: int = 1, maps: Sequence[str] = (), **facts) -> Cohort:
    generator = np.random.default_rng(0)
    writer = CohortWriter(
        folder, name="<i>odd</i> & name", channels=("T1w", "FLAIR")[:channels], shape=(SIDE,) * 3, spacing=8.0,
        affine=np.eye(4), preprocessing={"spacing": 8.0}, source="test", maps=maps, dtype="float32",
    )  # fmt: skip
    with writer:
        for row in range(scans):
            volume = brain(row, generator)
            classes = {name: (volume > 11).astype(np.int16) for name in maps}
            writer.add(
                np.stack([volume] * channels), subject=f"sub-{row // 2:02d}", session=f"ses-{row % 2}",
                age=np.nan if row == 0 else 20.0 + row, sex="F", site=("north", "south", "")[row % 3], maps=classes,
                coverage=0.8 if row == CUT else 1.0 - 1e-5 * row, intensity_median=100.0 + row % 4,
                intensity_p99=200.0 + row % 5, **facts,
            )  # fmt: skip
    return Cohort.open(folder)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Cohort:
    made = write(tmp_path_factory.mktemp("quality") / "cohort")
    lines = [("sub-99", "sub-99_T1w.nii.gz", "is <empty>: every voxel is 0")]
    pd.DataFrame(lines, columns=["subject", "file", "reason"]).to_csv(
        made.folder / "rejects.csv", index=False
    )
    return made


@pytest.fixture(scope="module")
def page(cohort, tmp_path_factory) -> str:
    return write_quality_page(cohort, tmp_path_factory.mktemp("page") / "quality.html").read_text()


def test_robust_z_by_hand():
    # median 3, absolute deviations 2 1 0 1 97, MAD 1
    np.testing.assert_allclose(robust_z([1, 2, 3, 4, 100]), 0.6745 * np.array([-2, -1, 0, 1, 97]))
    np.testing.assert_allclose(robust_z([1, 2, np.nan, 3, 4, 100])[[0, 5]], 0.6745 * np.array([-2, 97]))
    assert np.isnan(robust_z([1, np.nan, 2])[1])
    assert np.isnan(robust_z([np.nan, np.nan])).all()
    # most alike: the least difference that matters reaches exactly the limit
    np.testing.assert_allclose(robust_z([1, 1, 1, 1, 0.9, 0.99], least=0.1)[4:], [-3.5, -0.35], rtol=1e-6)
    np.testing.assert_array_equal(robust_z([1, 1, 1, 2]), [0, 0, 0, np.inf])


def test_each_planted_fault_is_found_and_by_what_is_wrong(cohort):
    measured = measure(cohort)
    why = reasons(measured, scores(measured))
    assert {row for row, found in enumerate(why) if found} >= PLANTED
    assert sum(map(bool, why)) <= SCANS / 2
    assert any(reason.short.startswith("histogram") for reason in why[DARK])
    assert any(reason.full.startswith("brain volume ") for reason in why[SMALL])
    assert len(why[CUT]) == 1
    assert re.fullmatch(r"brain inside the grid 0\.8 \(median 1, z -\d+\.\d\)", why[CUT][0].full)
    assert why[SPECKLED][0].short.startswith("likeness")


def test_measures_from_their_definitions(cohort):
    measured = measure(cohort)
    volumes = cohort.read(range(len(cohort)))[:, 0]
    np.testing.assert_allclose(
        measured.table["brain_ml"], [(volume != 0).sum() * 8**3 / 1000 for volume in volumes]
    )
    mostly = (volumes != 0).mean(axis=0) >= 0.5
    for row in (0, DARK, SPECKLED):
        others = np.delete(volumes, row, axis=0).mean(axis=0)
        expected = np.corrcoef(volumes[row][mostly], others[mostly])[0, 1]
        assert measured.table["likeness"].iloc[row] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(measured.densities.sum(axis=2), 1)
    # every other brain being nearly the same, a brain at 0.6 of the values is 0.4 of their mean away
    assert measured.table["histogram"].iloc[DARK] == pytest.approx(4, rel=0.1)
    everywhere = (volumes != 0).any(axis=0)
    assert everywhere[measured.box].sum() == everywhere.sum()
    x, y, z = np.nonzero(everywhere)
    assert [(part.start, part.stop) for part in measured.box] == [(a.min(), a.max() + 1) for a in (x, y, z)]


def test_few_scans_are_not_judged(tmp_path):
    small = write(tmp_path / "few", scans=6)
    measured = measure(small)
    assert reasons(measured, scores(measured)) == [[]] * 6
    text = write_quality_page(small, tmp_path / "q.html").read_text()
    assert "6 scans, too few to say which is unusual" in text
    assert 'class="card odd"' not in text
    assert "most unusual first" not in text


class _Page(HTMLParser):
    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found["href"] or ""] if tag == "a" else []
        self.sources += [found["src"] or ""] if "src" in found else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids += [found["id"] or ""] if "id" in found else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_offline_and_says_what_was_found(page):
    parsed = _Page()
    parsed.feed(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.links
    assert all(link[1:] in parsed.ids for link in parsed.links)
    assert len(parsed.sources) == SCANS
    assert all(source.startswith("data:image/jpeg;base64,") for source in parsed.sources)
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="https?:|url\(http|@import', page)
    framed = page.count('class="card odd"')
    assert 0 < framed < 14
    assert f"{framed} of 14 scans stand out in at least one of 6 measures" in parsed.text
    assert "1 was left out at ingest" in parsed.text
    assert "is <empty>: every voxel is 0" in parsed.text
    assert "<i>odd</i> & name" in parsed.text
    assert "sub-01 ses-1" in parsed.text
    assert "nan" not in re.sub(r"\s+", " ", parsed.text).lower()


def test_the_most_unusual_come_first_and_can_be_put_in_order_of_subject(page):
    cards = re.findall(
        r'<figure class="card( odd)?" id="scan-(\d+)" style="--worst:(\d+);--name:(\d+)"', page
    )
    assert [int(row) for _, row, _, _ in cards] == list(range(SCANS))
    assert [int(name) for *_, name in cards] == list(range(SCANS))
    worst = {int(place): int(row) for _, row, place, _ in cards}
    assert sorted(worst) == list(range(SCANS))
    assert {worst[place] for place in range(4)} == PLANTED
    framed = {int(row) for odd, row, _, _ in cards if odd}
    assert framed == {worst[place] for place in range(len(framed))}


def test_the_same_cohort_gives_the_same_bytes(cohort, page, tmp_path):
    assert write_quality_page(cohort, tmp_path / "again.html").read_text() == page


def picture(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"), dtype=int)


def test_slices_have_left_on_the_left_and_up_above(cohort):
    volume = np.zeros((1, 20, 20, 20), np.float32)
    volume[0, 2:18, 2:18, 2:18] = 1
    volume[0, 2:6] = 5  # the subject's left
    volume[0, :, :, 14:18] = 9  # the top
    whole = (slice(None),) * 3
    grey = picture(thumbnail(volume, None, whole, ((0.0, 9.0),)))[..., 0]
    height, width = grey.shape
    coronal = grey[:, width // 3 : 2 * width // 3]
    assert coronal[: height // 4].mean() > coronal[height // 3 :].mean() + 60
    lower = coronal[height // 2 : -height // 6]
    middle = lower.shape[1] // 2
    assert lower[:, 10:middle].mean() > lower[:, middle:-10].mean() + 30


def test_a_dark_scan_looks_darker_than_the_others_and_none_is_as_dark_as_the_background(cohort):
    measured = measure(cohort)
    pictures = [
        picture(thumbnail(cohort.read([row])[0], None, measured.box, measured.shown)) for row in (0, DARK)
    ]
    normal, dark = (each[each > 12].mean() for each in pictures)
    assert dark < normal - 30
    assert pictures[0][0, 0].max() < 12


def test_labels_are_outlined(tmp_path):
    cohort = write(tmp_path / "labelled", channels=2, maps=["label"])
    measured = measure(cohort)
    volume, label = cohort.read([0])[0], cohort.read_map("label", [0])[0]
    plain, outlined = (
        picture(thumbnail(volume, each, measured.box, measured.shown)) for each in (None, label)
    )
    painted = np.abs(outlined - OUTLINE.astype(int)).max(axis=2) < 60
    assert 100 < painted.sum() < 0.2 * painted.size
    assert not (np.abs(plain - OUTLINE.astype(int)).max(axis=2) < 60).any()
    assert plain.shape[0] > plain.shape[1] / 3  # two rows of three slices
    text = write_quality_page(cohort, tmp_path / "q.html").read_text()
    assert "a row for each of T1w, FLAIR" in text
    assert "label map, which is outlined" in text
    assert "Nothing was left out" in text


def test_an_empty_channel_or_scan_does_not_stop_the_page(tmp_path):
    writer = CohortWriter(
        tmp_path / "c", name="c", channels=("a",), shape=(6, 6, 6), spacing=8.0, affine=np.eye(4), source="t"
    )
    with writer:
        for row in range(9):
            volume = np.zeros((1, 6, 6, 6), np.float32)
            volume[0, 1:5, 1:5, 1:5] = 0 if row == 4 else 1
            writer.add(volume, subject=f"sub-{row}", age=30.0)
    text = write_quality_page(Cohort.open(tmp_path / "c"), tmp_path / "q.html").read_text()
    assert re.search(r'class="card odd" id="scan-4"', text)


def test_a_page_that_cannot_be_written_says_where(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "render", lambda _: "a page")
    with pytest.raises(UserError, match=r"cannot write the quality page to '.*gone"):
        write_quality_page(cohort, tmp_path / "gone" / "q.html")
