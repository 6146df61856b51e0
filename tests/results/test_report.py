"""Reports: what a page holds, how items are shown, and that nothing in the data can break it."""

import base64
import html.parser
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from result_examples import QUERIES, diagnostics, ends, full, self_influence

import lightning_influence
from lightning_influence.edits.edit_report import EditReport, LossChange
from lightning_influence.results.images import encode_png, to_image
from lightning_influence.results.ranking import Labels
from lightning_influence.results.report import render_page
from lightning_influence.results.report.certificate import describe_certificate
from lightning_influence.results.report.charts import histogram, spectrum_charts
from lightning_influence.results.report.items import show, split_item
from lightning_influence.support.errors import InfluenceWarning


class _Page(html.parser.HTMLParser):
    """Reads a page as a browser does: scripts end at their end tags, and every tag is counted."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.data, self._inside = [], [], "", None

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in {"src", "href"}]
        self._inside = dict(attrs).get("id") if tag == "script" else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, text):
        if self._inside == "data":
            self.data += text


TAGS = ["html", "head", "meta", "meta", "meta", "title", "style", "body", "header", "main"]
TAGS += ["noscript", "dialog", "script", "script"]


def read(text):
    page = _Page()
    page.feed(text)
    page.close()
    assert page.tags == TAGS
    assert not page.addresses, "the page asks for something elsewhere"
    return json.loads(page.data)


def sections(path):
    data = read(Path(path).read_text(encoding="utf-8"))
    return data, {section["id"]: section for section in data["sections"]}


def items(count=100):
    return [(torch.full((1, 6, 6), index / count), index % 10) for index in range(count)]


def test_attributions_show_both_ends_in_order(tmp_path):
    result = full()
    path = result.report(tmp_path / "deep" / "report.html", items(), items(), k=2, title="<b>Mine</b>")
    data, found = sections(path)
    assert data["title"] == "<b>Mine</b>"
    assert "<title>&lt;b&gt;Mine&lt;/b&gt;</title>" in path.read_text()
    rows = found["queries"]["rows"]
    assert [row["query"] for row in rows] == [f"query-{index}" for index in QUERIES.tolist()]
    assert [row["residual"] for row in rows] == pytest.approx([0.1, 0.2, 0.3])
    for end, ranking in (("top", result.top(2)), ("bottom", result.bottom(2))):
        for row, indices, scores in zip(rows, ranking.indices.tolist(), ranking.scores.tolist(), strict=True):
            assert [key for key, _ in row[end]] == [f"train-{index}" for index in indices]
            assert [score for _, score in row[end]] == pytest.approx(scores, rel=1e-5)
    example = data["examples"]["train-50"]
    assert example["label"] == "0"
    assert example["index"] == 50
    assert example["parts"][0]["image"].startswith("data:image/png;base64,")
    shown = {key for row in rows for end in ("top", "bottom") for key, _ in row[end]}
    assert set(data["examples"]) == shown | {row["query"] for row in rows}, "looked up what is not shown"


def test_without_datasets_and_with_ends_only_numbers_are_shown(tmp_path):
    data, found = sections(ends().report(tmp_path / "report.html", k=3))
    assert "parts" in data["examples"]["train-50"]
    assert data["examples"]["train-50"]["parts"] == []
    assert len(found["queries"]["rows"][0]["top"]) == 3
    assert "either end" in found["charts"]["charts"][0]["title"]
    with pytest.raises(ValueError, match="k=4"):
        ends().report(tmp_path / "report.html", k=4)


def test_predictions_labels_and_loaders(tmp_path):
    result = full(query_dataloaders=torch.tensor([0, 1, 1]))
    several = [items(), [("other", i) for i in range(10)]]
    predictions = [{5: torch.tensor([0.1, 0.9])}, {2: 3, 9: "nine"}]
    labels = Labels(train={50: "fifty"}, query=[{}, {9: "nine"}])
    path = result.report(
        tmp_path / "r.html",
        items(),
        several,
        k=1,
        predictions=predictions,
        labels=labels,
        class_names={1: "one", 3: "three"},
    )
    examples = sections(path)[0]["examples"]
    first, second, third = (examples[key] for key in ("query-0-5", "query-1-2", "query-1-9"))
    assert (first["label"], first["predicted"], first["confidence"], first["agrees"]) == (
        "5",
        "one",
        0.9,
        False,
    )
    assert (second["label"], second["predicted"], second["agrees"]) == ("2", "three", False)
    assert (third["label"], third["predicted"], third["agrees"]) == ("nine", "nine", True)
    assert third["parts"] == [{"text": "other"}]
    trains = {key: example.get("label") for key, example in examples.items() if key.startswith("train")}
    assert trains.get("train-50", "fifty") == "fifty"
    with pytest.raises(ValueError, match="nothing for query dataloader 1"):
        result.report(tmp_path / "r.html", items(), [items()], k=1)


def test_measured_predictions_are_not_called_right_or_wrong(tmp_path):
    data = [(torch.zeros(3), torch.tensor([0.5])) for _ in range(100)]
    path = full().report(tmp_path / "r.html", data, data, k=1, predictions=torch.linspace(0, 1, 100))
    example = sections(path)[0]["examples"]["query-5"]
    assert example["label"] == "0.5"
    assert example["predicted"] == "0.05051"
    assert "agrees" not in example


def test_a_renderer_of_the_users_takes_the_place_of_ours(tmp_path):
    path = self_influence().report(
        tmp_path / "r.html",
        items(),
        k=3,
        render=lambda item, index: {"mean": float(item[0].mean()), "note": f"<i>{index}"},
    )
    data, found = sections(path)
    assert [row["example"] for row in found["self-influence"]["rows"]] == ["train-31", "train-11", "train-99"]
    assert data["examples"]["train-31"]["parts"] == [{"row": [["mean", "0.31"], ["note", "<i>31"]]}]
    assert data["examples"]["train-31"]["label"] == "1"


def test_too_many_bytes_are_left_out_with_a_warning(tmp_path):
    texts = [("x" * 1500, 0)] * 100
    with pytest.warns(InfluenceWarning, match="Of 6 of 8 examples the report shows numbers"):
        path = self_influence().report(tmp_path / "r.html", texts, megabytes=3100 / 2**20)
    data, _ = sections(path)
    assert "6 of 8" in data["notes"][0]
    assert sum("parts" in example for example in data["examples"].values()) == 2


def test_bad_input_is_named(tmp_path):
    result, path = self_influence(), tmp_path / "r.html"
    with pytest.raises(ValueError, match=r"dataset of 3 entries has no entry 31 \(IndexError"):
        result.report(path, items(3))
    with pytest.raises(TypeError, match=r"unknown option 'rendr'\. Did you mean 'render'"):
        result.report(path, rendr=None)
    with pytest.raises(TypeError, match="dataset of type generator, which has no items by index"):
        result.report(path, (i for i in range(3)))
    with pytest.raises(TypeError, match="spectrum of type int"):
        result.report(path, spectrum=3)
    with pytest.raises(ValueError, match="megabytes"):
        result.report(path, megabytes=0)
    assert not path.exists(), "a report that failed left a file"


def test_a_failed_report_leaves_the_old_one(tmp_path):
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="no entry"):
        self_influence().report(path, items(3))
    assert path.read_text() == "old"
    self_influence().report(path, items())
    assert path.read_text() != "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]


def test_without_jinja_the_extra_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-influence\[report\]'"):
        full().report(tmp_path / "r.html", object())


def test_an_edit_shows_its_losses_and_layers(tmp_path):
    report = EditReport(
        kind="forget",
        method="gif",
        rule="greedy",
        ratio=0.5,
        layers={"net": (3, 12)},
        step=[1.0],
        scale=0.1,
        damping=1e-3,
        residual=0.01,
        solver_steps=7,
        norm=0.2,
        edited=LossChange(1, 0.1, 2.0, 1.5),
        kept=LossChange(9, 0.1, 0.11),
        notes=["a note"],
    )
    data, found = sections(report(tmp_path / "r.html", items(), examples=torch.tensor([7])))
    assert data["lead"] == "1 examples forgotten by changing 3 of the 12 parameters that could change."
    losses, layers = found["losses"]["tables"]
    assert losses["rows"][0] == ["forgotten", "1", "0.1", "2", "+1.9", "+1.5"]
    assert layers["rows"] == [["net", "3", "12", "25.0%"]]
    assert found["examples"]["rows"] == [{"example": "train-7", "values": [], "reasons": []}]
    words = [sentence["text"] for sentence in found["certificate"]["sentences"]]
    assert "from 0.1 to 2" in words[0]
    assert words[-1] == "a note"
    assert found["charts"]["charts"][0]["bars"] == [["net", 0.25]]


TEXTS = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=()), st.sampled_from("<>&\"'/\\\u2028\u2029\ufeff\0\x1b")
    ),
    max_size=30,
)
NASTY = st.one_of(
    TEXTS,
    st.sampled_from([
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "]]>",
        "</SCRIPT >",
        "{{ 7*7 }}{% raw %}",
        "\ud800 lone",
        "<img src=x onerror=alert(1)>",
        "&lt;/script&gt;",
        "\u2028\u2029",
        "javascript:alert(1)",
    ]),
)


@settings(max_examples=200, deadline=None)
@given(NASTY, NASTY, st.recursive(NASTY, lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_no_text_can_leave_the_data(title, key, value):
    data = {"title": title, key: value, "numbers": [float("nan"), float("inf"), 1.5]}
    expected = {"title": title, key: value, "numbers": [None, None, 1.5]}
    text = render_page(title, data)
    assert read(text) == expected
    text.encode("utf-8")
    block = text.split('id="data">', 1)[1].split("</script>", 1)[0]
    assert block.isascii()
    assert not set("<>&") & set(block)


@settings(max_examples=60, deadline=None)
@given(NASTY, NASTY, NASTY)
def test_no_dataset_can_break_a_page(text, label, name):
    result = self_influence(diagnostics=diagnostics(warnings=[name], checkpoint=label, extra={name: text}))
    written = {}

    def keep(path, material, heading, lead, parts):
        written["data"] = {"examples": material.examples, "sections": list(filter(None, parts))}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_influence.results.self_influence.write_page", keep)
        result.report("unused", [{"words": text, "label": label, name: torch.ones(3)}] * 100)
    data = read(render_page("title", written["data"]))
    assert len(data["examples"]) == 8


PICTURE = torch.rand(3, 20, 30)


@pytest.mark.parametrize(
    ("item", "content", "target"),
    [
        ((1, 2), (1, 2), None),
        (("text", 1), "text", 1),
        (("text", "spam"), "text", "spam"),
        ((np.float32(0.5), torch.tensor(2)), np.float32(0.5), 2),
        ({"text": "a", "label": 3}, {"text": "a"}, 3),
        ({"text": "a", "labels": [1, 2]}, {"text": "a", "labels": [1, 2]}, None),
        ("alone", "alone", None),
        (("x", 1, "more"), ("x", "more"), 1),
    ],
)
def test_inputs_are_told_from_targets(item, content, target):
    assert split_item(item) == (content, target)


def test_parts_are_chosen_by_type_and_shape():
    assert show(None) == []
    assert show("hello") == [{"text": "hello"}]
    assert show(["a", "list", "of", "words"]) == [{"text": "a list of words"}]
    assert show(0.123456) == [{"row": [["", "0.1235"]]}]
    assert show(torch.tensor([5, 7, 9])) == [{"text": "5 7 9"}]
    assert show([1.5, 2.5]) == [{"row": [["0", "1.5"], ["1", "2.5"]]}]
    assert show({"a": 1, "b": 2.0, "c": "red"}) == [{"row": [["a", "1"], ["b", "2"], ["c", "red"]]}]
    long = "a sentence of more than forty characters, all told"
    assert show({"n": 1, "text": long}) == [{"row": [["n", "1"]]}, {"name": "text", "text": long}]
    assert show({"n": 1, "text": ["two", "words"]}) == [
        {"row": [["n", "1"]]},
        {"name": "text", "text": "two words"},
    ]
    assert "image" in show(PICTURE)[0]
    assert "image" in show(torch.rand(28, 28, dtype=torch.bfloat16))[0]
    assert "image" in show(Image.new("P", (9, 9)))[0]
    assert show(torch.rand(2, 3, 4, 5))[0]["text"].startswith("array of shape (2, 3, 4, 5), mean 0.")
    assert show(np.array(["a", "b"])) == [{"text": "array of shape (2,), <U1"}]
    assert [set(part) for part in show((PICTURE, "caption"))] == [{"image"}, {"text"}]


@pytest.mark.parametrize("shape", [(6, 300), (300, 6), (2, 5), (5, 2), (22, 88)])
def test_narrow_matrices_of_floats_are_signals_whichever_way_they_lie(shape):
    values = torch.arange(float(shape[0] * shape[1])).reshape(shape)
    (part,) = show(values)
    channels = values if shape[0] < shape[1] else values.T
    assert part["length"] == channels.shape[1]
    assert len(part["signal"]) + part.get("more", 0) == len(channels)
    assert part["signal"][1][0] == float(channels[1, 0])


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (40, 200), (16, 48)])
def test_wider_matrices_are_pictures(shape):
    assert "image" in show(torch.rand(shape))[0]
    assert "image" in show((255 * torch.rand(6, 300)).to(torch.uint8))[0]


def test_signals_keep_their_spikes_and_gaps():
    signal = torch.zeros(2, 5000)
    signal[0, 1234], signal[1, 4321] = 7.0, -3.0
    (part,) = show(signal)
    assert part["length"] == 5000
    assert [len(channel) for channel in part["signal"]] == [240, 240]
    assert max(part["signal"][0]) == 7.0
    assert min(part["signal"][1]) == -3.0
    short = torch.linspace(0, 1, 40)
    short[3] = float("nan")
    assert show(short)[0]["signal"][0][3] is None
    assert show(torch.rand(3, 9))[0]["length"] == 9


def test_long_texts_and_rows_are_cut_and_counted():
    (part,) = show("x" * 5000)
    assert part["text"].endswith("and 3,000 more characters")
    (part,) = show({str(number): number for number in range(50)})
    assert len(part["row"]) == 33
    assert part["row"][-1] == ["…", "and 18 more"]


@pytest.mark.parametrize("shape", [(5, 7), (7, 5, 3), (6, 6, 4)])
def test_pictures_are_read_back_as_they_were(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels.flat[0], pixels.flat[1] = 0, 255
    opened = Image.open(io.BytesIO(encode_png(to_image(pixels))))
    opened.load()
    assert np.array_equal(np.asarray(opened), pixels)


def test_pictures_are_made_smaller_by_means_and_scaled_into_range():
    image = np.zeros((200, 100))
    image[:100] = 1.0
    opened = np.asarray(Image.open(io.BytesIO(encode_png(image, longest=10))))
    assert opened.shape == (10, 5)
    assert opened[:5].min() == 255
    assert opened[5:].max() == 0
    wide = np.asarray(Image.open(io.BytesIO(encode_png(np.array([[-2.0, 0.0], [2.0, np.nan]])))))
    assert wide.tolist() == [[0, 128], [255, 128]]
    assert base64.b64encode(encode_png(image)).isascii()


@pytest.mark.parametrize(
    ("residuals", "tone"), [([0.01, 0.02], "good"), ([0.01, 0.3], "fair"), ([0.01, 0.9], "bad")]
)
def test_the_certificate_judges_residuals(residuals, tone):
    found = describe_certificate(diagnostics(residuals=torch.tensor(residuals)))
    (judged,) = [entry for entry in found["sentences"] if "equations were solved" in entry["text"]]
    assert judged["tone"] == tone
    assert f"{max(residuals):.1%} for the worst" in judged["text"]


def test_the_certificate_names_what_is_known():
    facts = diagnostics(extra={"models": 3, "agreement": 0.5}, method="my_own", residuals=None)
    found = describe_certificate(facts)
    text = " ".join(entry["text"] for entry in found["sentences"])
    for words in ("'my_own'", "75.0% of the parameters", "0.001 to 0.002", "not measured", "over 3 models"):
        assert words in text
    assert {"text": "layer [norm] left out", "tone": "fair"} in found["sentences"]
    assert [tuple(fact) for fact in found["facts"]] == facts.facts()


def test_charts_count_every_number_or_say_so(monkeypatch):
    chart = histogram("t", "a", torch.arange(100.0))
    assert sum(chart["counts"]) == 100
    assert histogram("t", "a", None) is None
    monkeypatch.setattr("lightning_influence.results.report.charts._MOST_VALUES", 30)
    chart = histogram("t", "a", torch.arange(100.0))
    assert sum(chart["counts"]) == 25
    assert "every 4th of 100" in chart["caption"]
    assert spectrum_charts(None) == []


@pytest.mark.slow
def test_a_wheel_holds_the_page(tmp_path):
    root = Path(lightning_influence.__file__).parent.parent
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((root / name).read_bytes())
    (copy / "lightning_influence").symlink_to(root / "lightning_influence")
    subprocess.run([*command, "-w", str(tmp_path), str(copy)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for kind in ("html", "css", "js"):
        assert f"lightning_influence/results/report/page.{kind}" in names
