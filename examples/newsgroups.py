"""Teach a sentence encoder 20 newsgroups, four at a time, and merge what it learned.

    python examples/newsgroups.py            (or: make demo)

Fine-tuning on one task after another forgets the earlier ones. MagMax keeps the weights after every task, and
merges them: each weight takes the change that was largest over all the tasks. Nothing is trained again.

The steps: get the model and the texts, make a classifier of the class names, fine-tune on each task, merge,
compare. Everything downloaded goes to .cache/, everything made to demo/; a second run uses both again.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import cyclopts
import numpy as np
from drawing import picture, table

import magmax
from magmax.continual.data.datasets import MINILM, NEWSGROUP_NAMES, NEWSGROUPS, LabelledExamples, read_newsgroups
from magmax.continual.data.downloads import fetch
from magmax.continual.data.scenarios import class_incremental, shuffled_classes
from magmax.continual.evaluation.accuracy import accuracy_by_task, predict
from magmax.continual.models.heads import zero_shot_head
from magmax.continual.models.text_encoder import TextEncoder
from magmax.continual.progress import BarFactory, bars
from magmax.continual.training.fit import FitSettings
from magmax.continual.training.sequence import TrainingMethod, fine_tune
from magmax.continual.training.weight_files import load_weights

TEMPLATES = ["a message about {}", "a discussion of {}", "a question about {}"]
TEMPERATURE = 20.0  # of the cosine similarities, when they become logits
MAX_TOKENS = 64  # only the beginning of each message is read
TASKS = 5
LEARNING_RATE = 3e-4  # chosen on held-out training texts; the number of steps by the time it takes


def main(*, seed: int = 0, steps: int = 32, test_per_class: int = 60, out: Path = Path("demo")) -> None:
    """Fine-tune all-MiniLM-L6 on five tasks of 20 Newsgroups one after another, and merge with MagMax.

    Parameters
    ----------
    seed
        Draws the order of the classes and of the texts.
    steps
        Fine-tuning steps for each task, of 32 texts each.
    test_per_class
        Test texts of each class to evaluate on (a class has 251 to 399).
    out
        Where the weights, the picture and the numbers go.
    """
    began = time.monotonic()
    with bars() as new_bar:
        # 1. A real encoder and real texts, fetched once. Each text comes as a list of token ids.
        encoder = TextEncoder.load(fetch(MINILM, progress=new_bar("Fetching all-MiniLM-L6")), MAX_TOKENS)
        train, test = read_newsgroups(fetch(NEWSGROUPS, progress=new_bar("Fetching 20 Newsgroups")))
        test = test.sample_per_class(test_per_class, seed)
        train = tokenize(encoder, train, new_bar, "Reading the training texts")
        test = tokenize(encoder, test, new_bar, "Reading the test texts")

        # 2. The classifier: the untrained encoder's features of the class names in sentences. Frozen.
        encoder.freeze_word_embeddings()
        head = zero_shot_head(encoder, list(NEWSGROUP_NAMES.values()), TEMPLATES, TEMPERATURE)

        # 3. Five tasks of four classes, learned one after another. The weights after each are kept.
        tasks = class_incremental(shuffled_classes(len(NEWSGROUP_NAMES), seed), TASKS)
        settings = FitSettings(steps=steps, learning_rate=LEARNING_RATE)
        base, *tuned = fine_tune(encoder, head, train, tasks, TrainingMethod(settings), out, seed=seed, new_bar=new_bar)

        # 4. Merge the weights. This is all that MagMax is.
        average, merged = out / "average.safetensors", out / "magmax.safetensors"
        magmax.merge("average", base=base, models=tuned, out=average)
        magmax.merge("magmax", base=base, models=tuned, out=merged)

        # 5. Compare: every test text is classified among all 20 classes, whatever its task.
        methods = {"zero-shot": base, "last fine-tuned": tuned[-1]}
        methods |= {"plain average": average, "MagMax": merged}
        accuracy: dict[str, list[float]] = {}
        for name, weights in methods.items():
            load_weights(encoder.model, weights)
            found = predict(encoder, head, test.items, progress=new_bar(f"Evaluating: {name}"))
            by_task = accuracy_by_task(found, test.labels, tasks)
            accuracy[name] = [*by_task, float(np.mean(by_task))]

    # 6. Show it, and say how little it proves.
    about = (
        f"20 Newsgroups: {len(train):,} training and {len(test):,} test texts, {MAX_TOKENS} tokens of each. "
        f"all-MiniLM-L6. {TASKS} tasks of 4 classes, {steps} steps of {settings.batch} texts a task. "
        f"Seed {seed}: a single seed proves nothing."
    )
    columns = [*(task.name for task in tasks), "Average"]
    used = {"seed": seed, "max_tokens": MAX_TOKENS, "temperature": TEMPERATURE, "templates": TEMPLATES}
    results = {
        "about": about,
        "settings": used | asdict(settings),
        "classes": {task.name: [list(NEWSGROUP_NAMES)[c] for c in task.classes] for task in tasks},
        "accuracy": {name: dict(zip(columns, row, strict=True)) for name, row in accuracy.items()},
    }
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    picture(out / "accuracy.png", columns, accuracy, about)
    table(columns, accuracy, about)
    print(f"{out / 'accuracy.png'} and {out / 'results.json'} written in {time.monotonic() - began:.0f} s")


def tokenize(encoder: TextEncoder, texts: LabelledExamples, new_bar: BarFactory, title: str) -> LabelledExamples:
    """The same examples, as token ids."""
    return LabelledExamples(encoder.tokenize(texts.items, progress=new_bar(title)), texts.labels)


def write_text(path: Path, text: str) -> None:
    """Writes the file at once and whole, or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    try:
        cyclopts.run(main)
    except magmax.MagMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on after the last finished task")
