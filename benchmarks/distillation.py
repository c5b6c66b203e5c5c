"""How much of a mixture's gain over a dense model survives in a dense student that it teaches?

    python benchmarks/distillation.py --json=benchmarks/results/distillation.json

All models are `runs/micro.gin` at one active size, number of steps and learning rate. The teacher
is a mixture that hashes the token and the one before to 16 experts: of the shipped routers, the one
whose gain is far above the noise after so few steps. Students are the dense model and a mixture of
4 experts, each from text alone and distilled, with the same seed; a teacher has another one.
Control: a dense student that a dense model of its own size teaches, which has no gain to hand on.
A quarter of an hour on two idle cores.
"""

import shutil
import statistics

from runs import Place, arguments, by_case, measure, rows, spread

COMMON = ("train.prompts = ()", "train.artifacts = False", "AdamW.learning_rate = 0.05")
DENSE = ("models/dense.gin", "FeedForward.d_ff = 128")
MIXTURE = ("routers/hash_bigram.gin", "MoELayer.d_ff = 128")
LARGE, SMALL = ((*MIXTURE, f"MoELayer.num_experts = {n}") for n in (16, 4))
TEACHER, STUDENT, SMALLER = "mixture of 16, the teacher", "dense", "mixture of 4"
TAUGHT, SMALLER_TAUGHT = "dense, distilled", "mixture of 4, distilled"
CONTROL = "dense, distilled from a dense model"
# A file and settings, what is added to the seed, and whose student it is.
CASES = {
    TEACHER: (LARGE, 100, None),
    STUDENT: (DENSE, 0, None),
    TAUGHT: (DENSE, 0, TEACHER),
    SMALLER: (SMALL, 0, None),
    SMALLER_TAUGHT: (SMALL, 0, TEACHER),
    CONTROL: (DENSE, 50, STUDENT),
}


def one(case: str, seed: int, place: Place, steps: int, temperature: float, weight: float) -> dict:
    """Held-out bits per byte of a run; folders of teachers are kept until the seed's last case."""
    (file, *changes), offset, teacher = CASES[case]
    bindings = [*COMMON, *changes, f"train.steps = {steps}", f"train.seed = {seed + offset}"]
    if teacher is not None:
        bindings += ["train.distil = @Distillation()", f"Distillation.weight = {weight}"]
        bindings += [f"Distillation.teacher = {str(folder_of(place, teacher, seed))!r}"]
        bindings += [f"Distillation.temperature = {temperature}"]
    workdir = folder_of(place, case, seed)
    shutil.rmtree(workdir, ignore_errors=True)
    files = ["--gin_file=micro.gin", f"--gin_file={file}"]
    summary = place.moe("train", *files, f"--workdir={workdir}", bindings=bindings)
    if case == list(CASES)[-1]:
        for other in CASES:
            shutil.rmtree(folder_of(place, other, seed), ignore_errors=True)
    kept = ("parameters_total", "parameters_active", "train_seconds")
    return {"bits_per_byte": summary["val_bits_per_byte"], **{name: summary[name] for name in kept}}


def folder_of(place: Place, case: str, seed: int):
    return place.folder / f"distillation-{list(CASES).index(case)}-{seed}"


def table(runs: list[dict], steps: int, temperature: float, weight: float) -> str:
    found = by_case(runs)
    body = [
        (
            case,
            f"{own[0]['parameters_total']:,}",
            f"{own[0]['parameters_active']:,}",
            spread([run["bits_per_byte"] for run in own]),
            len(own),
        )
        for case, own in found.items()
    ]
    header = ("model", "parameters", "active", "bits per byte", "seeds")
    title = f"{steps} steps, temperature {temperature:g}, weight {weight:g}; mean ± standard error."
    return "\n\n".join([title, rows(header, body), *shares(found)])


def shares(found: dict[str, list[dict]]) -> list[str]:
    """A line for each student: what distilling brings it, and the share of the teacher's gain."""
    bits = {case: {r["seed"]: r["bits_per_byte"] for r in own} for case, own in found.items()}
    lines = []
    for name, student, taught in (
        ("dense student", STUDENT, TAUGHT),
        ("mixture of 4", SMALLER, SMALLER_TAUGHT),
        ("control", STUDENT, CONTROL),
    ):
        seeds = [s for s in bits.get(taught, ()) if s in bits[student] and s in bits[TEACHER]]
        if not seeds:
            continue
        gains = [bits[student][s] - bits[taught][s] for s in seeds]
        room = [bits[STUDENT][s] - bits[TEACHER][s] for s in seeds]
        share = statistics.mean(gains) / statistics.mean(room)
        lines.append(
            f"{name}: distilling brings {spread(gains)} bits per byte by seed, {share:.0%} of the "
            f"{spread(room)} that the teacher is better than the dense model."
        )
    return lines


if __name__ == "__main__":
    given = arguments(
        __doc__,
        steps=200,
        temperature={"type": float, "default": 2.0},
        weight={"type": float, "default": 0.5},
    )
    numbers = {"temperature": given.temperature, "weight": given.weight}
    measure(given, tuple(CASES), one, table, **numbers)
