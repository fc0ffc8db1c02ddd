"""The demo's questions, none of which an adapter was trained on, and what an answer looks like."""

import json
import re
from dataclasses import dataclass

from cli.demo.base import DEMO_BASE


@dataclass(frozen=True)
class DemoPrompt:
    """One question for one model: the base's name or an adapter's."""

    model: str
    prompt: str
    max_tokens: int


_ASKED: dict[str, tuple[int, tuple[str, ...]]] = {
    DEMO_BASE: (
        48,
        (
            "What is the capital of France?",
            "Name three fruits.",
            "What is a rainbow?",
            "How many days are in a week?",
            "What do plants need to grow?",
            "Give me one tip for learning to cook.",
        ),
    ),
    "sql": (
        48,
        (
            "Table workers(id, name, wage, team). Who earns less than 3000?",
            "Table countries(id, name, continent, area). Show the three largest countries.",
            "Table films(id, title, genre, year). How many films are there of each genre?",
            "Table hotels(id, name, city, stars). Which hotels in Berlin have more than 3 stars?",
            "Table trees(id, species, height, planted). What is the average height per species?",
            "Table guests(id, name, room, paid). Delete all guests that have paid.",
        ),
    ),
    "pirate": (
        64,
        (
            "What is the capital of Italy?",
            "How do I make a cup of tea?",
            "Why is the sky blue?",
            "What should I do on a rainy day?",
            "What is a book?",
            "How do I learn to play the guitar?",
        ),
    ),
    "json": (
        48,
        (
            "Linda is 52 years old and lives in Chicago.",
            "My cousin Marco, 23, comes from Milan.",
            "In Helsinki there is a 40-year-old baker called Aino.",
            "Thomas Reed moved to Bristol in May. He is 35.",
            "Our dentist is Yuki, aged 46, based in Osaka.",
            "Living in Geneva, 61-year-old Pierre collects stamps.",
        ),
    ),
}

# In turns, as requests of many tenants would arrive, not one model after the other.
DEMO_PROMPTS: tuple[DemoPrompt, ...] = tuple(
    DemoPrompt(model, prompts[turn], tokens)
    for turn in range(6)
    for model, (tokens, prompts) in _ASKED.items()
)

JSON_KEYS = ("name", "age", "city")
_SQL = re.compile(r"(SELECT|INSERT INTO|UPDATE|DELETE FROM) [^;]+;$")
_PIRATE = re.compile(r"\b(arr+|aye|matey|ye|yer|ahoy)\b", re.IGNORECASE)


def looks_like(model: str, answer: str) -> bool:
    """Say whether `answer` has the shape of `model`'s task; its truth is not looked at."""
    answer = answer.strip()
    if model == "sql":
        return _SQL.match(answer) is not None
    if model == "pirate":
        return _PIRATE.search(answer) is not None
    if model == "json":
        return _is_person(answer)
    return bool(answer) and not any(
        looks_like(other, answer) for other in ("sql", "pirate", "json")
    )


def _is_person(answer: str) -> bool:
    try:
        person = json.loads(answer)
    except ValueError:
        return False
    if not isinstance(person, dict) or tuple(person) != JSON_KEYS:
        return False
    return isinstance(person["age"], int) and all(
        isinstance(person[key], str) for key in ("name", "city")
    )
