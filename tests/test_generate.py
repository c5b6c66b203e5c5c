"""Sampling, continuing a text, and evaluating a run afterwards."""

import contextlib
import functools
import io
import json
import math
import subprocess
import sys

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Runs, environment, quick

from moe.cli import config
from moe.cli import main as cli
from moe.cli.eval import evaluate_run
from moe.data.tokens.tokenizer import ByteTokenizer
from moe.errors import UserError, printable
from moe.inference.generate import Generator, Pieces, check
from moe.inference.infill import Infiller
from moe.inference.sampling import Sampling, nucleus, penalised
from moe.model.transformer import Transformer
from moe.runs.restore import restore_run
from moe.runs.storage import checkpoint
from moe.training.abstract_model import Vocabulary, abstract_model
from moe.training.objective import NextToken
from routing.inputs import Tokens

TEXT = "the quick brown fox jumps over the lazy dog. "
LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.3, 0.15], [0.7, 0.05, 0.05, 0.1, 0.1]]))


def restored(folder, step=None):
    return restore_run(folder, config.of_folder(folder), step)


def picks(sampling, count=200):
    keys = jax.random.split(jax.random.key(0), count)
    return [set(row) for row in np.asarray(jax.vmap(lambda k: sampling.draw(LOGITS, k))(keys)).T]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=0, top_p=0.5),
        Sampling(top_k=1),
        Sampling(top_p=1e-6),
        Sampling(top_p=0.0),
        Sampling(temperature=1e-4),
        Sampling(temperature=1e-40),
    ],
    ids=str,
)
def test_greedy_in_all_its_forms(sampling):
    assert picks(sampling) == [{1}, {0}]


def test_cut_tails():
    assert picks(Sampling(top_k=2))[0] == {1, 3}
    assert picks(Sampling(top_k=99))[0] == {0, 1, 2, 3, 4}
    assert picks(Sampling(top_p=0.69))[0] == {1, 3}  # 0.4 + 0.3
    assert picks(Sampling(top_p=0.71))[0] == {1, 3, 4}
    assert picks(Sampling(top_p=0.69))[1] == {0}
    assert picks(Sampling(top_p=1.0))[0] == {0, 1, 2, 3, 4}
    many = jax.random.normal(jax.random.key(0), (1, 4096))
    assert (Sampling(top_p=1.0).probabilities(many) > 0).all()  # the sum of shares is rounded
    equal = Sampling(top_k=2).probabilities(jnp.zeros((1, 5)))
    assert (equal > 0).sum() == 2


def test_the_nucleus_keeps_the_fewest_that_reach_top_p():
    kept = np.isfinite(np.asarray(nucleus(LOGITS, 0.8)))
    assert kept.tolist() == [[False, True, False, True, True], [True, False, False, True, False]]


def test_unlikely_and_repeated_tokens():
    assert picks(Sampling(min_p=0.7))[0] == {1, 3}  # 0.3 of 0.4
    assert picks(Sampling(min_p=0.76))[0] == {1}
    assert picks(Sampling(min_p=0.0))[0] == {0, 1, 2, 3, 4}
    held_BV = jnp.asarray([[False, True, False, False, False], [True] * 5])
    lower_BV = penalised(jnp.asarray([[1.0, 2.0, 3.0, -1.0, 0.0], [1.0, 2, 3, -1, 0]]), held_BV, 2)
    assert lower_BV.tolist() == [[1, 1, 3, -1, 0], [0.5, 1, 1.5, -2, 0]]


def test_biases_are_added_to_logits():
    assert picks(Sampling(temperature=0, logit_bias=((1, -math.inf),)))[0] == {3}
    assert picks(Sampling(logit_bias=((2, 100.0), (2, -50.0)))) == [{2}, {2}]
    assert 1 not in picks(Sampling(top_k=2, logit_bias=((1, -math.inf),)))[0]
    share_BV = Sampling(logit_bias=((1, math.log(2)),)).probabilities(LOGITS)
    expected_V = jnp.asarray([1, 2, 1, 1, 1]) * jax.nn.softmax(LOGITS[0])
    np.testing.assert_allclose(share_BV[0], expected_V / expected_V.sum(), rtol=1e-5)


def test_sampling_follows_the_temperature():
    keys = jax.random.split(jax.random.key(1), 4000)
    for temperature in (0.5, 1.0, 2.0):
        sampling = Sampling(temperature)
        drawn = np.asarray(jax.vmap(lambda k, s=sampling: s.draw(LOGITS[:1], k))(keys))[:, 0]
        share = np.bincount(drawn, minlength=5) / len(drawn)
        expected = np.asarray(jax.nn.softmax(LOGITS[0] / temperature))
        np.testing.assert_allclose(share, expected, atol=0.03)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The corpus is one sentence over and over; both splits hold it."""
    found = Runs(tmp_path_factory.mktemp("generate"))
    for path in found.text.iterdir():
        path.write_text(TEXT * 12)
    return found


@pytest.fixture(scope="module")
def learned(runs):
    bindings = ("train.steps = 120", "train.optimizer = @AdamW()", "AdamW.learning_rate = 0.02")
    run = runs.done("learned", *bindings, "train.batch_size = 8", "train.log_every = 20")
    with quick():
        found = restored(str(run))
    gin.clear_config()
    return found


@pytest.fixture(scope="module")
def generator(learned):
    return Generator(learned.model, learned.params, learned.router_state, learned.tokenizer)


def continued(generator, prompt, count=1, **settings):
    settings = {"tokens": 60, "sampling": Sampling(temperature=0)} | settings
    return [text.text for text in generator.continuations([prompt] * count, **settings)]


def test_a_text_that_was_learned_by_heart_is_continued(generator):
    (text,) = continued(generator, TEXT[:20])
    assert text == (TEXT * 2)[:80]


def test_a_prompt_longer_than_the_context(generator):
    (text,) = continued(generator, TEXT * 3)
    assert text == (TEXT * 6)[: len(TEXT) * 3 + 60]


def test_temperature_0_is_the_argmax_by_hand(learned, generator):
    prompt = "fox dog "
    (text,) = continued(generator, prompt, tokens=5)
    ids = [learned.tokenizer.document_id, *prompt.encode()]
    for _ in range(5):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        model = learned.model.graph.merge(learned.params, learned.router_state)
        places = np.arange(32, dtype=np.int32)[None]
        segment = (places < len(ids)).astype(np.int32)
        tokens = Tokens(
            jnp.asarray(padded),
            jnp.asarray(segment),
            jnp.asarray(places),
            jnp.zeros(1, jnp.int32),
            jax.random.key(5),
            train=False,
        )
        ids.append(int(model.logits(model(tokens).hidden_BTD)[0, len(ids) - 1].argmax()))
    assert text == learned.tokenizer.decode(ids[1:])


def test_a_seed_repeats_and_samples_differ(generator):
    hot = {"sampling": Sampling(temperature=3.0), "count": 3, "tokens": 12}
    first = continued(generator, "the", seed=4, **hot)
    assert continued(generator, "the", seed=4, **hot) == first
    assert continued(generator, "the", seed=5, **hot) != first
    assert len(set(first)) == 3 and all(text.startswith("the") for text in first)


def test_a_text_does_not_depend_on_those_beside_it(generator):
    """Prompts of several lengths, drawn until some are past the context: others, the same text."""
    assert generator.recomputes is None and generator.context == 32
    sampling = Sampling(2.0, min_p=0.01, repetition_penalty=1.3)
    how = {"tokens": 14, "sampling": sampling, "seed": 3}
    prompts, others = ["the quick", "", TEXT[:23]], ["dog", "x" * 20, "ab"]
    together = generator.continuations(prompts, **how)
    for place, one in enumerate(together):
        beside = [*others[:place], prompts[place], *others[place + 1 :]]
        again = generator.continuations(beside, **how)[place]
        assert again.tokens == one.tokens and len(one.tokens) > 3
        np.testing.assert_allclose(again.log_probs, one.log_probs, rtol=1e-4, atol=1e-5)


def test_log_probabilities_are_those_of_the_model_whatever_was_drawn_from(learned, generator):
    sampling = Sampling(3.0, repetition_penalty=2.0)
    (found,) = generator.continuations(["the quick"], tokens=6, sampling=sampling)
    ids = [learned.tokenizer.document_id, *b"the quick", *found.tokens]
    model = learned.model.graph.merge(learned.params, learned.router_state)
    logits_TV = model.logits(model(ids).hidden_BTD)[0]
    told_T = jax.nn.log_softmax(logits_TV)[np.arange(len(ids) - 1), np.asarray(ids[1:])]
    told_T = told_T[-len(found.tokens) :]
    np.testing.assert_allclose(found.log_probs, told_T, rtol=1e-4, atol=1e-5)


def test_the_pieces_of_a_text_are_whole_characters():
    said = []
    pieces = Pieces(ByteTokenizer(), list("aé".encode()), said.append)
    for token in (*"ß€".encode(), 0xE2, 256, 65):
        pieces.add(token)
    pieces.finish()
    assert said == ["aé", "ß", "€", "\ufffd"]


def test_a_context_beyond_the_learned_positions_is_refused():
    make = functools.partial(
        Transformer, d_model=8, num_layers=1, num_heads=1, positions="learned", max_length=40
    )
    sizes = {"batch_size": 1, "sequence_length": 32}
    model = abstract_model(make, NextToken(), Vocabulary(9), **sizes)
    check(model, 40)
    with pytest.raises(UserError, match="a context of 41 tokens, but this model learned 40 posit"):
        check(model, 41)


def command(name: str, run, *flags: str) -> tuple[int, str]:
    out = io.StringIO()
    with quick(), contextlib.redirect_stdout(out):
        status = cli.main([name, f"--workdir={run}", *flags])
    return status, out.getvalue()


def test_the_command_prints_and_writes(runs, learned):
    target = runs.folder / "texts.json"
    flags = ("--prompt=the quick", "--temperature=0", "--tokens=10", f"--json={target}")
    status, out = command("generate", runs.folder / "learned", *flags)
    assert status == 0 and out == "the quick brown fox\n"
    written = json.loads(target.read_text())
    (log_probs,) = written.pop("log_probs")
    assert written == {"step": 120, "prompt": "the quick", "texts": ["the quick brown fox"]}
    assert len(log_probs) == 10 and all(-0.5 < value <= 0 for value in log_probs)


def test_the_likeliest_of_several_texts(runs, learned):
    """As chosen by hand from all of them; the bias is by a token's text, and by its id."""
    target, hot = runs.folder / "best.json", ("--prompt=the", "--temperature=3", "--tokens=6")
    folder, ban = runs.folder / "learned", ["--logit_bias=q:-inf", f"--logit_bias={ord('u')}:-inf"]
    _, out = command("generate", folder, *hot, *ban, "--best_of=5", "--count=2")
    assert command("generate", folder, *hot, *ban, "--count=5", f"--json={target}")[0] == 0
    written = json.loads(target.read_text())
    assert not any({"q", "u"} & set(text[3:]) for text in written["texts"])
    pairs = zip(written["texts"], map(np.mean, written["log_probs"]), strict=True)
    best = [text for text, _ in sorted(pairs, key=lambda pair: -pair[1])][:2]
    assert out == printable(f"{best[0]}\n{'-' * 80}\n{best[1]}\n")


@pytest.mark.parametrize("draft", ["itself", "lookahead"])
def test_a_draft_writes_the_same_text_in_fewer_steps(draft, runs, learned, capsys):
    run, target = runs.folder / "learned", runs.folder / f"{draft}.json"
    flags = ("--prompt=the quick", "--temperature=0", "--tokens=10", f"--json={target}")
    name = str(run) if draft == "itself" else draft
    status, out = command("generate", run, *flags, f"--draft={name}", "--ahead=3")
    assert status == 0 and out == "the quick brown fox\n"
    written = json.loads(target.read_text())
    assert written["texts"] == ["the quick brown fox"]
    if draft == "itself":
        assert written["steps"] == 3 and written["held"] == 3
    assert "guesses held; a step read" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--draft=lookup", "--beams=2"])
def test_drafts_and_beams_stay_within_the_context_where_no_length_is_given(flag, runs, learned):
    """The context is 32 tokens, one of which begins the text."""
    flags = ("--prompt=the quick", "--temperature=0", flag, "--context=12")
    status, out = command("generate", runs.folder / "learned", *flags)
    assert status == 0 and out.startswith("the quick b")


def test_a_text_that_outgrows_the_context_is_told(runs, learned, capsys):
    flags = ("--prompt=the quick", "--temperature=0")
    for tokens, told in ((3, ""), (4, "beyond 12 tokens each takes a pass over the last so many")):
        command("generate", runs.folder / "learned", *flags, "--context=12", f"--tokens={tokens}")
        assert told in (said := capsys.readouterr().err) and bool(told) == bool(said)


def test_a_penalty_on_what_the_text_holds_spares_its_end(generator):
    document = generator.tokenizer.document_id
    held_BV = generator._held([[document, 5, 7], [document]])
    assert np.flatnonzero(held_BV[0]).tolist() == [5, 7] and not held_BV[1].any()


def test_beams_print_the_likeliest_texts(runs, learned):
    target = runs.folder / "beams.json"
    flags = ("--prompt=the quick", "--beams=3", "--tokens=10", f"--json={target}")
    status, out = command("generate", runs.folder / "learned", *flags)
    assert status == 0 and out.startswith("the quick brown fox\n---")
    written = json.loads(target.read_text())
    assert len(written["texts"]) == 3 and written["scores"] == sorted(written["scores"])[::-1]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--beams=2", "--count=3"], "leave out --draft, --count"),
        (["--best_of=2", "--draft=lookup"], "--best_of needs each text's likelihood"),
        (["--best_of=2", "--count=3"], "--best_of=2 are too few for --count=3"),
        (["--logit_bias=the:1"], "'the' is 3 tokens: [116, 104, 101]; name one"),
        (["--logit_bias=257:1"], "token ids are below 257"),
        (["--logit_bias=q"], "expected TOKEN:X, such as 17:-inf"),
        (["--logit_bias=q:nan"], "expected TOKEN:X"),
        (["--logit_bias=q:1e39"], "expected TOKEN:X"),
        (["--draft="], "--draft= names nothing: a run's folder or lookup"),
        (["--order=right"], "--order=right: one of surest, left"),
        (["--seed=4294967296"], "--seed=4294967296: expected"),
        (["--json=."], "--json=.: this is a folder; name a file"),
        (["--draft=lookups"], "a run's folder or lookup, jacobi, lookahead"),
        (["--draft=lookup", "--tokens=99"], "at most 31 more are within it"),
        (["--draft=lookup", "--repetition_penalty=2"], "don't go together; leave one out"),
    ],
)
def test_drafts_that_can_not_be_are_one_line(flags, expected, runs, learned, capsys):
    status, _ = command("generate", runs.folder / "learned", *flags)
    assert status == 2 and expected in capsys.readouterr().err


@pytest.mark.thorough
def test_decoding_is_measured(runs, learned):
    target = runs.folder / "decode.json"
    with quick(), contextlib.redirect_stdout(io.StringIO()):
        given = [f"--workdir={runs.folder / 'learned'}", f"--json={target}"]
        plot = runs.folder / "decode.png"
        assert cli.main(["bench", "decode", *given, "--twins", f"--plot={plot}"]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    everything = json.loads(target.read_text())
    rows, active, whole = (everything[i : i + 4] for i in (0, 4, 8))
    assert [row["batch"] for row in everything] == [1, 4, 16, 64] * 3
    # One text makes the mixture read what the dense model of its active size reads.
    assert active[0]["weight_bytes_per_token"] == pytest.approx(
        rows[0]["weight_bytes_per_token"], rel=0.02
    )
    # 64 texts wake nearly all experts.
    read, size = (of[3]["weight_bytes_per_token"] for of in (rows, whole))
    assert 0.75 * size < read < 1.01 * size
    assert all(row["milliseconds_predicted"] > 0 for row in everything)
    assert rows[0]["distinct_experts_per_layer"] == [2, 2]
    assert all(2 <= count <= 4 for count in rows[3]["distinct_experts_per_layer"])
    assert {row["cache_bytes_per_token"] for row in rows} == {
        2 * 2 * 16 * 4
    }  # keys, values, layers
    # 64 texts share the weights of all experts, of which one text reads half.
    one, many = rows[0]["weight_bytes_per_token"], 64 * rows[3]["weight_bytes_per_token"]
    assert one < many < 2 * one
    assert all(row["milliseconds_per_step"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "give --workdir=FOLDER"),
        (["--workdir=x", "--plot=nowhere/a.png"], "--plot=nowhere/a.png: there is no such folder"),
        (["--workdir=x", "--plot=a.foo"], "--plot=a.foo: expected a name that ends in .png"),
        (["--workdir=x", "--tokens=9"], "--tokens is of `moe bench routers`; decode has no use"),
    ],
)
def test_a_measurement_that_can_not_be_is_told_before_it_is_made(flags, expected, capsys):
    assert cli.main(["bench", "decode", *flags]) == 2
    assert expected in capsys.readouterr().err


def test_evaluating_the_run_gives_the_summarys_figure(runs, learned):
    run = runs.folder / "learned"
    summary = json.loads((run / "summary.json").read_text())
    target = runs.folder / "eval.json"
    status, out = command("eval", run, f"--json={target}", "--gin_bindings=eval.batch_size = 8")
    found = json.loads(target.read_text())
    assert status == 0 and f"{summary['val_bits_per_byte']:.4f}" in out
    assert found["bits_per_byte"] == summary["val_bits_per_byte"]
    assert found["bytes"] == summary["val_bytes"] == found["tokens"]
    assert found["router"] == "TopK" and found["evaluation_rule"] == "as in training"
    assert found["dropped"] == 0


def test_the_batch_size_of_an_evaluation_changes_nothing(learned):
    found = []
    for size in (1, 3, 32):
        found.append(evaluate_run(learned, batch_size=size))
    gin.clear_config()
    for one in found[1:]:
        assert one.bits_per_byte == pytest.approx(found[0].bits_per_byte, rel=1e-5)
        assert (one.tokens, one.bytes, one.documents) == (
            found[0].tokens,
            found[0].bytes,
            found[0].documents,
        )


def test_another_corpus_is_scored_whole_and_what_is_left_out_is_told(runs, learned, capsys):
    folder = runs.folder / "other"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT * 3)
    (folder / "b.txt").write_text("zzyzx qqq 1234567890 %%%")
    (folder / "c.txt").symlink_to("nothing")
    target = runs.folder / "other.json"
    status, _ = command(
        "eval",
        runs.folder / "learned",
        "--gin_bindings=eval.corpus = @TextFiles()",
        f"--gin_bindings=TextFiles.paths = {str(folder)!r}",
        f"--json={target}",
    )
    found = json.loads(target.read_text())
    assert status == 0
    assert found["documents"] == 2 and found["bytes"] == len(TEXT) * 3 + 24
    assert f"left out, a broken link: {folder / 'c.txt'}" in capsys.readouterr().err
    summary = json.loads((runs.folder / "learned" / "summary.json").read_text())
    assert found["bits_per_byte"] > summary["val_bits_per_byte"] + 0.2


@pytest.fixture(scope="module")
def masked(runs):
    given = ("train.objective = @MaskedToken()", "train.steps = 2")
    return runs.done("masked", *given)


def test_a_masked_model_refuses_to_continue_a_text(masked, capsys):
    status, _ = command("generate", masked, "--prompt=the")
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    assert "masked tokens" in error and "train.objective = @NextToken()" in error


@pytest.mark.parametrize("order", ["surest", "left"])
def test_masks_are_filled_in_by_a_stated_order(order, masked, runs):
    """By hand: each pass sees what the ones before have filled in; the mask is never an answer."""
    with quick():
        run = restored(str(masked))
    gin.clear_config()
    infiller = Infiller(run.model, run.params, run.router_state, run.tokenizer, order)
    found = infiller.fill("th<mask> qu<mask><mask>k")
    ids = [run.tokenizer.document_id, *b"th", 257, *b" qu", 257, 257, *b"k"]
    model, places, expected = run.model.graph.merge(run.params, run.router_state), [3, 7, 8], []
    while left := [i for i in places if ids[i] == 257]:
        logits_TV = model.logits(model(ids).hidden_BTD)[0].at[:, 256:].set(-jnp.inf)
        log_probs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
        best = left[0] if order == "left" else max(left, key=lambda i: log_probs_TV[i].max())
        ids[best] = int(log_probs_TV[best].argmax())
        expected.append((places.index(best), log_probs_TV[best].max()))
    assert found.tokens == tuple(ids[i] for i in places)
    assert found.order == tuple(number for number, _ in expected)
    by_place = [log_prob for _, log_prob in sorted(expected)]
    np.testing.assert_allclose(found.log_probs, by_place, rtol=1e-4)
    assert found.text == run.tokenizer.decode(ids[1:])


def test_the_command_fills_in_masks(masked, learned, runs, capsys):
    target, text = runs.folder / "filled.json", "--prompt=the <mask>uick"
    status, out = command("generate", masked, text, "--count=2", f"--json={target}")
    found = json.loads(target.read_text())
    assert status == 0 and out.startswith(printable(found["texts"][0]))
    assert found["orders"] == [[0], [0]] and all(t.endswith("uick") for t in found["texts"])
    for run, flags, said in (
        (masked, [text, "--order=right"], "--order=right: one of surest, left"),
        (masked, [text, "--beams=2"], "leave out --beams"),
        (masked, ["--prompt=" + "a<mask>" * 20], "41 tokens, but this model was trained with 32"),
    ):
        assert command("generate", run, *flags)[0] == 2
        assert said in capsys.readouterr().err
    assert command("generate", runs.folder / "learned", text, "--tokens=1")[0] == 0
    assert "a model that continues texts reads <mask> as text" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_decoder_that_sees_the_future_is_trained_on_demand_and_writes_no_text(runs, capsys):
    router = ("MoELayer.router = @Hash", "Hash.key = 'future'", "train.prompts = ('the',)")
    leaky = runs.done("leaky", *router, "Transformer.allow_leaks = True", "train.steps = 2")
    assert not (leaky / "samples.txt").exists()
    status, _ = command("generate", leaky, "--prompt=the")
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    assert "can't continue a text" in error and "Hash is not causal" in error


def test_what_a_masked_evaluation_hides_does_not_depend_on_the_batch_size(masked):
    with quick():
        run = restored(str(masked))
        found = [evaluate_run(run, batch_size=size) for size in (1, 2, 32)]
    assert len({one.tokens for one in found}) == 1
    for one in found[1:]:
        assert one.loss == pytest.approx(found[0].loss, rel=1e-5)


def test_a_checkpoint_that_is_not_there_is_named(masked):
    with quick():
        assert restored(str(masked)).step == 2
        with pytest.raises(UserError, match="no checkpoint of step 1"):
            restored(str(masked), step=1)


@pytest.fixture(scope="module")
def spread(runs):
    """Trained on a mesh of 4 x 2 devices, in groups of four sequences."""
    settings = ("train.mesh = @MeshShape()", "MeshShape.expert = 2", "train.batch_size = 32")
    grouped = ("MoELayer.sequences_per_group = 4", "train.steps = 2")
    return runs.done("spread", *settings, *grouped)


@pytest.mark.thorough
def test_a_run_of_eight_devices_is_used_on_one(spread):
    """Groups of four are a matter of training, too: six texts are no fault."""
    words = ["generate", f"--workdir={spread}", "--prompt=the", "--tokens=3", "--count=6"]
    done = subprocess.run(
        [sys.executable, "-m", "moe", *words],
        env=environment(devices=1),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "expert=2" in done.stdout and "used here: data=1" in done.stdout
    assert done.stdout.count("-" * 80) == 5


@pytest.mark.thorough
def test_a_run_of_one_device_is_used_on_eight(masked, spread):
    """Whatever batch it is asked for: rows that fill up the mesh are padding."""
    with quick():
        alone = evaluate_run(restored(str(masked)), batch_size=3)
    run = restored(str(masked))
    assert run.mesh.size == 8
    assert evaluate_run(run, batch_size=3).loss == pytest.approx(alone.loss, rel=1e-5)
    assert evaluate_run(restored(str(spread)), batch_size=6).bytes > 0
    assert evaluate_run(restored(str(spread)), batch_size=6, rule="training").bytes > 0


def test_only_parameters_and_router_state_are_read(masked):
    """An optimizer's state is twice as large as the parameters."""
    with quick():
        run = restored(str(masked))
    with checkpoint.opened(masked / "checkpoints", read_only=True) as saves:
        there = saves.arrays(2)
        assert any(name.startswith("opt_state") for name in there)
        wanted = {"params.nothing": jax.ShapeDtypeStruct((2,), jnp.float32)}
        with pytest.raises(UserError, match=r"missing there: params\.nothing; only there: par"):
            saves.values(wanted)
        shape = jax.ShapeDtypeStruct((3, 5), jnp.float32)
        wanted = {f"params.{name}": shape for name in run.params}
        with pytest.raises(UserError, match=r"other shapes: params\.\w+ is \(.*\) there, \(3, 5\)"):
            saves.values(wanted)
