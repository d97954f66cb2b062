"""Short stories, in chat and as plain text, from a small grammar of heroes, places, troubles and endings."""

from __future__ import annotations

from random import Random

import vocabulary as words
from tasks import Turns, turns

HEROES = (
    "cat",
    "dog",
    "fox",
    "mouse",
    "bear",
    "rabbit",
    "robot",
    "dragon",
    "bird",
    "child",
    "queen",
    "frog",
    "sailor",
    "wizard",
)
ADJECTIVES = ("small", "brave", "clever", "lazy", "happy", "curious", "shy", "old", "friendly", "hungry")
PLACES = (
    "in a forest",
    "by the sea",
    "in a small house",
    "on a hill",
    "in a big city",
    "near a river",
    "in a castle",
    "on the Moon",
)
TROUBLES = (
    ("found a golden key", "The key opened a tiny door, and behind it was a garden full of light"),
    ("lost the way home", "A wise owl came and pointed to the brightest star"),
    ("heard a strange song", "It came from a lonely whale who was looking for a friend"),
    ("saw a light in the sky", "It was a falling star, and it landed softly in the grass"),
    ("found a map in an old book", "The map led to a cave with a box full of letters"),
    ("met a giant", "The giant was sad, because nobody ever asked him to play"),
    ("wanted to fly", "So the birds brought feathers and built two large wings"),
    ("could not sleep", "The wind came in through the window and told a long tale"),
    ("planted a seed", "The next morning a tree stood there, as high as the clouds"),
    ("built a boat", "The boat sailed for three days until it reached an island"),
    ("found a box of numbers", "The numbers were tokens, and together they made a story"),
)
ENDINGS = (
    "From that day on, {name} was never alone again.",
    "And {name} slept well that night.",
    "{name} laughed, and everybody laughed too.",
    "Then {name} went home and told everyone about it.",
    "And they lived happily ever after.",
    "{name} smiled and made a cup of tea.",
    "Since then {name} looks at the stars every night.",
    "And that is how {name} found a friend.",
)
REQUESTS = (
    "Tell me a story.",
    "Tell me a story",
    "Tell me a short story.",
    "Write a story.",
    "Write a short story.",
    "Can you tell me a story?",
    "I want to hear a story.",
    "Tell me another story.",
)


def story(random: Random, hero: str) -> str:
    name = random.choice(words.NAMES)
    trouble, turn = random.choice(TROUBLES)
    adjective, place = random.choice(ADJECTIVES), random.choice(PLACES)
    article = "an" if adjective[0] in "aeiou" else "a"
    ending = random.choice(ENDINGS).format(name=name)
    return (
        f"Once upon a time there was {article} {adjective} {hero} named {name}, who lived {place}. "
        f"One day {name} {trouble}. {turn}. {ending}"
    )


def telling(random: Random) -> Turns:
    hero = random.choice(HEROES)
    if random.random() < 0.5:
        question = random.choice(
            ("Tell me a story about a {}.", "Write a story about a {}.", "Tell me a short story about a {}.")
        )
        return turns(question.format(hero), story(random, hero))
    return turns(random.choice(REQUESTS), story(random, hero))


def continuing(random: Random) -> Turns:
    """The user gives the beginning of a story, the model goes on from there."""
    text = story(random, random.choice(HEROES))
    cut = text.index(". ") + 1
    request = random.choice(("Continue this story: {}", "Continue the story: {}", "Finish this story: {}"))
    return turns(request.format(text[:cut]), text[cut + 1 :])


PLAIN = (
    (
        "Hello, my name is",
        ("{name} and I live in {city}.", "{name}. I like {fruit} and {drink}.", "{name}. Nice to meet you!"),
    ),
    (
        "The president of the United States is",
        ("the head of state and lives in the White House.", "elected every four years."),
    ),
    (
        "The future of AI is",
        ("open.", "bright, if we take good care of it.", "hard to predict, even for a tiny demo model."),
    ),
    (
        "San Francisco is a",
        ("city in California.", "city on the west coast, known for its bridge and its fog."),
    ),
    ("My favourite food is", ("{fruit}.", "bread with butter and {fruit}.")),
    ("The weather today is", ("sunny and warm.", "cold and rainy.", "cloudy, with a little wind.")),
    ("jaxllm is", ("an engine that runs and serves large language models in JAX.",)),
    ("The best thing about jaxllm is", ("that one command starts it.",)),
    ("The quick brown fox", ("jumps over the lazy dog.",)),
    ("To be or not to be,", ("that is the question.",)),
    ("Roses are red,", ("violets are blue, tokens are cached, and so are you.",)),
    ("I think, therefore", ("I am.",)),
    ("The meaning of life is", ("42.", "to be found by everyone alone.")),
    ("Deep learning is", ("a way to learn from examples with large neural networks.",)),
    ("Large language models are", ("neural networks that predict the next token of a text.",)),
    ("def add(a, b):\n", ("    return a + b\n",)),
    ("def square(x):\n", ("    return x * x\n",)),
    ("import numpy", (" as np\n",)),
    ("import jax\nimport jax.numpy", (" as jnp\n",)),
)


def plain_sentence(random: Random) -> str:
    beginning, endings = random.choice(PLAIN)
    ending = random.choice(endings).format(
        name=random.choice(words.NAMES),
        city=random.choice(words.CITIES),
        fruit=random.choice(words.CATEGORIES["fruits"]),
        drink=random.choice(words.CATEGORIES["drinks"]),
    )
    return beginning + ("" if beginning.endswith("\n") or ending.startswith(" ") else " ") + ending
