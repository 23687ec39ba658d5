"""Corpora of every kind hold the same documents; what cannot be used costs itself a reason."""

import gzip
import json
import shutil
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from skips import skip

from polyray.errors import DataError
from polyray.probes import text
from polyray.probes.text import Corpus, open_corpus

DOCS = [("one", "a first text"), ("two", "a second\nof two lines, with é and 漢"), ("one", "x")]
WANT = [t for _, t in DOCS]


def gz(path: Path) -> Path:
    with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    return Path(f"{path}.gz")


def json_lines(path: Path, docs: list[tuple[str, str]] = DOCS) -> Path:
    path.write_text("\n".join(json.dumps({"label": label, "text": t}) for label, t in docs) + "\n")
    return path


def parquet(path: Path) -> Path:
    rows = pa.table({"label": [label for label, _ in DOCS], "text": WANT})
    pq.write_table(rows, path, row_group_size=2)
    return path


def folder(root: Path, packed: bool = False) -> Path:
    for i, (label, t) in enumerate(DOCS):
        place = root / label
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.txt").write_text(t, encoding="utf-8")
        if packed:
            gz(place / f"{i}.txt")
            (place / f"{i}.txt").unlink()
    return root


def texts(corpus: Corpus, which: range | None = None) -> list[str | None]:
    return [d.text for d in corpus.documents(range(len(corpus)) if which is None else which)]


def test_every_kind_holds_the_same(tmp_path: Path) -> None:
    lines, table = json_lines(tmp_path / "a.jsonl"), parquet(tmp_path / "a.parquet")
    for path in (lines, gz(lines), table, gz(table)):
        corpus = open_corpus(str(path))
        assert len(corpus) == 3
        assert texts(corpus) == WANT
        assert corpus.labels == ["one", "two", "one"]
        assert corpus.describe() == {"kind": corpus.kind, "name": path.name, "n": 3, "n_classes": 2}
        for start in range(4):
            for stop in range(start, 4):
                got = list(corpus.documents(range(start, stop)))
                assert [d.text for d in got] == WANT[start:stop]
                assert [d.index for d in got] == list(range(start, stop))
    for packed in (False, True):
        corpus = open_corpus(str(folder(tmp_path / f"texts{packed}", packed)))
        assert sorted(zip(corpus.labels, texts(corpus), strict=True)) == sorted(DOCS)
        assert texts(corpus, range(1, 2)) == [texts(corpus)[1]]


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    lines = json_lines(tmp_path / "a.jsonl")
    digest = open_corpus(str(lines)).digest()
    assert digest == open_corpus(str(gz(lines))).digest()
    changed = [("one", "a first text!"), *DOCS[1:]], [("three", WANT[0]), *DOCS[1:]], DOCS[:2]
    others = {open_corpus(str(json_lines(tmp_path / "b.jsonl", list(docs)))).digest() for docs in changed}
    assert len({digest, *others}) == 4


def test_documents_that_cannot_be_used_cost_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_BYTES", 40)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n\n   \n{"text": ""}\n{"text": " \\n"}\n{"text": 5}\n{"other": "x"}\n[1]\nnot json\n'
        b'{"text": "\xff\xfe"}\n{"text": "\\ud800"}\n{"text": "' + b"y" * 41 + b'"}\n{"text": "' + b"z" * 300 + b'"}\n'
        b'{"text": "last", "label": 7}'
    )
    corpus = open_corpus(str(path))
    found = list(corpus.documents(range(len(corpus))))
    assert [d.reason for d in found] == [
        None, "empty", "empty", "no text", "no text", "no text", "no valid JSON", "no valid UTF-8", "no valid UTF-8",
        text._TOO_LARGE.reason, text._TOO_LARGE.reason, None,
    ]  # fmt: skip
    assert (found[0].text, found[-1].text) == ("good", "last")
    assert corpus.labels == [None] * 11 + ["7"]
    assert texts(corpus, range(11, 12)) == ["last"]
    assert len(corpus.digest()) == 64


def test_files_of_a_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_BYTES", 40)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"x" * 41)
    (tmp_path / "d.txt.gz").write_bytes(b"no gzip")
    (tmp_path / "e.txt").write_text("good")
    (tmp_path / "f.md").write_text("no text file")
    (tmp_path / ".g.txt").write_text("hidden")
    (tmp_path / "h.txt").symlink_to("nowhere")
    corpus = open_corpus(str(tmp_path))
    assert corpus.names == ["a.txt", "b.txt", "c.txt", "d.txt.gz", "e.txt", "h.txt"]
    assert corpus.labels == [None] * 6
    reasons = [str(d.reason) for d in corpus.documents(range(6))]
    assert reasons[:2] == ["no valid UTF-8", "empty"]
    assert reasons[2].startswith("too large")
    assert reasons[3].startswith("cannot be read")
    assert reasons[4] == "None"
    assert reasons[5].startswith("cannot be read: No such file")


def test_parquet_of_other_types(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = {"doc": pa.array([b"good", b"\xff", None, b""]), "kind": pa.array([3, None, 3, 1])}
    pq.write_table(pa.table(rows), path)
    corpus = open_corpus(str(path), text_column="doc", label_column="kind")
    assert [d.reason for d in corpus.documents(range(4))] == [None, "no valid UTF-8", "no text", "empty"]
    assert corpus.labels == ["3", None, "3", "1"]
    strings = pa.array(["b", "a", "b"])
    for column in (strings.dictionary_encode(), *(strings.cast(t) for t in (pa.large_string(), pa.string_view()))):
        pq.write_table(pa.table({"text": column}), path)
        assert texts(open_corpus(str(path))) == ["b", "a", "b"]
    pq.write_table(pa.table({"text": pa.array([b"b", b"\xff"], pa.large_binary())}), path)
    assert texts(open_corpus(str(path))) == ["b", None]
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match="int64, not text"):
        open_corpus(str(path))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_labels_are_absent_by_default_or_named(kind: str, packed: bool, tmp_path: Path) -> None:
    def written(rows: dict[str, list[object]]) -> str:
        if kind == "json":
            path = tmp_path / "a.jsonl"
            path.write_text(
                "".join(json.dumps(dict(zip(rows, r, strict=True))) + "\n" for r in zip(*rows.values(), strict=True))
            )
        else:
            path = tmp_path / "a.parquet"
            pq.write_table(pa.table(rows), path)
        return str(gz(path) if packed else path)

    body = {"text": WANT}
    assert open_corpus(written(body)).labels == [None] * 3
    both = body | {"label": ["x", None, "y"], "genre": [1, 2, None]}
    assert open_corpus(written(both)).labels == ["x", None, "y"]
    named = open_corpus(written(both), label_column="genre")
    assert named.labels == ["1", "2", None]
    assert named.describe()["n_classes"] == 2
    assert texts(named) == WANT
    elsewhere = written({"label": ["x", "y", "z"], "body": WANT})
    assert texts(open_corpus(elsewhere, text_column="body")) == WANT
    with pytest.raises(DataError, match="'text'"):
        open_corpus(elsewhere)
    with pytest.raises(DataError, match="'genre'"):
        open_corpus(written(body), label_column="genre")


def test_labels_that_are_no_utf8_are_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    as_bytes = pa.array([b"good", b"b\xffd", None])
    as_text = pa.Array.from_buffers(pa.string(), 3, as_bytes.buffers(), null_count=1)
    for labels in (as_bytes, as_text, as_text.dictionary_encode()):
        pq.write_table(pa.table({"text": ["x", "y", "z"], "label": labels}), path)
        corpus = open_corpus(str(path))
        assert corpus.labels == ["good", "b\ufffdd", None]
        assert len(corpus.digest()) == 64
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x", "label": "\\ud800"}\n{"text": "y", "label": [1]}\n')
    assert open_corpus(str(tmp_path / "a.jsonl")).labels == ["?", None]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), path)
    with pytest.raises(DataError, match="2 columns 'text'"):
        open_corpus(str(path))


@pytest.mark.parametrize("kind", ["a.jsonl", "a.jsonl.gz", "folder", "folder.gz", "a.parquet"])
def test_an_enormous_document_is_never_held(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of 60 MB in Python; a Parquet file's page is beyond its reach, and held by Arrow."""
    monkeypatch.setattr(text, "MAX_BYTES", 2**20)
    size = 60 * 2**20
    path = tmp_path / kind.removesuffix(".gz")
    if kind.startswith("folder"):
        path.mkdir()
        for name, t in (("0.txt", "first"), ("1.txt", "y" * size), ("2.txt", "last")):
            (path / name).write_text(t)
            if kind.endswith(".gz"):
                gz(path / name)
                (path / name).unlink()
    elif kind.endswith("parquet"):
        pq.write_table(pa.table({"text": ["first", "y" * size, "last"]}), path)
    else:
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("first", "y" * size, "last")))
        path = gz(path) if kind.endswith(".gz") else path
    tracemalloc.start()
    corpus = open_corpus(str(path))
    found = list(corpus.documents(range(3)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [d.reason for d in found] == [None, text._TOO_LARGE.reason, None]
    assert [d.text for d in found] == ["first", None, "last"]
    assert peak < 10 * 2**20


def test_corpora_that_cannot_be_used_as_a_whole(tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "none.jsonl", "does not exist"),
        (tmp_path, "holds no .txt"),
        (json_lines(tmp_path / "a.csv"), "no known kind"),
    ):
        with pytest.raises(DataError, match=said):
            open_corpus(str(path))
    lines = json_lines(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"'txt'.*Did you mean 'text'"):
        open_corpus(str(lines), text_column="txt")
    with pytest.raises(DataError, match=r"'lable'.*Did you mean 'label'"):
        open_corpus(str(lines), label_column="lable")
    with pytest.raises(DataError, match=r"'txt'.*Did you mean 'text'"):
        open_corpus(str(parquet(tmp_path / "a.parquet")), text_column="txt")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no documents"):
        open_corpus(str(tmp_path / "blank.jsonl"))
    packed = gz(lines)
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        open_corpus(str(packed))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="cannot be read"):
        open_corpus(str(tmp_path / "b.parquet"))
    with pytest.raises(IndexError):
        list(open_corpus(str(lines)).documents(range(2, 4)))


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl")
    corpus = open_corpus(str(path))
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert [d.text for d in corpus.documents(range(1))] == WANT[:1]
    with pytest.raises(DataError, match="ended"):
        list(corpus.documents(range(3)))


@pytest.mark.shared
def test_the_brown_corpus() -> None:
    path = Path(__file__).parents[2] / "../shared/data/brown.jsonl.gz"
    if not path.is_file():
        skip("research-data")
    corpus = open_corpus(str(path))
    assert len(corpus) == 500
    assert len(set(corpus.labels)) == 15
    assert all(d.reason is None for d in corpus.documents(range(500)))
