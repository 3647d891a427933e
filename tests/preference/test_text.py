"""A target given as files leads to the weights that its features, computed plainly, lead to."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.test_cli import run  # noqa: E402, F401

from magmax import MagMaxError  # noqa: E402
from magmax.calibration.samples import read_samples  # noqa: E402
from magmax.preference import from_labels, from_samples, natural_shares  # noqa: E402
from magmax.preference.text_target import read_task_samples  # noqa: E402
from magmax.recipes.recipe import load_recipe  # noqa: E402

WORDS = [f"word{n}" for n in range(30)]
NAMES = ("cars", "ships", "birds")


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def texts(task: int, count: int, seed: int) -> list[tuple[str, str]]:
    """Task t has the labels word(10t) and word(10t + 1), and texts of the words 10t to 10t + 9."""
    draw = np.random.default_rng(seed)
    return [
        (" ".join(f"word{n}" for n in draw.integers(10 * task, 10 * task + 10, 4)), f"word{10 * task + n % 2}")
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base with its tokenizer, three fine-tuned models, their samples, and a target nearest to the second."""
    folder = tmp_path_factory.mktemp("texts")
    vocabulary = {
        word: n
        for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "message", "about", *WORDS])
    }
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder / "base")
        base = load_file(folder / "base" / "model.safetensors")
        for name in NAMES:
            save_file({k: v + 0.02 * torch.randn_like(v) for k, v in base.items()}, folder / f"{name}.safetensors")
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(vocab=vocabulary, do_lower_case=True).save_pretrained(folder / "base")
    for task, name in enumerate(NAMES):
        write_csv(folder / "samples" / f"{name}.csv", texts(task, 12, task))
    write_csv(folder / "target.csv", [*texts(1, 9, 7), *texts(0, 3, 8)])
    return folder


def plain_features(folder: Path, name: str, found: list[str]) -> np.ndarray:
    """The mean of a text's last hidden states, to length 1, one text at a time."""
    model = transformers.BertModel.from_pretrained(folder / "base").eval()
    model.load_state_dict(load_file(folder / f"{name}.safetensors"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    with torch.no_grad():
        means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in found]
    return np.stack([(mean / mean.norm()).numpy() for mean in means])


def words(folder: Path, method: str, *more: str) -> list[str]:
    models = [str(folder / f"{name}.safetensors") for name in NAMES]
    where = [
        "--base",
        str(folder / "base"),
        "--target",
        str(folder / "target.csv"),
        "--samples",
        str(folder / "samples"),
    ]
    return ["tune", *models, *where, "--method", method, *more]


def told(out: str) -> list[float]:
    line = next(line for line in out.splitlines() if line.startswith("from each: "))
    return [float(part.rsplit(" ", 1)[1].rstrip("%")) / 100 for part in line.removeprefix("from each: ").split(", ")]


@pytest.fixture(scope="module")
def pairs(place):
    """The features of each task's samples and of the target's, under the task's own encoder."""
    target = read_samples(place / "target.csv").texts
    return [
        tuple(plain_features(place, name, found) for found in (samples.texts, target))
        for name, samples in zip(NAMES, read_task_samples(place / "samples", NAMES), strict=True)
    ]


@pytest.mark.parametrize("method", ["ot", "cos", "mmd"])
def test_samples_lead_to_the_weights_of_their_plain_features(method, place, pairs, run, tmp_path):  # noqa: F811
    code, out, err = run(*words(place, method, "--out", tmp_path / "out.safetensors"))
    assert code == 0, err
    assert told(out) == pytest.approx(from_samples(pairs, method), abs=2e-3)


def test_features_need_no_labels(place, run, tmp_path):  # noqa: F811
    """In a CSV as a spreadsheet writes it, with a mark of its encoding."""
    found = read_samples(place / "target.csv").texts
    (tmp_path / "target.csv").write_text("\n".join(["text", *found]), encoding="utf-8-sig")
    given = [str(tmp_path / "target.csv") if word.endswith("target.csv") else word for word in words(place, "ot")]
    outs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    results = [run(*some, "--out", out) for some, out in zip((given, words(place, "ot")), outs, strict=True)]
    assert [code for code, _, _ in results] == [0, 0], results
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_labels_are_counted(place, run, tmp_path):  # noqa: F811
    _, out, _ = run(*words(place, "label", "--out", tmp_path / "out.safetensors"))
    assert told(out) == [0.25, 0.75, 0]


def test_counting_labels_takes_no_encoder(place, run, tmp_path):  # noqa: F811
    base = shutil.copy(place / "base" / "model.safetensors", tmp_path / "alone.safetensors")
    given = words(place, "label", "--out", tmp_path / "out.safetensors")
    code, out, err = run(*(base if word == str(place / "base") else word for word in map(str, given)))
    assert code == 0, err
    assert told(out) == [0.25, 0.75, 0]


def test_auto_tells_what_it_tried_and_takes_the_best(place, run, tmp_path):  # noqa: F811
    code, out, err = run(*words(place, "auto", "--out", tmp_path / "out.safetensors"))
    assert code == 0, err
    header, *rows = [line for line in err.splitlines() if "temperature" in line or line.startswith("score")]
    assert header.split() == ["score", "less", "pull", "weights", "candidate"]
    chosen = rows.pop().removeprefix("chosen: ")
    tried = [row.split("  ") for row in rows]
    assert {row[3].split(",")[0] for row in tried} == {"label", "ot", "cos", "mmd", "uniform", "magmax"}
    best = max(float(row[1]) for row in tried)
    assert best - 1e-4 <= float(next(row[1] for row in tried if row[3] == chosen)) <= best
    own = natural_shares(place / "base", [place / f"{name}.safetensors" for name in NAMES])
    assert next(row[2] for row in tried if row[3].startswith("magmax")) == " ".join(f"{share:.3f}" for share in own)
    assert sum(told(out)) == pytest.approx(1, abs=2e-3)


def test_auto_tells_once_what_it_could_not_try(place, run, tmp_path):  # noqa: F811
    write_csv(tmp_path / "target.csv", [(text, "word29") for text, _ in texts(1, 6, 7)])
    given = [str(tmp_path / "target.csv") if word.endswith("target.csv") else word for word in words(place, "auto")]
    code, _, err = run(*given, "--out", tmp_path / "out.safetensors")
    assert code == 0, err
    assert err.count("not tried: ") == err.count("not tried: label (none of the 3 target samples") == 1


def test_a_recipe_may_name_the_target(place, run):  # noqa: F811
    recipe = place / "recipe.yaml"
    recipe.write_text(
        f"base: base\nmodels: [{', '.join(f'{name}.safetensors' for name in NAMES)}]\nrule: tunable\n"
        "target: {data: target.csv, samples: samples, method: label}\nout: from-recipe.safetensors\n"
    )
    assert run("merge", recipe)[0] == 0
    listed = run("merge", recipe, "target=null", "rule={tunable: {preference: [0.25, 0.75, 0]}}", "out=b.safetensors")
    assert listed[0] == 0
    assert (place / "from-recipe.safetensors").read_bytes() == (place / "b.safetensors").read_bytes()
    assert run("search", "sweep", recipe, "scaling_factor=0.5", "--out", place / "swept.safetensors")[0] == 0
    assert (place / "swept-0.5.safetensors").read_bytes() == (place / "b.safetensors").read_bytes()
    with pytest.raises(MagMaxError, match="keep one of the two"):
        load_recipe(str(recipe), ["rule.preference=[1, 2, 3]"]).job()
    with pytest.raises(MagMaxError, match="the rule is magmax"):
        load_recipe(str(recipe), ["rule=magmax"]).job()
    recipe.write_text(recipe.read_text().replace("method", "metod"))
    with pytest.raises(MagMaxError, match="did you mean 'method'"):
        load_recipe(str(recipe))


def test_own_shares_are_the_counts_of_an_argmax(place):
    base = load_file(place / "base" / "model.safetensors")
    moved = [
        torch.cat([(load_file(place / f"{n}.safetensors")[k] - base[k]).abs().reshape(-1) for k in base]) for n in NAMES
    ]
    counts = np.bincount(torch.stack(moved).argmax(0).numpy(), minlength=3)
    shares = natural_shares(place / "base", [place / f"{name}.safetensors" for name in NAMES])
    assert shares == pytest.approx((counts / counts.sum()).tolist(), rel=1e-6)


def test_a_folder_of_texts_is_read_as_a_csv_is(tmp_path):
    for label, name, text in (("a", "1", "one"), ("a", "2", "two"), ("b", "1", "three")):
        (tmp_path / "t" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / label / f"{name}.txt").write_text(text)
    write_csv(tmp_path / "t.csv", [("one", "a"), ("two", "a"), ("three", "b")])
    assert read_samples(tmp_path / "t") == read_samples(tmp_path / "t.csv")
    assert from_labels(read_samples(tmp_path / "t").labels, [{"a"}, {"b"}]) == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\n", "holds no sample"),
        ("text,class\na,b\n", "line 2: needs the columns"),
        ("\0", "needs the columns|cannot be read|no sample"),
    ],
)
def test_files_that_hold_no_samples_are_refused(content, message, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(MagMaxError, match=message):
        read_samples(tmp_path / "t.csv")
    with pytest.raises(MagMaxError, match="cannot be read"):
        read_samples(tmp_path / "nowhere.csv")
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(MagMaxError, match=r"no samples of 'trains' .*did you mean"):
        read_task_samples(tmp_path, ["trains"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prefer", "cars=1"], "tune needs --prefer NAME=WEIGHT"),
        (["--save", "x"], "presets are kept in archives"),
        (["--encoder", "nowhere"], "no folder with an encoder"),
    ],
)
def test_words_that_do_not_go_together_are_refused(more, message, place, run, tmp_path):  # noqa: F811
    code, _, err = run(*words(place, "cos", "--out", tmp_path / "o.safetensors", *more))
    assert (code, message in err) == (2, True)
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(("method", "mismatch"), [("ot", "base"), ("auto", "intersect")])
def test_models_that_differ_from_the_base_are_merged_as_the_recipe_says(method, mismatch, place, run):  # noqa: F811
    one = load_file(place / "cars.safetensors")
    key = "embeddings.word_embeddings.weight"
    more = torch.cat([one[key], torch.full((2, one[key].shape[1]), torch.nan)])
    save_file({**one, key: more}, place / "resized.safetensors")
    for name in NAMES:
        samples = (place / "samples" / f"{name}.csv").read_bytes()
        (place / "resized-samples").mkdir(exist_ok=True)
        (place / "resized-samples" / f"{'resized' if name == 'cars' else name}.csv").write_bytes(samples)
    recipe = place / "mismatch.yaml"
    recipe.write_text(
        f"base: base\nmodels: [{', '.join(f'{name}.safetensors' for name in ('resized', *NAMES[1:]))}]\n"
        f"rule: tunable\nmismatch: {mismatch}\nout: {method}-{mismatch}.safetensors\n"
        f"target: {{data: target.csv, samples: resized-samples, method: {method}}}\n"
    )
    code, _, err = run("merge", recipe)
    assert code == 0, err


def test_own_shares_count_what_is_merged(place):
    base = load_file(place / "base" / "model.safetensors")
    models = [load_file(place / f"{name}.safetensors") for name in NAMES]
    key = "embeddings.word_embeddings.weight"
    models[0][key] = models[0][key][:7].clone()
    models[1][key][20, 0] = torch.nan
    for mismatch, rows in (("base", 0), ("intersect", 7)):
        cut = [{k: t[:rows] if k == key else t for k, t in model.items()} for model in (base, *models)]
        shares = natural_shares(base, models, mismatch=mismatch)
        assert shares == pytest.approx(natural_shares(cut[0], cut[1:]), rel=1e-12)
    for model in (base, models[0]):
        model[key][0, 0] = torch.inf
    with pytest.raises(MagMaxError, match="infinite"):
        natural_shares(base, models, mismatch="intersect")
    assert sum(natural_shares(base, models, mismatch="intersect", allow_nonfinite=True)) == pytest.approx(1)


def test_a_target_needs_no_pooler(place, run, tmp_path):  # noqa: F811
    shutil.copytree(place, tmp_path / "bare")
    files = [tmp_path / "bare/base/model.safetensors", *(tmp_path / "bare" / f"{name}.safetensors" for name in NAMES)]
    for file in files:
        save_file({k: v for k, v in load_file(file).items() if not k.startswith("pooler.")}, file)
    weights = []
    for folder in (place, tmp_path / "bare"):
        code, out, err = run(*words(folder, "ot"), "--out", tmp_path / f"{folder.name}.safetensors")
        assert code == 0, err
        weights.append(told(out))
    assert weights[0] == pytest.approx(weights[1], abs=0.01)
