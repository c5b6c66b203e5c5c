"""Settings and routers that a model or its MoE layer refuses."""

import functools

from models import D, T, model, moe, tokens
import pytest

from layers.attention import Attention
from layers.dispatch import Sorted
from layers.experts.default_vectors import DefaultVectors
from layers.experts.latent import LatentExperts
from layers.experts.segmented import SegmentedExperts
from layers.experts.shared import SharedExpert
from layers.experts.zero_computation import ZeroCopyConstant
from layers.moe_layer import MoELayer
from routing import (
    BalanceLoss,
    Capacity,
    ExpertChoiceRouter,
    MixtureOfDepths,
    MultiHash,
    SoftMoE,
    Switch,
    TopK,
    initialize,
)

# Refused.


@pytest.mark.parametrize(
    "router", [functools.partial(ExpertChoiceRouter, evaluation="tokens"), SoftMoE], ids=str
)
def test_a_decoder_refuses_a_router_that_sees_the_future(router):
    with pytest.raises(ValueError, match=r"(?s)is not causal .*in a decoder use TopK.*MaskedToken"):
        model(moe=moe(router))
    model(moe=moe(router), causal=False)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"positions": "absolute"}, "Transformer.positions='absolute': one of rotary, alibi"),
        ({"remat": "all"}, "Transformer.remat='all': one of none, full"),
        ({"compute_dtype": "float16"}, "one of float32, bfloat16"),
        ({"positions": "learned"}, "learned positions need Transformer.max_length"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"moe": moe(), "moe_every": 3}, "moe_every=3 leaves no such layer among 2"),
        ({"moe": moe(), "moe_every": 0}, "moe_every=0 leaves no such layer"),
        ({"moe": moe(), "moe_layers": [2]}, "list layers between 0 and 1"),
        ({"moe": moe(), "moe_layers": [0], "moe_every": 2}, "leave moe_every at 1"),
        ({"num_heads": 3}, "d_model=16 does not divide by num_heads=3"),
        ({"moe": moe(functools.partial(TopK, k=5))}, "TopK.k=5 experts per token, but there are 4"),
        ({"moe": moe(functools.partial(TopK, k=1, renormalise=True))}, "starves the router"),
        ({"moe": moe(functools.partial(TopK, k=1, gates="softmax_of_selected"))}, "starves"),
        ({"moe": moe(functools.partial(TopK, gates="hard"))}, "TopK.gates='hard': one of softmax"),
        ({"moe": moe(functools.partial(Switch, jitter=1.0))}, "Switch.jitter=1.0 must lie"),
        ({"moe": moe(sequences_per_group=0)}, "sequences_per_group=0 must be at least 1"),
        ({"moe": functools.partial(MoELayer, router=TopK, num_experts=0)}, "num_experts=0 must"),
        ({"moe": moe(activation="tanh")}, "activation='tanh'"),
        (
            {
                "moe": moe(functools.partial(ExpertChoiceRouter, capacity_factor=5.0)),
                "causal": False,
            },
            "ExpertChoice.capacity_factor=5.0 must be above 0 and at most the number of experts",
        ),
        (
            {"moe": moe(functools.partial(SoftMoE, segment=2), sequences_per_group=2)},
            "set MoELayer.sequences_per_group = 1 (it is 2)",
        ),
        ({"moe": moe(MultiHash)}, "MultiHash may name one expert several times for a token"),
        (
            {"moe": moe(experts=SegmentedExperts, activation="relu")},
            "SegmentedExperts leave gates out, so that the router's have to be 1, as MultiHash's",
        ),
        (
            {"moe": moe(MultiHash, experts=functools.partial(SegmentedExperts, segments=0))},
            "MoELayer.activation='swiglu': one of gelu, relu, relu2",
        ),
        (
            {"moe": moe(companions=(DefaultVectors, ZeroCopyConstant))},
            "not beside ZeroCopyConstant",
        ),
        (
            {"moe": moe(companions=(DefaultVectors,), experts=LatentExperts)},
            "not beside LatentExperts",
        ),
        (
            {"moe": moe(companions=(SharedExpert, SharedExpert))},
            "MoELayer.companions has two of a kind: shared, shared",
        ),
        (
            {"moe": moe(companions=(DefaultVectors,), eval_dispatcher=Sorted())},
            "MoELayer.eval_dispatcher = @Sorted() has no slots, which DefaultVectors",
        ),
        (
            {"moe": moe(experts=functools.partial(LatentExperts, width=D + 1))},
            f"LatentExperts.width={D + 1} must lie between 1 and the model's {D}",
        ),
        (
            {
                "moe": moe(
                    functools.partial(TopK, losses=(BalanceLoss(zero_computation=3),)),
                    companions=(ZeroCopyConstant,),
                )
            },
            "BalanceLoss.zero_computation=3, but the layer has 4 of them",
        ),
        (
            {"moe": moe(functools.partial(TopK, losses=(BalanceLoss(zero_computation=4),)))},
            "BalanceLoss.zero_computation=4, but the layer has 0 of them",
        ),
        (
            {"moe": moe(companions=(functools.partial(ZeroCopyConstant, share=0.0),))},
            "ZeroCopyConstant.share=0.0 must lie between 0.001 and 1",
        ),
        (
            {
                "moe": moe(functools.partial(TopK, residual=True)),
                "depth_router": MixtureOfDepths,
            },
            "TopK reads the logits of the sparse layer before",
        ),
        (
            {"depth_router": Switch},
            "makes a Switch; it has to be a DepthRouter, such as MixtureOfDepths",
        ),
        (
            {
                "depth_router": MixtureOfDepths,
                "attention": functools.partial(Attention, window=2),
            },
            "Attention.window counts tokens that go through",
        ),
        (
            {"moe": moe(functools.partial(SoftMoE, slots_per_expert=0)), "causal": False},
            "slots_per_expert=0 must be at least 1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(options, part):
    with pytest.raises(ValueError) as refusal:
        model(**options)
    assert part in str(refusal.value)


def test_a_decoder_refuses_to_drop_out_of_order_at_evaluation():
    capacity = Capacity(eval_factor=1.0, order="choice-major")
    with pytest.raises(ValueError, match="lets later tokens evict earlier ones"):
        model(moe=moe(capacity=capacity))
    model(moe=moe(capacity=capacity), causal=False)


def test_sequences_longer_than_the_learned_positions_are_refused():
    built = initialize(model(positions="learned", max_length=T - 1), 0)
    with pytest.raises(ValueError, match=r"6 tokens per sequence, but .*max_length=5"):
        built(tokens())
