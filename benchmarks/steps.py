"""What benchmarks of single steps share: a configuration's training step, compiled and timed."""

from collections.abc import Iterable, Sequence
import statistics
import time

import gin
import jax

from moe import settings
from moe.machine import hardware
from moe.model.sharding import MeshShape
from moe.training import assemble, metrics
from moe.training.objective import NextToken
from moe.training.train_step import to_devices


class CompiledStep:
    """A configuration's step on one batch of its text, and the seconds of each run of it."""

    def __init__(self, files: Sequence[str], bindings: Sequence[str] = ()):
        settings.load(list(files), bindings)
        run = gin.get_bindings("train")
        text = run["data"].prepare()
        batch, length = run["batch_size"], run["sequence_length"]
        model = assemble.assemble(
            run["model"],
            run.get("objective") or NextToken(),
            token_vocabulary=text.tokenizer.vocab_size,
            training_tokens=text.train.token_N,
            batch_size=batch,
            sequence_length=length,
        )
        self.costs = model.costs
        self.tokens = batch * length
        self.flops = model.costs.flops_per_token * self.tokens
        program = assemble.program(
            model,
            run["optimizer"],
            MeshShape().build(),
            steps=run["steps"],
            seed=0,
            accumulate=run.get("accumulate", 1),
            batch_size=batch,
        )
        self.step, self.state = program.step, program.init(0)
        rows = text.train_batches(batch, length, 0).batch(0)
        self.batch = to_devices(rows, program.batch_sharding, batch)
        self.seconds: list[float] = []
        self.run(1)
        self.seconds.clear()  # the first step compiled

    def run(self, steps: int) -> None:
        """So many steps, each waited for."""
        for _ in range(steps):
            start = time.perf_counter()
            self.state, self.measured = self.step(self.state, self.batch)
            jax.block_until_ready((self.state.params, self.measured.loss))
            self.seconds.append(time.perf_counter() - start)

    def kept_per_token(self) -> float:
        """Assignments of the last step that reached an expert, per token and layer."""
        routing = metrics.Routing.of(jax.device_get(self.measured.routers))
        return routing.kept_per_token(self.costs.num_experts)


def in_turns(rows: Iterable[CompiledStep], rounds: int, steps: int) -> float:
    """So many steps of each row in every round; the median of a matmul's FLOP/s between them."""
    peaks = []
    for _ in range(rounds):
        peaks.append(hardware.matmul_peak())
        for row in rows:
            row.run(steps)
    return statistics.median(peaks)
