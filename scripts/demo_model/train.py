"""Train the demo model, tokenizer and all: `python scripts/demo_model/train.py` (pip install -e ".[demo]").

About fifty minutes on two CPU cores. Interrupted, it goes on from its last checkpoint with `--resume`.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import optax
from corpus import Document, documents, long_chats
from export import train_tokenizer, write_model
from network import Parameters, Shape, initial_parameters, logits
from packing import Rows, Tokens, pack, tokenize
from tokenizers import Tokenizer

DEMO = Path(__file__).parents[2] / "jaxllm" / "demo"
VOCAB_SIZE = 1536
# Large batches find the way, small ones make more of the same text: twice the updates.
SHORT_ROW, FIRST_ROWS, LATER_ROWS = 320, 12, 6
FIRST_STEPS = 400
# The last part of training sees longer rows, many of them one long chat.
LONG_ROW, LONG_ROWS = 640, 3
LONG_PART = 0.1


def optimizer(steps: int) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices, Adam for embedding and norms; decays to zero."""
    warm_up = min(40, steps // 10)

    def schedule(peak: float) -> optax.Schedule:
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warm_up),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.0, steps // 2),
            ],
            [warm_up, steps - steps // 2],
        )

    def is_product(path: tuple[jax.tree_util.DictKey, ...], value: jax.Array) -> str:
        return "muon" if value.ndim == 2 and path[0].key == "layers" else "adam"

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {
                "muon": optax.contrib.muon(schedule(0.02), weight_decay=0.05),
                "adam": optax.adam(schedule(4e-3), b1=0.9, b2=0.98),
            },
            lambda parameters: jax.tree_util.tree_map_with_path(is_product, parameters),
        ),
    )


def loss(parameters: Parameters, shape: Shape, rows: Rows) -> jax.Array:
    """Weighted mean cross-entropy of the next token."""
    scores = logits(parameters, shape, rows.ids, rows.positions, rows.segments)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, rows.ids[:, 1:])
    weights = jnp.asarray(rows.weights)[:, 1:]
    return jnp.sum(losses * weights) / jnp.sum(weights)


def batches(
    steps: int, seed: int, tokenize_documents: Callable[[list[Document]], list[Tokens]]
) -> list[Rows]:
    """The batch of every step."""
    long_steps = round(steps * LONG_PART)
    first_steps = min(FIRST_STEPS, steps - long_steps)

    def take(count: int, rows: int, length: int, seed: int) -> list[Rows]:
        taken: list[Rows] = []
        while len(taken) < count:
            made = list(documents(seed, 20_000))
            if length == LONG_ROW:
                made += long_chats(seed, 1_200, exchanges=12)
            Random(seed).shuffle(made)
            taken += islice(pack(tokenize_documents(made), rows, length), count - len(taken))
            seed += 1
        return taken

    return [
        *take(first_steps, FIRST_ROWS, SHORT_ROW, seed + 1),
        *take(steps - long_steps - first_steps, LATER_ROWS, SHORT_ROW, seed + 100),
        *take(long_steps, LONG_ROWS, LONG_ROW, seed + 200),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=DEMO)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/demo_model.pkl"))
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    if arguments.resume:
        first, parameters, state, saved_tokenizer = pickle.loads(arguments.checkpoint.read_bytes())
        tokenizer = Tokenizer.from_str(saved_tokenizer)
    else:
        tokenizer = train_tokenizer([d.text for d in documents(arguments.seed, 8_000)], VOCAB_SIZE)
    shape = Shape(vocab_size=tokenizer.get_vocab_size())
    encode = partial(
        tokenize,
        tokenizer=tokenizer,
        random=Random(arguments.seed),
        max_positions=shape.max_position_embeddings,
    )
    schedule = batches(arguments.steps, arguments.seed, encode)
    transform = optimizer(arguments.steps)
    if not arguments.resume:
        parameters = initial_parameters(shape, arguments.seed)
        first, state = 0, transform.init(parameters)
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    print(f"{size / 1e6:.2f}M parameters, {len(schedule)} steps", flush=True)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Parameters, state: optax.OptState, rows: tuple) -> tuple:
        value, gradient = jax.value_and_grad(loss)(parameters, shape, Rows(*rows))
        update, state = transform.update(gradient, state, parameters)
        return optax.apply_updates(parameters, update), state, value

    started, recent = time.monotonic(), []
    for index in range(first, arguments.steps):
        rows = schedule[index]
        parameters, state, value = step(
            parameters, state, (rows.ids, rows.positions, rows.weights, rows.segments)
        )
        recent.append(value)
        if (index + 1) % 50 == 0 or index + 1 == arguments.steps:
            mean = float(sum(recent) / len(recent))
            recent = []
            print(f"step {index + 1}: loss {mean:.3f}, {time.monotonic() - started:.0f} s", flush=True)
        if (index + 1) % 100 == 0:
            arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            saved = (index + 1, *jax.device_get((parameters, state)), tokenizer.to_str())
            arguments.checkpoint.write_bytes(pickle.dumps(saved))
            write_model(arguments.output, parameters, shape, tokenizer)
    write_model(arguments.output, parameters, shape, tokenizer)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
