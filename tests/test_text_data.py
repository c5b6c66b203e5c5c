"""Batches of text: pure in (seed, i), the same for any hosts; every held-out token scored once."""

import itertools

import numpy as np
import pytest

from moe.data.batches import pack
from moe.data.tokens.tokenizer import Bytes, TrainedBPE

FIELDS = ("token_BT", "target_BT", "segment_BT", "position_BT", "scored_BT", "index_B")


def fields(batch):
    return {name: np.asarray(getattr(batch, name)) for name in FIELDS}


def assert_same(a, b):
    for name, value in fields(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


def test_info(text_data):
    data = text_data().prepare()
    info = data.info
    # 10 i letters of document i, 13 documents with one and 13 with two e-acutes of two bytes
    assert info.bytes == 10 * sum(range(40)) + 2 * (13 + 2 * 13)
    assert (info.name, info.documents) == ("texts", 40)
    assert info.train_bytes + info.validation_bytes == info.bytes
    assert (info.train_tokens, info.validation_tokens) == (info.train_bytes, info.validation_bytes)
    assert info.bytes_per_token == 1.0
    assert len(data.train.token_N) == info.train_tokens + info.train_documents


def test_the_stream_is_a_document_token_and_the_text_of_each_document(text_data):
    data = text_data().prepare()
    stream = data.train
    assert stream.token_N.dtype == np.uint16 and isinstance(stream.token_N, np.memmap)
    texts = list(data.train_split.texts())
    assert len(texts) == stream.num_documents
    for text, start, end in zip(texts, stream.start_M[:-1], stream.start_M[1:], strict=True):
        assert stream.token_N[start] == data.tokenizer.document_id
        assert bytes(stream.token_N[start + 1 : end].tolist()).decode() == text


def test_shuffled_documents_have_their_own_tokens_in_another_order(text_data):
    plain, mixed = text_data().prepare(), text_data(shuffle_tokens=True).prepare()
    assert mixed.fingerprint() != plain.fingerprint()
    for name in ("train", "validation"):
        ours, theirs = getattr(mixed, name), getattr(plain, name)
        np.testing.assert_array_equal(ours.start_M, theirs.start_M)
        np.testing.assert_array_equal(ours.num_bytes_M, theirs.num_bytes_M)
        assert (ours.token_N != theirs.token_N).mean() > 0.5
        for start, end in itertools.pairwise(ours.start_M):
            assert ours.token_N[start] == theirs.token_N[start] == plain.tokenizer.document_id
            assert sorted(ours.token_N[start:end]) == sorted(theirs.token_N[start:end])


def test_a_training_batch_is_pure_and_its_target_is_the_next_token(text_data):
    data = text_data().prepare()
    batches = data.train_batches(4, 32, seed=1)
    later = batches.batch(7)
    batches.batch(0)
    assert_same(batches.batch(7), later)
    assert_same(text_data().prepare().train_batches(4, 32, seed=1).batch(7), later)
    assert (data.train_batches(4, 32, seed=2).batch(7).token_BT != later.token_BT).any()
    np.testing.assert_array_equal(later.token_BT[:, 1:], later.target_BT[:, :-1])
    assert later.scored_BT.all() and later.token_BT.shape == (4, 32)
    assert all(fields(later)[name].dtype == np.int32 for name in FIELDS if name != "scored_BT")


def test_two_hosts_load_the_rows_of_one(text_data):
    data = text_data().prepare()
    train, validation = data.train_batches(4, 32, seed=0), data.validation_batches(4, 32)
    for batches, first in ((train, 0), (validation, 4)):
        one = fields(batches.batch(1))
        two = [fields(batches.batch(1, rows)) for rows in (slice(0, 2), slice(2, 4))]
        for name in FIELDS:
            joined = np.concatenate([host[name] for host in two])
            np.testing.assert_array_equal(joined, one[name], err_msg=name)
        assert one["index_B"].tolist() == [first, first + 1, first + 2, first + 3]


def test_an_epoch_visits_every_target_once_and_the_next_one_in_another_order(text_data):
    data = text_data().prepare()
    batches = data.train_batches(1, 16, seed=0)
    n, stream = batches.windows_per_epoch, data.train.token_N
    joined = np.concatenate([stream, stream[:16]]).astype(np.int32)
    where = {joined[s : s + 17].tobytes(): s for s in range(len(stream))}
    epochs = []
    for epoch in range(2):
        windows = [batches.batch(epoch * n + i) for i in range(n)]
        rows = [np.append(w.token_BT[0], w.target_BT[0, -1]).tobytes() for w in windows]
        epochs.append([where[row] for row in rows])
    for starts in epochs:
        np.testing.assert_array_equal(np.diff(sorted(starts)), 16)
        assert starts != sorted(starts)
    assert min(epochs[0]) != min(epochs[1])  # the offset
    assert np.argsort(epochs[0]).tolist() != np.argsort(epochs[1]).tolist()  # the order


def test_segments_and_positions_restart_at_each_document(text_data):
    data = text_data().prepare()
    batches = data.train_batches(8, 64, seed=0)
    seen = 0
    for batch in (batches.batch(i) for i in range(4)):
        for token_T, segment_T, position_T in zip(
            batch.token_BT, batch.segment_BT, batch.position_BT, strict=True
        ):
            segment, position = 1, 0
            for t, token in enumerate(token_T):  # the slow way
                if token == data.tokenizer.document_id and t > 0:
                    segment, position, seen = segment + 1, 0, seen + 1
                assert (segment_T[t], position_T[t]) == (segment, position)
                position += 1
    assert seen > 10


def test_without_isolation_a_window_is_one_segment(text_data):
    batch = text_data(isolate_documents=False).prepare().train_batches(2, 32, seed=0).batch(0)
    assert (batch.segment_BT == 1).all()
    np.testing.assert_array_equal(batch.position_BT, [list(range(32))] * 2)


def test_the_prefetching_iterator_gives_the_same_batches(text_data):
    batches = text_data().prepare().train_batches(2, 16, seed=3)
    iterator = batches.batches(start=5, rows=slice(1, 2))
    for i, batch in enumerate(itertools.islice(iterator, 12)):
        assert_same(batch, batches.batch(5 + i, slice(1, 2)))
    iterator.close()


def scored_texts(data, batches):
    """Scored targets of each piece, with the number of tokens in front of each in its segment."""
    for batch in batches:
        rows = zip(*(np.asarray(getattr(batch, name)) for name in FIELDS[:5]), strict=True)
        for token_T, target_T, segment_T, position_T, scored_T in rows:
            for segment in range(1, segment_T.max() + 1):
                here = segment_T == segment
                np.testing.assert_array_equal(position_T[here], np.arange(here.sum()))
                np.testing.assert_array_equal(token_T[here][1:], target_T[here][:-1])
                scored = scored_T[here]
                yield token_T[here], target_T[here][scored], position_T[here][scored] + 1
            assert not scored_T[segment_T == 0].any()


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(("length", "stride"), [(64, None), (64, 64), (50, 7), (2, 1), (500, 3)])
def test_every_held_out_token_is_scored_once_with_enough_context(
    text_data, isolate, length, stride
):
    data = text_data(isolate_documents=isolate).prepare()
    batches = data.validation_batches(4, length, stride)
    document_id, stride = data.tokenizer.document_id, stride or length // 2
    found = list(scored_texts(data, batches))
    assert sum(len(target) for _, target, _ in found) == data.info.validation_tokens
    assert batches.num_tokens == data.info.validation_tokens
    assert batches.num_bytes == data.info.validation_bytes
    at_least = [int(context.min()) for token, _, context in found if token[0] != document_id]
    assert all(context >= length - stride + 1 for context in at_least)
    assert all(document_id not in target for _, target, _ in found)
    # Without packing the rows are in order, and their targets join to the text itself.
    if not isolate:
        joined = b"".join(bytes(target.tolist()) for _, target, _ in found)
        assert joined.decode() == "".join(data.validation_split.texts())


def test_packed_rows_hold_the_same_pieces_as_single_ones(text_data):
    pieces = []
    for isolate in (True, False):
        data = text_data(isolate_documents=isolate).prepare()
        batches = data.validation_batches(4, 128)
        found = scored_texts(data, batches)
        pieces.append((sorted((a.tobytes(), b.tobytes()) for a, b, _ in found), len(batches.rows)))
    assert pieces[0][0] == pieces[1][0] and pieces[0][1] < pieces[1][1]


def test_the_last_validation_batch_is_filled_with_padding(text_data):
    batches = text_data().prepare().validation_batches(5, 64)
    assert len(batches.rows) % 5 != 0
    *_, last = batches
    assert last.token_BT.shape == (5, 64)
    assert (last.segment_BT[len(batches.rows) % 5 :] == 0).all() and (last.segment_BT[0] > 0).any()
    with pytest.raises(IndexError):
        batches.batch(len(batches))


def test_a_limit_keeps_the_same_text_for_every_tokenizer_but_for_the_cut(text_data):
    chosen, cut = {}, {}
    for spec in (Bytes(), TrainedBPE(vocab_size=300)):
        data = text_data(tokenizer=spec).prepare()
        batches = data.validation_batches(2, 400, max_bytes=1000)
        assert 990 < batches.num_bytes <= 1000
        found = [data.tokenizer.decode(target) for _, target, _ in scored_texts(data, batches)]
        assert sum(len(text.encode()) for text in found) == batches.num_bytes
        whole = set(data.validation_split.texts())
        chosen[spec] = sorted(text for text in found if text in whole)
        (cut[spec],) = (text for text in found if text not in whole)
    assert len(set(map(tuple, chosen.values()))) == 1
    shorter, longer = sorted(cut.values(), key=len)
    assert longer.startswith(shorter)
    assert data.validation_batches(2, 400, max_bytes=1).num_documents == 1


@pytest.mark.parametrize("seed", range(3))
def test_packing_wastes_little(seed):
    lengths = np.random.default_rng(seed).integers(1, 101, size=500).tolist()
    rows = pack(lengths, 100)
    assert sorted(itertools.chain(*rows)) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    # No packing can do with fewer rows than this; decreasing fits need at most 11/9 of the best.
    least = max(-(-sum(lengths) // 100), sum(length > 50 for length in lengths))
    assert least <= len(rows) <= 1.03 * least
