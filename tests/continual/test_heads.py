"""The zero-shot head against an independent, naive one; the encoder's features against one text at a time."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from magmax.continual.data.datasets import Dataset, LabelledExamples  # noqa: E402
from magmax.continual.models.heads import nearest_class_mean, prompt_head, zero_shot, zero_shot_head  # noqa: E402
from magmax.continual.models.text_encoder import TextEncoder  # noqa: E402
from magmax.errors import MagMaxError  # noqa: E402

NAMES, TEMPLATES = ["3 14", "15", "9 26 5"], ["{}", "1 {} 2", "{} 7"]


def naive_features(encoder: TextEncoder, text: str) -> np.ndarray:
    ids = encoder.tokenizer([text], truncation=True, max_length=encoder.max_tokens)["input_ids"]
    with torch.no_grad():
        states = encoder.model(input_ids=torch.tensor(ids)).last_hidden_state[0].double().numpy()
    mean = states.mean(axis=0)
    return mean / np.sqrt((mean**2).sum())


def test_features_do_not_depend_on_what_else_is_in_the_batch(encoder: TextEncoder) -> None:
    texts = ["1 2 3 4 5 6", "7", "8 9 10"]
    with torch.no_grad():
        together = encoder(encoder.tokenize(texts)).numpy()
    apart = np.stack([naive_features(encoder, text) for text in texts])
    np.testing.assert_allclose(together, apart, atol=1e-6)


def test_texts_are_cut_and_chunks_do_not_matter(encoder: TextEncoder) -> None:
    texts = [" ".join(map(str, range(n))) for n in (1, 8, 9, 30)]
    ids = encoder.tokenize(texts)
    assert [len(each) for each in ids] == [1, 8, 8, 8]
    assert ids == encoder.tokenize(texts, chunk=1)


def test_the_head_is_the_mean_of_the_templates_with_rows_as_long_as_the_temperature(
    encoder: TextEncoder,
) -> None:
    head = zero_shot_head(encoder, NAMES, TEMPLATES, temperature=20.0)
    expected = []
    for name in NAMES:
        mean = np.mean([naive_features(encoder, template.format(name)) for template in TEMPLATES], axis=0)
        expected.append(20.0 * mean / np.sqrt((mean**2).sum()))
    np.testing.assert_allclose(head.numpy(), np.stack(expected), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(head.numpy(), axis=1), 20.0, rtol=1e-6)
    assert not head.requires_grad


def test_the_model_stays_in_the_mode_it_was_in(encoder: TextEncoder) -> None:
    encoder.model.train()
    zero_shot_head(encoder, NAMES, TEMPLATES, 1.0)
    assert encoder.model.training


@pytest.mark.parametrize("templates", [[], ["{}", "no name in here"]])
def test_a_template_without_the_name(encoder: TextEncoder, templates: list[str]) -> None:
    with pytest.raises(MagMaxError, match="where the class name goes"):
        zero_shot_head(encoder, NAMES, templates, 1.0)


def test_prompts_of_a_data_set_are_its_zero_shot_head(encoder: TextEncoder) -> None:
    """Each class has as many sentences as it likes; templates, where given, come before them."""
    prompts = [["3 14", "1 5"], ["15"], ["9 26 5", "1", "2"]]
    nothing = LabelledExamples([], np.array([], dtype=np.int64))
    dataset = Dataset(nothing, nothing, NAMES, prompts=prompts)
    expected = []
    for own in prompts:
        mean = np.mean([naive_features(encoder, text) for text in own], axis=0)
        expected.append(20.0 * mean / np.sqrt((mean**2).sum()))
    np.testing.assert_allclose(zero_shot(encoder, dataset).numpy(), np.stack(expected), atol=1e-4)
    np.testing.assert_allclose(prompt_head(encoder, prompts, 20.0, batch=2).numpy(), np.stack(expected), atol=1e-4)
    templated = zero_shot(encoder, dataset, TEMPLATES, temperature=7.0)
    np.testing.assert_allclose(templated.numpy(), zero_shot_head(encoder, NAMES, TEMPLATES, 7.0).numpy(), atol=1e-4)
    with pytest.raises(MagMaxError, match=r"the classes \[1\] have none"):
        prompt_head(encoder, [["1"], []], 1.0)


def raw(domains: list[int] | None = None) -> Dataset:
    texts = [" ".join(map(str, range(i % 7, i % 7 + 3))) for i in range(12)]
    labels = np.arange(12) % 3
    data = LabelledExamples(texts, labels, None if domains is None else np.array(domains))
    return Dataset(data, data, NAMES, [] if domains is None else ["p", "q"])


def naive_means(encoder: TextEncoder, data: LabelledExamples) -> np.ndarray:
    features = np.stack([naive_features(encoder, text) for text in data.items])
    means = np.stack([features[data.labels == c].mean(axis=0) for c in range(3)])
    return 20.0 * means / np.linalg.norm(means, axis=1, keepdims=True)


def test_the_nearest_class_mean_is_the_mean_of_unit_features_of_the_training_texts(encoder: TextEncoder) -> None:
    dataset = raw()
    head = nearest_class_mean(encoder, dataset)
    np.testing.assert_allclose(head.numpy(), naive_means(encoder, dataset.train), atol=1e-4)
    assert not head.requires_grad
    few = nearest_class_mean(encoder, dataset, per_class=1, seed=3)
    one = dataset.train.sample_per_class(1, 3)
    np.testing.assert_allclose(few.numpy(), naive_means(encoder, one), atol=1e-4)


def test_a_domain_of_ones_choice_makes_the_head(encoder: TextEncoder) -> None:
    dataset = raw([0] * 6 + [1] * 6)
    first = dataset.train.pick(np.arange(6))
    head = nearest_class_mean(encoder, dataset, domain="p")
    np.testing.assert_allclose(head.numpy(), naive_means(encoder, first), atol=1e-4)
    with pytest.raises(MagMaxError, match=r"no domain 'r' among \['p', 'q'\]"):
        nearest_class_mean(encoder, dataset, domain="r")


def test_a_class_without_training_examples_has_no_mean(encoder: TextEncoder) -> None:
    whole = raw()
    without = whole.train.pick(np.flatnonzero(whole.train.labels != 1))
    with pytest.raises(MagMaxError, match=r"class 1 \(15\) has no training example"):
        nearest_class_mean(encoder, Dataset(without, whole.test, NAMES))
