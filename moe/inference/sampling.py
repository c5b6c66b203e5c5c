"""How a token is drawn from a model's logits.

B sequences, V token ids.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from this many likeliest tokens; from all where None.
        top_p: draw from the fewest likeliest tokens with this much probability; all where None.
        min_p: draw from tokens with at least this share of the likeliest one's probability; all
            where None.
        repetition_penalty: logits of tokens that the text holds already, the prompt included but
            not what begins and ends a document, are divided by it where positive and multiplied
            where negative; 1 changes nothing.
        logit_bias: (token id, number) pairs: the number is added to the token's logit after the
            penalty; -inf is never drawn.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: float32 can't divide by less than 1e-30."""
        return self.temperature < 1e-30

    @property
    def counts_tokens(self) -> bool:
        """Whether a draw depends on the tokens that the text holds."""
        return self.repetition_penalty != 1

    def draw(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        """A token for each row, int32 (B,)."""
        if self.greedy:
            return jnp.argmax(self._biased(logits_BV), axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, self._kept(logits_BV)).astype(jnp.int32)

    def probabilities(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Those by which `draw` draws; all of it on the likeliest token at temperature 0."""
        if self.greedy:
            likeliest_B = jnp.argmax(self._biased(logits_BV), axis=-1)
            return jax.nn.one_hot(likeliest_B, logits_BV.shape[-1])
        return jax.nn.softmax(self._kept(logits_BV))

    def _biased(self, logits_BV: jax.Array) -> jax.Array:
        if not self.logit_bias:
            return logits_BV
        token_N, bias_N = map(jnp.asarray, zip(*self.logit_bias, strict=True))
        return logits_BV.at[:, token_N].add(bias_N.astype(logits_BV.dtype))

    def _kept(self, logits_BV: jax.Array) -> jax.Array:
        """The logits (B, V) that are drawn from; -inf where a token is left out."""
        logits_BV = self._biased(logits_BV) / self.temperature
        if self.top_k is not None:
            likeliest_BK = jax.lax.top_k(logits_BV, min(self.top_k, logits_BV.shape[-1]))[1]
            row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
            keep_BV = jnp.zeros(logits_BV.shape, bool).at[row_B1, likeliest_BK].set(True)
            logits_BV = jnp.where(keep_BV, logits_BV, -jnp.inf)
        if self.top_p is not None and self.top_p < 1:  # all, whatever their sum is rounded to
            logits_BV = nucleus(logits_BV, self.top_p)
        if self.min_p is not None:
            least_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(self.min_p)
            logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
        return logits_BV

    def draw_each(
        self,
        logits_BV: Float[Array, "B V"],
        key_B: Key[Array, " B"],
        held_BV: Bool[Array, "B V"] | None,
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """A token for each sequence by a key of its own, and its log-probability in the model.

        held_BV: the tokens that each text holds; None where draws don't depend on them.
        """
        wanted_BV = logits_BV
        if held_BV is not None:
            wanted_BV = penalised(logits_BV, held_BV, self.repetition_penalty)
        token_B = jax.vmap(lambda row_V, key: self.draw(row_V[None], key)[0])(wanted_BV, key_B)
        log_prob_BV = jax.nn.log_softmax(logits_BV)
        return token_B, jnp.take_along_axis(log_prob_BV, token_B[:, None], -1)[:, 0]


def nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """The logits (B, V), with -inf for all but the fewest likeliest tokens that reach top_p.

    Nucleus sampling (Holtzman et al. 2020).
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    prob_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, -1))
    # A token is kept while those before it don't reach top_p; so the first is always kept.
    keep_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV < max(top_p, 1e-9)
    keep_BV = jnp.take_along_axis(keep_BV, jnp.argsort(order_BV, axis=-1), -1)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def penalised(logits_BV: jax.Array, held_BV: jax.Array, penalty: float) -> jax.Array:
    """The logits (B, V), with those of held tokens lowered.

    Keskar et al. 2019, section 4.1, who divide; a negative logit is multiplied, so that it falls.
    """
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(held_BV, lower_BV, logits_BV)
