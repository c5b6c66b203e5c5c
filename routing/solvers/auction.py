"""Balanced linear assignment by an auction (Bertsekas 1992), under jit and in bounded time.

T tokens, E experts, Q slots of an expert, M tokens that bid at a time.
"""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from routing.solvers.hash_tables import mixed

CLOSED = 1e6  # the price of an expert that takes nobody
BIDDERS = 256


@nnx.dataclass
class Book(nnx.Pytree):
    """Who holds which slot at which bid, and who bids; -1 is a free slot, or no bidder.

    queue_T lists the tokens that were open after the first round; bidder_M are those of them, and
    those who lost their slot since, that bid now; the rest, from `head` on, wait.
    """

    token_EQ: Int[Array, "E Q"] = nnx.data()
    bid_EQ: Float[Array, "E Q"] = nnx.data()
    price_E: Float[Array, " E"] = nnx.data()
    queue_T: Int[Array, " T"] = nnx.data()
    bidder_M: Int[Array, " M"] = nnx.data()
    head: Int[Array, ""] = nnx.data()
    rounds: Int[Array, ""] = nnx.data()


def quotas(tokens, num_experts: int) -> jax.Array:
    """How many tokens each expert takes: they differ by one at most, the first take more. int32."""
    index_E = jnp.arange(num_experts, dtype=jnp.int32)
    return tokens // num_experts + (index_E < tokens % num_experts)


@functools.partial(jax.jit, static_argnames=("precision", "rounds"))
def balanced_assignment(score_TE, valid_T, precision: float = 1e-3, rounds: int = 1000):
    """The expert of each valid token, -1 for padding: int32 (T,).

    Maximises the sum of the scores with every expert taking its quota exactly, to within
    `precision` times the scores' spread for each token, as long as the rounds suffice. What is
    still open after them goes to the experts with room, so that the balance holds in any case.

    Entropic prices come first: they are nearly right, and where many tokens want the same they
    spare the auction its price wars. Then every open token bids for the expert with the best value,
    its score less its price, as much more than the price as it prefers that expert to its second
    choice; an expert keeps its quota of the highest bids, and the lowest of them is its price.
    Three auctions follow each other, the first with coarse steps, each from the prices before.
    """
    tokens, experts = score_TE.shape
    if experts == 1:
        return jnp.where(valid_T, 0, -1).astype(jnp.int32)
    score_TE = normalised(score_TE, valid_T)
    # Equal tokens would all bid for the same expert; the difference is within the precision.
    score_TE = score_TE + precision / 2 * scattered(tokens * experts).reshape(tokens, experts)
    quota_E = quotas(valid_T.sum(dtype=jnp.int32), experts)
    price_E = entropic_prices(score_TE, valid_T, quota_E)
    price_E = jnp.where(quota_E > 0, price_E, CLOSED)
    for step in (8 * precision, 2 * precision, precision / 2):
        book = auction(score_TE, valid_T, quota_E, price_E, step, rounds)
        price_E = book.price_E
    return fill(book.token_EQ, valid_T, quota_E)


def auction(score_TE, valid_T, quota_E, price_E, step, rounds: int) -> Book:
    """From these prices until no token is open, or for so many rounds."""

    def unfinished(book):
        return (book.rounds < rounds) & jnp.any(book.bidder_M >= 0)

    book = all_bid(score_TE, valid_T, quota_E, price_E, step)
    return jax.lax.while_loop(unfinished, lambda book: some_bid(book, score_TE, step), book)


def scattered(size: int) -> jax.Array:
    """Numbers in [0, 1) that look random and are the same every time: float32 (size,)."""
    bits = mixed(jnp.arange(size, dtype=jnp.uint32) + jnp.uint32(1))
    return (bits >> 8).astype(jnp.float32) / 2**24


def normalised(score_TE, valid_T) -> jax.Array:
    """Scores of valid tokens, from 0, mostly up to 1; what is not finite counts as the lowest.

    The unit is the range, or for long tails 20 mean deviations: a few outliers blur no others.
    """
    good_TE = jnp.isfinite(score_TE) & valid_T[:, None]
    count = jnp.maximum(good_TE.sum(), 1)
    low = jnp.where(good_TE, score_TE, jnp.inf).min()
    high = jnp.where(good_TE, score_TE, -jnp.inf).max()
    mean = jnp.where(good_TE, score_TE, 0).sum() / count
    deviation = jnp.where(good_TE, jnp.abs(score_TE - mean), 0).sum() / count
    unit = jnp.minimum(high - low, 20 * deviation)
    return jnp.where(good_TE, score_TE - low, 0) / jnp.where(unit > 0, unit, 1)


def entropic_prices(score_TE, valid_T, quota_E) -> jax.Array:
    """Column potentials of a Sinkhorn iteration that cools down: float32 (E,)."""
    share_E = jnp.log(jnp.maximum(quota_E, 1).astype(score_TE.dtype))

    def one(price_E, temperature):
        logit_TE = (score_TE - price_E[None]) / temperature
        top_T1 = logit_TE.max(1, keepdims=True)
        weight_TE = jnp.exp(logit_TE - top_T1)
        weight_TE = weight_TE * (valid_T[:, None] / weight_TE.sum(1, keepdims=True))
        excess_E = jnp.log(jnp.maximum(weight_TE.sum(0), 1e-6)) - share_E
        return price_E + temperature * excess_E, None

    temperatures = jnp.geomspace(0.3, 0.003, 16, dtype=score_TE.dtype)
    price_E = jax.lax.scan(one, jnp.zeros(quota_E.shape, score_TE.dtype), temperatures)[0]
    return price_E - price_E.min()


def offers(score_XE, price_E, step):
    """Each token's best expert, int32 (X,), and its bid."""
    value_XE = score_XE - price_E[None]
    first_X = jnp.argmax(value_XE, axis=1).astype(jnp.int32)
    is_first_XE = jnp.arange(price_E.shape[0])[None] == first_X[:, None]
    second_X = jnp.where(is_first_XE, -jnp.inf, value_XE).max(1)
    return first_X, price_E[first_X] + value_XE.max(1) - second_X + step


def all_bid(score_TE, valid_T, quota_E, price_E, step) -> Book:
    """The first round: every token bids at once, and each expert takes its quota of the best."""
    tokens, experts = score_TE.shape
    first_T, offer_T = offers(score_TE, price_E, step)
    first_T = jnp.where(valid_T, first_T, experts)
    place_T = jnp.arange(tokens, dtype=jnp.int32)
    expert_T, lower_T, token_T = jax.lax.sort((first_T, -offer_T, place_T), num_keys=2)
    start_E = jnp.searchsorted(expert_T, jnp.arange(experts, dtype=jnp.int32)).astype(jnp.int32)
    safe_T = jnp.minimum(expert_T, experts - 1)
    rank_T = place_T - start_E[safe_T]
    wins_T = (expert_T < experts) & (rank_T < quota_E[safe_T])
    slots = math.ceil(tokens / experts)
    where_T = jnp.where(wins_T, safe_T * slots + rank_T, experts * slots)
    token_EQ = jnp.full(experts * slots, -1, jnp.int32).at[where_T].set(token_T, mode="drop")
    # A slot beyond the quota holds an unbeatable bid of nobody's.
    beyond_EQ = jnp.arange(slots)[None] >= quota_E[:, None]
    free_EQ = jnp.where(beyond_EQ, jnp.inf, -jnp.inf).astype(offer_T.dtype).ravel()
    bid_EQ = free_EQ.at[where_T].set(-lower_T, mode="drop").reshape(experts, slots)
    loses_T = (expert_T < experts) & ~wins_T
    count = loses_T.sum(dtype=jnp.int32)
    line_T = jnp.where(loses_T, jnp.cumsum(loses_T, dtype=jnp.int32) - 1, tokens)
    queue_T = jnp.full(tokens, -1, jnp.int32).at[line_T].set(token_T, mode="drop")
    bidders = min(BIDDERS, tokens)
    token_EQ = token_EQ.reshape(experts, slots)
    price_E = prices(bid_EQ, price_E)
    head = jnp.minimum(count, bidders)
    return Book(token_EQ, bid_EQ, price_E, queue_T, queue_T[:bidders], head, jnp.int32(0))


def some_bid(book: Book, score_TE, step) -> Book:
    """A round of the M bidders; each expert takes the best bid for its cheapest slot.

    Whoever loses a slot takes the winner's place among the bidders; an empty place goes to the
    next in the queue.
    """
    tokens, experts = score_TE.shape
    expert_E = jnp.arange(experts, dtype=jnp.int32)
    bidder_M = book.bidder_M
    first_M, offer_M = offers(score_TE[jnp.maximum(bidder_M, 0)], book.price_E, step)
    mine_EM = (first_M[None] == expert_E[:, None]) & (bidder_M >= 0)[None]
    bid_EM = jnp.where(mine_EM, offer_M[None], -jnp.inf)
    best_E, winner_E = bid_EM.max(1), jnp.argmax(bid_EM, axis=1).astype(jnp.int32)
    slot_E = jnp.argmin(book.bid_EQ, axis=1)
    takes_E = best_E > book.bid_EQ[expert_E, slot_E]
    loser_E = book.token_EQ[expert_E, slot_E]
    here_EQ = (jnp.arange(book.token_EQ.shape[1])[None] == slot_E[:, None]) & takes_E[:, None]
    token_EQ = jnp.where(here_EQ, bidder_M[winner_E][:, None], book.token_EQ)
    bid_EQ = jnp.where(here_EQ, best_E[:, None], book.bid_EQ)
    place_E = jnp.where(takes_E, winner_E, bidder_M.shape[0])
    bidder_M = bidder_M.at[place_E].set(loser_E, mode="drop")
    next_M = book.head + jnp.cumsum(bidder_M < 0, dtype=jnp.int32) - 1
    queued_M = jnp.where(next_M < tokens, book.queue_T[jnp.minimum(next_M, tokens - 1)], -1)
    head = jnp.minimum(next_M[-1] + 1, tokens)
    bidder_M = jnp.where(bidder_M < 0, queued_M, bidder_M)
    price_E = prices(bid_EQ, book.price_E)
    return Book(token_EQ, bid_EQ, price_E, book.queue_T, bidder_M, head, book.rounds + 1)


def prices(bid_EQ, price_E) -> jax.Array:
    """The lowest bid that a full expert holds; one with room keeps its price."""
    lowest_E = bid_EQ.min(1)
    return jnp.where(jnp.isfinite(lowest_E), lowest_E, price_E)


def fill(token_EQ, valid_T, quota_E) -> jax.Array:
    """The owner of every token; open ones, in order, go to experts with room, in order."""
    experts, slots = token_EQ.shape
    tokens = valid_T.shape[0]
    holder_EQ = jnp.broadcast_to(jnp.arange(experts, dtype=jnp.int32)[:, None], token_EQ.shape)
    where_N = jnp.where(token_EQ >= 0, token_EQ, tokens).ravel()
    owner_T = jnp.full(tokens, -1, jnp.int32).at[where_N].set(holder_EQ.ravel(), mode="drop")
    room_E = jnp.cumsum(quota_E - jnp.sum(token_EQ >= 0, axis=1, dtype=jnp.int32))
    open_T = valid_T & (owner_T < 0)
    number_T = jnp.cumsum(open_T, dtype=jnp.int32) - 1
    given_T = jnp.searchsorted(room_E, number_T, side="right").astype(jnp.int32)
    return jnp.where(open_T, given_T, owner_T)
