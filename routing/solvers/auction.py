"""Balanced linear assignment by an auction (Bertsekas 1992), under jit and in bounded time.

T tokens, E experts, Q slots of an expert, M tokens that bid at a time, N bidders of a round.
"""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from routing.records import AnyArray
from routing.solvers.hash_tables import hash_bits

CLOSED = 1e6  # the price of an expert without slots
BIDDERS = 256


@nnx.dataclass
class Book(nnx.Pytree):
    """The state of an auction.

    Attributes:
        token_EQ: the token in each slot, -1 for none.
        bid_EQ: its bid.
        price_E: the price of a slot.
        queue_T: the tokens without a slot after the first round; from `head` on they have not bid
            since.
        bidder_M: the tokens that bid in the next round, -1 for none.
        head: an index into the queue.
        rounds: rounds so far.
    """

    token_EQ: Int[Array, "E Q"] = nnx.data()
    bid_EQ: Float[Array, "E Q"] = nnx.data()
    price_E: Float[Array, " E"] = nnx.data()
    queue_T: Int[Array, " T"] = nnx.data()
    bidder_M: Int[Array, " M"] = nnx.data()
    head: Int[Array, ""] = nnx.data()
    rounds: Int[Array, ""] = nnx.data()


def quotas(tokens, num_experts: int) -> jax.Array:
    """The number of tokens of each expert, int32 (E,): equal, or one more for the first experts."""
    index_E = jnp.arange(num_experts, dtype=jnp.int32)
    return tokens // num_experts + (index_E < tokens % num_experts)


@functools.partial(jax.jit, static_argnames=("precision", "rounds"))
def balanced_assignment(
    score_TE: Float[AnyArray, "T E"],
    valid_T: Bool[AnyArray, " T"],
    precision: float = 1e-3,
    rounds: int = 1000,
):
    """The expert of each valid token, -1 for padding: int32 (T,).

    Maximises the sum of the scores, where every expert takes exactly its quota, to within
    `precision` times the range of the scores for each token, if the rounds suffice. Tokens that
    are then left go to experts with free slots, so that the balance is exact in any case.

    The auction starts from entropic prices, which are nearly right and save many rounds where many
    tokens prefer the same expert. In a round every token without a slot bids for the expert of the
    largest value (score less price). It bids the price, plus the difference to its second-best
    value, plus an increment. An expert keeps the highest bids, and its price is the lowest of them.
    Three auctions with smaller and smaller increments start from each other's prices.

    Args:
        score_TE: any floats; those that are not finite count as the lowest.
        valid_T: False for padding.
        precision: as above.
        rounds: the most rounds of each auction.
    """
    tokens, experts = score_TE.shape
    if experts == 1:
        return jnp.where(valid_T, 0, -1).astype(jnp.int32)
    score_TE = normalised(score_TE, valid_T)
    # Equal tokens would all bid for one expert; noise below the precision separates them.
    score_TE = score_TE + precision / 2 * scattered(tokens * experts).reshape(tokens, experts)
    quota_E = quotas(valid_T.sum(dtype=jnp.int32), experts)
    price_E = entropic_prices(score_TE, valid_T, quota_E)
    price_E = jnp.where(quota_E > 0, price_E, CLOSED)
    for increment in (8 * precision, 2 * precision, precision / 2):
        book = auction(score_TE, valid_T, quota_E, price_E, increment, rounds)
        price_E = book.price_E
    return fill(book.token_EQ, valid_T, quota_E)


def auction(
    score_TE: Float[AnyArray, "T E"],
    valid_T: Bool[AnyArray, " T"],
    quota_E: Int[AnyArray, " E"],
    price_E: Float[AnyArray, " E"],
    increment,
    rounds: int,
) -> Book:
    """The auction from these prices, until every token has a slot, or for so many rounds."""

    def unfinished(book):
        return (book.rounds < rounds) & jnp.any(book.bidder_M >= 0)

    book = all_bid(score_TE, valid_T, quota_E, price_E, increment)
    return jax.lax.while_loop(unfinished, lambda book: some_bid(book, score_TE, increment), book)


def scattered(size: int) -> jax.Array:
    """Fixed pseudorandom numbers in [0, 1): float32 (size,)."""
    bits = hash_bits(jnp.arange(size, dtype=jnp.uint32) + jnp.uint32(1))
    return (bits >> 8).astype(jnp.float32) / 2**24


def normalised(score_TE: Float[AnyArray, "T E"], valid_T: Bool[AnyArray, " T"]) -> jax.Array:
    """Scores shifted and scaled to begin at 0 and end near 1; those not finite become 0.

    The unit is the range, or 20 mean absolute deviations where that is less, so that outliers don't
    make the differences of other scores too small.
    """
    good_TE = jnp.isfinite(score_TE) & valid_T[:, None]
    count = jnp.maximum(good_TE.sum(), 1)
    low = jnp.where(good_TE, score_TE, jnp.inf).min()
    high = jnp.where(good_TE, score_TE, -jnp.inf).max()
    mean = jnp.where(good_TE, score_TE, 0).sum() / count
    deviation = jnp.where(good_TE, jnp.abs(score_TE - mean), 0).sum() / count
    unit = jnp.minimum(high - low, 20 * deviation)
    return jnp.where(good_TE, score_TE - low, 0) / jnp.where(unit > 0, unit, 1)


def entropic_prices(
    score_TE: Float[AnyArray, "T E"], valid_T: Bool[AnyArray, " T"], quota_E: Int[AnyArray, " E"]
) -> jax.Array:
    """Column potentials of Sinkhorn iterations with falling temperature: float32 (E,)."""
    share_E = jnp.log(jnp.maximum(quota_E, 1).astype(score_TE.dtype))

    def iterate(price_E, temperature):
        logit_TE = (score_TE - price_E[None]) / temperature
        top_T1 = logit_TE.max(1, keepdims=True)
        weight_TE = jnp.exp(logit_TE - top_T1)
        weight_TE = weight_TE * (valid_T[:, None] / weight_TE.sum(1, keepdims=True))
        excess_E = jnp.log(jnp.maximum(weight_TE.sum(0), 1e-6)) - share_E
        return price_E + temperature * excess_E, None

    temperatures = jnp.geomspace(0.3, 0.003, 16, dtype=score_TE.dtype)
    price_E = jax.lax.scan(iterate, jnp.zeros(quota_E.shape, score_TE.dtype), temperatures)[0]
    return price_E - price_E.min()


def offers(score_NE: Float[AnyArray, "N E"], price_E: Float[AnyArray, " E"], increment):
    """The expert of largest value for each token, int32 (N,), and the token's bid for it (N,)."""
    value_NE = score_NE - price_E[None]
    first_N = jnp.argmax(value_NE, axis=1).astype(jnp.int32)
    is_first_NE = jnp.arange(price_E.shape[0])[None] == first_N[:, None]
    second_N = jnp.where(is_first_NE, -jnp.inf, value_NE).max(1)
    return first_N, price_E[first_N] + value_NE.max(1) - second_N + increment


def all_bid(
    score_TE: Float[AnyArray, "T E"],
    valid_T: Bool[AnyArray, " T"],
    quota_E: Int[AnyArray, " E"],
    price_E: Float[AnyArray, " E"],
    increment,
) -> Book:
    """The first round: all tokens bid at once, and each expert takes the best, up to its quota."""
    tokens, experts = score_TE.shape
    first_T, offer_T = offers(score_TE, price_E, increment)
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
    # Slots beyond the quota hold an infinite bid of no token.
    beyond_EQ = jnp.arange(slots)[None] >= quota_E[:, None]
    free_EQ = jnp.where(beyond_EQ, jnp.inf, -jnp.inf).astype(offer_T.dtype).ravel()
    bid_EQ = free_EQ.at[where_T].set(-lower_T, mode="drop").reshape(experts, slots)
    loses_T = (expert_T < experts) & ~wins_T
    count = loses_T.sum(dtype=jnp.int32)
    place_in_queue_T = jnp.where(loses_T, jnp.cumsum(loses_T, dtype=jnp.int32) - 1, tokens)
    queue_T = jnp.full(tokens, -1, jnp.int32).at[place_in_queue_T].set(token_T, mode="drop")
    bidders = min(BIDDERS, tokens)
    token_EQ = token_EQ.reshape(experts, slots)
    price_E = prices(bid_EQ, price_E)
    head = jnp.minimum(count, bidders)
    return Book(token_EQ, bid_EQ, price_E, queue_T, queue_T[:bidders], head, jnp.int32(0))


def some_bid(book: Book, score_TE: Float[AnyArray, "T E"], increment) -> Book:
    """A later round of M bidders: each expert takes the best bid for its cheapest slot.

    A token that loses its slot replaces the winner among the bidders; the next in the queue fills
    an empty place.
    """
    tokens, experts = score_TE.shape
    expert_E = jnp.arange(experts, dtype=jnp.int32)
    bidder_M = book.bidder_M
    first_M, offer_M = offers(score_TE[jnp.maximum(bidder_M, 0)], book.price_E, increment)
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


def prices(bid_EQ: Float[AnyArray, "E Q"], price_E: Float[AnyArray, " E"]) -> jax.Array:
    """The lowest bid of each full expert; experts with free slots keep their price: (E,)."""
    lowest_E = bid_EQ.min(1)
    return jnp.where(jnp.isfinite(lowest_E), lowest_E, price_E)


def fill(
    token_EQ: Int[AnyArray, "E Q"], valid_T: Bool[AnyArray, " T"], quota_E: Int[AnyArray, " E"]
) -> jax.Array:
    """The expert of every token (T,); tokens without a slot fill the free slots in order."""
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
