"""The laws that come with the program, by name."""

from moe.scaling.laws.chinchilla import CHINCHILLA, DENSE
from moe.scaling.laws.granularity import GRANULARITY
from moe.scaling.laws.joint import JOINT
from moe.scaling.laws.law import Law
from moe.scaling.laws.leverage import LEVERAGE
from moe.scaling.laws.routed import ROUTED
from moe.scaling.laws.sparsity import SPARSITY

ALL = (CHINCHILLA, ROUTED, JOINT, GRANULARITY, SPARSITY, LEVERAGE, DENSE)
LAWS: dict[str, Law] = {law.name: law for law in ALL}
