"""Moving rows by index, with backward passes that gather too: no scatter-add anywhere.

An index of -1 means "no row": it reads zeros and writes nothing.
G groups, T tokens, D width, E experts, K experts per token, C slots; N = E * C.
"""

import functools

from einops import rearrange
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def take(rows_GND: Float[Array, "G N D"], index_GM: Int[Array, "G M"]) -> jax.Array:
    """rows_GND[g, index_GM[g, m]], zero where the index is -1: (G, M, D)."""
    safe_GM = jnp.maximum(index_GM, 0)
    taken = jax.vmap(lambda rows_ND, index_M: rows_ND.at[index_M].get(mode="clip"))
    return jnp.where((index_GM >= 0)[..., None], taken(rows_GND, safe_GM), 0)


def _expert_major(rows_GND, experts: int):
    """(G, E*C, D) to (E, G, C, D)."""
    return rearrange(rows_GND, "g (e c) d -> e g c d", e=experts)


def _group_major(y_EGCD):
    """(E, G, C, D) to (G, E*C, D)."""
    return rearrange(y_EGCD, "e g c d -> g (e c) d")


@jax.custom_vjp
def dispatch_rows(
    x_GTD: Float[Array, "G T D"],
    token_GEC: Int[Array, "G E C"],
    destination_GTK: Int[Array, "G T K"] | None,
) -> Float[Array, "E G C D"]:
    """(E, G, C, D): in every slot the vector of its token. Equivalent to: one-hot(token) @ x.

    destination_GTK holds the slots of every token, from which the backward pass gathers. It is
    None where a token may have more than K slots: the backward pass then sorts slots by token.
    """
    groups, experts, slots = token_GEC.shape
    return _expert_major(take(x_GTD, token_GEC.reshape(groups, experts * slots)), experts)


def _dispatch_forward(x_GTD, token_GEC, destination_GTK):
    return dispatch_rows(x_GTD, token_GEC, destination_GTK), (
        token_GEC,
        destination_GTK,
        x_GTD.shape[1],
    )


def _dispatch_backward(saved, dx_EGCD):
    token_GEC, destination_GTK, tokens = saved
    if destination_GTK is None:
        return sum_by_token(dx_EGCD, token_GEC, tokens), None, None
    return _sum_over_k(_group_major(dx_EGCD), destination_GTK, None), None, None


dispatch_rows.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def collect_rows(
    y_EGCD: Float[Array, "E G C D"],
    token_GEC: Int[Array, "G E C"],
    destination_GTK: Int[Array, "G T K"],
) -> Float[Array, "G T D"]:
    """(G, T, D): the sum of the rows of every token: the transpose of `dispatch_rows`."""
    return _sum_over_k(_group_major(y_EGCD), destination_GTK, None)


def _collect_forward(y_EGCD, token_GEC, destination_GTK):
    return collect_rows(y_EGCD, token_GEC, destination_GTK), (token_GEC, destination_GTK)


def _collect_backward(saved, dy_GTD):
    return dispatch_rows(dy_GTD, *saved), None, None


collect_rows.defvjp(_collect_forward, _collect_backward)


def permute(
    rows_ND: Float[Array, "N D"], source_M: Int[Array, " M"], destination_N: Int[Array, " N"]
) -> jax.Array:
    """(M, D): row source_M[m] in place m; destination_N is the inverse; -1 for none."""
    return dispatch_rows(rows_ND[None], source_M[None, None], destination_N[None, :, None])[0, 0]


@jax.custom_vjp
def permute_numbers(
    a_N: Float[Array, " N"], source_M: Int[Array, " M"], destination_N: Int[Array, " N"]
) -> jax.Array:
    """(M,): as `permute`, for a number in each place, without an axis of width 1."""
    return jnp.where(source_M >= 0, a_N.at[jnp.maximum(source_M, 0)].get(mode="clip"), 0)


def _numbers_forward(a_N, source_M, destination_N):
    return permute_numbers(a_N, source_M, destination_N), (source_M, destination_N)


def _numbers_backward(saved, da_M):
    source_M, destination_N = saved
    return permute_numbers(da_M, destination_N, source_M), None, None


permute_numbers.defvjp(_numbers_forward, _numbers_backward)


def _sum_over_k(rows_GND, destination_GTK, gate_GTK):
    """(G, T, D): sum over k of gate * rows[destination], by one gather for each k."""
    total_GTD = jnp.zeros((*destination_GTK.shape[:2], rows_GND.shape[-1]), rows_GND.dtype)
    for k in range(destination_GTK.shape[2]):
        taken_GTD = take(rows_GND, destination_GTK[..., k])
        if gate_GTK is not None:
            taken_GTD = taken_GTD * gate_GTK[..., k, None]
        total_GTD = total_GTD + taken_GTD
    return total_GTD


@jax.custom_vjp
def combine_rows(
    y_EGCD: Float[Array, "E G C D"],
    gate_GTK: Float[Array, "G T K"],
    source_GEC: Int[Array, "G E C"],
    destination_GTK: Int[Array, "G T K"],
) -> jax.Array:
    """(G, T, D): sum over k of gate_GTK * y[destination_GTK]; source_GEC is the inverse."""
    return _sum_over_k(_group_major(y_EGCD), destination_GTK, gate_GTK)


def _combine_forward(y_EGCD, gate_GTK, source_GEC, destination_GTK):
    saved = (y_EGCD, gate_GTK, source_GEC, destination_GTK)
    return combine_rows(y_EGCD, gate_GTK, source_GEC, destination_GTK), saved


def _combine_backward(saved, dy_GTD):
    y_EGCD, gate_GTK, source_GEC, destination_GTK = saved
    groups, experts, slots = source_GEC.shape
    k = destination_GTK.shape[2]
    source_GN = source_GEC.reshape(groups, experts * slots)
    gate_GN1 = take(gate_GTK.reshape(groups, -1, 1), source_GN)
    token_GN = jnp.where(source_GN < 0, -1, source_GN // k)
    dy_GND = take(dy_GTD, token_GN)
    dy_EGCD = _expert_major(dy_GND * gate_GN1, experts)
    # d gate: the dot product in slot order, then one scalar gathered for each assignment.
    rows_GND = jnp.where((source_GN >= 0)[..., None], _group_major(y_EGCD), 0)
    dot_GN1 = jnp.sum(dy_GND * rows_GND, axis=-1, keepdims=True)
    dgate_GTK = take(dot_GN1, destination_GTK.reshape(groups, -1)).reshape(gate_GTK.shape)
    return dy_EGCD, dgate_GTK, None, None


combine_rows.defvjp(_combine_forward, _combine_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_by_token(
    y_EGCD: Float[Array, "E G C D"], token_GEC: Int[Array, "G E C"], num_tokens: int
) -> jax.Array:
    """(G, T, D): the sum of all rows of each token; deterministic, by sorting and gathering.

    Rows are sorted by token; round j adds every token's j-th row, until no token has one left.
    """
    rows_GND = _group_major(y_EGCD)
    groups, _, width = rows_GND.shape
    token_GN = token_GEC.reshape(groups, -1)
    token_GN = jnp.where(token_GN < 0, num_tokens, token_GN)
    order_GN = jnp.argsort(token_GN, axis=1, stable=True)
    sorted_GN = jnp.take_along_axis(token_GN, order_GN, axis=1)
    edges = jax.vmap(lambda s: jnp.searchsorted(s, jnp.arange(num_tokens + 1)))(sorted_GN)
    start_GT, count_GT = edges[:, :-1], jnp.diff(edges, axis=1)

    def add(carry):
        j, total_GTD = carry
        place_GT = jnp.minimum(start_GT + j, order_GN.shape[1] - 1)
        row_GT = jnp.take_along_axis(order_GN, place_GT, axis=1)
        return j + 1, total_GTD + take(rows_GND, jnp.where(j < count_GT, row_GT, -1))

    rounds = count_GT.max()
    start = (jnp.int32(0), jnp.zeros((groups, num_tokens, width), rows_GND.dtype))
    return jax.lax.while_loop(lambda carry: carry[0] < rounds, add, start)[1]


def _sum_forward(y_EGCD, token_GEC, num_tokens):
    return sum_by_token(y_EGCD, token_GEC, num_tokens), token_GEC


def _sum_backward(num_tokens, token_GEC, dy_GTD):
    return dispatch_rows(dy_GTD, token_GEC, None), None


sum_by_token.defvjp(_sum_forward, _sum_backward)
