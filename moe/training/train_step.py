"""One optimizer step as a pure function. B batch, T tokens, L sparse layers, E experts."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
import numpy as np
import optax

from layers.logical_axes import sharding_rules
from moe.data.batch import Batch
from moe.machine import processes
from moe.model import sharding
from moe.model.functional import Arrays, Graph, initial_values, split
from moe.training import finite
from moe.training import objective as objectives
from moe.training.distillation import Teacher, TeacherValues
from moe.training.losses import measure
from moe.training.micro_batches import global_batch_of, micro_batches, summed
from moe.training.optimizer import stacked
from moe.training.precision import Precision
from moe.training.rounding import mixed
from routing import GlobalBatch, RouterOutput
from routing.parameters import ROLES, Role

# With these, TPUs run matmuls while all-to-alls exchange rows.
ASYNC_EXCHANGES = {
    "xla_tpu_enable_async_all_to_all": "true",
    "xla_tpu_enable_async_ragged_all_to_all": "true",
}


@nnx.dataclass
class TrainState(nnx.Pytree):
    """Everything that a step updates, and all that a checkpoint holds."""

    step: Int[Array, ""] = nnx.data()
    params: dict[str, Array] = nnx.data()
    router_state: dict[str, Array] = nnx.data()
    opt_state: Any = nnx.data()


@nnx.dataclass
class StepMetrics(nnx.Pytree):
    """The metrics of one step, which stay on the device until they are read.

    Attributes:
        loss: the task's loss, in nats per scored token.
        scored: scored tokens.
        text_nats: nats summed over scored tokens of text.
        text_bytes: the bytes of text that these tokens decode to.
        routers: losses and statistics of the MoE layers' routers; None for a dense model.
        grad_norms: of all parameters, and of the routers' and the experts'.
        update_norm: of all parameters.
        mod: losses, and counts per token, of the Mixture-of-Depths routers (L,), by name.
        broken: which layers of stacked arrays, or which arrays, are not finite, by name, among
            the parameters before the step, its gradients, and the state after it.
        skipped: whether the update was left out; None where none is.
        distillation: temperature^2 * KL(teacher || student) per scored token; None without one.
    """

    loss: Float[Array, ""] = nnx.data()
    scored: Int[Array, ""] = nnx.data()
    text_nats: Float[Array, ""] = nnx.data()
    text_bytes: Int[Array, ""] = nnx.data()
    routers: RouterOutput | None = nnx.data()
    grad_norms: dict[str, Array] = nnx.data()
    update_norm: Float[Array, ""] | None = nnx.data(default=None)
    mod: dict[str, Array] | None = nnx.data(default=None)
    broken: dict[str, Array] | None = nnx.data(default=None)
    skipped: Bool[Array, ""] | None = nnx.data(default=None)
    distillation: Float[Array, ""] | None = nnx.data(default=None)


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions of a run, and the shapes, types and shardings of its arrays.

    init(seed) gives the first state; step(state, batch) the next one and the step's metrics;
    gradients(state, batch) the gradients by name, and metrics.
    """

    init: Callable[[int], TrainState]
    step: "Jitted"
    gradients: "Jitted"
    abstract_state: TrainState
    batch_sharding: NamedSharding


class Given(NamedTuple):
    """What a compiled step is given, so that it is the same for all values of these.

    rate_N: the learning rate of each of the run's N steps, float32.
    loss_weights: the factors of the routers' losses, as `routing.inputs.Context`.
    limits: the largest loss and gradient norm of a step that counts; None where none is skipped.
    teacher: its values, sharded as parameters are, temperature and weight; None without one.
    """

    seed: np.uint32
    rate_N: np.ndarray
    loss_weights: dict[str, np.float32]
    limits: np.ndarray | None = None
    teacher: TeacherValues | None = None


@dataclasses.dataclass(frozen=True)
class Jitted:
    """A jitted function of the run's `Given` and further arguments, to be called with these."""

    function: Any
    given: Given

    def __call__(self, *arguments, **given):
        """given: fields of `Given` that differ."""
        return self.function(self.given._replace(**given), *arguments)

    def with_given(self, **given) -> "Jitted":
        """The same function with other fields of `Given`."""
        return dataclasses.replace(self, given=self.given._replace(**given))

    def lower(self, *arguments):
        """As jax.jit's."""
        return self.function.lower(self.given, *arguments)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingFunctions:
    """The pure functions of a run, for a model, an objective, an optimizer and a mesh.

    Attributes:
        graph: of the model.
        abstract: its parameters and router state, without values.
        objective: sets inputs and targets of a batch.
        optimizer: of all parameters.
        rate_N: the learning rate of each step, for an optimizer whose updates are given it.
        num_bytes_2V: bytes of text that each token decodes to, as a document's first token and
            elsewhere.
        mesh: of the devices.
        seed: of initial values and every random draw.
        loss_weights: the factors of the routers' losses, by `Router.key_of`.
        accumulate: micro-batches per step.
        sequences_per_group: of the routers' groups, which micro-batches don't split.
        global_batch_losses: with several micro-batches, run all of them forward first, so that
            losses on the statistics of the global batch are exact.
        skip_bad_steps: leave updates out that are not finite, or beyond the limits of `Given`.
        precision: the types in which parameters and moments are kept.
        teacher: from whose distribution the model learns, too.
    """

    graph: Graph
    abstract: tuple[Arrays, Arrays]
    objective: objectives.Objective
    optimizer: optax.GradientTransformation
    num_bytes_2V: np.ndarray
    mesh: Mesh
    seed: int
    rate_N: np.ndarray | None = None
    loss_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    accumulate: int = 1
    sequences_per_group: int = 1
    global_batch_losses: bool = False
    skip_bad_steps: bool = False
    precision: Precision = dataclasses.field(default_factory=Precision)
    teacher: Teacher | None = None

    def init(self, seed) -> TrainState:
        """The state before the first step."""
        params, router_state = initial_values(self.graph, *self.abstract, seed)
        return self._first_state(params, router_state)

    def _first_state(self, params: Arrays, router_state: Arrays) -> TrainState:
        declared = self.graph.declared
        params, opt_state = self.precision.init(self.optimizer, params, declared)
        return TrainState(jnp.int32(0), params, router_state, opt_state)

    @property
    def given(self) -> Given:
        """The seed, the learning rates, the losses' weights and the teacher's values."""
        rate_N = np.zeros(1) if self.rate_N is None else self.rate_N
        weights = {name: np.float32(weight) for name, weight in self.loss_weights.items()}
        limits = np.full(2, np.inf, np.float32) if self.skip_bad_steps else None
        teacher = self.teacher and self.teacher.values
        return Given(np.uint32(self.seed), np.asarray(rate_N, np.float32), weights, limits, teacher)

    def step(self, given: Given, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """One optimizer update with a whole batch: the state after it, and the step's metrics."""
        grads, metrics = self.gradients(given, state, batch)
        state, metrics = self._state_looked_at(state, metrics)
        optimizer = optax.with_extra_args_support(self.optimizer)
        rate = given.rate_N[state.step]
        params, opt_state, updates = self.precision.update(
            optimizer,
            grads,
            state.opt_state,
            state.params,
            self.graph.declared,
            mixed(given.seed ^ mixed(state.step.astype(jnp.uint32))),
            rate=rate,
        )
        router_state = state.router_state
        if metrics.routers is not None and router_state:
            model = self.graph.merge(params, router_state)
            model.update_router_state(metrics.routers.stats)
            router_state = split(model)[2]
        metrics = dataclasses.replace(metrics, update_norm=optax.tree.norm(updates))
        after = TrainState(state.step + 1, params, router_state, opt_state)
        return self._checked(given, state, after, grads, metrics)

    def _state_looked_at(self, state: TrainState, metrics) -> tuple[TrainState, StepMetrics]:
        """The same state, and metrics with its broken parameters where loss or gradients are bad.

        The update has to wait, since it overwrites the parameters.
        """
        ok = finite.is_finite((metrics.loss, metrics.grad_norms))
        broken = finite.broken_layers(ok, {"params": state.params})
        params, broken = jax.lax.optimization_barrier((state.params, broken))
        metrics = dataclasses.replace(metrics, broken=broken)
        return dataclasses.replace(state, params=params), metrics

    def _checked(
        self, given: Given, before: TrainState, after: TrainState, grads: Arrays, metrics
    ) -> tuple[TrainState, StepMetrics]:
        """The state after a step, with a bad update left out if asked for, and where it is bad."""
        norms = metrics.grad_norms, metrics.update_norm
        ok = finite.is_finite((metrics.loss, norms, after.router_state, after.opt_state))
        looked_at = {
            "gradients": grads,
            "router_state": after.router_state,
            "opt_state": after.opt_state,
        }
        broken = (metrics.broken or {}) | finite.broken_layers(ok, looked_at)
        metrics = dataclasses.replace(metrics, broken=broken)
        if given.limits is None:
            return after, metrics
        loss, norm = given.limits
        skipped = ~ok | (metrics.loss > loss) | (metrics.grad_norms["all"] > norm)
        kept = jax.tree.map(lambda new, old: jnp.where(skipped, old, new), after, before)
        kept = dataclasses.replace(kept, step=after.step)
        return kept, dataclasses.replace(metrics, skipped=skipped)

    def gradients(
        self, given: Given, state: TrainState, batch: Batch
    ) -> tuple[Arrays, StepMetrics]:
        """The gradients by name and the metrics of a batch, for any number of micro-batches."""
        key = objectives.step_key(given.seed, state.step)
        num_bytes_2V = jnp.asarray(self.num_bytes_2V)
        batch = objectives.prepared(self.objective, batch, key, num_bytes_2V)
        scored = jnp.maximum(batch.scored_BT.sum(), 1)
        valid = jnp.maximum((batch.segment_BT > 0).sum(), 1)
        grad = jax.value_and_grad(self._loss, has_aux=True)

        def one(micro: Batch, global_batch: GlobalBatch | None):
            with sharding_rules(sharding.rule(self.mesh), self.mesh.devices.flat[0]):
                (_, measured), grads = grad(
                    state.params, state, micro, key, global_batch, scored, valid, given
                )
            return grads, measured

        if self.accumulate == 1:
            grads, measured = one(batch, None)
        else:
            micros = micro_batches(batch, self.accumulate, self.sequences_per_group)
            statistics = None
            if self.global_batch_losses:
                each = jax.lax.map(lambda micro: self._statistics(state, micro, key), micros)
                statistics = jax.tree.map(lambda a: a.sum(0), each)
            grads, measured = summed(
                lambda micro: one(micro, global_batch_of(statistics, micro, valid)), micros
            )
        text_bytes = objectives.text_of(self.objective, batch, num_bytes_2V)[1].sum()
        return grads, StepMetrics(
            loss=measured.losses.task,
            scored=scored,
            text_nats=measured.text_nats,
            text_bytes=text_bytes,
            routers=measured.routers,
            grad_norms=grad_norms(grads, self.graph.roles),
            mod=measured.mod,
            distillation=measured.losses.distillation,
        )

    def _loss(self, params, state, batch: Batch, key, global_batch, scored, valid, given):
        """The micro-batch's term of the training loss, and its losses and statistics."""
        model = self.graph.merge(params, state.router_state)
        tokens = objectives.tokens_of(batch, key, train=True)
        out = model(tokens.with_loss_weights(given.loss_weights), global_batch)
        num_bytes_2V = jnp.asarray(self.num_bytes_2V)
        text_BT, _ = objectives.text_of(self.objective, batch, num_bytes_2V)
        numbers = scored, valid, given.loss_weights
        if self.teacher is None:
            measured = measure(model, out, batch, text_BT, *numbers)
            return measured.losses.total, measured
        taught = *self.teacher.read(given.teacher, batch), given.teacher.temperature
        measured = measure(model, out, batch, text_BT, *numbers, taught)
        return measured.losses.distilled(given.teacher.weight), measured

    def _statistics(self, state: TrainState, micro: Batch, key):
        """The routers' statistics of a micro-batch."""
        model = self.graph.merge(state.params, state.router_state)
        with sharding_rules(sharding.rule(self.mesh), self.mesh.devices.flat[0]):
            return model(objectives.tokens_of(micro, key, train=True)).routers.stats

    def program(self) -> Program:
        """The functions, jitted for the mesh."""
        # Not from `init`: a restored model may lack the text that initial values depend on.
        shapes = jax.eval_shape(self._first_state, *self.abstract)
        shardings = state_shardings(self.graph, shapes, self.mesh)
        by_batch = sharding.by_batch(self.mesh)
        everywhere: Any = NamedSharding(self.mesh, PartitionSpec())
        taught: Any = self.teacher.shardings(self.mesh) if self.teacher else everywhere
        given = Given(everywhere, everywhere, everywhere, everywhere, taught)
        exchanges = self.mesh.shape["expert"] > 1
        is_tpu = self.mesh.devices.flat[0].platform == "tpu"
        return Program(
            init=jax.jit(self.init, out_shardings=shardings),
            step=Jitted(
                jax.jit(
                    self.step,
                    in_shardings=(given, shardings, by_batch),
                    out_shardings=(shardings, everywhere),
                    donate_argnums=1,
                    compiler_options=ASYNC_EXCHANGES if exchanges and is_tpu else None,
                ),
                self.given,
            ),
            gradients=Jitted(
                jax.jit(self.gradients, in_shardings=(given, shardings, by_batch)), self.given
            ),
            abstract_state=jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
            ),
            batch_sharding=by_batch,
        )


def state_shardings(graph: Graph, shapes: TrainState, mesh: Mesh) -> TrainState:
    """The shardings of a train state; optimizer state is sharded like its parameter."""

    def sharding_of(path, leaf):
        name = next((p.key for p in reversed(path) if getattr(p, "key", None) in graph.axes), None)
        axes = graph.axes[name] if name is not None else ()
        if len(axes) != len(leaf.shape):  # counters, and Adafactor's moments of rows and columns
            lead = axes[: stacked(axes)] if len(leaf.shape) >= stacked(axes) else ()
            axes = (*lead, *(None,) * (len(leaf.shape) - len(lead)))
        return sharding.sharding(mesh, axes, leaf.shape)

    return jax.tree_util.tree_map_with_path(sharding_of, shapes)


def grad_norms(grads: Arrays, roles: dict[str, Role]) -> dict[str, Array]:
    """L2 norms of the gradients of all parameters, of the routers' and of the experts'."""
    kinds = {"all": ROLES, "router": ("router",), "experts": ("expert",)}
    chosen = {
        kind: [grad.astype(jnp.float32) for name, grad in grads.items() if roles[name] in those]
        for kind, those in kinds.items()
    }
    return {kind: optax.tree.norm(found) for kind, found in chosen.items() if found}


def to_devices(batch: Batch, where: NamedSharding, batch_size: int) -> Batch:
    """The global batch on the mesh, from this process's sequences (`processes.rows`)."""
    first = processes.rows(where, batch_size).start

    def put(local):
        local = np.asarray(local)

        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            return local[start - first : stop - first]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), where, shard)

    return jax.tree.map(put, batch)
