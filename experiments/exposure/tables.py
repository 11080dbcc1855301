"""The tables of exposure: every number for both start models, and differences paired by seed."""

from itertools import pairwise, product
from statistics import mean

from experiments.exposure.positions import matched
from experiments.grid import Row, between, paired, picked, spread, table
from experiments.looks import difference, verdict

MATCHED = (0.7, 0.9)
EQUAL, END = tuple(f"at {m}" for m in MATCHED), "at the end"
PAIRS = (  # who writes, at the same loss; and to SFT on the teacher's completions
    ("opd_reverse", "kd_reverse"),
    ("opd_forward", "kd_forward"),
    ("opd_reverse", "seqkd"),
    ("opd_forward", "seqkd"),
    ("kd_reverse", "seqkd"),
    ("kd_reverse", "kd_forward"),  # the loss, where the teacher writes and where the student does
    ("opd_reverse", "opd_forward"),
    ("sft", "seqkd"),  # the data's completions or the teacher's
)
WHOLE = "new/accuracy"
LATE, LATER = (0.95, 0.98, 0.99), range(8, 21)  # levels and updates of `rotate` that were chosen after the results


def tables(rows: list[Row], courses: list[Row]) -> None:
    """All of them; `start` tells whose runs rows are."""
    settings = groups(rows, "length", "skill")
    for (length, skill), mine in settings.items():
        at_the_end(f"{skill}, {length} digits", mine)
    for (length,), mine in groups(rows, "length").items():
        at_equal_skill(length, mine)
    for ((length, skill), mine), when in product(settings.items(), (*EQUAL, END)):
        digit_by_digit(f"{skill}, {length} digits, {when}", when, mine)
    turned(rows)
    longer(rows)
    expected(rows)
    largest(courses)
    on_the_way(picked(courses, skill="descend"))
    order_turns(picked(courses, skill="rotate", length=max(each(rows, "length"))))


def at_the_end(title: str, rows: list[Row]) -> None:
    """All arms after their last update, and differences: there, digits behind right ones need not be right equally often."""
    print(f"\n{title}, {END}, of digits 2 to the last; of whole answers, digit 1 included\n")
    columns = {name: f"{name} {END}" for name in ("right", "gap", "last gap", "wrong")} | {"whole answers": WHOLE}
    print(table(["", "start model", *columns], means_of(rows, columns.values())))
    columns = {name: f"{name} {END}" for name in ("right", "own", "gap", "wrong")} | {"whole answers": WHOLE}
    lines = (
        [f"`{a}` - `{b}`", start, *(paired(mine, a, b, number) for number in columns.values())]
        for a, b, start, mine in pairs(rows)
    )
    print(table(["paired by seed", "start model", *columns], lines))


def at_equal_skill(length: int, rows: list[Row]) -> None:
    """All arms where equally many digits behind right ones are right, a place of both skills per column."""
    places = list(product(each(rows, "skill"), EQUAL))
    header = ["start model", *(f"`{skill}` {when}" for skill, when in places)]
    for name in ("step", "gap", "last gap", "wrong"):
        print(f"\n{length} digits: {name}\n")
        lines = (
            [f"`{arm}`", start, *(spreads(picked(mine, skill=skill), f"{name} {when}") for skill, when in places)]
            for (arm, start), mine in groups(rows, "arm", "start").items()
        )
        print(table(["", *header], lines))
        lines = (
            [f"`{a}` - `{b}`", start, *(paired(picked(mine, skill=skill), a, b, f"{name} {when}") for skill, when in places)]
            for a, b, start, mine in pairs(rows)
        )
        print(table(["paired by seed", *header], lines))


def turned(rows: list[Row]) -> None:
    """How far one start model's differences of methods are another's: all pairs, lengths, skills and moments."""
    names = [f"{name} {when}" for name, when in product(("right", "gap", "wrong"), (*EQUAL, END))] + [WHOLE]
    found = []
    for mine, (a, b), number in product(groups(rows, "length", "skill").values(), PAIRS, names):
        found.append([sign(picked(mine, start=start), a, b, number) for start in each(rows, "start")])
    both = [signs for signs in found if len(signs) == 2 and all(signs)]
    print("\nDifferences of methods that both start models tell apart, and those of them with opposite signs\n")
    print(table(["on both", "opposite"], [[len(both), sum(sum(signs) == 0 for signs in both)]]))


def sign(rows: list[Row], arm: str, baseline: str, number: str) -> int:
    """Of the difference, paired by seed: 0 where its interval holds 0, has no width, or there are no pairs."""
    told = difference(rows, arm, baseline, number)
    return 0 if told is None or told.alike else verdict(told)


def digit_by_digit(title: str, when: str, rows: list[Row]) -> None:
    """The gap at each digit, at one point of the training."""
    digits, last = range(2, rows[0]["length"] + 1), f"gap {when}"
    gaps = [r | {i: r[f"right {i} {when}"] - r[f"own {i} {when}"] for i in digits} for r in rows if last in r]
    print(f"\n{title}: gap at digit\n")
    print(table(["gap at digit", "start model", *digits], means_of(gaps, digits)))


def longer(rows: list[Row]) -> None:
    """The gap and the digits behind a wrong one by length of the answer, and differences of lengths, paired by seed."""
    lines, lengths, starts = [], sorted(each(rows, "length")), each(rows, "start")
    changes = [*((b, a) for a, b in pairwise(lengths)), (lengths[-1], lengths[0])]
    arms = each(picked(rows, length=lengths[0]), "arm")
    for skill, when, arm, name in product(each(rows, "skill"), (*EQUAL, END), arms, ("gap", "wrong")):
        number, told = f"{name} {when}", []
        for start in starts:
            mine = picked(rows, skill=skill, arm=arm, start=start)
            told += [spreads(picked(mine, length=n), number) for n in lengths]
            told += [between(mine, {"length": a}, {"length": b}, number) for a, b in changes]
        lines.append([f"`{arm}`", f"`{skill}` {when}", name, *told])
    print("\nBy digits of the answer, differences of lengths paired by seed\n")
    columns = [*(f"{n} digits" for n in lengths), *(f"{a} - {b}" for a, b in changes)]
    print(table(["", "", "", *(f"{column}, {start}" for start, column in product(starts, columns))], lines))


def expected(rows: list[Row]) -> None:
    """Do the gap and the loss behind a wrong digit grow less with length for `opd_reverse` than for `seqkd`?"""
    short, long = min(each(rows, "length")), max(each(rows, "length"))
    same = ("start", "skill", "arm", "seed")
    before = {tuple(r[label] for label in same): r for r in picked(rows, length=short)}
    numbers, changes = [f"{name} {when}" for name, when in product(("gap", "wrong"), (*EQUAL, END))], []
    for r in picked(rows, length=long):
        other = before.get(tuple(r[label] for label in same), {})
        changes.append({label: r[label] for label in same} | {n: r[n] - other[n] for n in numbers if n in r and n in other})
    print(f"\nChange from {short} digits to {long}: `opd_reverse` - `seqkd`, paired by seed\n")
    columns, lines = list(product(("gap", "wrong"), each(rows, "start"))), []
    for skill, when in product(each(rows, "skill"), (*EQUAL, END)):
        mine = picked(changes, skill=skill)
        told = (paired(picked(mine, start=start), "opd_reverse", "seqkd", f"{name} {when}") for name, start in columns)
        lines.append([f"`{skill}` {when}", *told])
    print(table(["", *(f"{name}, {start}" for name, start in columns)], lines))


def largest(courses: list[Row]) -> None:
    """How large the gap becomes while arms learn."""
    print("\nThe largest gap of an arm's mean at any measurement\n")
    lines = []
    for (start, skill, length), mine in groups(courses, "start", "skill", "length").items():
        gaps = {point: mean(c["gap"] for c in some) for point, some in groups(mine, "arm", "step").items()}
        arm, step = max(gaps, key=gaps.get)
        lines.append([start, f"`{skill}`", f"{length} digits", f"`{arm}`", f"{step:g}", f"{gaps[arm, step]:.4f}"])
    print(table(["start model", "", "", "", "update", "gap"], lines))


def on_the_way(descend: list[Row]) -> None:
    """Who is ahead before the end, and what is lost again behind a wrong digit: updates chosen when the curves were seen."""
    print("\n`descend`, right behind a wrong digit at updates 35 and 80, and its changes, paired by seed\n")
    lines = []
    for (length, arm, start), mine in groups(descend, "length", "arm", "start").items():
        changes = (between(mine, {"step": 80}, {"step": at}, "wrong") for at in (35, 45, 75))
        lines.append(
            [f"{length} digits", f"`{arm}`", start, *(spreads(picked(mine, step=at), "wrong") for at in (35, 80)), *changes]
        )
    print(table(["", "", "start model", "35", "80", "80 - 35", "80 - 45", "80 - 75"], lines))
    print("\n`descend`, 8 digits: differences to `seqkd`, paired by seed\n")
    lines, starts = [], each(descend, "start")
    for arm, at, start in product(("kd_reverse", "opd_reverse", "opd_forward"), (35, 40, 45, 50), starts):
        mine = picked(descend, length=8, step=at, start=start)
        lines.append([f"`{arm}`", at, start, *(paired(mine, arm, "seqkd", name) for name in ("right", "gap", "wrong"))])
    print(table(["", "update", "start model", "right", "gap", "wrong"], lines))
    print("\n`descend` at update 50, 8 digits - 4, paired by seed\n")
    lines = []
    for arm, start in product(each(picked(descend, length=4), "arm"), starts):
        mine = picked(descend, arm=arm, step=50, start=start)
        lines.append([f"`{arm}`", start, *(between(mine, {"length": 8}, {"length": 4}, name) for name in ("right", "wrong"))])
    print(table(["", "start model", "right", "wrong"], lines))


def order_turns(rotate: list[Row]) -> None:
    """`rotate` past 0.9, behind a wrong digit: where as many digits are right behind right ones, and after as many updates."""
    print("\n`rotate`, 8 digits: `opd_reverse` - `seqkd`, paired by seed; levels and updates chosen after the results\n")
    arms, names, lines = ("opd_reverse", "seqkd"), ("right", "gap", "wrong"), []
    for (start,), mine in groups(rotate, "start").items():
        runs = [(arm, seed, some) for (arm, seed), some in groups(mine, "arm", "seed").items() if arm in arms]
        for m in LATE:
            there = [{"arm": arm, "seed": seed} | matched(numbers(some), m) for arm, seed, some in runs]
            lines.append([f"at {m}", start, "", "", paired(there, *arms, "wrong")])
        lines += [[f"update {at}", start, *(paired(picked(mine, step=at), *arms, n) for n in names)] for at in LATER]
    print(table(["", "start model", *names], lines))


def groups(rows: list[Row], *names: str) -> dict[tuple, list[Row]]:
    """Rows by their labels of these names, in the order in which these first occur."""
    found = {}
    for r in rows:
        found.setdefault(tuple(r[name] for name in names), []).append(r)
    return found


def each(rows: list[Row], name: str) -> list:
    """The labels of this name, in the order in which they first occur."""
    return [label for (label,) in groups(rows, name)]


def pairs(rows: list[Row]) -> list[tuple[str, str, str, list[Row]]]:
    """The pairs of arms that were run from a start model, its name, and its rows."""
    there, starts = groups(rows, "arm", "start"), groups(rows, "start")
    found = [(a, b, start, mine) for (a, b), ((start,), mine) in product(PAIRS, starts.items())]
    return [(a, b, start, mine) for a, b, start, mine in found if (a, start) in there and (b, start) in there]


def means_of(rows: list[Row], columns) -> list[list[str]]:
    """Lines of a table: an arm from a start model, and its mean and interval in each column."""
    return [
        [f"`{arm}`", start, *(spreads(mine, c) for c in columns)] for (arm, start), mine in groups(rows, "arm", "start").items()
    ]


def spreads(rows: list[Row], number: str | int) -> str:
    """Mean and interval of a number where it is there at all."""
    values = [r[number] for r in rows if number in r]
    return spread(values) if values else ""


def numbers(course: list[Row]) -> list[dict[str, float]]:
    """What `matched` reads of a course."""
    return [{name: c[name] for name in ("step", "right", "wrong")} for c in course]
