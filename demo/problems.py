"""Word problems in GSM8K's format, generated from a seed: sixteen kinds, one to five steps each.

A problem is ``{"question": str, "answer": str}``; the answer is one sentence a step with GSM8K's calculator
annotations (``<<3+4=7>>``) and closes with ``#### N``. Train and test are disjoint by construction: a problem
belongs to the test split when the hash of its question falls into one residue class, whatever the seed.

    python -m demo.problems --split test --count 200 --seed 1 > test.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from collections.abc import Callable, Iterator

Problem = dict[str, str]
Draft = tuple[str, list[str], int]  # question, one sentence a step, result

SPLITS = ("train", "test")
TEST_SHARE = 16  # one question in 16 belongs to the test split

NAMES = (
    "Ada Alan Amir Anna Ben Carla Chen Clara Dana David Elif Emma Farid Felix Grace Hana Hugo Ines Ivan Jana Jonas "
    "Kofi Lara Leo Lina Maria Mei Nadia Noah Olga Omar Paula Priya Ravi Rosa Sam Sofia Tariq Tom Yuki"
).split()
ITEMS = (
    "apples books marbles stickers pencils coins shells cards beads buttons stamps oranges cookies balloons ribbons "
    "candles flowers lemons peaches erasers bottles magnets badges postcards"
).split()
BOXES = "boxes bags baskets crates shelves jars drawers trays".split()


def _calc(expression: str) -> str:
    """``"3*4"`` -> ``"3 * 4 = <<3*4=12>>12"``, GSM8K's spelling of one step."""
    result = _value(expression)
    spaced = expression
    for operator in "+-*/":
        spaced = spaced.replace(operator, f" {operator} ")
    return f"{spaced} = <<{expression}={result}>>{result}"


def _value(expression: str) -> int:
    for operator, apply in (
        ("+", lambda a, b: a + b),
        ("-", lambda a, b: a - b),
        ("*", lambda a, b: a * b),
        ("/", lambda a, b: a // b),
    ):
        left, found, right = expression.partition(operator)
        if found:
            return apply(int(left), int(right))
    return int(expression)


def _two(rng: random.Random, words: list[str]) -> tuple[str, str]:
    first, second = rng.sample(words, 2)
    return first, second


def gain(rng: random.Random) -> Draft:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    question = f"{name} has {a} {item} and buys {b} more. How many {item} does {name} have now?"
    return question, [f"{name} has {_calc(f'{a}+{b}')} {item}."], a + b


def lose(rng: random.Random) -> Draft:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    a = rng.randint(20, 150)
    b = rng.randint(2, a - 2)
    question = f"There were {a} {item} on the table. {name} took {b} of them away. How many {item} are left?"
    return question, [f"There are {_calc(f'{a}-{b}')} {item} left."], a - b


def groups(rng: random.Random) -> Draft:
    name, item, box = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(BOXES)
    a, b = rng.randint(2, 12), rng.randint(2, 20)
    question = f"{name} fills {a} {box} with {b} {item} each. How many {item} is that in total?"
    return question, [f"That is {_calc(f'{a}*{b}')} {item}."], a * b


def share(rng: random.Random) -> Draft:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    friends, each = rng.randint(2, 12), rng.randint(2, 20)
    total = friends * each
    question = f"{name} shares {total} {item} equally among {friends} friends. How many {item} does each friend get?"
    return question, [f"Each friend gets {_calc(f'{total}/{friends}')} {item}."], each


def change(rng: random.Random) -> Draft:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    a, price = rng.randint(2, 9), rng.randint(2, 10)
    cost = a * price
    paid = cost + rng.randint(1, 50)
    question = (
        f"{name} buys {a} {item} at ${price} each and pays with ${paid}. How many dollars of change does {name} get?"
    )
    steps = [f"The {item} cost {_calc(f'{a}*{price}')} dollars.", f"The change is {_calc(f'{paid}-{cost}')} dollars."]
    return question, steps, paid - cost


def compare(rng: random.Random) -> Draft:
    (x, y), item = _two(rng, NAMES), rng.choice(ITEMS)
    a, more = rng.randint(5, 90), rng.randint(2, 60)
    question = f"{x} has {a} {item}. {y} has {more} more than {x}. How many {item} do they have together?"
    steps = [
        f"{y} has {_calc(f'{a}+{more}')} {item}.",
        f"Together they have {_calc(f'{a}+{a + more}')} {item}.",
    ]
    return question, steps, 2 * a + more


def times_as_many(rng: random.Random) -> Draft:
    (x, y), item = _two(rng, NAMES), rng.choice(ITEMS)
    a, (word, k) = rng.randint(3, 30), rng.choice([("twice", 2), ("three times", 3), ("four times", 4)])
    question = f"{x} collected {a} {item}. {y} collected {word} as many as {x}. How many did they collect altogether?"
    steps = [f"{y} collected {_calc(f'{k}*{a}')} {item}.", f"Altogether that is {_calc(f'{a}+{k * a}')} {item}."]
    return question, steps, a + k * a


def wages(rng: random.Random) -> Draft:
    name = rng.choice(NAMES)
    rate, hours, bonus = rng.randint(5, 20), rng.randint(2, 9), rng.randint(5, 50)
    pay = rate * hours
    question = (
        f"{name} earns ${rate} an hour. Today {name} worked {hours} hours and got a bonus of ${bonus}. "
        f"How many dollars did {name} earn today?"
    )
    steps = [
        f"{name} earned {_calc(f'{rate}*{hours}')} dollars for the hours.",
        f"With the bonus that is {_calc(f'{pay}+{bonus}')} dollars.",
    ]
    return question, steps, pay + bonus


def fraction_left(rng: random.Random) -> Draft:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    word, k = rng.choice([("Half", 2), ("A third", 3), ("A quarter", 4), ("A fifth", 5)])
    part = rng.randint(2, 30)
    total = k * part
    question = f"{name} had {total} {item}. {word} of them were given away. How many {item} does {name} still have?"
    steps = [f"{_calc(f'{total}/{k}')} {item} were given away.", f"{name} has {_calc(f'{total}-{part}')} {item} left."]
    return question, steps, total - part


def two_prices(rng: random.Random) -> Draft:
    name, (x, y) = rng.choice(NAMES), _two(rng, ITEMS)
    a, p, b, q = rng.randint(2, 9), rng.randint(2, 10), rng.randint(2, 9), rng.randint(2, 10)
    question = f"{name} buys {a} {x} at ${p} each and {b} {y} at ${q} each. How many dollars does {name} spend?"
    steps = [
        f"The {x} cost {_calc(f'{a}*{p}')} dollars.",
        f"The {y} cost {_calc(f'{b}*{q}')} dollars.",
        f"Together they cost {_calc(f'{a * p}+{b * q}')} dollars.",
    ]
    return question, steps, a * p + b * q


def trip(rng: random.Random) -> Draft:
    name = rng.choice(NAMES)
    v, t, w, u = rng.randint(3, 15), rng.randint(2, 6), rng.randint(3, 15), rng.randint(2, 6)
    question = (
        f"{name} rides {t} hours at {v} miles an hour and then {u} hours at {w} miles an hour. "
        f"How many miles does {name} ride?"
    )
    steps = [
        f"The first part is {_calc(f'{t}*{v}')} miles.",
        f"The second part is {_calc(f'{u}*{w}')} miles.",
        f"The whole ride is {_calc(f'{t * v}+{u * w}')} miles.",
    ]
    return question, steps, t * v + u * w


def ages(rng: random.Random) -> Draft:
    x, y = _two(rng, NAMES)
    a, k, years = rng.randint(4, 15), rng.randint(2, 4), rng.randint(2, 15)
    question = (
        f"{x} is {a} years old. {y} is {k} times as old as {x}. What will be the sum of their ages in {years} years?"
    )
    now = a + k * a
    steps = [
        f"{y} is {_calc(f'{k}*{a}')} years old.",
        f"Today the sum of their ages is {_calc(f'{a}+{k * a}')} years.",
        f"Together they grow older by {_calc(f'2*{years}')} years.",
        f"The sum will be {_calc(f'{now}+{2 * years}')} years.",
    ]
    return question, steps, now + 2 * years


def bakery(rng: random.Random) -> Draft:
    name, item, box = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(BOXES)
    a, b, price = rng.randint(2, 6), rng.randint(3, 9), rng.randint(2, 5)
    total = a * b
    kept = rng.randint(1, total - 2)
    sold = total - kept
    question = (
        f"{name} has {a} {box} of {b} {item}. {name} keeps {kept} {item} and sells the rest for ${price} each. "
        f"How many dollars does {name} get?"
    )
    steps = [
        f"{name} has {_calc(f'{a}*{b}')} {item}.",
        f"{name} sells {_calc(f'{total}-{kept}')} {item}.",
        f"{name} gets {_calc(f'{sold}*{price}')} dollars.",
    ]
    return question, steps, sold * price


def garden(rng: random.Random) -> Draft:
    name = rng.choice(NAMES)
    rows, per_row, fruit = rng.randint(2, 6), rng.randint(3, 8), rng.randint(2, 5)
    plants = rows * per_row
    lost = rng.randint(1, plants - 2)
    alive = plants - lost
    eaten = rng.randint(1, alive * fruit - 1)
    question = (
        f"{name} plants {rows} rows of {per_row} bushes. {lost} bushes die. Every other bush bears {fruit} melons, "
        f"and {name} eats {eaten} of the melons. How many melons are left?"
    )
    steps = [
        f"{name} plants {_calc(f'{rows}*{per_row}')} bushes.",
        f"{_calc(f'{plants}-{lost}')} bushes live.",
        f"They bear {_calc(f'{alive}*{fruit}')} melons.",
        f"{_calc(f'{alive * fruit}-{eaten}')} melons are left.",
    ]
    return question, steps, alive * fruit - eaten


def savings(rng: random.Random) -> Draft:
    x, y = _two(rng, NAMES)
    weekly, weeks, gift, people = rng.randint(3, 12), rng.randint(3, 9), rng.randint(5, 40), rng.randint(2, 4)
    saved = weekly * weeks
    with_gift = saved + gift
    each = rng.randint(2, max(2, (with_gift - 1) // people))
    spent = with_gift - each * people
    question = (
        f"{x} saves ${weekly} a week for {weeks} weeks and gets ${gift} from {y}. {x} spends ${spent} and divides "
        f"the rest equally among {people} jars. How many dollars more does {x} need to have $100 in one of the jars?"
    )
    steps = [
        f"{x} saves {_calc(f'{weekly}*{weeks}')} dollars.",
        f"With the gift that is {_calc(f'{saved}+{gift}')} dollars.",
        f"After spending there are {_calc(f'{with_gift}-{spent}')} dollars.",
        f"Each jar holds {_calc(f'{each * people}/{people}')} dollars.",
        f"{x} needs {_calc(f'100-{each}')} dollars more.",
    ]
    return question, steps, 100 - each


def errands(rng: random.Random) -> Draft:
    """One to five events, each a step."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    count = start = rng.randint(10, 90)
    events, steps = [], []
    for _ in range(rng.randint(1, 5)):
        if count > 12 and rng.random() < 0.5:
            amount = rng.randint(2, count - 2)
            events.append(f"loses {amount}")
            steps.append(f"After losing {amount} there are {_calc(f'{count}-{amount}')}.")
            count -= amount
        else:
            amount = rng.randint(2, 60)
            events.append(f"finds {amount}")
            steps.append(f"After finding {amount} there are {_calc(f'{count}+{amount}')}.")
            count += amount
    question = f"{name} starts with {start} {item}, then {', then '.join(events)}. How many {item} does {name} have?"
    return question, steps, count


KINDS: tuple[Callable[[random.Random], Draft], ...] = (
    gain,
    lose,
    groups,
    share,
    change,
    compare,
    times_as_many,
    wages,
    fraction_left,
    two_prices,
    trip,
    ages,
    bakery,
    garden,
    savings,
    errands,
)


def split_of(question: str) -> str:
    """The split that a question belongs to, a function of its text alone."""
    return "test" if zlib.crc32(question.encode()) % TEST_SHARE == 0 else "train"


def generate(split: str, count: int, seed: int) -> Iterator[Problem]:
    """Yield ``count`` problems of ``split``, the kinds in random order, the same for the same seed."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = random.Random(f"{split}-{seed}")
    while count:
        question, steps, result = rng.choice(KINDS)(rng)
        if split_of(question) == split:
            yield {"question": question, "answer": "\n".join([*steps, f"#### {result}"])}
            count -= 1


def as_text(problem: Problem) -> str:
    """The layout that lm-eval's gsm8k task prompts with, and that the model is trained on."""
    return f"Question: {problem['question']}\nAnswer: {problem['answer']}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.problems", description=__doc__.partition("\n")[0])
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--count", type=int, default=200, help="how many problems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--pack", type=int, metavar="N", help='write {"text": ...} lines of N problems each instead')
    args = parser.parse_args()
    problems = list(generate(args.split, args.count, args.seed))
    if args.pack:
        texts = ["\n\n".join(map(as_text, problems[i : i + args.pack])) for i in range(0, len(problems), args.pack)]
        rows: list[dict[str, str]] = [{"text": text} for text in texts]
    else:
        rows = problems
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
