"""What serving costs, counted: figures worked by hand, and the training count's own.

Seen red: with a whole context in place of a window's keys, and with K B in place of the union.
"""

import dataclasses
import functools
import json

import numpy as np
import pytest

from layers.attention import Attention
from layers.moe_layer import MoELayer
from moe.cli import main as cli
from moe.model.transformer import Transformer
from moe.planning.chips import CHIPS
from moe.planning.serving import Serving
from moe.training.abstract_model import Vocabulary, abstract_model
from moe.training.objective import NextToken
from routing import Lory, MixtureOfDepths, SoftMoE, TopK

T, V = 64, 100


def serving(**settings):
    settings = {"d_model": 32, "num_layers": 2, "num_heads": 4} | settings
    make = functools.partial(Transformer, **settings)
    model = abstract_model(make, NextToken(), Vocabulary(V), batch_size=2, sequence_length=T)
    return model, Serving.of(model)


MIXTURE = functools.partial(MoELayer, router=functools.partial(TopK, k=2), num_experts=8, d_ff=16)


@pytest.mark.parametrize(
    "settings",
    [
        {"moe": None},
        {"moe": MIXTURE},
        {"moe": MIXTURE, "moe_every": 2, "tie_embeddings": True},
        {"moe": MIXTURE, "depth_router": functools.partial(MixtureOfDepths, capacity=0.5)},
    ],
    ids=["dense", "mixture", "every other layer, tied", "depths"],
)
def test_a_token_amid_a_text_costs_a_third_of_its_training(settings):
    """Forward alone, with the mean number of keys of a causal mask."""
    model, found = serving(**settings)
    assert sum(found.flops(T // 2).values()) == pytest.approx(model.costs.flops_per_token / 3)
    everything = found.expert_parameters + found.other_parameters + found.table_parameters
    assert everything == model.costs.parameters_total


def test_bytes_of_keys_and_values():
    """2 L n_kv d_head bytes for each token, of a window's tokens at most (papers: GQA, windows)."""
    grouped = functools.partial(Attention, num_kv_heads=2)
    _, found = serving(attention=grouped, moe=None)
    assert found.cache_bytes(100) == 2 * 2 * 2 * 8 * 2 * 100
    _, found = serving(attention=functools.partial(Attention, window=16), moe=None)
    assert found.cache_bytes(100) == 2 * 2 * 4 * 8 * 2 * 16
    assert found.flops(100)["scores"] == found.flops(16)["scores"] == 2 * 4 * 16 * 32


def test_the_union_of_experts_is_that_of_draws():
    _, found = serving(moe=MIXTURE)
    rng = np.random.default_rng(0)
    drawn = [
        len({e for _ in range(5) for e in rng.choice(8, 2, replace=False)}) for _ in range(4000)
    ]
    assert found.experts_read(1) == 2 and abs(found.experts_read(5) - np.mean(drawn)) < 0.05
    one, all_ = found.weights_read(1), found.weights_read(10_000)
    assert all_ - one == pytest.approx(found.expert_parameters * 2 * (1 - 2 / 8))


def test_merged_experts_and_soft_slots_are_all_read():
    """For one text, as decoding does; slots of a segment are computed for each of its tokens."""
    width, hidden, experts, layers = 32, 16, 8, 2
    one = 3 * 2 * width * hidden  # FLOPs of a token in an expert, whose three matrices are gated
    for router, work in (
        (functools.partial(SoftMoE, segment=16, slots_per_expert=2), experts * 2 * one),
        (functools.partial(Lory, segment=16), one + 2 * experts * one // 2),
    ):
        moe = functools.partial(MoELayer, router=router, num_experts=experts, d_ff=hidden)
        _, found = serving(moe=moe)
        assert found.experts_read(1) == experts
        assert found.weights_read(1) == found.weights_read(100)
        assert found.flops(1)["experts"] == layers * work


def test_what_no_cache_serves_is_told(capsys):
    assert cli.main(["cost", "--gin_file=masked.gin", "--chip=h100"]) == 0
    assert "A masked model fills each mask in by a pass" in capsys.readouterr().out
    dropping = ["--gin_file=quickstart.gin", "--gin_bindings=Capacity.eval_factor = 1.0"]
    assert cli.main(["cost", *dropping, "--chip=h100"]) == 0
    said = capsys.readouterr().out
    assert "Each token takes a pass over the whole text" in said and "Capacity.eval_factor" in said


def test_from_the_break_even_on_flops_take_longer():
    _, found = serving(moe=MIXTURE)
    chip = dataclasses.replace(CHIPS["h100"], flops=1e12, memory_bandwidth=1e11)
    texts = found.break_even(chip, 4)
    assert texts > 1
    below, there = found.step(chip, texts - 1, 4), found.step(chip, texts, 4)
    assert below["computing"] < below["reading"] and there["computing"] >= there["reading"]
    # With long texts their caches, which nobody shares, always take longer.
    assert found.break_even(chip, 10_000) is None


def test_room_for_texts():
    _, found = serving(moe=None)
    text = found.cache_bytes(T)
    assert found.most_texts(found.weight_bytes + 3.5 * text, T) == 3
    assert found.most_texts(found.weight_bytes - 1, T) == 0


def test_mixtral_on_two_cards(tmp_path, capsys):
    """131,072 bytes of cache for a token: 32 layers, 8 heads of keys, 128 wide, bfloat16."""
    path = tmp_path / "cost.json"
    given = ["--gin_file=pod_mixtral_8x7b.gin", "--chip=h100", "--chips=2", "--context=4096"]
    assert cli.main(["cost", *given, f"--json={path}"]) == 0
    said, found = capsys.readouterr().out, json.loads(path.read_text())
    assert found["cache_bytes_per_text"] == 131_072 * 4096
    assert found["most_texts"] == (2 * 84942979072 - found["weight_bytes"]) // 2**29
    assert "512 MiB of keys and values" in said and "2 x h100" in said
    assert [row["texts"] for row in found["steps"]] == [1, 4, 16, 64, 256]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--chip=h10"], "no TPU or GPU is called 'h10'; did you mean 'h100' or 'h200'?"),
        (["--dtype=int4"], "--dtype=int4: expected one of float32, bfloat16, int8"),
    ],
)
def test_a_mistake_is_one_line(given, expected, capsys):
    assert cli.main(["cost", "--gin_file=quickstart.gin", *given]) == 2
    assert expected in capsys.readouterr().err
