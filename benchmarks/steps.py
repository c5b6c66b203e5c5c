"""Shared by benchmarks of training steps: a config's step, compiled and timed."""

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
    """A config's training step on one batch of its text; `seconds` has the time of each run."""

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
        """Run and time this number of steps, one after the other."""
        for _ in range(steps):
            start = time.perf_counter()
            self.state, self.measured = self.step(self.state, self.batch)
            jax.block_until_ready((self.state.params, self.measured.loss))
            self.seconds.append(time.perf_counter() - start)

    def kept_per_token(self) -> float:
        """Assignments that reached an expert in the last step, per token and layer."""
        routing = metrics.Routing.of(jax.device_get(self.measured.routers))
        return routing.kept_per_token(self.costs.num_experts)


def in_turns(rows: Iterable[CompiledStep], rounds: int, steps: int) -> float:
    """Run `steps` steps of each row in each round; returns FLOP/s of a matmul.

    That is the median over the rounds, each measured before its steps.
    """
    peaks = []
    for _ in range(rounds):
        peaks.append(hardware.matmul_peak())
        for row in rows:
            row.run(steps)
    return statistics.median(peaks)
