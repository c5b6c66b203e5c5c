"""The mesh: what it refuses, where arrays live, and which collectives one MoE layer costs."""

import collections
import dataclasses
import functools
from pathlib import Path
import re
import sys

import jax
import jax.numpy as jnp
from marks import mainly
import numpy as np
import optax
import pytest

from layers.dispatch import OneHotEinsum, SlotGather, Sorted
from layers.kernels.grouped_matmul import spare_rows
from layers.logical_axes import logical_constraint, sharding_rules
from layers.moe_layer import MoELayer
from moe.data.batches import train_batch
from moe.model import functional, sharding
from moe.model.transformer import Transformer
from moe.training import train_step
from moe.training.objective import NextToken, step_key, tokens_of
from routing import BiasBalancer, TopK
from routing.records import TokenChoice

EXPERTS, D, F, V, ROWS, LENGTH = 8, 16, 32, 13, 16, 12


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"expert": 4}, (2, 1, 4, 1, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1, 1, 1)),
        ({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, (1, 2, 2, 2, 1)),
        ({"sequence": 4}, (2, 1, 1, 1, 4)),
    ],
    ids=str,
)
def test_mesh_shapes(sizes, shape):
    mesh = sharding.MeshShape(**sizes).build()
    assert tuple(mesh.shape.values()) == shape and tuple(mesh.shape) == sharding.MESH_AXES


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ({"data": 3}, "needs 3 devices, but there are 8; set one axis to -1"),
        ({"data": 16}, "needs 16 devices, but there are 8"),
        ({"expert": 3}, "needs a multiple of 3 devices, but there are 8"),
        ({"fsdp": -1}, "one of them may be -1"),
        ({"data": 8, "expert": 0}, "sizes are at least 1"),
        ({"data": 8, "expert": -2}, "sizes are at least 1"),
    ],
    ids=str,
)
def test_mesh_shapes_that_cannot_be(sizes, part):
    with pytest.raises(ValueError) as refusal:
        sharding.MeshShape(**sizes).build()
    assert part in str(refusal.value)


def test_a_mesh_of_some_devices():
    mesh = sharding.MeshShape(expert=2).build(jax.devices()[:4])
    assert mesh.size == 4 and mesh.shape["data"] == 2


def test_groups_and_experts_have_to_divide():
    mesh = sharding.MeshShape(data=2, expert=4).build()
    sharding.check_batch(mesh, 16, 8)
    sharding.check_batch(mesh, 16, None)
    with pytest.raises(ValueError, match=r"12 groups .* = 8 devices; make train.batch_size"):
        sharding.check_batch(mesh, 12, 8)
    with pytest.raises(ValueError, match=r"num_experts=6 doesn't divide over MeshShape.expert=4"):
        sharding.check_batch(mesh, 16, 6)


def test_sequences_have_to_divide():
    mesh = sharding.MeshShape(sequence=4).build()
    sharding.check_length(mesh, 12, 1)
    with pytest.raises(ValueError, match=r"sequence_length=10 doesn't divide over .*sequence=4"):
        sharding.check_length(mesh, 10, 1)
    with pytest.raises(ValueError, match=r"MoELayer.sequences_per_group = 1 \(it is 2\)"):
        sharding.check_length(mesh, 12, 2)
    sharding.check_length(sharding.MeshShape().build(), 13, 4)


def test_specs():
    mesh = sharding.MeshShape(data=1, fsdp=2, expert=2, tensor=2).build()

    def spec(axes, shape):
        return tuple(sharding.spec(mesh, axes, shape))

    assert spec(("expert", "embed", "mlp"), (8, 16, 32)) == ("expert", "fsdp", "tensor")
    assert spec(("batch", None, None), (8, 3, 5)) == (("fsdp", "expert"), None, None)
    # What does not divide stays whole, and so does what has no name.
    assert spec(("expert", "embed", None), (3, 16, 4)) == (None, "fsdp", None)
    # No mesh axis cuts two dimensions.
    assert spec(("batch", "expert"), (8, 8)) == (("fsdp", "expert"), None)


def test_a_logical_constraint_does_nothing_by_itself():
    x = jnp.ones((8, 2))
    assert logical_constraint(x, "batch", None) is x
    mesh = sharding.MeshShape().build()
    with sharding_rules(sharding.rule(mesh)):
        assert len(logical_constraint(x, "batch", None).sharding.device_set) == 8
    assert logical_constraint(x, "batch", None) is x
    assert sharding.rule(sharding.MeshShape().build(jax.devices()[:1])) is None


@functools.cache
def one_layer(dispatcher):
    """A model of a single sparse layer."""

    def make():
        moe = functools.partial(
            MoELayer, router=TopK, num_experts=EXPERTS, d_ff=F, dispatcher=dispatcher
        )
        return Transformer(V, d_model=D, num_layers=1, num_heads=2, moe=moe)

    return functional.abstract(make)


def batch_of(rows=ROWS):
    window_BW = np.random.default_rng(0).integers(0, V, (rows, LENGTH + 1)).astype(np.int32)
    return train_batch(window_BW, np.arange(rows, dtype=np.int32))


def compiled_text(dispatcher, *, gradient=False, **sizes):
    """The compiled program of a forward pass to hidden states, or of a gradient of those."""
    graph, params, state = one_layer(dispatcher)
    mesh = sharding.MeshShape(**sizes).build()
    place = functools.partial(sharding.sharding, mesh)
    shardings = {n: place(graph.axes[n], p.shape) for n, p in params.items()}
    batch = batch_of()
    rows = place(("batch",), (ROWS,))

    def forward(params, batch):
        with sharding_rules(sharding.rule(mesh)):
            tokens = tokens_of(batch, step_key(0, 0), train=True)
            return graph.merge(params, state)(tokens).hidden_BTD

    def backward(params, batch):
        return jax.grad(lambda params: jnp.square(forward(params, batch)).sum())(params)

    to = shardings if gradient else rows
    run = jax.jit(
        backward if gradient else forward, in_shardings=(shardings, rows), out_shardings=to
    )
    return run.lower(params, batch).compile().as_text()


def collectives(text):
    """How many of each kind, by name; asynchronous ones are counted where they start."""
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    return collections.Counter(re.findall(rf"[)}}] ({kinds})(?:-start)?\(", text))


PARALLEL = [OneHotEinsum(), SlotGather(), Sorted(), Sorted("slot_blocks")]


@pytest.mark.parametrize("dispatcher", mainly([Sorted()], PARALLEL), ids=str)
@pytest.mark.parametrize(
    ("sizes", "gradient"),
    [({"data": 1, "expert": 8}, False), ({"data": 2, "expert": 4}, True)],
    ids=str,
)
def test_expert_parallel_is_two_all_to_alls(sizes, gradient, dispatcher):
    """One to the experts, one home, and the same for gradients; and no weight travels.

    With sorted rows their gates travel too: a third one, of a number for each row.
    """
    text = compiled_text(dispatcher, gradient=gradient, **sizes)
    found = collectives(text)
    each_way = 3 if isinstance(dispatcher, Sorted) else 2
    assert found["all-to-all"] == (2 * each_way if gradient else each_way), found
    # Sorted rows' devices tell each other how many come, and nothing else.
    counts = re.findall(rf"= s32\[{sizes['expert']},{EXPERTS}\]\S* all-gather\(", text)
    assert found["all-gather"] == len(counts) == isinstance(dispatcher, Sorted), found
    assert not found["collective-permute"] and not found["reduce-scatter"], found


def test_of_a_cut_sequence_only_keys_and_values_are_put_together():
    """Beside integers, which routers and masks count with, and the output that is asked for."""
    text = compiled_text(Sorted(), data=2, sequence=4)
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
    floats = sorted(shape for kind, shape in gathered if kind == "f32")
    rows = ROWS // 2  # of the data axis
    whole = f"{rows},{LENGTH},{D}"
    assert floats == sorted([whole, whole, f"{rows},{LENGTH},2,{D // 2}"]), gathered


def test_what_a_buffer_has_no_room_for_is_dropped_or_goes_a_second_way():
    """All tokens choose expert 0, and its device has room for half of what all send."""
    mesh = sharding.MeshShape(data=2, expert=4).build()
    rows = sharding.sharding(mesh, ("batch",), (ROWS,))
    x_GTD = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, D))
    shape = (ROWS, LENGTH, 1)
    decision = TokenChoice(
        expert_GTK=jnp.zeros(shape, jnp.int32),
        gate_GTK=jnp.full(shape, 0.5),
        keep_GTK=jnp.ones(shape, bool),
        num_experts=EXPERTS,
    )

    @functools.partial(jax.jit, static_argnums=2)
    def moved(x_GTD, decision, mover):
        """Experts that hand their rows back."""
        with sharding_rules(sharding.rule(mesh)):
            fits, overflow = mover.split_overflow(decision)
            sent = mover.dispatch(x_GTD, fits)
            assert (
                sent.rows_PND.shape[1] - spare_rows(4 * mover.most_rows(24, 4), 1, "loop") == 4 * 12
            )
            found = mover.combine(sent.rows_PND * sent.combine_PN[..., None], fits)
            rest = None if overflow is None else overflow.decision
            return found, fits, rest

    args = (jax.device_put(x_GTD, rows), jax.device_put(decision, rows))
    found, fits, rest = moved(*args, Sorted(buffer=2.0, overflow="drop"))
    # 24 tokens a device, 4 devices that hold experts: 12 go to the first, in their order.
    kept_PN = np.asarray(fits.keep_GTK).reshape(8, 24)
    assert rest is None and (kept_PN == (np.arange(24) < 12)).all()
    np.testing.assert_array_equal(found, np.where(fits.keep_GTK, 0.5 * x_GTD, 0))
    _, fits, rest = moved(*args, Sorted(buffer=2.0))
    np.testing.assert_array_equal(rest.keep_GTK, ~np.asarray(fits.keep_GTK))


def test_data_parallel_forward_moves_nothing():
    assert not collectives(compiled_text(OneHotEinsum(), data=8))


@pytest.mark.smoke
def test_experts_live_where_the_mesh_says():
    make = functools.partial(
        MoELayer,
        router=functools.partial(TopK, balancer=BiasBalancer),
        num_experts=EXPERTS,
        d_ff=F,
    )
    graph, *abstract = functional.abstract(
        lambda: Transformer(V, d_model=D, num_layers=2, num_heads=2, moe=make)
    )
    mesh = sharding.MeshShape(data=1, fsdp=2, expert=2, tensor=2).build()
    program = train_step.TrainingFunctions(
        graph,
        tuple(abstract),
        objective=NextToken(),
        optimizer=optax.adam(1e-3),
        num_bytes_2V=np.ones((2, graph.merge(*abstract).vocab_size), np.int32),
        mesh=mesh,
        seed=0,
    ).program()
    state = program.init(0)
    (name,) = (n for n in state.params if n.endswith("experts.up_EDF"))
    # (L, E, D, F) = (2, 8, 16, 32) cut by expert 2, fsdp 2, tensor 2.
    for value in (state.params[name], state.opt_state[0].mu[name], state.opt_state[0].nu[name]):
        assert value.addressable_shards[0].data.shape == (2, 4, 8, 16)
    (bias,) = state.router_state.values()
    assert bias.sharding.is_fully_replicated and state.step.sharding.is_fully_replicated
    after, _ = program.step(state, jax.device_put(batch_of(), program.batch_sharding))
    copies = [np.asarray(s.data) for s in after.router_state.popitem()[1].addressable_shards]
    for copy in copies[1:]:
        np.testing.assert_array_equal(copy, copies[0])


def test_the_documents_table_of_rules_is_the_real_one():
    text = (Path(__file__).parents[1] / "docs" / "sharding.md").read_text()
    table = text.split("## The table of rules")[1].split("![")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]*?) \|", table, re.M)
    told = {name: tuple(axes.replace(",", " ").split()) for name, axes in rows}
    assert told == sharding.RULES


def test_every_parameter_names_its_axes():
    graph, params, state = one_layer(SlotGather())
    for name, value in (params | state).items():
        assert len(graph.axes[name]) == len(value.shape), name
        assert all(axis is None or axis in sharding.RULES for axis in graph.axes[name]), name


def test_processes_put_their_rows_together():
    mesh = sharding.MeshShape().build()
    where = sharding.sharding(mesh, ("batch",), (ROWS,))
    batch = train_step.to_devices(batch_of(), where, ROWS)
    np.testing.assert_array_equal(batch.token_BT, batch_of().token_BT)
    assert len(batch.token_BT.sharding.device_set) == 8


def test_micro_batches_are_whole_groups_and_spread_over_the_devices():
    batch = batch_of()
    micro = train_step.micro_batches(batch, 4, 2)
    index_AB = np.asarray(micro.index_B)
    assert sorted(index_AB.ravel()) == list(range(ROWS))
    assert index_AB[0].tolist() == [0, 1, 8, 9]  # groups 0 and 4 of eight
    rows = dataclasses.replace(batch, token_BT=batch.token_BT)
    np.testing.assert_array_equal(micro.token_BT[0, 2], rows.token_BT[8])


def test_a_kernel_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ValueError, match=r"pip install 'moe-routing\[tokamax\]'"):
        Sorted("tokamax")
