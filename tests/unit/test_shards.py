"""How inputs are cut: each row in one shard, at places that the model's batches fit."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import shards as shards_module
from serving.errors import BatchError
from serving.shards import (
    TextScan,
    call_rows,
    cut_rows,
    cut_text,
    header_of,
    mark_rows_for,
    read_shard,
    rows_of_a_shard,
    split_records,
)


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 40))
def test_rows_are_cut_once_each_and_in_order(file_rows, shard_rows):
    shards = cut_rows(file_rows, shard_rows)
    seen = [
        (piece.file, row)
        for shard in shards
        for piece in shard.pieces
        for row in range(piece.start, piece.stop)
    ]
    assert seen == [(file, row) for file, rows in enumerate(file_rows) for row in range(rows)]
    assert all(shard.rows == shard_rows for shard in shards[:-1])
    assert [shard.first_row for shard in shards] == [n * shard_rows for n in range(len(shards))]
    assert [read_shard(n, shard.as_record()) for n, shard in enumerate(shards)] == shards


def scanned(texts, block, mark_rows, is_quoted=False, unit_rows=None):
    scans, first, carried = [], 0, 0
    for file, text in enumerate(texts):
        scan = TextScan(file, 0, first, mark_rows, is_quoted, unit_rows, carried)
        for start in range(0, len(text), block):
            scan.feed(text[start : start + block])
        scan.close()
        first += scan.rows
        carried = scan.left_bytes
        scans.append(scan)
    return scans


Lines = st.lists(st.sampled_from([b"a", b"", b"\r", b"bb\r", b" ", b"long line"]), max_size=30)


@settings(max_examples=50, deadline=None)
@given(st.lists(Lines, min_size=1, max_size=3), st.integers(1, 7), st.integers(1, 5), st.booleans())
def test_lines_are_cut_once_each_whatever_the_blocks(files, block, mark_rows, has_last_end):
    texts = [b"\n".join(lines) + (b"\n" if has_last_end else b"") for lines in files]
    scans = scanned(texts, block, mark_rows)
    stretches = [piece for scan in scans for piece in scan.stretches()]
    cut = cut_text(stretches, mark_rows, 2 * mark_rows)
    seen = []
    for shard in cut:
        in_shard = []
        for piece in shard.pieces:
            part = texts[piece.file][piece.start : piece.stop]
            records = split_records(part, False)
            assert len(records.starts) == piece.rows
            spans = (records.starts, records.ends)
            in_shard += [part[s:e].strip(b"\r\n") for s, e in zip(*spans, strict=True)]
        assert len(in_shard) == shard.rows
        assert shard.first_row == len(seen)
        seen += in_shard
    wanted = [line.strip(b"\r\n") for text in texts for line in text.split(b"\n")]
    assert seen == [line for line in wanted if line]
    assert all(shard.rows == 2 * mark_rows for shard in cut[:-1])


Values = st.text(st.sampled_from('a",\n\r x'), max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(Values, Values), min_size=1, max_size=12), st.integers(1, 9))
def test_a_line_end_in_quotes_ends_no_record(rows, block):
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows(rows)
    text = out.getvalue().encode()
    (scan,) = scanned([text], block, 1, is_quoted=True)
    assert scan.rows == len(rows)
    parts = [text[piece.start : piece.stop].decode() for piece in scan.stretches()]
    read = [tuple(row) for part in parts for row in csv.reader(io.StringIO(part, newline=""))]
    assert read == list(rows)


def test_shards_begin_where_batches_do():
    assert mark_rows_for(8) == 4096
    assert mark_rows_for(65_536) == 65_536
    assert mark_rows_for(3_000) == 6_000


@pytest.mark.parametrize(
    ("s_a_row", "row_bytes", "batch", "rows", "predictors", "wanted"),
    [
        (1e-5, 40, 4096, 10**9, 4, 200_704),  # two seconds
        (1e-7, 1, 65_536, 10**9, 4, 2**22),  # the most rows
        (1e-6, 2**20, 8, 10**9, 4, 64),  # the most bytes
        (1e-6, 40, 65_536, 4 * 10**6, 2, 1_048_576),  # both predictors have work
        (1e-6, 40, 4096, 10_000, 2, 253_952),  # but no crumbs
        (10.0, 40, 8, 100, 2, 8),  # one call at least
    ],
)
def test_a_shard_is_about_two_seconds(s_a_row, row_bytes, batch, rows, predictors, wanted):
    assert rows_of_a_shard(s_a_row, row_bytes, batch, rows, predictors) == wanted


def test_a_row_without_end_is_refused_while_it_is_read(monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_ROW_BYTES", 100)
    scan = TextScan(0, 0, 0, 10, True)
    scan.feed(b"a,b\n" * 5)
    scan.feed(b'x,"' + b"y" * 60)
    with pytest.raises(BatchError, match="row 6 .* quotes are closed"):
        scan.feed(b"z" * 60)
    with pytest.raises(BatchError, match="row 2 "):
        TextScan(0, 0, 0, 10, False).feed(b"a\n" + b"b" * 200 + b"\nc\n")


def test_bytes_bound_a_shard_too(monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_SHARD_BYTES", 30)
    (scan,) = scanned([b"123456789\n" * 20], 7, 2)
    cut = cut_text(scan.stretches(), 2, 1000)
    assert [shard.rows for shard in cut] == [4] * 5


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), max_size=30), min_size=1, max_size=3),
    st.integers(1, 50),
    st.sampled_from([1, 2, 3]),
)
def test_large_rows_are_cut_at_more_places(files, block, unit_rows):
    texts = [b"".join(b"x" * size + b"\n" for size in sizes) for sizes in files]
    lengths = [size + 1 for sizes in files for size in sizes]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards_module, "MARK_BYTES", 10)
        patched.setattr(shards_module, "MAX_SHARD_BYTES", 30)
        scans = scanned(texts, block, 6 * unit_rows, unit_rows=unit_rows)
        cut = cut_text([p for scan in scans for p in scan.stretches()], unit_rows, 10**6)
    windows = [sum(lengths[n : n + unit_rows]) for n in range(0, len(lengths), unit_rows)]
    assert max(scan.widest for scan in scans) == max(windows, default=0)
    assert max(scan.longest for scan in scans) == max(lengths, default=0)
    assert sum(shard.rows for shard in cut) == len(lengths)
    assert all(shard.first_row % unit_rows == 0 for shard in cut)
    # Once a shard has its bytes, the next place is some bytes and the rows of a call away; where a
    # file ends between two places, it goes on to the first one of the next file.
    slack = (10 + 2 * max(windows, default=0)) * len(files)
    for shard in cut:
        assert sum(p.stop - p.start for p in shard.pieces) <= 30 + slack


def test_rows_of_a_call_are_bounded_by_their_bytes(monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_CALL_BYTES", 1000)
    assert [call_rows((1, 8, 64), size) for size in (1, 15, 16, 125, 126, 5000)] == [
        *(64, 64, 8, 8, 1, 1)
    ]


def test_the_line_of_names_is_the_first_record():
    text = b'\xef\xbb\xbf\n"a\nb",c\n1,2\n'
    header, begin = header_of(io.BytesIO(text))
    assert header == b'"a\nb",c\n'
    assert text[begin:] == b"1,2\n"
    with pytest.raises(BatchError, match="is empty"):
        header_of(io.BytesIO(b"\r\n\n"))
