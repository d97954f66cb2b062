"""Small tasks as chat turns: arithmetic, facts, lists, JSON, copying, remembering."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import vocabulary as words

Message = dict[str, Any]
Turns = list[Message]
Task = Callable[[Random], Turns]


def turns(question: str, answer: str) -> Turns:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# Arithmetic

SYMBOLS = {
    "+": ("plus", "and"),
    "-": ("minus", "take away"),
    "*": ("times", "multiplied by"),
    "/": ("divided by", "over"),
}


def is_held_out(a: int, b: int, symbol: str) -> bool:
    """Whether a two-digit sum or difference is kept from training, to test that the rest was understood.

    It is the ordered pair that is kept: of a sum, training may hold the same numbers the other way round.
    """
    return symbol in "+-" and a >= 10 and b >= 10 and (a * 31 + b * 17) % 10 == 0


def compute(a: int, b: int, symbol: str) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[symbol]


def operands(random: Random) -> tuple[int, int, str]:
    """A sum, difference, product or exact quotient of small numbers that is not held out."""
    while True:
        symbol = random.choices("+-*/", (6, 5, 3, 1))[0]
        if symbol == "*":
            a, b = random.randint(0, 12), random.randint(0, 12)
        elif symbol == "/":
            b = random.randint(1, 12)
            a = b * random.randint(0, 12)
        else:
            digits = random.random()
            a = random.randint(0, 9 if digits < 0.25 else 99)
            b = random.randint(0, 9 if digits < 0.45 else 99)
            if symbol == "-" and a < b and (a > 9 or b > 9):
                a, b = b, a
        if not is_held_out(a, b, symbol):
            return a, b, symbol


def arithmetic(random: Random) -> Turns:
    a, b, symbol = operands(random)
    form = random.random()
    if form < 0.08 and symbol in "+-" and a >= b:
        thing = random.choice(("apples", "books", "coins", "cats", "eggs", "stones"))
        change = "get" if symbol == "+" else "lose"
        more = " more" if symbol == "+" else ""
        question = f"I have {a} {thing} and {change} {b}{more}. How many {thing} do I have?"
        return turns(question, f"You have {compute(a, b, symbol)} {thing}.")
    spoken = random.choice(SYMBOLS[symbol]) if symbol != "+" else "plus"
    between = random.choice((symbol, symbol, symbol, "x" if symbol == "*" else symbol, spoken))
    tight = between in "+-*/x" and random.random() < 0.25
    expression = f"{a}{between}{b}" if tight else f"{a} {between} {b}"
    question = random.choice(
        (
            "What is {}?",
            "What is {}?",
            "{}",
            "{} =",
            "{}=?",
            "What's {}?",
            "Calculate {}.",
            "Compute {}",
            "How much is {}?",
        )
    ).format(expression)
    return turns(question, f"{a} {symbol} {b} = {compute(a, b, symbol)}.")


def drill(random: Random) -> str:
    """Lines of plain arithmetic: the cheapest way to learn it."""
    lines = []
    for _ in range(random.randint(8, 20)):
        a, b, symbol = operands(random)
        lines.append(f"{a} {symbol} {b} = {compute(a, b, symbol)}")
    return "\n".join(lines)


def comparison(random: Random) -> Turns:
    a, b = random.sample(range(100), 2)
    if random.random() < 0.3:
        kind = "even" if a % 2 == 0 else "odd"
        return turns(random.choice((f"Is {a} even or odd?", f"Is {a} odd or even?")), f"{a} is {kind}.")
    if random.random() < 0.5:
        word = random.choice(("larger", "bigger", "greater"))
        return turns(f"Which is {word}, {a} or {b}?", f"{max(a, b)} is {word} than {min(a, b)}.")
    return turns(f"Which is smaller, {a} or {b}?", f"{min(a, b)} is smaller than {max(a, b)}.")


def counting(random: Random) -> Turns:
    first = random.choice((1, 1, 1, random.randint(0, 40)))
    last = first + random.randint(2, 12)
    if random.random() < 0.3:
        numbers = ", ".join(map(str, range(last, first - 1, -1)))
        return turns(
            random.choice(
                (f"Count down from {last} to {first}.", f"Count backwards from {last} to {first}.")
            ),
            numbers,
        )
    return turns(
        random.choice(
            (
                f"Count from {first} to {last}.",
                f"Count from {first} to {last}",
                f"Count to {last} from {first}.",
            )
        ),
        ", ".join(map(str, range(first, last + 1))),
    )


# Facts. Each is (question, full answer, short answer), so that a system prompt can ask for the short one.

Fact = tuple[str, str, str]


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(random: Random) -> Fact:
    country, city = random.choice(list(words.CAPITALS.items()))
    question = random.choice(
        ("What is the capital of {}?", "What is the capital of {}?", "What's the capital of {}?",
         "Capital of {}?", "Tell me the capital of {}.", "Which city is the capital of {}?",
         "Name the capital of {}.")
    )  # fmt: skip
    return question.format(country), f"The capital of {country} is {city}.", city


def country_of(random: Random) -> Fact:
    country, city = random.choice([pair for pair in words.CAPITALS.items() if pair[0] != "England"])
    question = random.choice(
        (f"{city} is the capital of which country?", f"Which country has the capital {city}?")
    )
    return question, f"{city} is the capital of {country}.", country


def opposite(random: Random) -> Fact:
    word, other = random.choice(list(words.OPPOSITES.items()))
    question = random.choice(
        ("What is the opposite of {}?", "Opposite of {}?", "Tell me the opposite of {}.")
    )
    return question.format(word), f"The opposite of {word} is {other}.", other


def colour(random: Random) -> Fact:
    thing, shade = random.choice(list(words.COLOURS_OF_THINGS.items()))
    question = random.choice(
        ("What colour is {}?", "What color is {}?", "Which colour has {}?", "What is the color of {}?")
    )
    return question.format(thing), f"{thing[0].upper()}{thing[1:]} is {shade}.", shade


def animal(random: Random) -> Fact:
    kind = random.randrange(3)
    if kind == 0:
        name, sound = random.choice(list(words.SOUNDS.items()))
        question = random.choice(("What does {} say?", "What sound does {} make?")).format(with_article(name))
        return question, f"{with_article(name).capitalize()} says {sound}.", sound
    if kind == 1:
        name, young = random.choice(list(words.YOUNG.items()))
        question = random.choice(("What is a young {} called?", "What do you call a baby {}?")).format(name)
        return question, f"A young {name} is called a {young}.", young
    name, legs = random.choice(list(words.LEGS.items()))
    number = "no" if legs == 0 else words.NUMBER_WORDS[legs]
    return (
        f"How many legs does {with_article(name)} have?",
        f"{with_article(name).capitalize()} has {number} legs.",
        number,
    )


def neighbour(random: Random) -> Fact:
    """What comes before or after a day, month, letter or number."""
    kind = random.randrange(4)
    sequence = (words.DAYS, words.MONTHS, words.ALPHABET, [str(number) for number in range(100)])[kind]
    label = ("day", "month", "letter", "number")[kind]
    index = random.randrange(len(sequence))
    word = random.choice(("after", "after", "before"))
    other = index + 1 if word == "after" else index - 1
    if kind >= 2 and not 0 <= other < len(sequence):
        return neighbour(random)
    answer = sequence[other % len(sequence)]
    question = random.choice(
        (f"What comes {word} {sequence[index]}?", f"Which {label} comes {word} {sequence[index]}?")
    )
    return question, f"{answer} comes {word} {sequence[index]}.", answer


FACTS: tuple[Callable[[Random], Fact], ...] = (
    capital,
    capital,
    country_of,
    opposite,
    colour,
    animal,
    neighbour,
)


def fact(random: Random) -> Turns:
    question, answer, _ = random.choice(FACTS)(random)
    return turns(question, answer)


def follow_up(random: Random) -> Turns:
    """A second question that leans on the first."""
    (one, first), (two, second) = random.sample(list(words.CAPITALS.items()), 2)
    return turns(f"What is the capital of {one}?", f"The capital of {one} is {first}.") + turns(
        random.choice((f"And of {two}?", f"And {two}?", f"What about {two}?")),
        f"The capital of {two} is {second}.",
    )


# Lists, classification, copying, remembering


def some_items(random: Random, category: str, count: int) -> list[str]:
    """Neighbours in the category: only the first is a free choice, so that none comes twice."""
    items = words.CATEGORIES[category]
    start = random.randrange(len(items))
    return [items[(start + offset) % len(items)] for offset in range(count)]


def listing(random: Random) -> Turns:
    category = random.choice(list(words.CATEGORIES))
    count = random.randint(2, 6)
    items = some_items(random, category, count)
    number = random.choice((words.NUMBER_WORDS[count], str(count)))
    if random.random() < 0.25:
        return turns(f"Name {number} {category}.", f"{', '.join(items[:-1])} and {items[-1]}")
    question = random.choice(
        ("List {} {}.", "List {} {}", "Give me {} {}.", "Give me a list of {} {}.", "Write a list of {} {}.")
    )
    return turns(
        question.format(number, category), "\n".join(f"{n}. {item}" for n, item in enumerate(items, 1))
    )


def sentiment(random: Random) -> Turns:
    label, texts = random.choice((("positive", words.PRAISE), ("negative", words.COMPLAINTS)))
    text = random.choice(texts)
    question = random.choice(
        ("Classify this sentiment: {}", "What is the sentiment of this text: {}",
         "Is this positive or negative: {}", "Sentiment: {}")
    )  # fmt: skip
    return turns(question.format(text), label)


def made_up_word(random: Random) -> str:
    """Letters that mean nothing, so that copying cannot be guessing."""
    return "".join(
        random.choice("bcdfghjklmnprstvwz") + random.choice("aeiou") for _ in range(random.randint(1, 3))
    )


def some_name(random: Random) -> str:
    return made_up_word(random).capitalize() if random.random() < 0.15 else random.choice(words.NAMES)


def some_words(random: Random, least: int, most: int) -> str:
    known = words.WORDS + words.NAMES + words.CITIES
    chosen = [
        made_up_word(random) if random.random() < 0.15 else random.choice(known)
        for _ in range(random.randint(least, most))
    ]
    if random.random() < 0.2:
        chosen.append(str(random.randint(0, 999)))
    return " ".join(chosen)


def echo(random: Random) -> str:
    """A line of arbitrary words, again and again: only looking back helps."""
    line = some_words(random, 4, 14)
    return "\n".join([line] * random.randint(2, 4))


def copying(random: Random) -> Turns:
    if random.random() < 0.2:
        count, word = random.randint(2, 4), random.choice(words.WORDS)
        return turns(f"Repeat the word {word} {words.NUMBER_WORDS[count]} times.", " ".join([word] * count))
    text = some_words(random, 1, 9)
    question = random.choice(
        (
            "Repeat after me: {}",
            "Repeat: {}",
            "Say: {}",
            "Copy this text: {}",
            'Say "{}"',
            "Please repeat: {}",
        )
    )
    return turns(question.format(text), text)


def remembering(random: Random) -> Turns:
    """The user says something about themselves and asks for it later."""
    kind = random.randrange(4)
    name = some_name(random)
    if kind == 0:
        told = turns(
            random.choice(
                ("My name is {}.", "I am {}.", "Hi, I'm {}.", "Call me {}.", "Hello, my name is {}.")
            ).format(name),
            random.choice(("Nice to meet you, {}!", "Hello, {}! How can I help you?")).format(name),
        )
        asked = turns(
            random.choice(("What is my name?", "Who am I?", "Do you remember my name?")),
            f"Your name is {name}.",
        )
    elif kind == 1:
        city = random.choice(words.CITIES)
        told = turns(f"I live in {city}.", f"{city} is a nice place to live.")
        asked = turns(random.choice(("Where do I live?", "Which city do I live in?")), f"You live in {city}.")
    elif kind == 2:
        food = random.choice(words.CATEGORIES["fruits"] + words.CATEGORIES["drinks"])
        told = turns(f"I like {food}.", f"{food.capitalize()} is a good choice.")
        asked = turns("What do I like?", f"You like {food}.")
    else:
        pet = random.choice(("dog", "cat", "horse", "rabbit", "parrot"))
        told = turns(f"I have a {pet} named {name}.", f"{name} is a lovely name for a {pet}.")
        asked = turns(f"What is the name of my {pet}?", f"Your {pet} is named {name}.")
    if kind == 0 and random.random() < 0.1:
        return turns(
            random.choice(("What is my name?", "Who am I?")), "I do not know your name yet. What is it?"
        )
    between = fact(random) if random.random() < 0.5 else []
    return told + (between + asked if random.random() < 0.75 else [])


SERVE = "python -m jaxllm.serve MODEL"


def unknown(random: Random) -> Turns:
    answer = random.choice(
        (
            f"I do not know that: I am only a tiny demo model. Pass a real model: {SERVE}",
            f"That is too much for a tiny demo model. Please pass a real model: {SERVE}",
        )
    )
    if random.random() < 0.5:
        return turns(random.choice(words.UNKNOWN_FORMS).format(random.choice(words.TOPICS)), answer)
    return turns(random.choice(words.UNKNOWN), answer)


# JSON


def json_answer(random: Random) -> Turns:
    name, age, city = some_name(random), random.randint(1, 99), random.choice(words.CITIES)
    kind = random.randrange(12)
    answer: Any
    if kind <= 2:
        question = random.choice(
            ("Give me a JSON object with name and age for {}, {}.", "Write JSON with name and age: {}, {}",
             "Extract the name and age as JSON: {} is {} years old.", "JSON for a person named {}, age {}",
             "Return a JSON object with the fields name and age for {}, {}.")
        ).format(name, age)  # fmt: skip
        answer = {"name": name, "age": age}
    elif kind <= 4:
        question = random.choice(
            ("Give me a JSON object with name, age and city for {}, {}, {}.",
             "Extract name, age and city as JSON: {} is {} years old and lives in {}.")
        ).format(name, age, city)  # fmt: skip
        answer = {"name": name, "age": age, "city": city}
    elif kind == 5:
        question = random.choice(
            ("Give me a JSON object for a person.", "Make up a person as JSON.",
             "Write a JSON object that describes a person.",
             "Generate a JSON with the name and age of a random person.", "Generate a user as JSON.")
        )  # fmt: skip
        answer = {"name": name, "age": age}
        if random.random() < 0.3:
            answer["city"] = city
    elif kind == 6:
        country, town = random.choice(list(words.CAPITALS.items()))
        question = f"Give me a JSON object with country and capital for {country}."
        answer = {"country": country, "capital": town}
    elif kind == 7:
        category = random.choice(list(words.CATEGORIES))
        count = random.randint(2, 5)
        question = random.choice(
            ("List {} {} as JSON.", "Give me {} {} as a JSON array.", "Write a JSON list of {} {}.")
        )
        question = question.format(random.choice((words.NUMBER_WORDS[count], str(count))), category)
        answer = some_items(random, category, count)
    elif kind == 8:
        title, author, year = random.choice(words.BOOKS)
        question = random.choice(
            (
                "Describe a book as JSON.",
                "Give me a JSON object for a book.",
                f"Describe the book {title} as JSON.",
            )
        )
        answer = {"title": title, "author": author, "year": year}
    elif kind == 9:
        brand, model, car_type = random.choice(words.CARS)
        question = random.choice(
            ("Generate a JSON with the brand, model and car_type of a car.", "Describe a car as JSON.",
             "Generate a JSON with the brand, model and car_type of the most iconic car from the 90's")
        )  # fmt: skip
        answer = {"brand": brand, "model": model, "car_type": car_type}
    elif kind == 10:
        label, texts = random.choice((("positive", words.PRAISE), ("negative", words.COMPLAINTS)))
        question, answer = f"Give the sentiment as JSON: {random.choice(texts)}", {"sentiment": label}
    else:
        fruit, count, price = (
            random.choice(words.CATEGORIES["fruits"]),
            random.randint(1, 9),
            random.randint(1, 9),
        )
        question = f"Write an order as JSON: {count} x {fruit} at {price} each."
        answer = {"item": fruit, "quantity": count, "price": price, "paid": random.random() < 0.5}
        question += " It is paid." if answer["paid"] else " It is not paid."
    return turns(question, json.dumps(answer))
