"""Chats with tools: the tools on offer, the call in Hermes form, the result, and the answer from it."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import vocabulary as words
from tasks import Message, Turns, arithmetic, compute, fact, operands, turns

CONDITIONS = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear")
Arguments = dict[str, Any]


def tool(name: str, description: str, parameters: dict[str, str]) -> Arguments:
    """An OpenAI function tool whose required parameters have the given JSON types."""
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def call(name: str, arguments: Arguments) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def weather(random: Random) -> tuple[Arguments, Turns]:
    name = random.choice(("get_weather", "get_weather", "get_current_weather", "weather"))
    parameter = random.choice(("city", "city", "location", "place"))
    with_unit = random.random() < 0.25
    description = random.choice(
        ("Get the weather in a city.", "The current weather of a place.", "Get the current weather")
    )
    definition = tool(name, description, {parameter: "string"} | ({"unit": "string"} if with_unit else {}))
    cities = random.sample(words.CITIES + tuple(words.CAPITALS.values()), random.choice((1, 1, 1, 1, 2)))
    place = " and ".join(cities)
    question = random.choice(
        ("What is the weather in {}?", "What is the weather like in {}?", "How is the weather in {}?",
         "Weather in {}?",
         "What's the weather like in {} today?", "Is it raining in {}?", "Tell me the weather in {}.")
    ).format(place)  # fmt: skip
    unit = random.choice(("celsius", "celsius", "fahrenheit"))
    if with_unit and unit == "fahrenheit":
        question = f"What is the weather in {place} in fahrenheit?"
    calls = [call(name, {parameter: city} | ({"unit": unit} if with_unit else {})) for city in cities]
    results, sentences = [], []
    for city in cities:
        condition, degrees = random.choice(CONDITIONS), random.randint(-5, 38)
        result = {parameter: city, "temperature": degrees, "condition": condition}
        if random.random() < 0.3:
            del result[parameter]
        results.append({"role": "tool", "content": json.dumps(result)})
        sentences.append(f"It is {condition} in {city}, with {degrees} degrees.")
    return definition, [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *results,
        {"role": "assistant", "content": " ".join(sentences)},
    ]


def called(question: str, name: str, arguments: Arguments, result: str, answer: str) -> Turns:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call(name, arguments)]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    ]


def calculator(random: Random) -> tuple[Arguments, Turns]:
    name = random.choice(("calculator", "calculator", "calculate", "evaluate"))
    definition = tool(name, "Evaluate an arithmetic expression.", {"expression": "string"})
    a, b, symbol = operands(random)
    if random.random() < 0.5:
        a, b, symbol = random.randint(100, 9999), random.randint(10, 999), random.choice("+-*")
    expression, value = f"{a} {symbol} {b}", compute(a, b, symbol)
    question = random.choice(("What is {}?", "Calculate {}.", "Compute {}")).format(expression)
    return definition, called(
        question, name, {"expression": expression}, str(value), f"{expression} = {value}."
    )


def add(random: Random) -> tuple[Arguments, Turns]:
    name = random.choice(("add", "add_numbers", "sum"))
    definition = tool(name, "Add two numbers.", {"a": "integer", "b": "integer"})
    a, b = random.randint(0, 999), random.randint(0, 999)
    question = random.choice((f"What is {a} + {b}?", f"Add {a} and {b}."))
    return definition, called(question, name, {"a": a, "b": b}, str(a + b), f"{a} + {b} = {a + b}.")


def clock(random: Random) -> tuple[Arguments, Turns]:
    name, parameter = (
        random.choice(("get_time", "current_time")),
        random.choice(("city", "location", "timezone")),
    )
    definition = tool(name, "Get the current time in a city.", {parameter: "string"})
    city, now = random.choice(words.CITIES), f"{random.randint(0, 23):02}:{random.randint(0, 59):02}"
    question = random.choice((f"What time is it in {city}?", f"What is the time in {city}?"))
    return definition, called(question, name, {parameter: city}, now, f"It is {now} in {city}.")


def search(random: Random) -> tuple[Arguments, Turns]:
    name = random.choice(("search", "web_search"))
    definition = tool(name, "Search the web.", {"query": "string"})
    query = " ".join(random.sample(words.WORDS[:60], random.randint(1, 3)))
    result = " ".join(random.sample(words.WORDS[:60], random.randint(3, 6)))
    question = random.choice((f"Search the web for {query}.", f"Search for {query}."))
    return definition, called(question, name, {"query": query}, result, f"I found this: {result}")


def email(random: Random) -> tuple[Arguments, Turns]:
    definition = tool("send_email", "Send an email.", {"to": "string", "subject": "string"})
    person, subject = random.choice(words.NAMES), " ".join(random.sample(words.WORDS[:60], 2))
    question = f"Send an email to {person} about {subject}."
    return definition, called(
        question, "send_email", {"to": person, "subject": subject}, "sent", f"I sent the email to {person}."
    )


KINDS = (weather, weather, weather, calculator, add, clock, search, email)


def conversation(random: Random) -> tuple[list[Arguments], Turns]:
    """One or two tools on offer, and a chat that uses one, or needs none."""
    definition, messages = random.choice(KINDS)(random)
    offered = [definition]
    if random.random() < 0.35:
        other, _ = random.choice([kind for kind in KINDS if kind is not weather])(random)
        if other["function"]["name"][:3] != definition["function"]["name"][:3]:
            offered.insert(random.randrange(2), other)
    chance = random.random()
    if chance < 0.15:
        names = " ".join(entry["function"]["name"] for entry in offered)
        calculates = any(word in names for word in ("calc", "eval", "add", "sum"))
        messages = fact(random) if calculates or random.random() < 0.5 else arithmetic(random)
    elif chance < 0.2:
        messages = turns(
            random.choice(("Hello!", "Hi", "Hello")),
            "Hello! I am a tiny demo model. What would you like to know?",
        )
    elif chance < 0.3:
        messages = messages + fact(random)
    return offered, messages
