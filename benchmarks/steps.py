"""What benchmarks of single steps share: a configuration's training step, compiled and timed."""

from collections.abc import Iterable, Sequence
import math
import statistics
import time

import jax

from moe.cli import config
from moe.machine import hardware
from moe.training import metrics
from moe.training.abstract_model import Vocabulary
from moe.training.train_step import to_devices


class CompiledStep:
    """A configuration's step on one batch of its text, and the seconds of each run of it."""

    def __init__(self, files: Sequence[str], bindings: Sequence[str] = ()):
        spec = config.load(files, bindings)
        text = spec.prepare_data()
        vocabulary, tokens = Vocabulary.of(text.tokenizer), text.train.token_N
        model, program = spec.build(vocabulary, spec.build_mesh(), tokens)
        self.costs = model.costs
        self.tokens = math.prod(spec.shape)
        self.flops = model.costs.flops_per_token * self.tokens
        self.step, self.state = program.step, program.init(0)
        rows = text.train_batches(*spec.shape, spec.seed).batch(0)
        self.batch = to_devices(rows, program.batch_sharding, spec.batch_size)
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
