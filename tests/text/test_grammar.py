"""Grammars against other judges of the same languages: `regex` with partial matches, and JSON schema."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.demo import demo_model_path
from jaxllm.errors import InvalidRequestError
from jaxllm.structured_outputs import StructuredOutputsConfig, StructuredOutputsParams
from jaxllm.text import grammar as grammar_module
from jaxllm.text.constraints import subschemas
from jaxllm.text.grammar import GrammarCompiler, GrammarMatcher, fill_masks
from jaxllm.text.tokenizer import get_tokenizer
from tests.json_schemas import SCHEMAS, SUPPORTED_FORMATS, instances

VOCAB_SIZE = 1536
EOS = (0, 2)


@cache
def tokenizer() -> Any:
    return get_tokenizer(demo_model_path())


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer(), VOCAB_SIZE, EOS)


@cache
def token_texts() -> list[str]:
    """What each token adds to a text; "" for those that are no text, or no whole characters."""
    special = set(tokenizer().added_tokens_decoder)
    texts = ["" if i in special else tokenizer().decode([i]) for i in range(VOCAB_SIZE)]
    return ["" if "\N{REPLACEMENT CHARACTER}" in text else text for text in texts]


def matcher(**constraint: Any) -> GrammarMatcher:
    return compiler().compile(StructuredOutputsParams(**constraint)).fork()


def allowed(one: GrammarMatcher) -> list[int]:
    masks = np.full((1, -(-VOCAB_SIZE // 32)), -1, np.int32)
    fill_masks([(one, 0)], masks)
    return np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")).tolist()


def walk(one: GrammarMatcher, rng: random.Random, *, limit: int = 200) -> str | None:
    """A random text that the grammar takes; None where it got too long."""
    ids: list[int] = []
    while len(ids) < limit and not one.is_complete:
        tokens = allowed(one)
        ends = [t for t in tokens if t in EOS]
        if ends and (len(ends) == len(tokens) or rng.random() < 0.2):
            assert one.accept(rng.choice(ends)) is None
            assert one.is_complete
            return str(tokenizer().decode(ids))
        token = rng.choice([t for t in tokens if t not in EOS])
        assert one.accept(token) is None
        ids.append(token)
    return str(tokenizer().decode(ids)) if one.is_complete else None


def takes(one: GrammarMatcher, text: str) -> bool:
    """Whether the whole of a text matches."""
    for token in tokenizer().encode(text, add_special_tokens=False):
        if one.accept(token) is not None:
            return False
    return one.is_complete or bool(set(allowed(one)) & set(EOS))


REGEXES = [
    r"[a-f]+(?:\.[0-9]{2,4})?",
    r"(?:yes|no|maybe)(?:, (?:yes|no))*",
    r"\d{4}-(?:0[1-9]|1[0-2])-[0-3]\d",
    r"(?i:the) .*",
    r"a{0,3}b?",
    r"[^x]*",
    "",
]


@pytest.mark.parametrize("pattern", REGEXES)
def test_exactly_the_tokens_that_lead_on_are_allowed(pattern: str) -> None:
    """Along random walks, against a matcher of whole texts that can tell the beginnings of matches.

    Where only one text can follow, it is to be written in the tokens that the tokenizer would use.
    """
    oracle = regex.compile(pattern)
    rng = random.Random(pattern)
    for _ in range(4):
        one, text = matcher(regex=pattern), ""
        for _ in range(6):
            now = set(allowed(one))
            expected = {
                i
                for i, added in enumerate(token_texts())
                if added and oracle.fullmatch(text + added, partial=True)
            }
            if oracle.fullmatch(text):
                expected |= set(EOS)
            partial_characters = {i for i in now if not token_texts()[i] and i not in EOS}
            going_on = sorted(now - partial_characters - set(EOS))
            if len(going_on) == 1:
                longest = max((token_texts()[i] for i in expected - set(EOS)), key=len)
                assert token_texts()[going_on[0]] == longest
            else:
                assert now - partial_characters == expected, text
            assert one.is_complete == (not going_on and bool(text))
            if not going_on:
                break
            token = rng.choice(going_on)
            assert one.accept(token) is None
            text += token_texts()[token]


@pytest.mark.parametrize("pattern", REGEXES)
def test_what_is_generated_matches(pattern: str) -> None:
    rng = random.Random(pattern)
    texts = [walk(matcher(regex=pattern), rng) for _ in range(20)]
    assert sum(text is not None for text in texts) >= 5
    for text in texts:
        assert text is None or regex.fullmatch(pattern, text)


def test_choices_may_hold_anything() -> None:
    choices = ['a"b\\', "é😀\n", "x/y # z", "x", "xy", "", "{}", "\u2028\x7f"]
    rng = random.Random(0)
    for choice in choices:
        assert takes(matcher(choice=choices), choice), choice
    assert not takes(matcher(choice=choices), "x/y")
    assert not takes(matcher(choice=["ab"]), "a")
    drawn = {walk(matcher(choice=choices), rng) for _ in range(200)}
    assert drawn == set(choices)


@pytest.mark.parametrize(
    "text",
    [
        'start: "[" (item ("," item)*)? "]"\nitem: /[a-z]/ | start\n',
        'root ::= "[" (item ("," item)*)? "]"\nitem ::= [a-z] | root\n',
    ],
    ids=["Lark", "GBNF"],
)
def test_context_free_grammars(text: str) -> None:
    for good in ("[]", "[a]", "[[],[b,[c]]]"):
        assert takes(matcher(grammar=text), good)
    for bad in ("[", "[a,]", "[]]", "[[a]"):
        assert not takes(matcher(grammar=text), bad)


@settings(max_examples=150)
@given(schema=SCHEMAS, data=st.data())
def test_instances_of_a_schema_are_taken_and_what_is_generated_is_one(
    schema: dict[str, Any], data: st.DataObject
) -> None:
    """Both ways: the grammar is not tighter than the schema (given the order of properties), nor looser."""
    one = compiler().compile(StructuredOutputsParams(json=schema, disable_any_whitespace=True))
    instance = data.draw(instances(schema))
    jsonschema.validate(instance, schema)
    assert takes(one.fork(), json.dumps(instance, ensure_ascii=False, separators=(",", ":"))), instance
    text = walk(one.fork(), random.Random(data.draw(st.integers(0, 2**32))))
    if text is not None:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("format_", SUPPORTED_FORMATS)
def test_formats_are_enforced(format_: str) -> None:
    schema = {"type": "string", "format": format_}
    checker = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    assert not takes(matcher(json=schema), '"no such thing: <>"')
    rng = random.Random(format_)
    for _ in range(5):
        text = walk(matcher(json=schema), rng)
        if text is not None:
            checker.validate(json.loads(text))


def test_options_of_json() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {}}}}
    spaced, compact, extra = '{ "a": {} }', '{"a":{}}', '{"a":{"b":1}}'

    def taken(**options: Any) -> list[bool]:
        return [takes(matcher(json=schema, **options), text) for text in (spaced, compact, extra)]

    assert taken() == [True, True, True]
    assert taken(disable_any_whitespace=True) == [False, True, True]
    assert taken(whitespace_pattern="[ ]") == [True, True, True]
    assert taken(whitespace_pattern="_") == [False, True, True]
    assert taken(disable_additional_properties=True) == [True, True, False]
    own = {**schema, "x-guidance": {"whitespace_flexible": False}}
    assert not takes(matcher(json=own), spaced)
    for text, fits in (('{"a": [1, "x"]}', True), ("[]", False), ('"a"', False), ('{"a": }', False)):
        assert takes(matcher(json_object=True), text) == fits
    assert not takes(matcher(json_object=True, disable_any_whitespace=True), '{"a": 1}')
    strict = GrammarCompiler(
        tokenizer(), VOCAB_SIZE, EOS, StructuredOutputsConfig(disable_any_whitespace=True)
    ).compile(StructuredOutputsParams(json=schema))
    assert takes(strict.fork(), compact) and not takes(strict.fork(), spaced)


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({"regex": "a(b"}, r"regex .*cannot be used: (.|\n)*a\(b\n *\^\nerror: unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"grammar": 'start: "a" foo\nbar: "b"'}, r'at 1\(8\): unknown name: "foo"'),
        ({"grammar": 'root ::= "a" foo\n'}, "foo"),
        ({"grammar": "any old text"}, "at line 1"),
        ({"json": {"type": "strin"}}, "used: Invalid type: strin"),
        ({"json": {"properties": {"a": {"items": {"type": "strin"}}}}}, "at /properties/a/items: Invalid"),
        ({"json": {"$defs": {"x": {"type": "strin"}}, "anyOf": [{}, {"$ref": "#/$defs/x"}]}}, "at /anyOf/1"),
        ({"json": {"properties": {"a/b~": {"uniqueItems": True}}}}, r"at /properties/a~1b~0: .*uniqueItems"),
        ({"json": {"type": "string", "format": "postcode"}}, "Unknown format: postcode"),
        ({"json": {"type": "string", "pattern": "("}}, "regex"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json": {"$ref": "https://example.com/schema"}}, "example.com"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 4}}, "satisfiable"),
        ({"structural_tag": {"a": 1}}, "either 'format', or 'triggers' and 'structures'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_with_its_place(constraint: dict[str, Any], words: str) -> None:
    for _ in range(2):  # failures are kept, too
        with pytest.raises(InvalidRequestError, match=words) as caught:
            matcher(**constraint)
        assert caught.value.param == "structured_outputs"
        assert len(str(caught.value)) < 1300


def test_a_token_that_does_not_fit_is_an_error_for_good() -> None:
    one = matcher(regex="ab")
    [a] = tokenizer().encode("a")
    error = one.accept(tokenizer().encode("x")[0])
    assert error is not None and "cannot go on" in error and "<state>" not in error
    assert one.accept(a) is not None
    assert set(allowed(one)) == set(EOS)
    assert "no token satisfies" in (matcher(regex="a").accept(-1) or "")


def test_forks_go_their_own_ways() -> None:
    root = compiler().compile(StructuredOutputsParams(regex="ab|cd"))
    a, c = (tokenizer().encode(x)[0] for x in "ac")
    one, other = root.fork(), root.fork()
    assert one.accept(a) is None and other.accept(c) is None
    assert not set(allowed(one)) & set(allowed(other))
    assert {a, c} <= set(allowed(root.fork()))


def test_a_grammar_may_start_after_some_tokens() -> None:
    x, y, a = (tokenizer().encode(t)[0] for t in "xya")
    one = compiler().compile(StructuredOutputsParams(regex="a")).fork(starts_after=[x, x, y])
    for token in (y, x, 2, x, x):
        assert one.accept(token) is None
        assert not one.is_active and not one.is_complete and len(allowed(one)) == VOCAB_SIZE
    assert one.accept(y) is None
    assert one.is_active and allowed(one) == [a]
    assert one.accept(a) is None and one.is_complete


def test_a_batch_of_masks_is_its_rows() -> None:
    rng = random.Random(3)
    words = -(-VOCAB_SIZE // 32)
    batch = []
    for row in rng.sample(range(40), 17):
        one = compiler().compile(StructuredOutputsParams(regex=rng.choice(REGEXES)))
        batch.append((one.fork([5] if row % 5 == 0 else []), row))
    masks = np.full((40, words), 7, np.int32)
    fill_masks(batch, masks)
    expected = np.full((40, words), 7, np.int32)
    for one, row in batch:
        if one.is_active:
            fill_masks([(one, row)], expected)
    np.testing.assert_array_equal(masks, expected)
    assert (masks == 7).all(axis=1).sum() == 40 - sum(one.is_active for one, _ in batch)


@pytest.mark.parametrize("vocab_size", [1500, 1536, 1537, 2000])
def test_the_model_may_have_more_tokens_than_its_tokenizer_or_fewer(vocab_size: int) -> None:
    one = GrammarCompiler(tokenizer(), vocab_size, EOS).compile(StructuredOutputsParams(regex="[a-z]*"))
    masks = np.full((3, -(-vocab_size // 32)), -1, np.int32)
    fill_masks([(one.fork(), 2), (one.fork(), 0)], masks)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size]
    expected = np.zeros(vocab_size, bool)
    ids = allowed(matcher(regex="[a-z]*"))
    expected[[i for i in ids if i < vocab_size]] = True
    for row in (0, 2):
        np.testing.assert_array_equal(bits[row], expected)
    assert (masks[1] == -1).all()


def test_tokenizers_of_every_kind(zoo: Any) -> None:
    for name in ("byte_level", "llama2", "gemma"):
        own = zoo(name)
        eos = own.eos_token_id
        one = GrammarCompiler(own, len(own), [eos]).compile(StructuredOutputsParams(regex="(hello|world)+"))
        for seed in range(5):
            rng, now, ids = random.Random(seed), one.fork(), list[int]()
            while not now.is_complete and len(ids) < 40:
                masks = np.empty((1, now.num_words), np.int32)
                fill_masks([(now, 0)], masks)
                ids.append(
                    int(rng.choice(np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little"))))
                )
                assert now.accept(ids[-1]) is None
            if ids[-1] == eos:
                text = own.decode(ids, skip_special_tokens=True)
                assert regex.fullmatch(" ?(hello|world)+", text), (name, text)


def test_a_tokenizer_is_needed(zoo: Any) -> None:
    for none in (None, object()):
        with pytest.raises(InvalidRequestError, match="needs a fast tokenizer"):
            GrammarCompiler(none, 10, [1]).compile(StructuredOutputsParams(regex="a"))
    own = zoo("metaspace_never")
    with pytest.raises(InvalidRequestError, match=r"does not work with this model's tokenizer: .*Metaspace"):
        GrammarCompiler(own, len(own), [1]).compile(StructuredOutputsParams(regex="a"))


# Compiling


def test_what_is_compiled_is_kept_for_as_long_as_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_CACHED", 3)
    own = GrammarCompiler(tokenizer(), VOCAB_SIZE, EOS)

    def compiled(pattern: str, **options: Any) -> GrammarMatcher:
        return own.compile(StructuredOutputsParams(regex=pattern, **options))

    first = compiled("a")
    assert compiled("a") is first
    for pattern in "bc":
        compiled(pattern)
    assert compiled("a") is first  # and is now the newest
    compiled("d")
    compiled("e")
    assert compiled("a") is first
    for pattern in "fgh":
        compiled(pattern)
    assert compiled("a") is not first
    schema = {"type": "object"}
    both = [StructuredOutputsParams(json=schema, disable_any_whitespace=flag) for flag in (True, False)]
    assert own.compile(both[0]) is not own.compile(both[1])


def test_the_same_grammar_is_compiled_once_however_many_ask() -> None:
    own = GrammarCompiler(tokenizer(), VOCAB_SIZE, EOS)
    calls: list[object] = []
    inner = own._compile
    own._compile = lambda params: (calls.append(params), time.sleep(0.1), inner(params))[2]  # type: ignore[method-assign]
    futures = [own.submit(StructuredOutputsParams(regex="a+")) for _ in range(20)]
    assert len({id(future.result()) for future in futures}) == 1
    assert len(calls) == 1


def test_who_waits_for_a_grammar_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "COMPILE_SECONDS", 0.8)
    own = GrammarCompiler(tokenizer(), VOCAB_SIZE, EOS)
    release = threading.Event()
    inner = own._compile
    slow = StructuredOutputsParams(regex="slow")

    def compile_(params: StructuredOutputsParams) -> GrammarMatcher:
        if params.regex == slow.regex:
            release.wait(10)
        return inner(params)

    own._compile = compile_  # type: ignore[method-assign]

    async def main() -> None:
        waiting = asyncio.create_task(own.wait(slow))
        await own.wait(StructuredOutputsParams(regex="quick"))
        assert not waiting.done()
        with pytest.raises(InvalidRequestError, match=r"regex .* takes more than 1 s to compile"):
            await waiting
        with pytest.raises(InvalidRequestError, match="takes more than"):
            own.compile(slow)
        release.set()
        await own.wait(slow)
        own.compile(slow)

    asyncio.run(main())


BOMBS: dict[str, dict[str, Any]] = {
    "counted repetitions": {"regex": "((a{1,100}){1,100}){1,100}b"},
    "an automaton of 2^n states": {"regex": "(a|b)*a(a|b){40}"},
    "many alternatives": {"choice": [f"{i:x}" * 20 for i in range(20_000)]},
    "a wide schema": {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}},
    "a schema of many patterns": {
        "json": {"anyOf": [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(10, 60)]}
    },
    "forty patterns at once": {
        "json": {"allOf": [{"pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(40)]},
    },
    "references upon references": {
        "json": {
            "$defs": {
                f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]}
                for i in range(30)
            }
            | {"d30": {"type": "string"}},
            "$ref": "#/$defs/d0",
        }
    },
    "an ambiguous grammar": {"grammar": 'start: s\ns: s s | s s s | "a" | \n'},
    "a long list": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 100_000}},
    "a long string": {"json": {"type": "string", "minLength": 1_000_000}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_bounded(name: str) -> None:
    """Compiled or refused within seconds of processor time, and no mask takes long, or fails for good."""
    start = time.process_time()
    try:
        one = compiler().compile(StructuredOutputsParams(**BOMBS[name])).fork()
    except InvalidRequestError:
        one = None
    assert time.process_time() - start < 8
    if one is None:
        return
    rng = random.Random(0)
    slowest = 0.0
    for _ in range(60):
        start = time.process_time()
        tokens = allowed(one)
        slowest = max(slowest, time.process_time() - start)
        if one.accept(rng.choice(tokens)) is not None or one.is_complete:
            break
    assert slowest < 0.5


def pattern(count: int) -> dict[str, Any]:
    """A schema that so many patterns hold for, one within the other."""
    return {"pattern": f"^a{{0,{count}}}$", **({"allOf": [pattern(count - 1)]} if count > 1 else {})}


@pytest.mark.parametrize(
    "schema",
    [
        pattern(13),
        {"properties": {"a": {"items": pattern(13)}}},
        {"allOf": [pattern(6), {"anyOf": [pattern(2), pattern(7)]}]},
        {"allOf": [{"$ref": "#/$defs/a~1b"}, pattern(7)], "$defs": {"a/b": pattern(6)}},
    ],
)
def test_patterns_that_one_string_must_match_are_counted(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="would have to match 13 patterns at once"):
        compiler().compile(StructuredOutputsParams(json=schema))


@pytest.mark.parametrize(
    "constraint",
    [
        {"json": pattern(12)},
        {"json": {"anyOf": [pattern(12), pattern(12)]}},
        {"json": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "properties": {"b": {"pattern": "a"}}}},
        {"grammar": 'start: "' + "&" * 50 + '" /a&b/ "\\"&&"'},
    ],
)
def test_and_those_of_several_are_not(constraint: dict[str, Any]) -> None:
    compiler().compile(StructuredOutputsParams(**constraint))


def test_subschemas_are_found_where_they_stand() -> None:
    schema = {
        "properties": {"a": {"type": "string"}, "b": True},
        "items": [{"type": "null"}],
        "not": {},
        "anyOf": [{"a": 1}],
    }
    assert dict(subschemas(schema)) == {
        "/not": {},
        "/anyOf/0": {"a": 1},
        "/items/0": {"type": "null"},
        "/properties/a": {"type": "string"},
    }
